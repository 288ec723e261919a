"""Runs programs that a model wrote, to see whether they are right, within a boundary that the kernel holds.

An answer runs in a process that can compute and nothing else (confinement.py), and its tests run in a second one
(sandbox_child.py): what the answer does to its own process cannot make it pass. Where the kernel grants no boundary
nothing runs at all, and nothing does until `execute_code` is set.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specflow.bench.scoring.confinement import missing
from specflow.data.prompt_sets import Program
from specflow.errors import UserError

CHILD = "specflow.bench.scoring.sandbox_child"
ROOT = Path(__file__).parents[3]
PROBE = Program(
    "",
    "def check(candidate):\n    assert candidate([3, 1, 2]) == [1, 2, 3]",
    "probe",
)
PROBE_ANSWER = (
    "import collections, datetime, decimal, functools, hashlib, heapq, itertools, math, random, re, string, typing\n"
    "def probe(numbers):\n    return sorted(numbers)\n"
)
"""An answer that must pass, or all would fail."""


@dataclass(frozen=True)
class Limits:
    """Of one answer; the memory and the CPU time of its tests' process are limited in the same way."""

    wall_s: float = 10.0
    """Of both processes, their start included."""
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    """Address space, the interpreter's own 20 MB included."""
    num_open_files: int = 32

    def rlimits(self) -> dict[str, tuple[int, int]]:
        """(soft, hard) by name of Python's `resource` constants."""
        hard = {"RLIMIT_AS": self.memory_bytes, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": self.num_open_files}
        both = {name: (value, value) for name, value in {**hard, "RLIMIT_CORE": 0}.items()}
        return {"RLIMIT_CPU": (self.cpu_s, self.cpu_s + 1), **both}  # above the soft one comes a signal that says why


@dataclass(frozen=True)
class Outcome:
    status: Literal["passed", "failed", "timeout"]
    """passed: the tests ran to their end and none failed. timeout: the limit on wall or CPU time."""
    detail: str
    """Why it failed, one line; empty where it passed."""
    seconds: float


@dataclass(frozen=True)
class Sandbox:
    """How answers are run on this machine."""

    limits: Limits

    @classmethod
    def open(cls, limits: Limits | None = None) -> Sandbox:
        """Raises UserError where the kernel grants no boundary, or where not even a right answer passes."""
        refused = "execute_code runs programs that the model wrote, and no boundary can be put around them here: "
        if lack := missing():
            raise UserError(f"{refused}{lack}; or leave the set out of accuracy")
        sandbox = cls(limits or Limits())
        outcome = sandbox.run(PROBE_ANSWER, PROBE)
        if outcome.status != "passed":
            raise UserError(
                f"{refused}a harmless program ended with {outcome.status} ({outcome.detail}); leave the set out of "
                "accuracy, or measure on another machine"
            )
        return sandbox

    def run(self, source: str, program: Program) -> Outcome:
        """Hold an answer's `source` against the tests of `program`. Raises UserError where the boundary fails."""
        began = time.perf_counter()
        task = {"source": source, "prompt": program.prompt, "test": program.test, "entry_point": program.entry_point}
        try:
            said, answer_code, judge_code = self._judge(json.dumps(task).encode())
        except subprocess.TimeoutExpired:
            return Outcome("timeout", f"after {self.limits.wall_s:g} s", time.perf_counter() - began)
        seconds = time.perf_counter() - began
        if -signal.SIGXCPU in (answer_code, judge_code):
            return Outcome("timeout", f"after {self.limits.cpu_s} s of CPU time", seconds)
        verdict = json.loads(said or b'{"status": "failed", "detail": "the tests\' process ended early"}')
        if verdict["status"] == "unconfined":
            raise UserError(f"the boundary around programs that the model wrote fails: {verdict['detail']}")
        return Outcome(verdict["status"], verdict["detail"], seconds)

    def _judge(self, task: bytes) -> tuple[bytes, int, int]:
        """What the judge's process wrote, and exit codes of the answer's and of the judge's (negative: a signal)."""
        calls, results = os.pipe(), os.pipe()
        try:
            answer = self._start("program", stdin=calls[0], stdout=results[1])
            try:
                kept = (calls[1], results[0])
                judge = self._start("judge", *map(str, kept), pass_fds=kept)
            except BaseException:
                _end(answer)
                raise
        finally:
            for descriptor in (*calls, *results):  # ours; each side then notices the end of the other
                os.close(descriptor)
        try:
            said, _ = judge.communicate(task, timeout=self.limits.wall_s)
        finally:
            _end(judge)
            _end(answer)
        return said, answer.returncode, judge.returncode

    def _start(
        self, role: str, *pipes: str, stdin: int = subprocess.PIPE, stdout: int = subprocess.PIPE,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        # -P -s -S: no module of the folder or of installed packages; -B: no .pyc files. Nothing of our environment
        return subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-m", CHILD, role, json.dumps(self.limits.rlimits()), *pipes],
            cwd="/",
            env={"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            pass_fds=pass_fds,
        )

    def describe(self) -> list[str]:
        """What happens to an answer here, one sentence each, to be said before the first one runs."""
        limits = self.limits
        return [
            f"each runs in a process of its own, at most {limits.wall_s:g} s ({limits.cpu_s} s of CPU) and "
            f"{limits.memory_bytes / 2**20:.0f} MiB of memory, without our environment",
            "the kernel (Landlock, seccomp) lets it read Python's own files, and neither write, nor start processes or "
            "threads, nor reach a network",
            "its tests run in another process",
        ]


def _end(process: subprocess.Popen[bytes]) -> None:
    """It cannot have started others. One that has ended already keeps the exit code that it had."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
