"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from specflow.config import Params, parse_params
from specflow.paths import Paths
from tests.toys import tiny_params


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a project with one offline family `tiny` in params.yaml, whose inputs do not exist."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(tmp_path)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def params(project: Path) -> Params:
    return parse_params(yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8")))


@pytest.fixture
def paths(project: Path) -> Paths:
    return Paths(root=Path(), family="tiny", cache=project / "cache")
