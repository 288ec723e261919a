"""params.yaml: whatever is wrong is one line that names the place and the fix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from specflow.config import load_params, parse_params
from specflow.errors import UserError
from specflow.paths import Paths, project_home
from tests.toys import tiny_params

Change = Callable[[dict[str, Any]], object]


def tiny(raw: dict[str, Any]) -> dict[str, Any]:
    return dict(raw["families"])["tiny"]


CASES: list[tuple[Change, str]] = [
    (lambda raw: raw.update(famlies={}), "unknown parameter 'famlies': did you mean 'families'?"),
    (lambda raw: tiny(raw)["train"].update(tt_steps=3), "'families.tiny.train.tt_steps': did you mean 'ttt_steps'?"),
    (lambda raw: tiny(raw)["target"].update(zzz=3), "unknown parameter 'families.tiny.target.zzz': known here: "),
    (lambda raw: tiny(raw).pop("target"), "missing parameter 'families.tiny.target'"),
    (lambda raw: raw.update(families={}), "families: Dictionary should have at least 1 item"),
    (lambda raw: tiny(raw)["train"].update(lr=0), "families.tiny.train.lr: Input should be greater than 0, got 0"),
    (lambda raw: tiny(raw)["train"].update(lr="fast"), "families.tiny.train.lr: Input should be a valid number"),
    (
        lambda raw: tiny(raw)["bench"].update(repeats=2),
        "families.tiny.bench.repeats: Input should be greater than or equal to 3",
    ),
    (lambda raw: tiny(raw)["data"].update(sources=[]), "families.tiny.data.sources: List should have at least 1 item"),
    (lambda raw: tiny(raw)["data"].update(max_prompt_tokens=256), "data.max_prompt_tokens (256) must be below"),
    (lambda raw: raw.update(offline=["tyni"]), "offline/online name 'tyni', which families lacks; it has ['tiny']"),
    (lambda raw: raw.update(online=["tiny"]), "['tiny'] stand twice in offline and online"),
    (lambda raw: tiny(raw)["bench"].update(prompt_sets=["mt"]), "has 'mt'; known are ['heldout', 'questions']"),
]


@pytest.mark.parametrize("change, message", CASES, ids=[message[:40] for _, message in CASES])
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, change: Change, message: str) -> None:
    raw = copy.deepcopy(tiny_params(tmp_path))
    change(raw)
    with pytest.raises(UserError) as caught:
        parse_params(raw)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_more_problems_are_counted(tmp_path: Path) -> None:
    raw = tiny_params(tmp_path)
    tiny(raw)["train"].update(lr=0, ttt_steps=0)
    with pytest.raises(UserError, match=r"\(and 1 more\)"):
        parse_params(raw)


@pytest.mark.parametrize("text", ["families: [", "\tfamilies: 1"])
def test_broken_yaml(tmp_path: Path, text: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="is not valid YAML") as caught:
        load_params(file)
    assert "\n" not in str(caught.value)


def test_no_file_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no params\.yaml in"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").touch()
    with pytest.raises(UserError):
        load_params(tmp_path / "params.yaml")


def test_params_are_frozen_and_defaults_filled(tmp_path: Path) -> None:
    params = parse_params(tiny_params(tmp_path))
    family = params.family("tiny")
    assert family.train.ttt_decay == 0.8 and family.bench.num_speculative_tokens == "auto"
    with pytest.raises(ValidationError):
        family.train.lr = 1.0
    with pytest.raises(UserError, match=r"unknown family 'x': params\.yaml has \['tiny'\]"):
        params.family("x")


def test_state_outlives_the_copy_of_a_queued_experiment(tmp_path: Path) -> None:
    copied = tmp_path / ".dvc" / "tmp" / "exps" / "tmpabc"
    copied.mkdir(parents=True)
    assert project_home(copied) == tmp_path
    assert Paths(copied, "tiny", tmp_path).state == tmp_path / ".specflow" / "tiny"
    assert Paths(tmp_path, "tiny", tmp_path).state == tmp_path / ".specflow" / "tiny"
    assert Paths(copied, "tiny", tmp_path).draft == copied / "artifacts" / "tiny" / "draft"
