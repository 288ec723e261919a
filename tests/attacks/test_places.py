"""Every place that is wrong ends in one line; those that only a process of its own meets, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.attacks.bad_input import faults, run_specflow, template_project
from tests.attacks.places import CASES


def test_places_end_in_one_line(tmp_path: Path) -> None:
    found = faults(CASES, template_project(tmp_path / "template"), tmp_path / "scratch")
    assert len(found) == len(CASES)
    assert {case: said for case, said in found.items() if said} == {}


def test_a_project_in_a_folder_that_mlflow_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "what?"
    folder.mkdir()
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    ending = run_specflow(folder, "init")
    assert ending.code == 2 and "?" in ending.line and ending.line.startswith("specflow: MLflow cannot keep its store")
    assert [path.name for path in tmp_path.iterdir()] == ["what?"]


def test_a_project_below_the_root_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    folder = tmp_path / "deep" / "project"
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert run_specflow(folder, "init").code == 0
    root = [sys.executable, "-m", "dvc", "root"]
    assert subprocess.run(root, cwd=folder, check=True, capture_output=True, text=True).stdout.strip() == "."


def test_an_experiment_without_a_git_identity(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    bare = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    bare |= {
        "HOME": str(tmp_path),
        "GIT_CONFIG_NOSYSTEM": "1",
        "XDG_CONFIG_HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "flows.experiment", "--name", "x"]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("specflow: an experiment is a git commit and git has no user.name: run `git config")
