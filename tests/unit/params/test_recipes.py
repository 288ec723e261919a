"""Recipes: each one can be added to this repository's params.yaml, and DVC makes the right stages of the outcome."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from specflow.config import load_params
from specflow.errors import UserError
from specflow.params.recipes import add_recipe, list_recipes
from tests import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    return tmp_path


def specflow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "specflow", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_beside_what_there_is_and_complete_for_dvc(project: Path, recipe: Path) -> None:
    before = (project / "params.yaml").read_text()
    kept = load_params(project / "params.yaml")
    name = next(iter(yaml.safe_load(recipe.read_text())["families"]))
    lines = add_recipe(project / "params.yaml", recipe, accept_terms=True)
    assert f"Added family {name}" in lines[0] and any(f"dvc repro fetch@{name}" in line for line in lines)
    params = load_params(project / "params.yaml")
    assert params.family("smollm2") == kept.family("smollm2") and params.prompt_sets == kept.prompt_sets
    assert (name in params.offline) == ("offline" in recipe.stem) != (name in params.online)
    after = (project / "params.yaml").read_text()
    assert after[: after.index(f"\n  {name}:")].startswith(before[: before.index("offline:")])
    family = params.family(name)
    assert family.target.chat_template is None or (ROOT / family.target.chat_template).is_file()
    assert family.bench.prompt_sets[0] in params.prompt_sets  # MLflow's headline
    big = not family.target.parts[0].startswith("pypi:")
    assert family.allow_cpu != big
    gpu_stages = {"sample", "bench", *(["extract", "train_offline"] if name in params.offline else ["train_online"])}
    assert set(family.resources) == (gpu_stages if big else set())
    assert all(resources.gpus == 1 and resources.gpu_memory_gb <= 78 for resources in family.resources.values())


def test_dvc_makes_the_stages_of_all_recipes_and_the_matrix_follows_the_lists(project: Path) -> None:
    for recipe in RECIPES:
        add_recipe(project / "params.yaml", recipe, accept_terms=True)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=project, check=True)
    listed = subprocess.run(
        [*dvc, "stage", "list", "--all", "--names-only"], cwd=project, check=True, capture_output=True, text=True
    )
    stages = {line.rpartition(":")[2] for line in listed.stdout.split()}
    params = load_params(project / "params.yaml")
    ways = {"offline": ["extract", "train_offline"], "online": ["train_online"]}
    expected = {"report"}
    for way, names in (("offline", params.offline), ("online", params.online)):
        for name in names:
            common = ["inputs", "fetch", "prepare", "sample", "vocab", "export", "bench"]
            expected |= {f"{stage}@{name}" for stage in [*common, *ways[way]]}
    assert len(params.families) == len(RECIPES) + 1 and stages == expected


def test_terms_have_to_be_accepted(project: Path) -> None:
    before = (project / "params.yaml").read_bytes()
    refused = specflow(project, "add-family", "recipes/gemma3-270m-offline.yaml")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not refused.stdout
    assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in refused.stderr
    assert "--accept-terms" in refused.stderr and (project / "params.yaml").read_bytes() == before
    done = specflow(project, "add-family", "recipes/gemma3-270m-offline.yaml", "--accept-terms", "--name", "mine")
    assert done.returncode == 0 and "Gemma Terms of Use" in done.stdout and "specflow plan mine" in done.stdout
    assert load_params(project / "params.yaml").offline == ["smollm2", "mine"]
    again = specflow(project, "add-family", "recipes/gemma3-270m-offline.yaml", "--accept-terms", "--name", "mine")
    assert again.returncode == 2 and "has a family 'mine' already" in again.stderr


def test_recipes_are_listed_with_their_terms(project: Path) -> None:
    lines = specflow(project, "add-family", "--list").stdout.splitlines()
    assert len(lines) == len(RECIPES)
    assert re.fullmatch(r"recipes/qwen3-8b-online.yaml +online +hf:Qwen/Qwen3-8B@main", lines[-1])
    assert any("(Gemma Terms of Use)" in line for line in lines)
    assert specflow(project, "add-family").returncode == 2
    with pytest.raises(UserError, match="no recipes in"):
        list_recipes(project / "nowhere")


def test_a_parameter_that_dvc_needs_and_new_prompt_sets_are_said(project: Path) -> None:
    recipe = project / "recipes" / "qwen3-8b-online.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("    extract:\n      max_length_tokens: 4096\n", "    extract:\n"))
    with pytest.raises(UserError, match=r"lacks extract.max_length_tokens, which stage sample of dvc.yaml depends on"):
        add_recipe(project / "params.yaml", recipe)
    recipe.write_text(text.replace("prompt_sets:\n", "prompt_sets:\n  extra: {source: file:extra.jsonl}\n", 1))
    lines = add_recipe(project / "params.yaml", recipe)
    assert any("Added prompt sets extra: training prompts of every family" in line for line in lines)
