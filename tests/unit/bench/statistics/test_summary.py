"""summary.json from records alone."""

import random
from pathlib import Path
from typing import Any

import pytest

from specflow import files
from specflow.bench.statistics.records import Record
from specflow.bench.statistics.summary import recompute, summarise, summary_of
from specflow.config_bench import StaticTree
from specflow.results.schema import Conditions, SetResult, Statistics
from tests.bench_records import benchmark, plain, record
from tests.results import summary_from


def summary(records: list[Record], **kwargs: Any) -> SetResult:
    return summarise(records, **{"num_speculative_tokens": 3, "greedy": True, **kwargs})


def test_parts_add_up() -> None:
    """Category a accepts all 3 of 3 in both steps, b nothing in 4 steps: pooled 1 + 6/6, macro (4 + 1) / 2."""
    records = []
    for category, turn, accepted in (("a", 0, [3, 3]), ("b", 1, [0, 0, 0, 0])):
        num_tokens = 1 + sum(x + 1 for x in accepted)
        where: dict[str, Any] = {"question": category, "category": category, "turn": turn}
        records += [plain(num_tokens, **where), record(accepted, seconds=0.5, **where)]
    found = summary(records)
    assert found.acceptance_length == 2.0 and found.acceptance_length_macro == 2.5
    lengths = [{name: part.acceptance_length for name, part in parts.items()} for parts in
               (found.by_category, found.by_turn)]  # fmt: skip
    assert lengths == [{"a": 4.0, "b": 1.0}, {0: 4.0, 1: 1.0}]
    for parts in (found.by_category.values(), found.by_turn.values()):
        assert sum(part.num_tokens for part in parts) == found.num_tokens
        assert sum(part.num_steps for part in parts) == found.num_steps == 6
    assert list(found.by_sample) == [0] and found.by_sample[0].speedup == found.speedup
    assert found.acceptance_length_ci is None, "two questions"
    assert found.references == {} and found.lossless is True and found.baseline_repeats_equal is True
    assert summary(records, greedy=False).lossless is None


def test_samples_are_requests_of_their_own() -> None:
    records = []
    for sample, accepted in enumerate(([1, 1], [3, 0])):
        num_tokens = 1 + sum(a + 1 for a in accepted)
        records += [plain(num_tokens, sample=sample), record(accepted, sample=sample)]
    found = summary(records, greedy=False)
    assert (found.num_requests, found.num_questions) == (2, 1)
    assert [part.acceptance_length for part in found.by_sample.values()] == [2.0, 2.5]


def test_reference_rows() -> None:
    """The always right draft takes 1/2 s, the always wrong one 2 s; each ran in one repeat only."""
    records = benchmark(0.7)
    for q in range(6):
        where: dict[str, Any] = {"question": f"q{q}", "repeat": 1}
        records.append(record([3, 3, 1], engine="oracle", cut=0, seconds=0.5 * (1 + 0.01 * q), **where))
        records.append(record([0] * 10, engine="null", seconds=2 * (1 + 0.01 * q), **where))
    rows = summary(records).references
    assert list(rows) == ["oracle", "null"]
    assert rows["oracle"].speedup == pytest.approx(2.0) and rows["null"].speedup == pytest.approx(0.5)
    assert rows["null"].acceptance_length == 1.0 and rows["oracle"].acceptance_length == pytest.approx(10 / 3)
    assert rows["null"].num_requests == 6 and rows["null"].lossless is True
    assert summary(records).acceptance_length == summary(benchmark(0.7)).acceptance_length


def test_a_side_that_did_not_run_has_no_numbers() -> None:
    draft = [r for r in benchmark(0.7) if r.engine == "draft"]
    found = summary(draft)
    for name in ("speedup", "speedup_ci", "speedup_mean_of_ratios", "decode_speedup", "baseline_tok_s", "lossless"):
        assert getattr(found, name) is None, name
    assert found.acceptance_length == 2.0 and found.tok_s and found.num_requests == 6
    found = summary([r for r in benchmark(0.7) if r.engine == "baseline"])
    for name in ("acceptance_length", "acceptance_length_ci", "tok_s", "speedup", "draft_acceptance_rate"):
        assert getattr(found, name) is None, name
    assert found.baseline_tok_s and found.num_requests == found.num_questions == 6


def test_identities_are_asserted() -> None:
    def of(records: list[Record], **kwargs: Any) -> Any:
        return summary_of(records, **{"num_speculative_tokens": 3, "greedy": True, **kwargs})

    with pytest.raises(AssertionError, match="there twice"):
        of([plain(3), plain(3)])
    with pytest.raises(AssertionError, match="8 drafted in a chain of 3"):
        of([plain(4), record([2], k=8)])
    with pytest.raises(AssertionError, match="another prompt"):
        of([plain(4), Record.from_json({**record([2]).to_json(), "num_prompt_tokens": 6})])
    with pytest.raises(AssertionError, match="the baseline drafted"):
        of([record([1, 1], engine="baseline"), record([2, 0])])


def test_records_in_any_order_give_the_same_summary() -> None:
    records = benchmark(0.7, slower=0.02)
    shuffled = random.Random(0).sample(records, len(records))
    kwargs: dict[str, Any] = {"num_speculative_tokens": 3, "greedy": True}
    one, other = (summary_of(rows, **kwargs) for rows in (records, shuffled))
    assert flat(one.to_json()) == pytest.approx(flat(other.to_json())) and one.verdict == other.verdict


def flat(value: Any, name: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {key: v for k, inner in value.items() for key, v in flat(inner, f"{name}/{k}").items()}
    if isinstance(value, list):
        return {key: v for k, inner in enumerate(value) for key, v in flat(inner, f"{name}/{k}").items()}
    return {name: float(value)} if isinstance(value, int | float) else {}


def test_anybody_can_compute_it_again(tmp_path: Path) -> None:
    """From the two files alone, a tree's settings and the machine's state included, to the last digit."""
    records = benchmark(0.7, k=5, slower=0.02)
    made = summary_from(
        records,
        num_speculative_tokens=3,
        settings={"seed": 4},
        tree=StaticTree(branches=[[0], [1], [2], [0, 0], [0, 0, 0]]),
        conditions=Conditions(busy_share=0.4),
    )
    files.write_json(tmp_path / "summary.json", made.to_json())
    files.write_jsonl(tmp_path / "records.jsonl", (r.to_json() for r in records))
    again = recompute(tmp_path)
    assert again.to_json() == {name: made.to_json()[name] for name in Statistics.model_fields}
    assert "no conclusion" in again.conclusion.conclusion and "used 40% of the machine" in again.verdict
