"""Drift of the machine on records whose drift is known."""

import dataclasses
import math

import numpy as np
import pytest

from specflow.bench.statistics import drift
from specflow.bench.statistics.records import BASELINE, DRAFT, by_engine
from tests.bench_records import benchmark, plain


def test_slope_of_a_machine_that_slows_down() -> None:
    """2 % slower each hour, both engines alike: found to a hundredth, although the questions differ in speed."""
    engines = by_engine(benchmark(0.7, slower=0.02))
    found = drift.drift(engines[BASELINE], engines[DRAFT], most_at_once=1)
    assert found.span_s and found.baseline_change and found.baseline_change_ci
    assert found.baseline_per_hour == pytest.approx(-0.02, abs=2e-4)
    assert found.span_s == pytest.approx(7200 + 50 + 1.05 / 0.98**2)
    assert found.baseline_change == pytest.approx(0.98 ** (found.span_s / 3600) - 1, abs=1e-4)
    low, high = found.baseline_change_ci
    assert low <= found.baseline_change <= high < 0
    repeats = found.by_repeat
    assert [row.num_pairs for row in repeats] == [6, 6, 6]
    assert repeats[2].baseline_tok_s / repeats[0].baseline_tok_s == pytest.approx(0.98**2)
    assert all(row.speedup == pytest.approx(repeats[0].speedup) for row in repeats)


def test_interval_of_the_slope_covers_no_drift_about_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        rows = [
            plain(10, question=f"q{q}", repeat=r, started_at=1e9 + 600 * r + 20 * q, seconds=math.exp(noise))
            for r in range(3)
            for q, noise in enumerate(generator.normal(0, 0.05, size=15))
        ]
        low, high = drift.drift(rows, [], most_at_once=1).baseline_change_ci or (math.nan, math.nan)
        covered += low <= 0 <= high
    assert 180 <= covered <= 199


def test_nothing_to_tell_from() -> None:
    once = [plain(10, question=f"q{q}", started_at=1e9 + q) for q in range(3)]
    assert drift.drift(once, [], most_at_once=1).baseline_change is None
    untimed = by_engine(benchmark(0.7))
    bare = [dataclasses.replace(record, started_at=0.0) for record in untimed[BASELINE]]
    found = drift.drift(bare, untimed[DRAFT], most_at_once=1)
    assert found.span_s is None is found.baseline_per_hour and len(found.by_repeat) == 3
    assert drift.drift([], [], most_at_once=1).by_repeat == []


def test_most_at_once() -> None:
    rows = [plain(3, question=f"q{q}", started_at=1e9 + q) for q in range(3)]  # one ends as the next begins
    assert drift.most_at_once(rows) == 1
    beside = [plain(3, question=f"p{q}", started_at=1e9 + 0.5 + q) for q in range(3)]
    assert drift.most_at_once([*rows, *beside]) == 2
    assert drift.most_at_once([plain(3)]) == 0


def test_load_counts_what_runs_beside_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 ticks 100 were idle and 20 waited for a disk: 70 % were used, 8 of them taken by the hypervisor."""
    stats = iter(["cpu  10 0 10 100 0 0 0 0 0 0", "cpu  250 10 30 200 20 2 0 8 0 0"])
    monkeypatch.setattr(drift, "_cpu_times", lambda: [int(word) for word in next(stats).split()[1:9]])
    assert drift.machine_load(0.0)["busy_share"] == pytest.approx(1 - 120 / 400)
