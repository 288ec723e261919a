"""Imports point one way, and each tool around the pipeline has the importers that docs/design.md names."""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT
from tests.unit.test_dvc_yaml import imported_names

FILES = sorted(file for package in ("specflow", "flows") for file in (ROOT / package).rglob("*.py"))


def layer(path: Path) -> str:
    """Of a file or module as a path: flows, a folder of specflow, or a file beside those folders."""
    return path.parts[0] if path.parts[0] == "flows" else "/".join(path.with_suffix("").parts[:2])


def test_no_two_folders_import_each_other() -> None:
    """Raises CycleError with the folders of the circle. Imports inside functions and those for types alone count."""
    layers = {layer(file.relative_to(ROOT)) for file in FILES}
    imports: dict[str, set[str]] = {name: set() for name in layers}
    for file in FILES:
        own = layer(file.relative_to(ROOT))
        imports[own] |= {layer(Path(*name.split("."))) for name in imported_names(file)} & layers - {own}
    TopologicalSorter(imports).prepare()
    assert imports["flows"] and imports["specflow/cli"] >= {"specflow/stage", "specflow/bench"}


@pytest.mark.parametrize(
    ("tool", "importers"),
    [
        ("mlflow", {"specflow/tracking"}),
        ("prefect", {"flows"}),
        ("dvc", {"flows"}),
        ("pynvml", {"specflow/gpus"}),
        ("ray", {"specflow/sharding", "flows"}),
    ],
)
def test_each_tool_has_its_importers(tool: str, importers: set[str]) -> None:
    found = {
        layer(file.relative_to(ROOT))
        for file in FILES
        if any(name.partition(".")[0] == tool for name in imported_names(file))
    }
    assert found == importers
