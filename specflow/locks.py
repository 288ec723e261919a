"""A flock that ends with its process: the kernel frees what a killed process held."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import ClassVar


class Lock:
    """A flock on an open file. Closed in forked children, which would otherwise keep it after the holder's death."""

    _open: ClassVar[set[Lock]] = set()
    """All of this process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor: int | None = descriptor
        Lock._open.add(self)

    @staticmethod
    def take(path: Path, *, wait: bool = False, shared: bool = False, create: bool = True) -> Lock | None:
        """Lock `path`; None where somebody else has it and `wait` is off. Raises FileNotFoundError without `create`."""
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            descriptor = _open_for_all(path) if create else os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            lock = Lock(descriptor)
            try:
                fcntl.flock(descriptor, kind)
                if os.fstat(descriptor).st_nlink:
                    return lock
            except BlockingIOError:
                lock.close()
                return None
            except BaseException:
                lock.close()
                raise
            lock.close()  # removed between opening and locking: others lock a new file of this name

    def close(self) -> None:
        """Free the lock; in a forked child, whose copy is closed already, do nothing."""
        # first: a signal's exception must not lead to a second close
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
            Lock._open.discard(self)

    @staticmethod
    def close_in_child() -> None:
        for lock in list(Lock._open):
            lock.close()  # without LOCK_UN, which would free the parent's too


os.register_at_fork(after_in_child=Lock.close_in_child)


def _open_for_all(path: Path) -> int:
    """Open a lock file that other users may lock too, made where it is missing.

    Never O_CREAT on what exists: in a sticky folder the kernel refuses that for another user's file
    (fs.protected_regular).
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(descriptor, 0o666)  # whatever the umask
            return descriptor
