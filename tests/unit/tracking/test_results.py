"""Names of results in MLflow, and the terminal's table of a family, from one made-up benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from specflow import files
from specflow.config_bench import DynamicTree, StaticTree
from specflow.paths import Paths
from specflow.project import family_table
from specflow.results.schema import Accuracy, BatchRow, Summary
from specflow.tracking import results
from tests.bench_records import benchmark, record
from tests.evidence import make_records, make_summary
from tests.results import changed, summary_from


@pytest.fixture
def summary() -> Summary:
    records = benchmark(0.5, k=6, slower=0.05)
    for q in range(6):
        where: dict[str, Any] = {"question": f"q{q}", "repeat": 1, "started_at": 1e9}
        pace = (1 + 0.01 * q) / 0.95
        records.append(record([3, 3, 1], engine="oracle", seconds=0.25 * pace, **where))
        records.append(record([0] * 10, engine="lookup", seconds=1.25 * pace, **where))
    rights = {"baseline": 0.5, "draft": 0.25, "difference": -0.25, "difference_ci": None}
    counts = {"num_questions": 4, "num_answers": 4, "only_baseline_right": 1, "only_draft_right": 0}
    return summary_from(
        records,
        num_speculative_tokens=3,
        tree=DynamicTree(total_token=7, depth=3, top_k=2),
        accuracy={"gsm8k": Accuracy(kind="final number", **rights, **counts, num_unreadable={}, num_length_limited={})},
        batch=[
            BatchRow(
                batch_size=4,
                num_requests=4,
                num_speculative_tokens=3,
                tok_s=99.0,
                baseline_tok_s=66.0,
                speedup=1.5,
                acceptance_length=2.5,
                lossless_rate=1.0,
                first_divergence=None,
            )
        ],
    )


def test_names_of_what_not_every_benchmark_has(summary: Summary, tmp_path: Any) -> None:
    paths = Paths(root=tmp_path, family="tiny", cache=tmp_path)
    files.write_json(paths.bench / "summary.json", summary.to_json())
    flat = {
        "t_draft_ms": 4.0,
        "lookup_speedup": 0.8,
        "s.speedup": 2.0,
        "survival_1": 1.0,
        "acceptance_length_ci_low": 2.0,
    }
    named = results.headline("bench", flat, paths)
    expected = {
        "bench/t_draft_ms": 4.0,
        "reference/lookup_speedup": 0.8,
        "reference/lookup_accept_length": 1.0,
        "reference/oracle_speedup": 4.0,
        "reference/oracle_accept_length": 10 / 3,
        "accuracy/gsm8k_baseline": 0.5,
        "accuracy/gsm8k_draft": 0.25,
        "accuracy/gsm8k_difference": -0.25,
        "batch/4_speedup": 1.5,
        "batch/4_tok_s": 99.0,
        "batch/4_acceptance_length": 2.5,
        "bench/drafted_per_step": 6.0,
        "bench/drift": summary.drift.baseline_change,
        "accept/length_low": 2.0,
    }
    assert {name: named.get(name) for name in expected} == pytest.approx(expected)
    assert not {name for name in named if name.count("/") != 1}
    again = ("bench/lookup_speedup", "bench/s.speedup", "bench/survival_1", "bench/acceptance_length_ci_low")
    assert not set(again) & set(named)
    assert next(iter(named)) == "accept/length"


def test_what_was_asked_and_how_is_a_condition_and_how_often_is_not() -> None:
    summary = make_summary(make_records({"a": 2.0}))
    asked = results.conditions(summary)["bench_settings"]
    for change in ({"top_p": 0.9}, {"top_k": 20}, {"num_samples": 2}, {"max_turns": 3}):
        other = changed(summary, settings={"temperature": 1.0, **change})
        assert results.conditions(other)["bench_settings"] != asked, change
    for change in ({"repeats": 5}, {"stock_generate": False}, {"cost_tokens": []}):
        assert results.conditions(changed(summary, settings=change))["bench_settings"] == asked, change


def test_a_side_that_did_not_run_has_no_metrics(tmp_path: Any) -> None:
    paths = Paths(root=tmp_path, family="tiny", cache=tmp_path)
    alone = [r for r in benchmark(0.5) if r.engine == "draft"]
    files.write_json(paths.bench / "summary.json", summary_from(alone, num_speculative_tokens=3).to_json())
    named = results.headline("bench", {}, paths)
    assert named["accept/length"] == 2.0 and not {name for name in named if "speedup" in name or "baseline" in name}


def test_table_of_a_family(summary: Summary) -> None:
    lines = family_table("tiny", summary).splitlines()
    assert lines[0] == "tiny, a dynamic tree of at most 6 nodes, 3 deep"
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[2:5]]
    base = 6.15 * (1 + 1 / 0.95 + 1 / 0.95**2)
    speeds = [f"{11 * 18 / (base * 0.5 * 6.3 / 6.15):.1f}", f"{11 * 18 / base:.1f}"]
    assert cells[0][:5] == ["s", "2.00", "1.00 0.00 0.00", *speeds]
    assert cells[0][5].startswith("1.95x [1.9") and cells[0][6] == "yes"
    assert [cells[1][0], cells[1][1], cells[1][4]] == ["n-gram lookup", "1.00", "0.80x [0.80, 0.80]"]
    assert [cells[2][0], cells[2][1], cells[2][4]] == ["always right", "3.33", "4.00x [4.00, 4.00]"]
    assert lines[-1] == summary.verdict
    static = changed(summary, tree=StaticTree(branches=[[0], [1], [0, 0]]))
    assert "a static tree of at most 3 nodes, 3 deep" in family_table("tiny", static)
    assert "tiny, 3 drafted tokens a step" in family_table("tiny", changed(summary, tree=None))
