"""The command line: what it prints, what it returns, what it does not import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from specflow import files
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.stage import check_listed
from tests.measurements import make_records, make_summary

HEAVY = ("torch", "transformers", "mlflow", "dvc", "datasets", "altair", "vl_convert", "numpy", "pydantic")


def specflow(*arguments: str, code: int = 2) -> str:
    """Output of the command; stderr's for an error, which must be one line without a traceback."""
    done = subprocess.run([sys.executable, "-m", "specflow", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    if code == 2:
        assert done.stderr.startswith("specflow: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr
    return done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, specflow.cli; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "train_offline" in specflow("--help", code=0)


def test_outside_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["fetch", "tiny"], ["report"], ["results"], ["init"], ["mlflow-sync"]):
        assert "no params.yaml" in specflow(*command)


def test_unknown_family_stage_and_option(project: Path) -> None:
    assert "unknown family 'tny': params.yaml has ['tiny']" in specflow("fetch", "tny")
    assert "No such command 'fetsh'" in specflow("fetsh", "tiny")
    assert "No such option" in specflow("fetch", "tiny", "--colour")
    assert "Missing argument 'FAMILY'" in specflow("bench")


def test_misspelt_parameter(project: Path) -> None:
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["families"]["tiny"]["train"]["learning_rat"] = 1
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    assert "families.tiny.train.learning_rat" in specflow("fetch", "tiny")


def test_a_family_trains_one_way(project: Path) -> None:
    assert "run train_offline" in specflow("train_online", "tiny")
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["offline"], raw["online"] = [], ["tiny"]
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    assert "run train_online" in specflow("train_offline", "tiny")
    assert "run train_online" in specflow("extract", "tiny")
    raw["online"] = []
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    assert "neither offline nor online" in specflow("fetch", "tiny")


def test_stages_that_both_kinds_share_are_allowed(params: object) -> None:
    for stage in ("fetch", "prepare", "sample", "vocab", "extract", "train_offline", "export", "bench"):
        check_listed(stage, "tiny", params)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="run train_offline"):
        check_listed("train_online", "tiny", params)  # type: ignore[arg-type]


def test_init_outside_git(project: Path) -> None:
    assert "not in a git repository" in specflow("init")


def test_init_twice_changes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["git", "init", "--quiet"], check=True)
    first = specflow("init", code=0)
    config = Path(".dvc/config").read_text()
    assert "analytics = false" in config and "check_update = false" in config and "autostage = false" in config
    assert "experiments tiny" in first and Path("mlflow.db").exists()
    assert specflow("init", code=0) == first
    assert Path(".dvc/config").read_text() == config


def test_results(project: Path, paths: Paths) -> None:
    assert "no results yet" in specflow("results")
    summary = make_summary(make_records())
    files.write_json(paths.bench / "summary.json", summary.to_json())
    table = specflow("results", code=0)
    row = next(line for line in table.splitlines() if line.startswith("human_eval"))
    of_set = summary.sets["human_eval"]
    assert of_set.acceptance_length and of_set.speedup_ci
    numbers = [of_set.acceptance_length, *of_set.survival]
    speeds = [f"{of_set.tok_s:.1f}", f"{of_set.baseline_tok_s:.1f}", f"{of_set.speedup:.2f}x"]
    low, high = of_set.speedup_ci
    interval = [f"[{low:.2f},", f"{high:.2f}]"]
    assert row.split() == ["human_eval", *(f"{value:.2f}" for value in numbers), *speeds, *interval, "yes"]
    assert summary.verdict in table and "mlflow ui" in table


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_unwind(project: Path, number: signal.Signals, code: int) -> None:
    """A stage that is stopped leaves through its finally blocks, with the shell's exit code for the signal."""
    program = (
        "import sys, time, types, pathlib, specflow.stage, specflow.cli\n"
        "def run_stage(*_, **__):\n"
        "    try:\n"
        "        pathlib.Path('ready').touch(); time.sleep(30)\n"
        "    finally:\n"
        "        pathlib.Path('cleaned').touch()\n"
        "specflow.stage.run_stage = run_stage\n"
        "sys.argv = ['specflow', 'fetch', 'tiny']\n"
        "specflow.cli.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not Path("ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == code
    assert Path("cleaned").exists()
