"""Bootstrap intervals that draw whole questions: what belongs to one question says too much alike to be drawn apart.

A question's turns, samples and repeats are summed before anything is drawn, so more repeats of the same questions add
no certainty. Percentile intervals, None where there are fewer than two questions: one tells nothing of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from specflow.bench.statistics.records import Pair, Record

NUM_RESAMPLES = 2000
LEVEL = 0.95
Sums = NDArray[np.float64]


def sums_by_question(parts: Iterable[tuple[tuple[str, str], Sequence[float]]]) -> dict[tuple[str, str], Sums]:
    """Parts of each question added up, by question in sorted order: the order of rows does not change an interval."""
    found: dict[tuple[str, str], Sums] = {}
    for question, values in parts:
        found[question] = found.get(question, np.zeros(len(values))) + np.asarray(values, dtype=np.float64)
    return dict(sorted(found.items()))


def bootstrap(
    sums: Iterable[Sums], statistic: Callable[[Sums], Sums], *, seed: int, level: float = LEVEL
) -> tuple[float, float] | None:
    """Interval of `statistic`, a function of sums over questions: [..., parts] -> [...]."""
    table = np.array(list(sums))
    if len(table) < 2:
        return None
    chosen = np.random.default_rng(seed).integers(len(table), size=(NUM_RESAMPLES, len(table)))
    low, high = np.quantile(statistic(table[chosen].sum(axis=1)), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def speed_sums(pairs: Iterable[Pair]) -> dict[tuple[str, str], Sums]:
    """Baseline tokens, baseline seconds, engine tokens, engine seconds of each question."""
    return sums_by_question(
        (base.question, (len(base.token_ids), base.total_s, len(engine.token_ids), engine.total_s))
        for base, engine in pairs
    )


def speedup_of(sums: Sums) -> Sums:
    """Ratio of tokens per second, from `speed_sums` [..., 4] -> [...]."""
    ratio: Sums = (sums[..., 2] / sums[..., 3]) / (sums[..., 0] / sums[..., 1])
    return ratio


def speedup_interval(pairs: Iterable[Pair], *, seed: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Interval of the ratio of sums, `metrics.speedup`."""
    return bootstrap(speed_sums(pairs).values(), speedup_of, seed=seed, level=level)


def length_interval(records: Iterable[Record], *, seed: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Interval of the pooled acceptance length. Questions without a step have no part in it."""
    sums = sums_by_question((r.question, (sum(a for _, a in r.steps), len(r.steps))) for r in records if r.steps)
    return bootstrap(sums.values(), lambda table: 1.0 + table[..., 0] / table[..., 1], seed=seed, level=level)


def difference_interval(
    values: Iterable[tuple[tuple[str, str], float]], *, seed: int, level: float = LEVEL
) -> tuple[float, float] | None:
    """Interval of the mean of paired differences, each said with its question."""
    sums = sums_by_question((question, (value, 1.0)) for question, value in values)
    return bootstrap(sums.values(), lambda table: table[..., 0] / table[..., 1], seed=seed, level=level)
