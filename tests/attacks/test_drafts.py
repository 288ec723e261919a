"""Every damaged draft of drafts.py is one line; what is allowed beside them is read as it is."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specflow.bench.job import family_job
from specflow.bench.measuring import _load_draft
from specflow.export.imports import read_draft
from specflow.serving.engines import Install
from specflow.serving.family import launch_for
from tests.attacks.__main__ import draft_fault
from tests.attacks.drafts import CASES, BadDraft, copy_draft, project_with_draft
from tests.captures import TinyProject


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyProject, Path]:
    return project_with_draft(tmp_path_factory.mktemp("drafts"))


@pytest.fixture
def project(sound: tuple[TinyProject, Path]) -> TinyProject:
    return sound[0]


@pytest.fixture
def folder(sound: tuple[TinyProject, Path], tmp_path: Path) -> Path:
    return copy_draft(sound[1], tmp_path / "draft")


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_a_damaged_draft_is_one_line(project: TinyProject, folder: Path, bad: BadDraft) -> None:
    assert draft_fault(bad, project, folder) == ""


def test_what_the_file_need_not_say(project: TinyProject, folder: Path) -> None:
    """Without t2d, or with one of bytes, d2t alone names the tokens; half precision is read."""
    expected = read_draft(folder, project.facts, project.paths.cache)[0]
    tensors = load_file(folder / "model.safetensors")
    for t2d in (None, tensors["t2d"].to(torch.uint8)):
        kept = {name: tensor for name, tensor in tensors.items() if name != "t2d"}
        save_file(kept if t2d is None else kept | {"t2d": t2d}, folder / "model.safetensors")
        assert read_draft(folder, project.facts, project.paths.cache)[0].t2d.equal(expected.t2d)


def test_a_draft_for_fewer_positions_limits_its_server(project: TinyProject, caplog: pytest.LogCaptureFixture) -> None:
    """A draft of 64 positions beside a target of 512: the server takes 64, or what it is told, and says why."""
    file = project.paths.export / "eagle3" / "config.json"
    whole = file.read_text()
    family, install = project.family, Install("vllm", Path("/nowhere"), on_cpu=False, version="9.9")

    def words(**serve: object) -> str:
        changed = family.model_copy(update={"serve": family.serve.model_copy(update=serve)})
        made = launch_for(changed, "tiny", project.paths, engine="vllm", port=1, draft=True, install=install)
        return " ".join(made.argv)

    try:
        assert "--max-model-len" not in words() and not caplog.records
        file.write_text(json.dumps(json.loads(whole) | {"max_position_embeddings": 64, "own_rope": True}))
        with caplog.at_level(logging.WARNING, "specflow"):
            assert "--max-model-len 64" in words()
            assert "made for 64 positions, the target for 512" in caplog.messages[-1]
            assert "--max-model-len 256" in words(max_model_len=256)
            assert "serve.max_model_len 256 drafts badly" in caplog.messages[-1]
            assert "--max-model-len 48" in words(max_model_len=48) and len(caplog.messages) == 2
            job = family_job("tiny", family, project.params, project.paths)
            assert _load_draft(job)[1] == [caplog.messages[-1].removeprefix("bench: ")] and len(caplog.messages) == 3
    finally:
        file.write_text(whole)
