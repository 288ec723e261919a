"""Two families of different architectures side by side: one joins a project that has run, by `dvc repro` alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from specflow.params.file import set_params
from tests.projects import Project, make_project
from tests.toys import CHATML, make_tiny_gemma, tiny_params

COMMON = {"fetch", "prepare", "sample", "vocab", "export", "bench"}


def stages(name: str, *, way: str) -> set[str]:
    trained = {"offline": {"extract", "train_offline"}, "online": {"train_online"}}[way]
    return {f"{stage}@{name}" for stage in COMMON | trained}


def write_recipe(folder: Path) -> None:
    """A recipe for a tiny Gemma 3 with a template file of its own, trained on the fly."""
    family = tiny_params(folder)["families"]["tiny"]
    family["target"] = {"source": f"file:{folder / 'gemma'}", "chat_template": "gemma.jinja"}
    family["bench"]["prompt_sets"] = ["heldout"]
    (folder / "gemma.jinja").write_text(CHATML, encoding="utf-8")
    recipe = {"online": ["gemma"], "families": {"gemma": family}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project whose one family has run."""
    folder = tmp_path_factory.mktemp("families")
    make_tiny_gemma(folder / "gemma")
    write_recipe(folder)
    made = make_project(folder, tiny_params(folder))
    assert set(made.repro()) == {*stages("tiny", way="offline"), "report"}
    yield made


def test_an_added_family_runs_and_the_other_does_not_run_again(project: Project) -> None:
    project.run("specflow", "add-family", "recipe.yaml")
    assert set(project.repro()) == {*stages("gemma", way="online"), "report"}
    facts = project.json("artifacts/gemma/target.json")
    assert (facts["architecture"], facts["hidden_act"]) == ("Gemma3ForCausalLM", "gelu_pytorch_tanh")
    draft = project.json("artifacts/gemma/export/eagle3/config.json")
    assert draft["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}  # the full layers'
    assert (draft["hidden_act"], draft["head_dim"], draft["num_key_value_heads"]) == ("silu", 16, 1)
    for name in ("tiny", "gemma"):
        for result in project.json(f"artifacts/{name}/bench/summary.json")["sets"].values():
            assert result["lossless"] is True
            assert result["acceptance_length"] == pytest.approx(1 + sum(result["survival"]))
    report = (project.folder / "report/report.md").read_text(encoding="utf-8")
    assert "tiny" in report and "gemma" in report
    assert project.repro() == []


def test_a_parameter_of_one_family_runs_that_family_alone(project: Project) -> None:
    set_params(project.folder / "params.yaml", {"families.gemma.train.lr": 2e-3})
    assert set(project.repro()) == {"train_online@gemma", "export@gemma", "bench@gemma", "report"}
    set_params(project.folder / "params.yaml", {"families.tiny.bench.max_new_tokens": 6})
    assert set(project.repro()) == {"bench@tiny", "report"}


def test_a_template_changed_behind_the_back_of_fetch_is_refused(project: Project) -> None:
    (project.folder / "gemma.jinja").write_text(CHATML.replace("\n", " "), encoding="utf-8")
    said = project.run("specflow", "prepare", "gemma", code=2)
    assert "changed since it was fetched: run `dvc repro`" in said
