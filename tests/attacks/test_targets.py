"""Damaged target folders: each ends in its one line at `fetch`, and what is only odd is fetched as it would be loaded.

`python -m tests.attacks` runs them as commands; here the stage's function alone, which raises that line.
"""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml

from specflow.errors import UserError
from specflow.stage import load_project, quieten_transformers
from specflow.targets import fetch, template
from specflow.targets.model import load_embedding, load_lm_head, load_model, read_facts
from tests.attacks.bad_input import BadInput, copy_project
from tests.attacks.targets import CASES
from tests.toys import make_project_inputs, tiny_params


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    make_project_inputs(folder)
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params(folder)), encoding="utf-8")
    return folder


def fetched(folder: Path) -> str:
    """The line that `fetch` ends with; "" where target.json is written."""
    quieten_transformers()
    with chdir(folder):
        try:
            params, paths = load_project(Path("params.yaml"), "tiny")
            fetch.run("tiny", params.family("tiny"), params, paths, lambda values, step: None)
        except UserError as error:
            assert not paths.target.exists()
            return str(error)
        facts = read_facts(paths.target)
        if facts.quantisation is None:  # what training reads is what the loaded target has
            model = load_model(facts, paths.cache)
            assert torch.equal(load_lm_head(facts, paths.cache), model.get_output_embeddings().weight)
            assert torch.equal(load_embedding(facts, paths.cache), model.get_input_embeddings().weight)
            assert facts.num_parameters == sum(weight.numel() for weight in model.parameters())
        return ""


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.name)
def test_a_damaged_target_ends_in_one_line_or_is_fetched(
    bad: BadInput, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "MOST_SECONDS", 0.5)
    folder = copy_project(project, tmp_path / "p")
    bad.damage(folder)
    line = fetched(folder)
    assert bool(line) == bool(bad.words), line
    assert [word for word in bad.words if word.lower() not in line.lower()] == [], line
    assert "\n" not in line
