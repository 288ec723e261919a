"""Runs programs that a model wrote, to see whether they are right: in a subprocess with limits, in a folder of its own.

Guards against a model's mistakes (endless loops, memory, files, processes), not against a program that is written to
break out: for that give the benchmark a container or a machine of its own. Nothing runs until `execute_code` is set.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specflow.bench.scoring.sandbox_child import NOBODY
from specflow.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
_POLL_S = 0.005
OUTPUT_BYTES = 2000
"""Of the end of a program's output, kept with its outcome."""
PROBE = "import collections, datetime, decimal, functools, hashlib, heapq, itertools, math, random, re, string, typing"
"""A program that must pass, or all answers would fail."""


@dataclass(frozen=True)
class Limits:
    """Of one program."""

    wall_s: float = 10.0
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    """Address space, the interpreter's own 20 MB included."""
    file_bytes: int = 1 << 20
    """Of any file written, the program's output among them."""
    num_open_files: int = 32

    def rlimits(self) -> dict[str, tuple[int, int]]:
        """(soft, hard) by name of Python's `resource` constants. No process or thread may be started."""
        both = {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.num_open_files,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
        }
        # above the soft limit comes a signal that says why
        return {"RLIMIT_CPU": (self.cpu_s, self.cpu_s + 1), **{name: (value, value) for name, value in both.items()}}


@dataclass(frozen=True)
class Outcome:
    status: Literal["passed", "failed", "timeout"]
    """passed: the program ran to its end. failed: it raised, left early or was killed by a limit."""
    exit_code: int
    """Negative: the signal that ended it."""
    output: str
    """The end of what it printed, stderr included."""
    seconds: float
    granted: dict[str, bool]
    """What the system allowed: `network` cut off, run as another `user`, no `processes`."""


@dataclass(frozen=True)
class Sandbox:
    """How programs are run on this machine."""

    limits: Limits
    drop_user: bool
    granted: dict[str, bool]

    @classmethod
    def open(cls, limits: Limits | None = None) -> Sandbox:
        """Find out what this machine can do. Raises UserError where not even a harmless program runs."""
        limits = limits or Limits()
        if not hasattr(os, "waitid"):
            raise UserError(f"no sandbox for code on {sys.platform}: leave execute_code false, or measure on Linux")
        for drop_user in (True, False):
            outcome = run_program(PROBE, limits, drop_user=drop_user)
            if outcome.status == "passed":
                return cls(limits, drop_user, outcome.granted)
        last = outcome.output.strip().splitlines()[-1:] or [f"exit code {outcome.exit_code}"]
        raise UserError(f"no sandbox for code on this machine ({last[0]}): leave execute_code false")

    def run(self, source: str) -> Outcome:
        return run_program(source, self.limits, drop_user=self.drop_user)

    def describe(self) -> list[str]:
        """What happens to a program here, one sentence each, to be said before the first one runs."""
        limits = self.limits
        said = [
            f"each program runs in a process of its own, at most {limits.wall_s:g} s ({limits.cpu_s} s of CPU), "
            f"{limits.memory_bytes / 2**20:.0f} MiB of memory and {limits.file_bytes / 2**20:g} MiB a file, in an "
            "empty folder that is removed, without our environment"
        ]
        said.append("it has no network" if self.granted["network"] else
                    "this system grants no network of its own: only the interpreter refuses sockets")  # fmt: skip
        said.append("it cannot start processes" if self.granted["processes"] else
                    "the system does not limit its processes: only the interpreter refuses them")  # fmt: skip
        if self.granted["user"]:
            said.append("it runs as nobody")
        else:
            said.append("it runs as our own user and can read what we can: only the interpreter refuses to write")
        return said


def run_program(source: str, limits: Limits, *, drop_user: bool = True) -> Outcome:
    """Run Python `source` to its end or its limits; nothing that it started is left behind."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="sandbox-") as outer, tempfile.TemporaryFile() as report:
        Path(outer).chmod(0o711)  # another user may pass through, not look around
        folder = Path(outer) / "work"
        folder.mkdir(mode=0o700)
        if os.geteuid() == 0 and drop_user:
            os.chown(folder, NOBODY, NOBODY)
        task = {
            "source": source,
            "secret": secret,
            "limits": limits.rlimits(),
            "drop_user": drop_user,
            "folder": str(folder),
        }
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as given:
            given.write(json.dumps(task).encode())
            given.seek(0)
            began = time.perf_counter()
            exit_code, timed_out = _wait(folder, given.fileno(), output.fileno(), report.fileno(), limits.wall_s)
            seconds = time.perf_counter() - began
            output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_BYTES))
            printed = output.read().decode("utf-8", errors="replace")
        report.seek(0)
        granted, _, end = report.read(4096).decode("utf-8", errors="replace").partition("\n")
    if timed_out or exit_code == -signal.SIGXCPU:
        status: Literal["passed", "failed", "timeout"] = "timeout"
    else:
        status = "passed" if end == secret and exit_code == 0 else "failed"
    nothing = dict.fromkeys(("network", "user", "processes"), False)
    return Outcome(status, exit_code, printed, seconds, json.loads(granted) if granted else nothing)


def _wait(folder: Path, task: int, output: int, report: int, wall_s: float) -> tuple[int, bool]:
    """(exit code, whether it had to be stopped); `task`, `output` and `report` are open files."""
    # -I: neither our environment nor the folder is searched for modules; -S: no installed packages; -B: no .pyc files
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(CHILD), str(report)],
        cwd=folder,
        env={"LC_ALL": "C.UTF-8", "HOME": str(folder), "TMPDIR": str(folder)},
        stdin=task,
        stdout=output,
        stderr=output,
        pass_fds=(report,),
        start_new_session=True,
    )
    deadline, ended = time.monotonic() + wall_s, False
    try:
        while not ended and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            # not reaped yet: its number, which is its session's too, stays taken until the session was killed
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, not ended
