"""The graph that the flows run by is DVC's own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.graph import StageNode, changed_stages, stage_graph
from specflow.errors import UserError
from tests import ROOT
from tests.toys import tiny_params

TOY = """
stages:
  make:
    matrix: {family: [x, y-2]}
    cmd: cp in.txt ${item.family}.txt
    deps: [in.txt]
    outs: ["${item.family}.txt"]
  report:
    cmd: cat x.txt y-2.txt > report.txt
    deps: [x.txt, y-2.txt]
    outs: [report.txt]
"""


def dvc(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    dvc(tmp_path, "init", "--quiet", "--no-scm")
    (tmp_path / "dvc.yaml").write_text(TOY, encoding="utf-8")
    (tmp_path / "in.txt").write_text("1", encoding="utf-8")
    return tmp_path


def edges_of(graph: dict[str, StageNode]) -> set[tuple[str, str]]:
    return {(up, node.address) for node in graph.values() for up in node.upstream}


def edges_by_dvc(folder: Path) -> set[tuple[str, str]]:
    return set(re.findall(r'"([^"]+)" -> "([^"]+)"', dvc(folder, "dag", "--dot")))


def test_toy_graph_is_that_of_dvc_dag(toy: Path) -> None:
    graph = stage_graph(toy)
    assert edges_of(graph) == edges_by_dvc(toy) == {("make@x", "report"), ("make@y-2", "report")}
    assert graph["make@y-2"] == StageNode("make@y-2", "make", "y-2", ())
    assert graph["report"].family is None


def test_the_pipeline_of_two_families_is_that_of_dvc_dag(tmp_path: Path) -> None:
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    params = tiny_params(tmp_path)
    params["families"]["other"] = params["families"]["tiny"]
    params["online"] = ["other"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for folder in ("specflow", "artifacts"):
        (tmp_path / folder).mkdir()
    dvc(tmp_path, "init", "--quiet", "--no-scm")
    graph = stage_graph(tmp_path)
    edges = edges_of(graph)
    assert edges == edges_by_dvc(tmp_path)
    assert {
        ("train_online@other", "export@other"),
        ("extract@tiny", "train_offline@tiny"),
        ("bench@other", "report"),
    } <= edges
    assert not [edge for edge in edges if "tiny" in edge[0] and "other" in edge[1]]
    order = list(graph)
    assert all(order.index(before) < order.index(after) for before, after in edges)


def test_changed_stages_are_those_of_dvc_status(toy: Path) -> None:
    assert changed_stages(toy) == {"make@x", "make@y-2", "report"}
    dvc(toy, "repro", "--quiet")
    assert changed_stages(toy) == set()
    (toy / "x.txt").write_text("edited", encoding="utf-8")
    assert changed_stages(toy) == {"make@x", "report"}
    assert changed_stages(toy, ["make@y-2", "report"]) == {"report"}
    assert changed_stages(toy, []) == set()


def test_what_dvc_cannot_read_is_one_line(tmp_path: Path, toy: Path) -> None:
    (toy / "dvc.yaml").write_text(TOY.replace("item.family", "item.kind"), encoding="utf-8")
    with pytest.raises(UserError, match=r"item\.kind") as caught:
        stage_graph(toy)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="specflow init"):
        stage_graph(tmp_path.parent)
