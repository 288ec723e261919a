"""The process that a program of the model's runs in. Started by sandbox.py as a script; the standard library only.

Takes {source, secret, limits, drop_user, folder} from stdin and the number of an open file for its report as argument.
The report's first line says what the system granted; a second one, the secret, that the program ran to its end.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import sys
from types import CodeType
from typing import Any

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_NO_NEW_PRIVS = 38
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DENIED = (
    "_posixsubprocess.", "_thread.start", "ctypes.", "fcntl.", "ftplib.", "http.", "mmap.", "os.chflags", "os.exec",
    "os.fork", "os.kill", "os.lockf", "os.posix_spawn", "os.putenv", "os.spawn", "os.startfile", "os.system", "pty.",
    "resource.", "signal.", "smtplib.", "socket.", "subprocess.", "syslog.", "urllib.", "webbrowser.",
)  # fmt: skip
"""Beginnings of the names of events (the table of audit events in Python's documentation) that no answer needs."""
CHANGING = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.setxattr", "os.symlink",
    "os.truncate", "os.utime", "os.mkfifo", "os.mknod", "shutil.", "tempfile.",
)  # fmt: skip
MOST_FILES = 64
"""Opened for writing: with the limit on each one's size this bounds what a program can fill a disk with."""
COMMON = (
    "array", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime", "decimal", "enum",
    "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math", "numbers", "operator", "queue",
    "random", "re", "statistics", "string", "textwrap", "time", "types", "typing",
)  # fmt: skip
"""Modules that answers import. Loaded before the user changes, who may not reach the interpreter's files."""
REFUSED = ("ctypes", "_ctypes", "_posixsubprocess", "_socket", "multiprocessing")


def restrict(limits: dict[str, list[int]], drop_user: bool) -> dict[str, bool]:
    """Take rights from this process for good; returns what the system granted: no network, another user, no processes.

    A user namespace of its own is what an ordinary user needs to be allowed a network of its own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    granted = {"network": False, "user": False, "processes": False}
    root = os.geteuid() == 0
    if hasattr(libc, "unshare"):
        granted["network"] = libc.unshare(CLONE_NEWNET if root else CLONE_NEWUSER | CLONE_NEWNET) == 0
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if root and drop_user:
        for name in COMMON:
            importlib.import_module(name)
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            granted["user"] = True
        except OSError:
            pass
    for name, (soft, hard) in limits.items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    granted["processes"] = _cannot_fork()
    return granted


def _cannot_fork() -> bool:
    """Whether the limit on processes holds: it does not bind root."""
    try:
        child = os.fork()
    except OSError:
        return True
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return False


def guard(folder: str) -> None:
    """Refuse, inside the interpreter, what an answer has no business with: processes, sockets, writing elsewhere.

    A second line behind the system's limits. Code that sets out to break it can; a model's mistake does not.
    """
    inside = os.path.realpath(folder) + os.sep

    def elsewhere(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return False
        return not (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(inside)

    opened = 0

    def check(event: str, args: tuple[Any, ...]) -> None:
        nonlocal opened
        if event == "open":
            path, mode, flags = args
            writes = bool(set(mode or "") & set("wax+")) or bool((flags or 0) & WRITING)
            opened += writes
            if opened > MOST_FILES:
                raise PermissionError(f"the sandbox allows {MOST_FILES} files to be written")
            if writes and elsewhere(path) and path != os.devnull:
                raise PermissionError(f"the sandbox allows no writing outside its folder: {path!r}")
        elif event == "import":
            if args[0].partition(".")[0] in REFUSED:
                raise PermissionError(f"the sandbox has no module {args[0]}")
        elif event.startswith(CHANGING):
            if any(elsewhere(arg) for arg in args if isinstance(arg, str | bytes | os.PathLike)):
                raise PermissionError(f"the sandbox allows no {event} outside its folder")
        elif event.startswith(DENIED):
            raise PermissionError(f"the sandbox allows no {event}")

    sys.addaudithook(check)


def main() -> None:
    report = int(sys.argv[1])
    task = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    granted = restrict(task["limits"], task["drop_user"])
    os.write(report, json.dumps(granted).encode() + b"\n")
    code: CodeType = compile(task["source"], "answer.py", "exec", dont_inherit=True)
    guard(task["folder"])
    exec(code, {"__name__": "__main__"})
    os.write(report, task["secret"].encode())


if __name__ == "__main__":
    main()
