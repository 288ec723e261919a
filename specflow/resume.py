"""Resumable state: what a killed stage had finished, under a key of all that it depends on, its code included.

One run, one folder `<family state>/<kind>/<key>`: a run with another key (an edit, an upgrade, a sweep's next point)
has a folder of its own. Beside it lie two lock files: `.lock`, which one writer holds at a time, and `.use`, which
everybody at work there shares, so that nothing is removed under a live process.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

import specflow
from specflow.errors import UserError
from specflow.files import KEPT_S, remove_leftovers, sha256_file, sha256_json, write_json
from specflow.locks import Lock

ABOUT = "state.json"
"""In each folder: whose it is, the parts of its key, and whether it is complete."""
REMOVED = ".removed"
"""Behind the key while a state is being removed."""
POLL_S = 0.5
REPEAT_S = 300.0
"""Between two lines that say who is waited for."""
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
"""What a file system without flock says."""

logger = logging.getLogger("specflow")


def code_digest(root: Path, stage: str) -> str:
    """Digest of the code that makes a stage's results: the Python files that dvc.yaml names for it, as imported.

    That is what DVC watches too. The project's dvc.yaml is read, else the one beside the package; where none has the
    stage, as in a benchmark outside a project, the whole package counts. Raises UserError for a dvc.yaml that is no
    YAML.
    """
    package = Path(specflow.__file__).parent
    names = next((found for place in (root, package.parent) if (found := _code_deps(place, stage))), [package.name])
    files: dict[str, Path] = {}
    for name in names:
        path = (package.parent if name.split("/")[0] == package.name else root) / name
        found = [path] if path.suffix == ".py" else path.rglob("*.py")
        files |= {f"{name}/{file.relative_to(path)}": file for file in found if file.is_file()}
    return sha256_json({name: sha256_file(file) for name, file in files.items()})[:16]


def _code_deps(folder: Path, stage: str) -> list[str]:
    path = folder / "dvc.yaml"
    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        deps = [dep for dep in stages[stage]["deps"] if isinstance(dep, str) and "$" not in dep]
    except (FileNotFoundError, KeyError, TypeError):
        return []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML ({' '.join(str(error).split())}): mend it") from None
    return [dep for dep in deps if dep.endswith(".py") or dep.split("/")[0] == Path(specflow.__file__).parent.name]


def versions(*packages: str) -> dict[str, str]:
    """Versions that shape results, without local parts such as +cpu: nodes of one kind may have different builds."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "transformers", *packages)}


class State:
    """The folder of one run, held until `close` or the end of the `with` block."""

    def __init__(self, base: Path, what: str, parts: Mapping[str, Any], *, part: str | None = None) -> None:
        """Open the state of `what` (`stage@family`) below `base`, whose key is the digest of `parts`.

        `parts` are named code, versions, target, inputs and settings: where an interrupted run is there that differs,
        the line that says so names the ones that do. Waits for another process with the same key. With `part`, the name
        of a share, it is one of several writers of the folder, each with files of its own.
        """
        self.key = sha256_json({"what": what, **parts})[:16]
        self.folder = base / self.key
        self.what, self.parts, self._locks = what, json.loads(json.dumps(parts)), list[Lock]()
        base.mkdir(parents=True, exist_ok=True)
        try:
            self._hold(".use", shared=True)
            self._hold(".lock", shared=part is not None)
            if part is not None:
                self._hold(f".{part}.lock", shared=False)
            if not (self.folder / ABOUT).exists():
                if part in (None, "share-0"):
                    self._say_anew()
                write_json(self.folder / ABOUT, {"what": what, "parts": self.parts, "complete": False})
            os.utime(self.folder / ABOUT)
            remove_leftovers(self.folder)
        except BaseException:
            self.close()
            raise
        _remove_old(self.folder)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for lock in reversed(self._locks):
            lock.close()
        self._locks.clear()

    def finish(self, *, keep: bool = False) -> None:
        """The run's outputs are written: forget its state, or with `keep` mark it complete. Ends the hold on it.

        What the same run had left under other code or versions goes too: nobody asks for it any more.
        """
        if keep:
            write_json(self.folder / ABOUT, {"what": self.what, "parts": self.parts, "complete": True})
        self.close()
        if not keep:
            _remove(self.folder, unused=True)
        for other, their in _others(self.folder):
            superseded = set(_differing(self.parts, their["parts"])) <= {"code", "versions"}
            removed = _remove(other) if their["what"] == self.what and superseded else None
            if removed is not None and their["complete"]:
                logger.info("%s: removed what other code had made, %.2f GB: %s", self.what, removed / 1e9, other)

    def _hold(self, suffix: str, *, shared: bool) -> None:
        path = self.folder.with_name(f"{self.key}{suffix}")
        said = -REPEAT_S
        started = time.monotonic()
        while True:
            try:
                lock = Lock.take(path, shared=shared)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning("%s: no locks on the file system of %s: run it once at a time", self.what, path.parent)
                return
            if lock is not None:
                break
            waited = time.monotonic() - started
            if waited > POLL_S and time.monotonic() - said >= REPEAT_S:
                said = time.monotonic()
                logger.info("%s waits: %s is at the same run", self.what, _holder(path))
            time.sleep(POLL_S / 5)
        self._locks.append(lock)
        if suffix != ".use":
            path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")

    def _say_anew(self) -> None:
        """One line where a run that differs in something was interrupted, with what differs; the nearest one counts."""
        theirs = [about for other, about in _others(self.folder) if not about["complete"] and not _in_use(other)]
        found = [_differing(self.parts, about["parts"]) for about in theirs if about["what"] == self.what]
        if found:
            changed = " and ".join(min(found, key=len))
            logger.info(
                "%s starts anew: %s changed since the run that was interrupted (undo that to go on with it)",
                self.what,
                changed,
            )


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep a complete state from being removed while the block reads it."""
    lock = None
    try:
        lock = Lock.take(folder.with_name(f"{folder.name}.use"), wait=True, shared=True)
    except OSError as error:
        if error.errno not in NO_LOCKS | {errno.ENOENT, errno.EACCES, errno.EROFS}:
            raise
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]


def _holder(lock: Path) -> str:
    with suppress(FileNotFoundError):
        return lock.read_text(encoding="utf-8") or "another process"
    return "another process"


def _about(folder: Path) -> dict[str, Any] | None:
    """What a state says of itself; None where it was removed meanwhile."""
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return about
    except (FileNotFoundError, ValueError):
        return None


def _others(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The other states of the kind; without those of an older specflow, which say nothing of themselves."""
    found = [path.parent for path in folder.parent.glob(f"*/{ABOUT}")]
    return [(other, about) for other in found if other != folder and (about := _about(other)) is not None]


def _in_use(folder: Path) -> bool:
    try:
        lock = Lock.take(folder.with_name(f"{folder.name}.use"))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return True  # nobody can tell
    if lock is not None:
        lock.close()
    return lock is None


def _remove_old(mine: Path) -> None:
    """Remove what interrupted runs left that nobody went on with for KEPT_S; complete states stay."""
    for half_removed in mine.parent.glob(f"*{REMOVED}"):
        shutil.rmtree(half_removed, ignore_errors=True)
    for other, about in _others(mine):
        newest = max((stat.st_mtime for stat in _stats(other)), default=time.time())
        if not about["complete"] and time.time() - newest > KEPT_S:
            _remove(other, unused=True)


def _remove(folder: Path, *, unused: bool = False) -> int | None:
    """Remove a state that nobody uses, with its lock files; bytes that were freed, None where it is in use.

    `unused` is the word for that where the file system has no locks.
    """
    lock = None
    try:
        lock = Lock.take(folder.with_name(f"{folder.name}.use"))
        if lock is None:
            return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if not unused:
            return None
    try:
        size = sum(stat.st_size for stat in _stats(folder))
        gone = folder.with_name(f"{folder.name}{REMOVED}")
        with suppress(FileNotFoundError):  # another process was faster
            folder.rename(gone)  # whole or not there
        shutil.rmtree(gone, ignore_errors=True)
        for file in folder.parent.glob(f"{folder.name}.*"):
            file.unlink(missing_ok=True)
        return size
    finally:
        if lock is not None:
            lock.close()


def _stats(folder: Path) -> list[os.stat_result]:
    found = []
    for place, _, files in os.walk(folder):
        for name in files:
            with suppress(FileNotFoundError):
                found.append((Path(place) / name).stat())
    return found
