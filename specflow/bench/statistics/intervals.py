"""95 % intervals over questions: what belongs to one question says too much alike to be counted apart.

A question's turns, samples and repeats are summed before anything else, so more repeats of the same questions add no
certainty. The standard error is the delete-one jackknife's over questions, and the quantile Student's t with the
effective number of questions less one degrees of freedom, (sum of sizes)^2 / sum of sizes^2 (Kish): six questions of
which one is half of all tokens are worth fewer. Ratios are taken as logarithms. `tests/unit/bench/statistics/
test_coverage.py` holds the coverage; percentiles of a bootstrap cover 83 to 86 % with six questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from specflow.bench.statistics.records import Pair, Record

LEVEL = 0.95
LEAST_QUESTIONS = 3
"""Below this nothing is known of how far questions lie apart: no interval."""
Sums = NDArray[np.float64]


def sums_by_question(parts: Iterable[tuple[tuple[str, str], Sequence[float]]]) -> dict[tuple[str, str], Sums]:
    """Parts of each question added up, by question in sorted order: the order of rows does not change an interval."""
    found: dict[tuple[str, str], Sums] = {}
    for question, values in parts:
        found[question] = found.get(question, np.zeros(len(values))) + np.asarray(values, dtype=np.float64)
    return dict(sorted(found.items()))


def half_width(table: Sums, statistic: Callable[[Sums], Sums], sizes: Sequence[int] | None = None) -> Sums:
    """Half of the interval's width for tables of [..., questions, parts] -> [...].

    `statistic`: a function of sums over questions, [..., parts] -> [...]. `sizes`: the parts that say how much of the
    whole a question is, none negative; default all.
    """
    num = table.shape[-2]
    without = statistic(table.sum(axis=-2, keepdims=True) - table)
    errors = without - without.mean(axis=-1, keepdims=True)
    standard_error = np.sqrt((num - 1) / num * (errors**2).sum(axis=-1))
    parts = table if sizes is None else table[..., list(sizes)]
    squares = (parts**2).sum(axis=-2)
    effective = np.divide(parts.sum(axis=-2) ** 2, squares, out=np.full_like(squares, num), where=squares > 0)
    freedom = np.maximum(effective.min(axis=-1) - 1, 1.0)
    width: Sums = stdtrit(freedom, (1 + LEVEL) / 2) * standard_error
    return width


def ratio_interval(sums: Iterable[Sums], ratio: Callable[[Sums], Sums]) -> tuple[float, float] | None:
    """Interval of a positive ratio of sums over questions; None below LEAST_QUESTIONS."""
    table = np.array(list(sums))
    if len(table) < LEAST_QUESTIONS:
        return None
    centre, half = ratio(table.sum(axis=0)), np.exp(half_width(table, lambda parts: np.log(ratio(parts))))
    return float(centre / half), float(centre * half)


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


def length_of(sums: Sums) -> Sums:
    """Pooled acceptance length, from steps and accepted tokens [..., 2] -> [...]."""
    return np.asarray(1.0 + sums[..., 1] / sums[..., 0])


def speedup_interval(pairs: Iterable[Pair]) -> tuple[float, float] | None:
    """Interval of the ratio of sums, `metrics.speedup`."""
    return ratio_interval(speed_sums(pairs).values(), speedup_of)


def length_interval(records: Iterable[Record]) -> tuple[float, float] | None:
    """Interval of the pooled acceptance length. Questions without a step have no part in it."""
    sums = sums_by_question((r.question, (len(r.steps), sum(a for _, a in r.steps))) for r in records if r.steps)
    bounds = ratio_interval(sums.values(), length_of)
    return None if bounds is None else (max(1.0, bounds[0]), bounds[1])  # no step emits less than one token


def difference_interval(values: Iterable[tuple[tuple[str, str], float]]) -> tuple[float, float] | None:
    """Interval of the mean of paired differences, each said with its question."""
    sums = sums_by_question((question, (1.0, value)) for question, value in values)
    table = np.array(list(sums.values()))
    if len(table) < LEAST_QUESTIONS:
        return None

    def mean(parts: Sums) -> Sums:
        return np.asarray(parts[..., 1] / parts[..., 0])

    centre, half = mean(table.sum(axis=0)), half_width(table, mean, sizes=[0])
    return float(centre - half), float(centre + half)
