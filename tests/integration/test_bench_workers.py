"""`specflow bench --output` as processes: workers that share the questions, and a benchmark killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.bench_project import make_bench_project, without_times

OPTIONS = ["--num-prompts", "2", "--max-new-tokens", "8", "--no-references", "-k", "2"]
SAMPLING = ["--temperature", "1", "--num-samples", "2"]
# Every process that has this on its path runs it first: one dies by SIGKILL at its fifth record, once.
DIE_ONCE = """
import os, pathlib, signal
from specflow import files
append, marker = files.RowLog.append, pathlib.Path(__file__).with_name("killed")
def killing(self, row):
    append(self, row)
    if sum('"engine"' in line for line in self.path.read_text().splitlines()) >= 5 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
files.RowLog.append = killing
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bench_project(tmp_path_factory.mktemp("bench"))[1].root


def specflow(project: Path, *words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*([path] if path else []), ROOT]))
    command = [sys.executable, "-m", "specflow", "bench", "tiny", *words]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "summary.json").read_text())


def test_workers_make_the_records_of_one_and_a_killed_run_resumes(project: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, *SAMPLING]
    alone = specflow(project, "--output", str(tmp_path / "alone"), *options)
    assert alone.returncode == 0, alone.stderr
    rows, summary = results(tmp_path / "alone")
    assert summary["conditions"]["shared_cpu"] is False
    assert len(rows) == (2 * 2 + 2) * 2 * 2 * 3  # turns of both sets, samples, engines, repeats

    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "sitecustomize.py").write_text(DIE_ONCE)
    together = specflow(project, "--output", str(tmp_path / "workers"), "--workers", "2", *options, path=bad)
    assert together.returncode == 0, together.stderr
    assert (bad / "killed").exists() and "was killed (-9), starting it again" in together.stderr
    shared, found = results(tmp_path / "workers")
    assert without_times(shared) == without_times(rows)
    # whether these few records of two workers overlap in time is up to the machine
    said = "several workers measured on one CPU at the same time" in found["verdict"]
    assert said is found["conditions"]["shared_cpu"]
    assert found["verdict"].startswith("No conclusion") or not said
    assert found["verdict"] in together.stdout
    assert sorted(file.name for file in (tmp_path / "workers").iterdir()) == [
        "job.json",
        "records.jsonl",
        "summary.json",
    ]

    (bad / "killed").unlink()
    killed = specflow(project, "--output", str(tmp_path / "killed"), *options, path=bad)
    assert killed.returncode == -signal.SIGKILL
    log = next((tmp_path / "killed" / "state").glob("bench/*/bench.jsonl")).read_text().splitlines()
    kept = [row for row in map(json.loads, log[1:]) if "engine" in row]
    assert len(kept) == 5 and not (tmp_path / "killed" / "records.jsonl").exists()
    other = specflow(project, "--output", str(tmp_path / "killed"), "--resume", *OPTIONS)
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "was made with other settings (bench.temperature 1.0 -> 0.0; bench.num_samples 2 -> 1)" in other.stderr
    resumed = specflow(project, "--output", str(tmp_path / "killed"), "--resume", *options)
    assert resumed.returncode == 0, resumed.stderr
    again, _ = results(tmp_path / "killed")
    assert without_times(again) == without_times(rows)
    assert all(row in again for row in kept)  # what was measured before the kill, times included
