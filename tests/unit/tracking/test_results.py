"""Names of results in MLflow, and the terminal's table of a family, from one made-up benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from specflow import files
from specflow.bench.statistics.summary import summary_of
from specflow.files import sha256_json
from specflow.paths import Paths
from specflow.project import family_table
from specflow.tracking import results
from tests.bench_records import benchmark, record
from tests.evidence import make_records, make_summary


@pytest.fixture
def summary() -> dict[str, Any]:
    records = benchmark(0.5, k=6, slower=0.05)
    for q in range(6):
        where: dict[str, Any] = {"question": f"q{q}", "repeat": 1, "started_at": 1e9}
        pace = (1 + 0.01 * q) / 0.95
        records.append(record([3, 3, 1], engine="oracle", seconds=0.25 * pace, **where))
        records.append(record([0] * 10, engine="lookup", seconds=1.25 * pace, **where))
    tree = {"total_token": 7, "depth": 3, "top_k": 2}
    return {
        "tree": tree,
        "num_speculative_tokens": 3,
        **summary_of(records, num_speculative_tokens=3, greedy=True, tree=tree),
        "accuracy": {"gsm8k": {"baseline": 0.5, "draft": 0.25, "difference": -0.25, "num_questions": 4}},
        "batch": [{"batch_size": 4, "tok_s": 99.0, "speedup": 1.5, "acceptance_length": 2.5}],
    }


def test_names_of_what_not_every_benchmark_has(summary: dict[str, Any], tmp_path: Any) -> None:
    paths = Paths(root=tmp_path, family="tiny", cache=tmp_path)
    files.write_json(paths.bench / "summary.json", summary)
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
        "bench/drift": summary["drift"]["baseline_change"],
        "accept/length_low": 2.0,
    }
    assert {name: named.get(name) for name in expected} == pytest.approx(expected)
    assert not {name for name in named if name.count("/") != 1}
    again = ("bench/lookup_speedup", "bench/s.speedup", "bench/survival_1", "bench/acceptance_length_ci_low")
    assert not set(again) & set(named)
    assert next(iter(named)) == "accept/length"


def test_sampling_is_a_condition_and_its_absence_changes_no_digest() -> None:
    summary = make_summary(make_records({"a": 2.0}))
    old = results.conditions(summary)["bench_settings"]
    assert old == sha256_json({**summary["settings"], "questions": {"questions": ["a"]}})[:12]
    summary["settings"] |= {"top_p": 1.0, "top_k": 0, "num_samples": 1}
    assert results.conditions(summary)["bench_settings"] == old
    for change in ({"top_p": 0.9}, {"top_k": 20}, {"num_samples": 2}):
        changed = {**summary, "settings": {**summary["settings"], **change}}
        assert results.conditions(changed)["bench_settings"] != old


def test_a_side_that_did_not_run_has_no_metrics(tmp_path: Any) -> None:
    paths = Paths(root=tmp_path, family="tiny", cache=tmp_path)
    alone = [r for r in benchmark(0.5) if r.engine == "draft"]
    files.write_json(
        paths.bench / "summary.json", summary_of(alone, num_speculative_tokens=3, greedy=True) | {"tree": None}
    )
    named = results.headline("bench", {}, paths)
    assert named["accept/length"] == 2.0 and not {name for name in named if "speedup" in name or "baseline" in name}


def test_table_of_a_family(summary: dict[str, Any]) -> None:
    lines = family_table("tiny", summary).splitlines()
    assert lines[0] == "tiny, a dynamic tree of at most 6 nodes, 3 deep"
    cells = [[cell.strip() for cell in line.split("  ") if cell] for line in lines[2:5]]
    base = 6.15 * (1 + 1 / 0.95 + 1 / 0.95**2)
    speeds = [f"{11 * 18 / (base * 0.5 * 6.3 / 6.15):.1f}", f"{11 * 18 / base:.1f}"]
    assert cells[0][:5] == ["s", "2.00", "1.00 0.00 0.00", *speeds]
    assert cells[0][5].startswith("1.95x [1.9") and cells[0][6] == "yes"
    assert [cells[1][0], cells[1][1], cells[1][4]] == ["n-gram lookup", "1.00", "0.80x [0.80, 0.80]"]
    assert [cells[2][0], cells[2][1], cells[2][4]] == ["always right", "3.33", "4.00x [4.00, 4.00]"]
    assert lines[-1] == summary["verdict"]
    static = {**summary, "tree": {"branches": [[0], [1], [0, 0]]}}
    assert "a static tree of at most 3 nodes, 3 deep" in family_table("tiny", static)
    assert "tiny, 3 drafted tokens a step" in family_table("tiny", {**summary, "tree": None})
