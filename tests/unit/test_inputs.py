"""What stages read from outside is in DVC's view by content: every kind of it, replaced under its name, is noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.graph import changed_stages
from specflow import inputs
from specflow.config import parse_params
from specflow.errors import UserError
from specflow.paths import Paths
from tests import ROOT
from tests.toys import tiny_params

Edit = Callable[[Path], object]


def append(file: str) -> Edit:
    return lambda folder: (folder / file).write_text((folder / file).read_text() + " ")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parameters of a project in the current folder that names a file of every kind; none is a real one."""
    monkeypatch.chdir(tmp_path)
    for name in ("target/model.safetensors", "target/config.json", "data/a.jsonl", "data/deep/b.jsonl", "one.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("template.jinja", "questions.jsonl", "other.jsonl", "draft/model.safetensors", "small/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    raw = tiny_params(tmp_path)
    raw["prompt_sets"] = {"questions": {"source": "file:questions.jsonl"}, "other": {"source": "file:other.jsonl"}}
    tiny = raw["families"]["tiny"]
    tiny["target"] = {"source": "file:target", "chat_template": "template.jinja"}
    tiny["data"]["sources"] = [{"source": "file:data"}, {"source": "file:one.json"}]
    tiny["train"]["init_from"] = "draft"
    tiny["bench"]["assistant"] = "small"
    return raw


def refresh(raw: dict[str, Any]) -> list[str]:
    params = parse_params(raw)
    paths = Paths(Path(), "tiny", Path("cache"))
    return inputs.write(inputs.of_family(params.family("tiny"), params, paths), paths)


@pytest.mark.parametrize(
    ("edit", "stages"),
    [
        (append("target/model.safetensors"), ["fetch"]),
        (append("target/config.json"), ["fetch"]),
        (append("template.jinja"), ["fetch"]),
        (append("one.json"), ["fetch", "prepare"]),
        (append("data/deep/b.jsonl"), ["fetch", "prepare"]),
        (lambda folder: (folder / "data" / "c.jsonl").touch(), ["fetch", "prepare"]),
        (lambda folder: (folder / "data" / "a.jsonl").unlink(), ["fetch", "prepare"]),
        (append("questions.jsonl"), ["fetch", "prepare", "bench"]),
        (append("other.jsonl"), ["fetch", "prepare"]),  # no set of this family's benchmark
        (append("draft/model.safetensors"), ["train"]),
        (append("small/config.json"), ["bench"]),
        (lambda folder: (folder / "target" / "README.md").touch(), []),
        (lambda folder: (folder / "data" / ".cache").touch(), []),
        (lambda folder: (folder / "one.json").touch(), []),  # another time, the same content
    ],
)
def test_a_change_is_in_the_view_of_the_stages_that_it_can_change(
    outside: dict[str, Any], tmp_path: Path, edit: Edit, stages: list[str]
) -> None:
    assert len(refresh(outside)) == 6
    assert refresh(outside) == []
    edit(tmp_path)
    assert refresh(outside) == stages


def test_a_stage_stops_at_a_file_that_changed_since(outside: dict[str, Any], tmp_path: Path) -> None:
    params, paths = parse_params(outside), Paths(Path(), "tiny", Path("cache"))
    family = params.family("tiny")
    refresh(outside)
    append("one.json")(tmp_path)
    append("draft/model.safetensors")(tmp_path)
    for stage in ("sample", "extract", "bench"):
        inputs.check_unchanged(stage, family, params, paths)
    with pytest.raises(UserError, match=r"^file:one.json changed since it was fetched: run `dvc repro`"):
        inputs.check_unchanged("prepare", family, params, paths)
    with pytest.raises(UserError, match=r"^draft/model.safetensors changed since"):
        inputs.check_unchanged("train_offline", family, params, paths)


def test_data_that_was_read_and_cleaned_away_changes_nothing(outside: dict[str, Any], tmp_path: Path) -> None:
    refresh(outside)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "one.json").unlink()
    assert refresh(outside) == []
    outside["families"]["tiny"]["data"]["sources"].append({"source": "file:two.json"})
    with pytest.raises(UserError, match=r"file:two\.json does not exist"):
        refresh(outside)


def test_versions_are_public_ones_of_what_a_stage_runs(
    outside: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = {"torch": "2.13.0+cu130", "transformers": "5.16.0"}
    monkeypatch.setattr(inputs.metadata, "version", lambda name: installed[name])
    refresh(outside)
    read = {file.stem: json.loads(file.read_text())["versions"] for file in (tmp_path / "artifacts").rglob("*.json")}
    both = {"torch": "2.13.0", "transformers": "5.16.0"}
    assert read == {"fetch": {}, "prepare": {"transformers": "5.16.0"}, **dict.fromkeys(
        ("sample", "extract", "train", "bench"), both)}  # fmt: skip
    installed["torch"] = "2.13.0+cpu"
    assert refresh(outside) == []
    installed["torch"] = "2.13.1"
    assert refresh(outside) == ["sample", "extract", "train", "bench"]


def test_an_engine_that_is_not_here_keeps_the_version_on_record(
    outside: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"
    package = venv / "lib" / "python3.12" / "site-packages" / "vllm-0.32.0+cu130.dist-info"
    package.mkdir(parents=True)
    (venv / "bin").mkdir()
    (venv / "bin" / "python").touch()
    tiny = outside["families"]["tiny"]
    tiny["sample"]["engine"], tiny["serve"] = "vllm", {"venv": "venv"}
    refresh(outside)
    package.rename(package.with_name("vllm-0.33.0.dist-info"))
    assert refresh(outside) == ["sample"]
    assert json.loads(Path("artifacts/tiny/inputs/sample.json").read_text())["versions"]["vllm"] == "0.33.0"
    shutil.rmtree(venv)
    assert refresh(outside) == []


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("target", "source"), "file:nowhere", "file:nowhere does not exist"),
        (("target", "source"), "file:~nosuchuser/x", "~nosuchuser/x: this machine has no home folder of that name"),
        (("train", "init_from"), "one.json/draft", "one.json/draft does not exist"),
        (("target", "chat_template"), "x" * 300, "name of over 255 bytes"),
        (("data", "sources"), [{"source": "file:loop"}], "cannot be read"),
        (("data", "sources"), [{"source": "file:around"}], "around/up is a link to a folder that it lies in"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    outside: dict[str, Any], tmp_path: Path, place: tuple[str, str], value: Any, words: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "around").mkdir()
    (tmp_path / "around" / "up").symlink_to(tmp_path / "around")
    outside["families"]["tiny"][place[0]][place[1]] = value
    with pytest.raises(UserError) as caught:
        refresh(outside)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_dvc_repro_alone_notices_and_an_experiment_reads_the_projects_files(
    outside: dict[str, Any], tmp_path: Path
) -> None:
    """The real dvc.yaml's `inputs` with a consumer; the sources are relative and git ignores them."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    consumer = {
        "matrix": {"family": "${families}"},
        "cmd": "cp artifacts/${item.family}/inputs/prepare.json artifacts/${item.family}/prompts.json",
        "deps": ["artifacts/${item.family}/inputs/prepare.json"],
        "outs": ["artifacts/${item.family}/prompts.json"],
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"inputs": stages["inputs"], "use": consumer}}))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(outside))
    (tmp_path / ".gitignore").write_text("/data\n/one.json\n/target\n/cache\n")

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    dvc = (sys.executable, "-m", "dvc")
    run("git", "init", "--quiet")
    run("git", "config", "user.name", "x")
    run("git", "config", "user.email", "x@y")
    run(*dvc, "init", "--quiet")
    assert "Running stage 'use@tiny'" in run(*dvc, "repro")
    first = (tmp_path / "artifacts/tiny/prompts.json").read_text()
    assert "Running stage 'use@tiny'" not in run(*dvc, "repro")
    assert changed_stages(tmp_path) == set()  # so a flow with nothing to do starts no process
    append("data/a.jsonl")(tmp_path)
    assert changed_stages(tmp_path) == {"inputs@tiny"}
    assert "Running stage 'use@tiny'" in run(*dvc, "repro")
    assert (tmp_path / "artifacts/tiny/prompts.json").read_text() != first
    run("git", "add", "-A")
    run("git", "commit", "-qm", "x")
    said = run(
        "env",
        f"PYTHONPATH={ROOT}",
        sys.executable,
        "-m",
        "flows.experiment",
        "--name",
        "e1",
        "-S",
        "+families.tiny.data.seed=1",
    )
    assert "Running stage 'inputs@tiny'" in said
    assert "Running stage 'use@tiny'" not in said  # the copy found the same files, which it does not hold


def test_a_benchmark_knows_a_prompt_sets_folder_by_its_files(tmp_path: Path) -> None:
    from specflow.bench import job

    (tmp_path / "set" / "deep").mkdir(parents=True)
    file = tmp_path / "set" / "deep" / "questions.jsonl"
    file.write_text("one")
    before = job._digest(tmp_path / "set", tmp_path / "cache")
    assert job._digest(tmp_path / "set", tmp_path / "cache") == before
    file.write_text("two")
    assert job._digest(tmp_path / "set", tmp_path / "cache") != before
