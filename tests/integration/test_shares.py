"""The processes of a stage that is split: one that is killed is started again, none outlives the one that waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import ROOT
from tests.captures import TinyProject, tiny_project, write_split
from tests.toys import WORDS, make_tiny_target

LIMIT_S = 240.0
"""Of one command, on a machine that does other things too."""
# Every process of a project that has this on its path runs it first: share 1 kills itself once, on its third row.
KILL_SHARE_ONCE = """
import os, pathlib, signal, sys
from specflow import files
append, marker = files.RowLog.append, pathlib.Path("killed")
def killing(self, row):
    append(self, row)
    if self.path.name == "sample-train.share-1.jsonl" and len(self.path.read_text().splitlines()) == 3:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
files.RowLog.append = killing
"""
SLOW_ROWS = """
import time
from specflow import files
append = files.RowLog.append
files.RowLog.append = lambda self, row: (append(self, row), time.sleep(60))
"""


def prompts_of(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"c{number}",
            "source": "s",
            "category": "x",
            "messages": [{"role": "user", "content": " ".join(WORDS[number : number + 5])}],
        }
        for number in range(count)
    ]


MakeProject = Callable[..., tuple[TinyProject, dict[str, str]]]


@pytest.fixture
def make_project(tmp_path: Path) -> MakeProject:
    """A project with prompts that the command line can run `sample` in, in two shares, and its environment."""

    def make(name: str, patch: str) -> tuple[TinyProject, dict[str, str]]:
        root = tmp_path / name
        root.mkdir()
        project = tiny_project(root, make_tiny_target(root / "target"))
        write_split(project.paths.prompts, prompts_of(12), [])
        resources = {"sample": {"gpus": 0, "shards": 2}}
        raw = {**project.settings, "cache_dir": str(root / "cache"), "offline": ["tiny"]}
        raw["families"]["tiny"]["resources"] = resources
        (root / "params.yaml").write_text(yaml.safe_dump(raw))
        (root / "path").mkdir()
        (root / "path" / "sitecustomize.py").write_text(patch)
        path = f"{root / 'path'}{os.pathsep}{ROOT}"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        return project, environment

    return make


def start(project: TinyProject, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "specflow", "sample", "tiny"],
        cwd=project.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_killed_share_is_started_again_and_the_result_is_that_of_one_process(make_project: MakeProject) -> None:
    from specflow.sample import stage as sampling

    project, environment = make_project("split", KILL_SHARE_ONCE)
    started = start(project, environment)
    output, _ = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 0, output
    assert "share-1 was killed (-9), starting it again" in output and (project.root / "killed").exists()
    split = (project.paths.samples / "train.jsonl").read_bytes()
    metrics = json.loads(project.paths.metrics("sample").read_text())
    assert metrics["resumed_conversations"] == 12 and metrics["tok_s"] > 0
    project.run(sampling)
    assert (project.paths.samples / "train.jsonl").read_bytes() == split


SHARES = "sample/*/sample-train.share-*.jsonl"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_share_outlives_the_coordinator(make_project: MakeProject, number: signal.Signals) -> None:
    project, environment = make_project("ended", SLOW_ROWS)
    started = start(project, environment)
    deadline = time.monotonic() + LIMIT_S
    while sum(len(log.read_text().splitlines()) > 1 for log in project.paths.state.glob(SHARES)) < 2:
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.1)
    shares = psutil.Process(started.pid).children(recursive=True)
    assert len(shares) == 2
    started.send_signal(number)
    started.communicate(timeout=30)
    _, alive = psutil.wait_procs(shares, timeout=15)
    assert alive == []
    assert started.returncode == (128 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL)


def test_a_mistake_ends_every_share_and_is_said_once_by_the_stage(make_project: MakeProject) -> None:
    project, environment = make_project("wrong", "")
    long = {**prompts_of(1)[0], "id": "long", "messages": [{"role": "user", "content": "river " * 400}]}
    write_split(project.paths.prompts, [*prompts_of(3), long], [])
    started = start(project, environment)
    output, _ = started.communicate(timeout=LIMIT_S)
    assert started.returncode == 2
    assert "prompt of long has" in output and output.rstrip().endswith(
        "specflow: sample@tiny: share-1 ended with exit code 2, its message stands above"
    )
