"""Edits of params.yaml: exactly the asked characters change, and nothing is written unless the outcome is valid."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from specflow.config import load_params
from specflow.errors import UserError
from specflow.params.file import add_family, set_params
from tests import ROOT

MINIMAL = """\
# head
offline:
  - a   # listed
  # more to come
online: []
prompt_sets: {q: {source: "file:q.jsonl"}}  # questions

families:   # all of them
  a:
    target: {source: file:t, dtype: float32}   # the target
    data:
      sources:
      - source: file:d   # data
        format: 'auto'
      # how many
      train_conversations: 10
      eval_conversations: 2
    bench:
      prompt_sets: [q,
                    heldout]
      sweep:
        - 1
        - 2
    extract:
      aux_layer_ids:   # the default
# tail
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return Path(shutil.copy(ROOT / "params.yaml", tmp_path))


def changed(before: str, after: str) -> list[str]:
    """Lines taken out (-) and put in (+)."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


CASES: list[tuple[str, Any, list[str]]] = [
    (
        "families.a.data.train_conversations",
        7,
        ["-      train_conversations: 10", "+      train_conversations: 7"],
    ),
    (
        "families.a.target.dtype",
        "bfloat16",
        [
            "-    target: {source: file:t, dtype: float32}   # the target",
            "+    target: {source: file:t, dtype: bfloat16}   # the target",
        ],
    ),
    ("families.a.data.sources.0.format", "prompt", ["-        format: 'auto'", "+        format: 'prompt'"]),
    ("families.a.data.seed", 3, ["+      seed: 3"]),
    ("families.a.train.lr", 2e-5, ["+    train: {lr: 2.0e-05}"]),
    (
        "families.a.extract.aux_layer_ids",
        [1, 2],
        ["-      aux_layer_ids:   # the default", "+      aux_layer_ids: [1, 2]   # the default"],
    ),
    ("families.a.bench.sweep", [2, 3], ["-      sweep:", "-        - 1", "-        - 2", "+      sweep: [2, 3]"]),
    ("families.a.bench.sweep.1", 5, ["-        - 2", "+        - 5"]),
    (
        "families.a.bench.prompt_sets",
        ["q"],
        ["-      prompt_sets: [q,", "-                    heldout]", "+      prompt_sets: [q]"],
    ),
    ("offline", [], ["-offline:", "-  - a   # listed", "+offline: []"]),
    ("cache_dir", "~/elsewhere", ["+cache_dir: ~/elsewhere"]),
]


@pytest.mark.parametrize("key, value, expected", CASES, ids=[case[0] for case in CASES])
def test_one_value_changes_and_no_other_character(file: Path, key: str, value: Any, expected: list[str]) -> None:
    set_params(file, {key: value})
    assert changed(MINIMAL, file.read_text()) == expected
    got: Any = yaml.safe_load(file.read_text())
    for part in key.split("."):
        got = got[int(part)] if isinstance(got, list) else got[part]
    assert got == value


def test_several_values_at_once_and_setting_them_back_gives_the_same_bytes(real: Path) -> None:
    before = real.read_bytes()
    train = load_params(real).family("smollm2").train
    overrides = {
        "families.smollm2.train.lr": 2e-4,
        "families.smollm2.train.betas": [0.9, 0.99],
        "offline": [],
        "online": ["smollm2"],
    }
    set_params(real, overrides)
    params = load_params(real)
    assert (params.offline, params.online, params.family("smollm2").train.lr) == ([], ["smollm2"], 2e-4)
    assert params.family("smollm2").train.model_copy(update={"lr": train.lr, "betas": train.betas}) == train
    set_params(real, {"families.smollm2.train.betas": [0.9, 0.95], "offline": ["smollm2"], "online": []})
    assert changed(before.decode(), real.read_text()) == ["-      lr: 3.0e-4", "+      lr: 0.0002"]


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("families.a.train.lrr", 1, "unknown parameter 'families.a.train.lrr': did you mean 'lr'?"),
        ("famlies.a.train.lr", 1, "unknown parameter 'famlies': did you mean 'families'?"),
        ("families.b.train.lr", 1, "unknown family 'b' in 'families.b.train.lr'"),
        ("families.a.train.lr", -1, "families.a.train.lr: Input should be greater than 0, got -1"),
        ("families.a.data.seed.x", 1, "families.a.data.seed: Input should be a valid integer"),
        ("families.a.data.train_conversations.x", 1, "train_conversations holds the value 10"),
        ("families.a.data.sources.1.format", "auto", "'1' is no position in a list of 1"),
        ("offline", ["c"], "offline/online name 'c', which families lacks"),
    ],
)
def test_a_bad_override_is_one_line_and_leaves_the_file(file: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        set_params(file, {"families.a.train.epochs": 9, key: value})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert file.read_text() == MINIMAL and [path.name for path in file.parent.iterdir()] == ["params.yaml"]


def test_a_layout_that_cannot_be_edited_is_refused(file: Path) -> None:
    text = MINIMAL.replace("sweep:", "sweep: &two").replace("        - 2", "        - 1")
    text = text.replace("    extract:", "    train:\n      betas: *two\n    extract:")
    file.write_text(text)
    load_params(file)
    with pytest.raises(UserError, match="cannot be edited safely"):
        set_params(file, {"families.a.train.betas": [0.5, 0.5]})
    assert file.read_text() == text


def test_windows_line_ends_and_mode_stay(file: Path) -> None:
    file.write_bytes(MINIMAL.replace("\n", "\r\n").encode())
    file.chmod(0o640)
    set_params(file, {"families.a.data.seed": 3})
    assert file.read_bytes().count(b"\r\n") == file.read_bytes().count(b"\n") == MINIMAL.count("\n") + 1
    assert file.stat().st_mode & 0o777 == 0o640


RECIPE = """\
# why this family
terms: {name: Some terms, url: "https://example.org"}
online: [new]
prompt_sets:
  q: {source: file:another.jsonl}
  # more questions
  r: {source: file:r.jsonl} # from somewhere
families:
  # A family.
  # Two lines.
  new:
    target: {source: file:u} # its target
    data:
      sources: [{source: file:d}]
      train_conversations: 1

      eval_conversations: 1
    bench:
      # which
      prompt_sets: [r]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_a_family_is_put_in_and_the_rest_stays(real: Path, recipe: Path) -> None:
    before = real.read_text()
    add_family(real, recipe)
    after = real.read_text()
    assert changed(before, after) == [
        "+  q: {source: file:another.jsonl}",
        "+  # more questions",
        "+  r: {source: file:r.jsonl} # from somewhere",
        "-online: []",
        "+online: [new]",
        "+",
        *(f"+{line}" for line in RECIPE[RECIPE.index("  # A family.") :].splitlines()),
    ]
    params, block = load_params(real), yaml.safe_load(RECIPE)["families"]["new"]
    assert params.online == ["new"] and params.offline == ["smollm2"]
    assert yaml.safe_load(after)["families"]["new"] == block


def test_under_another_name_into_another_layout_and_twice(file: Path, recipe: Path) -> None:
    """Deeper indentation, lists in blocks, prompt sets in one line (comments are lost there), one set known already."""
    text = MINIMAL.replace("online: []", "online:\n  []")
    file.write_text(text)
    add_family(file, recipe, name="mine")
    add_family(file, recipe, name="mine-too")
    after, params = file.read_text(), load_params(file)
    assert params.online == ["mine", "mine-too"] and set(params.families) == {"a", "mine", "mine-too"}
    assert params.prompt_sets["q"].source == "file:q.jsonl", "a set of the same name stays the user's"
    assert params.prompt_sets["r"].source == "file:r.jsonl" and "  # questions\n" in after
    assert params.family("mine") == params.family("mine-too")
    assert [line for line in changed(text, after) if line[0] == "-"] == [
        "-  []",
        '-prompt_sets: {q: {source: "file:q.jsonl"}}  # questions',
    ]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("  new:", "  a:", "must list its family 'a' in either offline or online, once"),
        ("online: [new]", "online: [new]\noffline: [new]", "either offline or online, once"),
        ("online: [new]", "", "either offline or online, once"),
        ("terms:", "licence:", "has ['licence']: a recipe holds families"),
        ("url:", "link:", "terms must be a mapping of name and url"),
        ("eval_conversations: 1", "eval_conversations: 1\n      sed: 1", "did you mean 'seed'?"),
        ("[r]", "[s]", "families.new.bench.prompt_sets has 's'"),
        ("families:", "families:\n  other: {}", "must hold exactly one family"),
        ("data:", "data: [", "is not valid YAML"),
        (RECIPE, "just text", "must be a mapping"),
    ],
)
def test_a_bad_recipe_is_one_line_and_leaves_the_file(
    file: Path, recipe: Path, old: str, new: str, message: str
) -> None:
    recipe.write_text(RECIPE.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        add_family(file, recipe)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert file.read_text() == MINIMAL


def test_names_that_are_taken_or_that_dvc_cannot_address(file: Path, recipe: Path) -> None:
    for name, message in (("a", "has a family 'a' already"), ("llama-3.1", "a dot as a level"), ("x/y", "use letters")):
        with pytest.raises(UserError, match=message):
            add_family(file, recipe, name=name)
    with pytest.raises(UserError, match="no recipe"):
        add_family(file, recipe.with_name("nothing.yaml"))
    assert file.read_text() == MINIMAL
