"""A boundary that the kernel holds around this process, for good: Landlock for what it may read, seccomp for all else.

Unprivileged, and the same for root. Afterwards the process may compute, read Python's own files and use the files that
are open already. It cannot open anything for writing, read other files, start a process or a thread, send a signal or
open a socket: those system calls are not on the list. Standard library only: sandbox_child.py runs without packages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
"""System calls, of the same number on all machines; the C library has no names for them."""
FS_READ_FILE, FS_READ_DIR = 1 << 2, 1 << 3
FS_ALL = (1 << 13) - 1
"""Of Landlock's first version: execute, write, read, list, remove, make. Whatever came later is no call on the list."""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_GET_SECCOMP = 1, 38, 21
SIGKILL = 9
ACT_ALLOW, ACT_EPERM = 0x7FFF0000, 0x00050000 | errno.EPERM
CMP_EQ, CMP_MASKED_EQ = 4, 7
READABLE = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo",
    "/dev/null", "/dev/urandom",
)  # fmt: skip
"""Besides Python's standard library: what its extension modules load and read."""
CALLS = (
    "access", "brk", "clock_getres", "clock_gettime", "clock_nanosleep", "close", "dup", "exit", "exit_group",
    "faccessat", "faccessat2", "fstat", "futex", "getcwd", "getdents64", "getegid", "geteuid", "getgid", "getpid",
    "getppid", "getrandom", "getrusage", "gettid", "gettimeofday", "getuid", "lseek", "lstat", "madvise", "mmap",
    "mprotect", "mremap", "munmap", "nanosleep", "newfstatat", "pread64", "read", "readlink", "readlinkat", "readv",
    "restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
    "sigaltstack", "stat", "statx", "sysinfo", "time", "times", "uname", "write", "writev",
)  # fmt: skip
"""System calls that are allowed whatever their arguments."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_TMPFILE", 0) & ~os.O_DIRECTORY
IOCTLS = (0x5401, 0x5450, 0x5451)
"""TCGETS, FIONCLEX, FIOCLEX: is it a terminal, and inheritance of descriptors."""
FCNTLS = (0, 1, 2, 3, 4, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; not F_SETOWN, by which the kernel sends signals."""


def missing() -> str | None:
    """What this machine lacks for the boundary, and the cure; None where it has all. Changes nothing."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return f"it needs 64-bit Linux, and this is {platform.system()} {platform.machine()}: measure there"
    version = _libc().syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return (
            f"the kernel {platform.release()} grants no Landlock ({os.strerror(ctypes.get_errno())}): use Linux 5.13 "
            "or newer with landlock among its security modules (boot option lsm=landlock,...); in a container, a "
            "runtime whose profile allows it"
        )
    if _libc().prctl(PR_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return f"the kernel {platform.release()} has no seccomp: use one with CONFIG_SECCOMP_FILTER"
    try:
        _seccomp()
    except OSError:
        return "libseccomp is not installed: install the system's package (libseccomp2 on Debian, libseccomp on Fedora)"
    return None


def confine() -> None:
    """Shut this process in. Raises OSError where the kernel refuses, or where it turns out not to hold."""
    libc, seccomp = _libc(), _seccomp()
    _checked(libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "prctl")  # nothing outlives the benchmark
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _restrict_reading(libc)
    _restrict_calls(seccomp)
    _verify()


def readable() -> list[Path]:
    """Files and folders that a confined process may read."""
    places = [*READABLE, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
    return [Path(place) for place in dict.fromkeys(places) if Path(place).exists()]


def _restrict_reading(libc: ctypes.CDLL) -> None:
    handled = ctypes.c_uint64(FS_ALL)
    rules = _checked(
        libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(8), ctypes.c_uint(0)), "landlock"
    )
    for place in readable():
        descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
        rights = FS_READ_FILE | (FS_READ_DIR if place.is_dir() else 0)
        rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)  # packed: u64, s32
        _checked(libc.syscall(LANDLOCK_ADD_RULE, rules, 1, rule, ctypes.c_uint(0)), "landlock")
        os.close(descriptor)
    _checked(libc.syscall(LANDLOCK_RESTRICT_SELF, rules, ctypes.c_uint(0)), "landlock")
    os.close(rules)


class _Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp."""

    _fields_ = [
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    ]


def _restrict_calls(seccomp: ctypes.CDLL) -> None:
    """Allow what is listed; everything else fails with EPERM, so that Python says what was refused."""
    context = ctypes.c_void_p(seccomp.seccomp_init(ctypes.c_uint32(ACT_EPERM)))

    def allow(call: str, *comparisons: _Comparison) -> None:
        number = seccomp.seccomp_syscall_resolve_name(call.encode())
        if number >= 0:  # older calls do not exist on newer machines
            array = (_Comparison * len(comparisons))(*comparisons)
            rule = (context, ctypes.c_uint32(ACT_ALLOW), number, len(comparisons), array)
            _checked(seccomp.seccomp_rule_add_array(*rule), "seccomp")

    for call in CALLS:
        allow(call)
    allow("open", _Comparison(1, CMP_MASKED_EQ, WRITING, 0))
    allow("openat", _Comparison(2, CMP_MASKED_EQ, WRITING, 0))
    allow("prlimit64", _Comparison(0, CMP_EQ, 0, 0), _Comparison(2, CMP_EQ, 0, 0))  # looking at our own limits only
    for request in IOCTLS:
        allow("ioctl", _Comparison(1, CMP_EQ, request, 0))
    for command in FCNTLS:
        allow("fcntl", _Comparison(1, CMP_EQ, command, 0))
    _checked(seccomp.seccomp_load(context), "seccomp")
    seccomp.seccomp_release(context)


def _verify() -> None:
    """Try what must fail: a boundary that does not hold must not be taken for one."""
    import _socket

    attempts: dict[str, Callable[[], object]] = {
        "reads its own memory": lambda: os.open("/proc/self/mem", os.O_RDONLY),
        "opens a file for writing": lambda: os.open("/dev/null", os.O_WRONLY),
        "forks": lambda: os.fork() or os._exit(0),
        "has sockets": lambda: _socket.socket(_socket.AF_UNIX),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        raise OSError(errno.EPERM, f"the boundary does not hold: a confined process {what}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _seccomp() -> ctypes.CDLL:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _checked(value: int, what: str) -> int:
    if value < 0:
        number = -value if what == "seccomp" else ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return value
