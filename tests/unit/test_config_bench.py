"""Settings of a benchmark: what a tree may be, what excludes what, and that today's families mean what they meant."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from specflow.bench.questions import largest_depth, largest_draft
from specflow.bench.runner import sampling_of
from specflow.config import parse_params
from specflow.config_bench import Bench, DynamicTree, StaticTree
from specflow.errors import UserError
from tests.toys import tiny_params


def test_depth_and_size_of_what_is_drafted() -> None:
    chain = Bench(num_speculative_tokens="auto", sweep=[1, 5, 2])
    assert (largest_depth(chain), largest_draft(chain), chain.sweeps) == (5, 5, True)
    dynamic = Bench(tree={"total_token": 9, "depth": 3, "top_k": 2})
    assert isinstance(dynamic.tree, DynamicTree)
    assert (largest_depth(dynamic), largest_draft(dynamic), dynamic.sweeps) == (3, 8, False)
    static = Bench(tree={"branches": [[0], [1], [0, 0]]})
    assert isinstance(static.tree, StaticTree)
    assert (static.tree.depth, static.tree.total_token, largest_draft(static)) == (2, 4, 3)
    assert Bench.model_validate_json(static.model_dump_json()) == static


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree": {"total_token": 3, "depth": 3, "top_k": 1}}, "depth 3 cannot be reached with total_token 3"),
        ({"tree": {"branches": [[0, 0]]}}, r"\[0, 0\] but not \[0\], which it hangs on"),
        ({"tree": {"branches": [[0], [0]]}}, r"\[0\] twice"),
        ({"tree": {"branches": [[]]}}, "empty path"),
        ({"tree": 8}, "8 is no tree"),
        ({"num_samples": 2}, "would repeat one answer"),
        ({"top_k": 5}, "change nothing at temperature 0"),
        ({"batch_sizes": [4, 2]}, "must ascend"),
        ({"batch_sizes": [2], "tree": {"branches": [[0]]}}, "measured with a chain"),
        ({"accuracy": ["gsm8k"]}, "accuracy names 'gsm8k'"),
        ({"serve": {}, "temperature": 1.0, "top_p": 0.9}, "serve measures a chain"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Bench.model_validate(changes)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"total_token": 8, "depth": 2}, "missing parameter 'families.tiny.bench.tree.top_k'"),
        (
            {"total_token": 8, "depth": 2, "topk": 2},
            "unknown parameter 'families.tiny.bench.tree.topk': did you mean 'top_k'?",
        ),
        ({"branches": [[0], [-1]]}, "families.tiny.bench.tree.branches.1.0: "),
    ],
)
def test_a_wrong_tree_is_named_by_its_place(tree: dict[str, Any], message: str, tmp_path: Any) -> None:
    raw = tiny_params(tmp_path)
    raw["families"]["tiny"]["bench"]["tree"] = tree
    with pytest.raises(UserError) as caught:
        parse_params(raw)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sampling_of_the_settings() -> None:
    sampling = sampling_of(Bench(temperature=0.5, top_p=0.9, top_k=7))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.greedy) == (0.5, 0.9, 7, False)
