"""The command runner of the flows: lines, bars, limits, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import runner
from tests import ROOT

FAMILY_OF_SLEEPERS = """
import os, pathlib, subprocess, sys, time
code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(300)"
subprocess.Popen([sys.executable, "-c", code, "child.pid"])
subprocess.Popen([sys.executable, "-c", code, "own_session.pid"], start_new_session=True)
pathlib.Path("parent.pid").write_text(str(os.getpid()))
print("started", flush=True)
time.sleep(300)
"""


def run(folder: Path, code: str, **changes: Any) -> runner.Finished:
    settings: dict[str, Any] = {"timeout_s": None, "stop": threading.Event(), "on_line": lambda line: None, **changes}
    return runner.run_command([sys.executable, "-c", code], root=folder, environment=os.environ, **settings)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def alive(folder: Path) -> list[str]:
    """Names of the sleepers whose process still runs."""
    found = []
    for file in folder.glob("*.pid"):
        stat = Path("/proc") / file.read_text(encoding="utf-8") / "stat"
        if stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z":
            found.append(file.stem)
    return found


def test_lines_come_live_and_bars_are_no_lines(tmp_path: Path) -> None:
    code = (
        "import sys, time; from tqdm import tqdm; print('first')\n"
        "for _ in tqdm(range(4), mininterval=0): time.sleep(0.01)\n"
        "for _ in tqdm(iter([1]), mininterval=0, unit='row'): pass\n"
        "print('\\u00fc', end=''); sys.exit(3)"
    )
    lines: list[str] = []
    bars: list[float] = []
    finished = run(tmp_path, code, on_line=lines.append, on_progress=lambda percent, text: bars.append(percent))
    assert finished.code == 3
    assert lines == finished.lines == ["first", "ü"]
    assert bars[0] == 0.0 and bars[-1] == 100.0 and bars == sorted(bars)


def test_a_timeout_ends_the_whole_family(tmp_path: Path) -> None:
    with pytest.raises(runner.StageTimeout, match="limit of 2 s"):
        run(tmp_path, FAMILY_OF_SLEEPERS, timeout_s=2.0)
    assert (tmp_path / "own_session.pid").exists()
    assert alive(tmp_path) == []


def test_stop_ends_the_whole_family(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Thread(target=lambda: wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 3) and stop.set()).start()
    with pytest.raises(runner.StageStopped):
        run(tmp_path, FAMILY_OF_SLEEPERS, stop=stop)
    assert alive(tmp_path) == []


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    left = FAMILY_OF_SLEEPERS.replace("time.sleep(300)\n", "") + "time.sleep(1)"
    assert run(tmp_path, left).code == 0
    assert (tmp_path / "own_session.pid").exists()
    assert alive(tmp_path) == []


def test_kill_9_of_the_caller_ends_the_family(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading; from pathlib import Path; from flows.runner import run_command\n"
        "run_command([sys.executable, '-c', sys.argv[1]], root=Path(), environment=os.environ, timeout_s=None,"
        " stop=threading.Event(), on_line=print)"
    )
    caller = subprocess.Popen(
        [sys.executable, "-c", code, FAMILY_OF_SLEEPERS], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert wait_for(lambda: len(alive(tmp_path)) == 3)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert wait_for(lambda: alive(tmp_path) == [])


def test_a_command_that_ignores_sigint_gets_the_next_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = tmp_path / "supervisor.py"
    source = Path(runner.supervisor.__file__).read_text(encoding="utf-8")
    assert "15.0" in source
    short.write_text(source.replace("15.0", "0.5").replace("5.0)", "0.5)"), encoding="utf-8")
    monkeypatch.setattr(runner.supervisor, "__file__", str(short))
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    with pytest.raises(runner.StageTimeout):
        run(tmp_path, deaf + FAMILY_OF_SLEEPERS, timeout_s=2.0)
    assert alive(tmp_path) == []
