"""Runs a command of DVC as a polled process group, and says what DVC said about it. Knows nothing of Prefect.

The group's leader is specflow/supervisor.py, which ends it when the flow asks for that or is itself killed with -9.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from specflow import supervisor

POLL_S = 0.25
END_S = sum(seconds for _, seconds in supervisor.GRACE_S) + 3.0
"""How long the supervisor may take to end a command and all it started."""
RETRYABLE_CODE = 75
"""What a stage exits with for specflow.errors.RetryableError (EX_TEMPFAIL)."""
TAIL_LINES = 200

_SEPARATOR = re.compile(rb"[\r\n]+")
_PROGRESS = re.compile(r"(\d{1,3})%\|")
_HINTS = ("To track the changes with git", "\tgit add ", "To enable auto staging", "\tdvc config ", "Use `dvc push`")
"""What DVC advises after every stage; noise in a log of many."""
_COUNTER = re.compile(r"\[\d+:\d\d(:\d\d)?, .*(/s|s/).*\]$")
"""A bar whose total tqdm does not know: neither a line nor a percentage."""
_FAILED = re.compile(r"^ERROR: failed to reproduce '[^']+': failed to run: .*, exited with (-?\d+)$", re.DOTALL)


class StageStopped(Exception):
    """The command was ended because the flow is being cancelled."""


class StageTimeout(Exception):
    """The command was ended because it ran past its limit; the message is one line."""


@dataclass(frozen=True)
class Finished:
    code: int
    """Exit code of the command itself (255 where DVC failed)."""
    lines: list[str]
    """The last lines it printed, without progress bars."""
    seconds: float


def run_command(
    command: Sequence[str],
    *,
    root: Path,
    environment: Mapping[str, str],
    timeout_s: float | None,
    stop: threading.Event,
    on_line: Callable[[str], None],
    on_progress: Callable[[float, str], None] = lambda percent, text: None,
) -> Finished:
    """Run `command` in `root` until it ends; nothing of it outlives this call, nor the process that called it.

    `on_line` gets each line as it comes, `on_progress` each refresh of a tqdm bar (percent, the bar's text).
    Raises StageTimeout after `timeout_s`, StageStopped once `stop` is set; any exception raised into this thread, as
    Prefect does to cancel, ends the command too.
    """
    started = time.monotonic()
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, str(read_end), *command],
        cwd=root,
        env={**environment, "PYTHONUNBUFFERED": "1"},  # or its lines would come in blocks of 8 KiB
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[read_end],
        start_new_session=True,
    )
    os.close(read_end)
    output = _Output(process, on_line, on_progress)
    try:
        while process.poll() is None:
            output.drain(POLL_S)
            if stop.is_set():
                raise StageStopped("cancelled")
            if timeout_s is not None and time.monotonic() - started > timeout_s:
                raise StageTimeout(f"ran longer than its limit of {timeout_s:g} s (timeout_s) and was ended")
    finally:
        os.close(write_end)  # the supervisor ends what is left
        _wait(process)
        output.close()
    return Finished(process.returncode, list(output.tail), time.monotonic() - started)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:  # the supervisor itself hangs
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Output:
    """Splits what a process prints into lines and refreshes of a progress bar."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        on_line: Callable[[str], None],
        on_progress: Callable[[float, str], None],
    ) -> None:
        assert process.stdout is not None
        self._stream = process.stdout
        self._on_line, self._on_progress = on_line, on_progress
        self._rest = b""
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        os.set_blocking(self._stream.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stream, selectors.EVENT_READ)

    def drain(self, wait_s: float) -> bool:
        """Hand on what is there, waiting at most `wait_s` for it; False at the end of the stream."""
        if not self._selector.select(wait_s):
            return True
        chunk = os.read(self._stream.fileno(), 65536)
        if not chunk:
            time.sleep(wait_s)  # the stream is closed and the process still runs
            return False
        *whole, self._rest = _SEPARATOR.split(self._rest + chunk)
        for line in whole:
            self._hand_on(line)
        return True

    def close(self) -> None:
        """The rest of the stream, as far as it is already there."""
        while self._selector.select(0) and self.drain(0):
            pass
        self._hand_on(self._rest)
        self._selector.close()
        self._stream.close()

    def _hand_on(self, raw: bytes) -> None:
        text = raw.decode("utf-8", errors="replace").rstrip()
        bar = _PROGRESS.search(text)
        if bar is not None:
            self._on_progress(min(100.0, float(bar[1])), text)
        elif text and not text.startswith(_HINTS) and not _COUNTER.search(text):
            self.tail.append(text)
            self._on_line(text)


@dataclass(frozen=True)
class Verdict:
    """What `dvc repro -s` did with a stage."""

    state: Literal["ran", "restored", "cached", "failed"]
    code: int | None = None
    """Exit code of the stage's own command where that failed; None where DVC itself did."""
    message: str = ""
    """Why it failed, in one line: the stage's own last word, or DVC's."""

    @property
    def retryable(self) -> bool:
        return self.code == RETRYABLE_CODE


def read_verdict(finished: Finished) -> Verdict:
    """Parse DVC's output; the only place that knows its wording (3.67)."""
    if finished.code == 0:
        for line in finished.lines:
            if line.startswith("Stage '") and line.endswith("is cached - skipping run, checking out outputs"):
                return Verdict("restored")
            if line.startswith("Stage '") and line.endswith("didn't change, skipping"):
                return Verdict("cached")
        return Verdict("ran")
    failed = next((match for line in reversed(finished.lines) if (match := _FAILED.match(line))), None)
    if failed is None:
        own = [line for line in finished.lines if line.startswith("ERROR: ")] or finished.lines
        return Verdict("failed", None, _last(own) or f"dvc exited with {finished.code}")
    said = [
        line for line in finished.lines if not line.startswith(("ERROR: failed to reproduce", "Running stage", "> "))
    ]
    return Verdict("failed", int(failed[1]), _last(said) or f"exited with {failed[1]} and said nothing")


def _last(lines: list[str]) -> str:
    return " ".join(lines[-1].split())[:500] if lines else ""
