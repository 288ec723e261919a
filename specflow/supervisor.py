"""Runs one command and ends all of it when told to, or when the process that started it is gone.

Standard library only, started as a script by flows/runner.py: `supervisor.py FD COMMAND...`, leader of its own process
group. FD is the read end of a pipe; its other end is held open by the flow and never written to. When that end closes,
because the flow asked for it or was killed with -9, the command's group gets SIGINT, then SIGTERM, then SIGKILL.
Processes that left the group are found too: the supervisor adopts orphans (PR_SET_CHILD_SUBREAPER, Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType

GRACE_S = ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0))
"""Signals in order and how long each is given. Together below the 30 s after which Prefect kills a cancelled flow."""
POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36
PROC = Path("/proc")


def main() -> int:
    """Exit code of the command; 128 + signal where a signal ended it, as shells say it."""
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    # A handler, not SIG_IGN: exec resets handlers in the child, but would pass SIG_IGN on to it.
    for received in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(received, _stay)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.set_inheritable(pipe, False)
    # Python ignores SIGPIPE and exec would pass that on.
    child = os.posix_spawnp(command[0], command, os.environ, setsigdef=[signal.SIGPIPE])
    code: int | None = None
    while code is None:
        readable, _, _ = select.select([pipe], [], [], POLL_S)
        code = _reap(child)
        if readable and code is None:
            return _end_all(child) or 0
    _end_all(child, GRACE_S[1:])  # what it left in the background; shells let that ignore SIGINT
    return code


def _stay(_signal: int, _frame: FrameType | None) -> None:
    pass


def _reap(child: int) -> int | None:
    """Collect whatever has ended, adopted orphans too; the exit code of `child` once it is among them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == child:
                status = os.waitstatus_to_exitcode(ended[1])
                code = status if status >= 0 else 128 - status
    return code


def _end_all(child: int, signals: tuple[tuple[signal.Signals, float], ...] = GRACE_S) -> int | None:
    """End every descendant, politely first; the exit code of `child` where it was still running."""
    code = None
    if not PROC.is_dir():  # not Linux: only the group is known
        os.killpg(0, signal.SIGTERM)
        return _reap(child)
    for to_send, grace_s in signals:
        deadline = time.monotonic() + grace_s
        for process in _descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, to_send)
        while time.monotonic() < deadline:
            ended = _reap(child)
            code = code if ended is None else ended
            if not _descendants():
                return code
            time.sleep(POLL_S)
    return code


def _descendants() -> list[int]:
    """Ids of the live processes below this one."""
    parents = {}
    for entry in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(entry.parent.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {process for process, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


if __name__ == "__main__":
    sys.exit(main())
