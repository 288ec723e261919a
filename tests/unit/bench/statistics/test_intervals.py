"""Intervals against a jackknife written out and against closed forms; their coverage is in test_coverage.py."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from specflow.bench.statistics.intervals import difference_interval, length_interval, speedup_interval
from specflow.bench.statistics.records import Record, paired
from tests.bench_records import plain, record


def test_a_mean_over_equal_questions_has_students_interval() -> None:
    """Where all questions weigh the same, the jackknife of a mean is its standard error: scipy's own t interval."""
    numbers = [0.3, -0.1, 0.4, 0.0, 0.2, 0.7]
    interval = difference_interval(((("s", f"q{q}"), value) for q, value in enumerate(numbers)))
    expected = stats.t.interval(0.95, 5, loc=np.mean(numbers), scale=stats.sem(numbers))
    assert interval == pytest.approx(expected)


def test_speedup_of_a_jackknife_written_out() -> None:
    """Records listed and divided with one question left out at a time; the longest question has half of the tokens."""
    seconds = {"q0": (2, 0.9), "q1": (5, 0.6), "q2": (3, 0.8), "q3": (12, 0.75)}
    pairs = [
        (plain(n, question=q, repeat=r), record([0] * (n - 1), question=q, repeat=r, seconds=s + 0.1 * r))
        for q, (n, s) in seconds.items()
        for r in range(2)
    ]

    def log_speedup(rows: list[tuple[Record, Record]]) -> float:
        base, draft = (sum(r.total_s for r in side) for side in zip(*rows, strict=True))
        return math.log(base / draft)  # the same tokens on both sides

    without = [log_speedup([pair for pair in pairs if pair[0].question_id != q]) for q in seconds]
    error = math.sqrt(3 / 4 * sum((value - statistics.mean(without)) ** 2 for value in without))
    effective = 22**2 / (2**2 + 5**2 + 3**2 + 12**2)  # 2.66 of 4 questions
    half = stats.t.ppf(0.975, effective - 1) * error
    interval = speedup_interval(pairs)
    assert interval == pytest.approx([math.exp(log_speedup(pairs) + side * half) for side in (-1, 1)])


def test_length_interval_is_the_delta_methods_for_many_questions() -> None:
    """Ratio of sums R = sum a / sum n over 400 questions: standard error = sqrt(sum (a - R n)^2) / sum n."""
    generator = np.random.default_rng(0)
    records = []
    for q in range(400):
        rate = generator.beta(2, 3)
        accepted = [int(a) for a in generator.binomial(3, rate, size=generator.integers(2, 9))]
        records += [record(accepted, question=f"q{q}", repeat=r) for r in range(3)]
    a = np.array([sum(x for _, x in r.steps) for r in records[::3]])
    n = np.array([len(r.steps) for r in records[::3]])
    ratio = a.sum() / n.sum()
    error = np.sqrt(((a - ratio * n) ** 2).sum()) / n.sum()
    interval = length_interval(records)
    assert interval is not None
    assert interval == pytest.approx((1 + ratio - 1.96 * error, 1 + ratio + 1.96 * error), abs=0.2 * error)


def test_difference_interval_is_the_means() -> None:
    generator = np.random.default_rng(0)
    values = [((("s", f"q{q}"), float(v))) for q, v in enumerate(generator.normal(0.1, 0.5, size=500))]
    interval = difference_interval(values)
    numbers = np.array([v for _, v in values])
    error = numbers.std() / np.sqrt(500)
    assert interval is not None
    assert interval == pytest.approx((numbers.mean() - 1.96 * error, numbers.mean() + 1.96 * error), abs=0.2 * error)


@pytest.mark.parametrize("kwargs", [{"repeat": 1}, {"sample": 1}, {"turn": 1}])
def test_draws_questions_not_what_belongs_to_them(kwargs: dict[str, int]) -> None:
    """More repeats, samples or turns of the same three questions add no certainty."""

    def width(**more: int) -> float:
        where = [{}, more] if more else [{}]
        baseline = [plain(10, question=f"q{q}", **place) for q in range(3) for place in where]
        draft = [record([0] * 9, question=f"q{q}", seconds=0.5 + q, **place) for q in range(3) for place in where]
        interval = speedup_interval(paired(baseline, draft))
        assert interval is not None
        return interval[1] - interval[0]

    assert width() == pytest.approx(width(**kwargs)) and width() > 0.5


def test_order_of_rows_does_not_matter_and_two_questions_have_no_interval() -> None:
    records = [record([q % 3] * 5, question=f"q{q}") for q in range(7)]
    assert length_interval(records) == length_interval(records[::-1])
    assert length_interval([]) is None is speedup_interval([])
    assert length_interval(records[1:2]) is None is length_interval(records[1:3]), "one question, two"
    few = [record([]), *(record([2], question=f"q{q}") for q in (1, 2))]
    assert length_interval(few) is None, "two questions with steps"
    assert length_interval([record([0, 0], question=f"q{q}") for q in range(3)]) == (1.0, 1.0)
