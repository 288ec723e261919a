"""Files in which an engine hands out states: the folder it writes them to, and waiting until one is whole.

Beside each file lies `<file>.lock`, which the engine's connector holds locked until it has written the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
WAIT_S = 0.002


def scratch_prefix(store: Path) -> str:
    """How the scratch folders of what fills `store` begin."""
    return f"specflow-{hashlib.sha256(str(store.resolve()).encode()).hexdigest()[:12]}-"


def roomy(needed_bytes: int, otherwise: Path) -> Path:
    """Shared memory where that has room for twice `needed_bytes`, else `otherwise`."""
    shared = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2 * needed_bytes
    return SHARED_MEMORY if shared else otherwise


@contextlib.contextmanager
def scratch_folder(store: Path, base: Path) -> Iterator[Path]:
    """A folder of our own in `base` for the engine's files, empty when it begins and gone when it ends.

    What a killed process for the same store left there is removed, which another share's live folder must not be: it
    is locked.
    """
    prefix = scratch_prefix(store)
    for left in base.glob(f"{prefix}*"):
        with _locked(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    with _locked(folder) as ours:
        assert ours, "a fresh folder is nobody else's"
        try:
            yield folder.resolve()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; False where it is somebody else's folder or lock, or gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield os.fstat(handle).st_uid == os.getuid()
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def wait_until_written(path: Path, timeout_s: float) -> None:
    """Return once the writer of `path` has let go of its lock, which then is gone.

    Raises TimeoutError where it does not, another OSError where there is no lock.
    """
    lock, deadline = path.with_name(f"{path.name}.lock"), time.monotonic() + timeout_s
    with lock.open("rb") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path} is still being written") from None
            time.sleep(WAIT_S)
    lock.unlink()
