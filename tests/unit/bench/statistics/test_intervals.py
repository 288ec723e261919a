"""Bootstrap intervals against another implementation and against closed forms."""

import random
import statistics

import numpy as np
import pytest

from specflow.bench.statistics.intervals import NUM_RESAMPLES, difference_interval, length_interval, speedup_interval
from specflow.bench.statistics.records import paired
from tests.bench_records import plain, record


def test_same_as_a_bootstrap_written_out() -> None:
    """Questions drawn one by one with another generator, records listed and divided: both are within the noise of 2000
    draws (standard error of a 2.5 % quantile here: below 0.01)."""
    generator = random.Random(0)
    questions = []
    for q in range(12):
        factor = generator.uniform(0.6, 1.1)
        rows = [(plain(4 + q, question=f"q{q}", repeat=r), record([0] * (3 + q), question=f"q{q}", repeat=r,
                 seconds=factor * generator.uniform(0.95, 1.05))) for r in range(3)]  # fmt: skip
        questions.append(rows)
    found = []
    for _ in range(NUM_RESAMPLES):
        drawn = [pair for _ in questions for pair in questions[generator.randrange(len(questions))]]
        rates = [
            sum(len(r.token_ids) for r in side) / sum(r.total_s for r in side) for side in zip(*drawn, strict=True)
        ]
        found.append(rates[1] / rates[0])
    cuts = statistics.quantiles(found, n=40, method="inclusive")
    interval = speedup_interval([pair for rows in questions for pair in rows], seed=1)
    assert interval == pytest.approx((cuts[0], cuts[-1]), abs=0.03)
    assert cuts[-1] - cuts[0] > 0.1


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
    interval = length_interval(records, seed=0)
    assert interval is not None
    assert interval == pytest.approx((1 + ratio - 1.96 * error, 1 + ratio + 1.96 * error), abs=0.2 * error)


def test_difference_interval_is_the_means() -> None:
    generator = np.random.default_rng(0)
    values = [((("s", f"q{q}"), float(v))) for q, v in enumerate(generator.normal(0.1, 0.5, size=500))]
    interval = difference_interval(values, seed=0)
    numbers = np.array([v for _, v in values])
    error = numbers.std() / np.sqrt(500)
    assert interval is not None
    assert interval == pytest.approx((numbers.mean() - 1.96 * error, numbers.mean() + 1.96 * error), abs=0.2 * error)


def test_covers_a_known_speedup() -> None:
    """Per-question speedups around 1.5: the 95 % interval covers the truth about that often, not by being wide."""
    generator, covered, widths = np.random.default_rng(0), 0, []
    for trial in range(60):
        baseline, draft = [], []
        for q in range(25):
            baseline += [plain(20, question=f"q{q}", repeat=r, seconds=1.5) for r in range(2)]
            seconds = 1.0 + generator.normal(0, 0.1)
            draft += [record([0] * 19, question=f"q{q}", repeat=r, seconds=seconds) for r in range(2)]
        interval = speedup_interval(paired(baseline, draft), seed=trial)
        assert interval is not None
        covered += interval[0] <= 1.5 <= interval[1]
        widths.append(interval[1] - interval[0])
    assert covered >= 50 and np.mean(widths) < 0.2


@pytest.mark.parametrize("kwargs", [{"repeat": 1}, {"sample": 1}, {"turn": 1}])
def test_draws_questions_not_what_belongs_to_them(kwargs: dict[str, int]) -> None:
    """More repeats, samples or turns of the same two questions add no certainty."""

    def width(**more: int) -> float:
        where = [{}, more] if more else [{}]
        baseline = [plain(10, question=f"q{q}", **place) for q in range(2) for place in where]
        draft = [record([0] * 9, question=f"q{q}", seconds=0.5 + q, **place) for q in range(2) for place in where]
        interval = speedup_interval(paired(baseline, draft), seed=0)
        assert interval is not None
        return interval[1] - interval[0]

    assert width() == pytest.approx(width(**kwargs)) and width() > 0.5


def test_order_of_rows_does_not_matter_and_one_question_has_no_interval() -> None:
    records = [record([q % 3] * 5, question=f"q{q}") for q in range(7)]
    assert length_interval(records, seed=0) == length_interval(records[::-1], seed=0)
    assert length_interval([], seed=0) is None is speedup_interval([], seed=0)
    assert length_interval(records[1:2], seed=0) is None, "one question"
    assert length_interval([record([]), record([2], question="q1")], seed=0) is None, "one question with steps"
