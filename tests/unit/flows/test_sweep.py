"""Values of a sweep as words of `dvc exp run`, read by DVC's own parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

import flows.benchmark
from flows.sweep import _set_param


@pytest.mark.parametrize("before", [None, {"branches": [[0]]}, 4])
@pytest.mark.parametrize(
    "value",
    [
        {"total_token": 8, "depth": 3, "top_k": 3},
        {"branches": [[0], [1], [0, 0]]},
        None,
        1e-4,
        "auto",
        ["a", "b"],
        True,
    ],
)
def test_values_arrive_as_they_are(tmp_path: Path, before: Any, value: Any) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"a": {"b": before, "c": 1}}))
    words = _set_param("a.b", value)
    assert words[::2] == ["-S"] * (len(words) // 2)
    apply_overrides(path, words[1::2])
    assert yaml.safe_load(path.read_text()) == {"a": {"b": value, "c": 1}}


def test_chains_and_trees_are_settings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(flows.benchmark, "run_points", lambda family, settings, **_: asked.append(settings))
    tree = {"total_token": 8, "depth": 3, "top_k": 3}
    flows.benchmark.benchmark.fn("tiny", [2, "auto"], temperature=1.0, top_p=0.9, trees=[tree])
    flows.benchmark.benchmark.fn("tiny", num_prompts=3)
    fixed = {"bench.temperature": 1.0, "bench.top_p": 0.9}
    assert asked == [
        [
            {"bench.num_speculative_tokens": 2, "bench.tree": None, **fixed},
            {"bench.num_speculative_tokens": "auto", "bench.tree": None, **fixed},
            {"bench.tree": tree, **fixed},
        ],
        [{"bench.num_prompts": 3}],
    ]
