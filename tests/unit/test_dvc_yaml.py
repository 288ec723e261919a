"""dvc.yaml, the schema, the command line and the code agree with each other."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from specflow.cli import SUMMARIES, cli
from specflow.config import Family, Params, load_params
from specflow.stage import STAGES
from tests import ROOT

PLUMBING = ("config.py", "config_bench.py", "schema.py", "settings_file.py", "errors.py", "files.py", "paths.py")
PLUMBING += ("locks.py", "resume.py")
EVERYWHERE = {f"specflow/{name}" for name in PLUMBING}
"""Plumbing that every stage imports: a change there does not make results stale, nor what it imports itself."""

IN_ANOTHER_PROCESS = {
    "specflow/serving/vllm_plugin/specflow_connector.py",
    "specflow/bench/scoring/sandbox_child.py",
}
"""Code that vLLM imports in its own environment, and what a sandboxed child runs; here they are only pointed at."""


def dvc_stages() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def test_stage_names_are_the_commands() -> None:
    assert list(dvc_stages()) == ["inputs", *STAGES, "report"] == ["inputs", *SUMMARIES, "report"]
    assert set(dvc_stages()) <= set(cli.commands)
    for name, stage in dvc_stages().items():
        assert stage["cmd"] == (f"specflow {name}" if name == "report" else f"specflow {name} ${{item.family}}")


@pytest.mark.parametrize("name", [*STAGES, "report"])
def test_params_exist_in_the_schema_and_in_params_yaml(name: str) -> None:
    stage = dvc_stages()[name]
    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    assert stage["params"]
    for path in stage["params"]:
        model: Any = Params
        value = raw
        for part in path.replace("${item.family}", "smollm2").split("."):
            assert part in value, path
            value = value[part]
            if part == "smollm2":
                model = Family
            elif part != "families":
                assert part in model.model_fields, path
                model = model.model_fields[part].annotation


@pytest.mark.parametrize("name", [*STAGES, "report"])
def test_code_dependencies_are_what_the_stage_imports(name: str) -> None:
    module = STAGES[name][0] if name in STAGES else "specflow.report.stage"
    declared = {dep for dep in dvc_stages()[name]["deps"] if dep.startswith("specflow/")}
    python = {file for dep in declared for file in _python_files(ROOT / dep)}
    imported = _imports(module) - EVERYWHERE
    assert imported - python == set(), "imported, but no dependency in dvc.yaml"
    assert python - imported - IN_ANOTHER_PROCESS == set(), "a dependency in dvc.yaml, but not imported"


@pytest.mark.parametrize("name", list(STAGES))
def test_results_are_never_uncached_outs(name: str) -> None:
    """An `outs:` entry with `cache: false` silently turns DVC's run cache off for its stage."""
    stage = dvc_stages()[name]
    assert all(isinstance(out, str) for out in stage["outs"])
    assert list(stage["metrics"][0]) == [f"artifacts/${{item.family}}/metrics/{name}.json"]
    for entry in [*stage["metrics"], *stage.get("plots", [])]:
        assert all(settings["cache"] is False for settings in entry.values())


def test_every_file_of_inputs_has_a_reader_and_each_reader_its_own() -> None:
    stages = dvc_stages()
    assert stages["inputs"]["always_changed"] is True
    folder = "artifacts/${item.family}/inputs/"
    written = {
        out.removeprefix(folder): settings for entry in stages["inputs"]["outs"] for out, settings in entry.items()
    }
    assert all(settings == {"persist": True} for settings in written.values())
    read = {
        name: [dep.removeprefix(folder) for dep in stage.get("deps", []) if dep.startswith(folder)]
        for name, stage in stages.items()
    }
    none: list[str] = []
    own = {name: [f"{name.partition('_')[0]}.json"] for name in stages if f"{name.partition('_')[0]}.json" in written}
    assert read == {name: own.get(name, none) for name in stages}
    assert {file for files in own.values() for file in files} == set(written)


def test_every_stage_declares_its_resources() -> None:
    for stage in dvc_stages().values():
        assert set(stage["meta"]) == {"gpus", "timeout_s"}
        assert stage["meta"]["gpus"] in (0, 1) and stage["meta"]["timeout_s"] > 0


def test_default_params_are_valid() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.offline == ["smollm2"] and params.online == []


def _python_files(path: Path) -> list[str]:
    files = path.rglob("*.py") if path.is_dir() else [path] if path.suffix == ".py" else []
    return [file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"]


def _imports(module: str) -> set[str]:
    """Files of the package that a module imports, itself included, at any depth and inside functions too."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        file = ROOT / (waiting.pop().replace(".", "/") + ".py")
        name = file.relative_to(ROOT).as_posix()
        if not file.exists() or name in found:
            continue
        found.add(name)
        if name in EVERYWHERE:
            continue
        waiting += [imported for imported in imported_names(file) if imported.startswith("specflow")]
    return found


def imported_names(file: Path) -> list[str]:
    """Modules that a file imports, inside functions too; `from a import b` may mean a or a.b: both."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names
