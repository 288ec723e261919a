"""Under real `dvc repro`: an edit of code changes the result, an interrupted run says why it starts anew, and a stage
does not outlive the dvc that started it. The project runs its own copy of the code.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load

from specflow import inputs
from specflow.config import parse_params
from specflow.data import vocab
from specflow.files import sha256_file
from specflow.paths import Paths
from specflow.targets import fetch
from tests.captures import write_split
from tests.integration.test_shares import LIMIT_S, prompts_of
from tests.projects import Project, make_project
from tests.toys import tiny_params
from tests.unit.extract.test_stage import make_samples

DRAFT = "artifacts/tiny/draft/model.safetensors"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Fetched, with prompts, samples and a vocabulary that no stage of DVC made."""
    raw = tiny_params(tmp_path)
    raw["families"]["tiny"]["train"]["checkpoints"] = 8
    made = make_project(tmp_path, raw)
    made.environment |= {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    params, paths = parse_params(raw), Paths(tmp_path, "tiny", tmp_path / "cache")
    args = ("tiny", params.family("tiny"), params, paths, lambda values, step: None)
    fetch.run(*args)
    inputs.write(inputs.of_family(params.family("tiny"), params, paths), paths)
    write_split(paths.prompts, prompts_of(12), [])
    write_split(paths.samples, make_samples(20), make_samples(6, prefix="e"))
    vocab.run(*args)
    return made


def edit(project: Project, file: str, old: str, new: str) -> None:
    path = project.folder / "specflow" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def shards(project: Project) -> dict[str, str]:
    manifest = project.json("artifacts/tiny/hidden_states.json")
    folder = project.folder / "artifacts/tiny" / manifest["folder"]
    return {shard["file"]: sha256_file(folder / shard["file"]) for shard in manifest["shards"]}


def first_shard(project: Project) -> dict[str, torch.Tensor]:
    folder = project.folder / "artifacts/tiny" / project.json("artifacts/tiny/hidden_states.json")["folder"]
    return load((folder / "shard-00000.safetensors").read_bytes())


def test_an_edit_of_the_code_changes_the_result(project: Project) -> None:
    state, logits = project.folder / ".specflow/tiny", "logits = matmul(states, compute_head.t()).float()"
    project.run("dvc", "repro", "-s", "extract@tiny", "train_offline@tiny")
    draft, before = sha256_file(project.folder / DRAFT), shards(project)
    assert list((state / "checkpoints").iterdir()) == []  # a finished run keeps none

    kill = "        import os, signal\n        os.kill(os.getpid(), signal.SIGKILL)\n\n    def load("
    edit(project, "training/checkpoint.py", "    def load(", kill)
    assert "train_offline: " in project.run("dvc", "repro", "-s", "train_offline@tiny", code=255)
    assert len(list((state / "checkpoints").glob("*/last.pt"))) == 1
    edit(project, "training/checkpoint.py", kill, "    def load(")
    edit(project, "training/losses.py", logits, f"{logits} * 0.25")
    said = project.run("dvc", "repro", "-s", "train_offline@tiny")
    assert "train_offline@tiny starts anew: code changed since the run that was interrupted" in said
    assert sha256_file(project.folder / DRAFT) != draft
    assert list((state / "checkpoints").iterdir()) == []  # nor what the older code had left

    unedited = first_shard(project)
    edit(project, "extract/capture.py", "        last = packed(final)", "        last = packed(final) * 3")
    said = project.run("dvc", "repro", "-s", "extract@tiny")
    after = shards(project)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())
    assert "extract@tiny: removed what other code had made" in said
    assert len(list((state / "hidden_states").glob("*/state.json"))) == 1
    assert torch.equal(first_shard(project)["final"], 3 * unedited["final"])


def test_a_stage_ends_with_its_dvc_and_the_next_one_goes_on(project: Project) -> None:
    edit(
        project, "files.py", "        self._stream.flush()\n", "        self._stream.flush()\n        time.sleep(0.5)\n"
    )
    command, logs = ["dvc", "repro", "-s", "sample@tiny"], project.folder / ".specflow/tiny/sample"
    options = {"cwd": project.folder, "env": project.environment, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, **options, stderr=subprocess.STDOUT) as dvc:
        deadline = time.monotonic() + LIMIT_S
        while sum(len(log.read_bytes().splitlines()) > 3 for log in logs.glob("*/*.jsonl")) == 0:
            assert time.monotonic() < deadline and dvc.poll() is None
            time.sleep(0.05)
        started = psutil.Process(dvc.pid).children(recursive=True)
        dvc.kill()
    assert started and any("sample" in process.cmdline() for process in started)
    project.run(*command)
    assert psutil.wait_procs(started, timeout=20)[1] == []
    metrics = project.json("artifacts/tiny/metrics/sample.json")
    assert 3 <= metrics["resumed_conversations"] < metrics["rows"] == 12
    lines = (project.folder / "artifacts/tiny/samples/train.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 12
    assert list(logs.glob("*/")) == []
