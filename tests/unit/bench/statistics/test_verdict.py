"""What a benchmark concludes, and every reason for which it concludes nothing."""

from typing import Any

import pytest

from specflow.bench.statistics.records import Record
from specflow.bench.statistics.summary import summary_of
from specflow.results.schema import Conclusion, Conditions
from tests.bench_records import benchmark, plain, record


def judged(records: list[Record], **kwargs: Any) -> Conclusion:
    summary = summary_of(records, **{"num_speculative_tokens": 3, "greedy": True, **kwargs})
    conclusion = summary.conclusion
    assert conclusion.sentence == summary.verdict
    assert (conclusion.conclusion == "no conclusion") == bool(conclusion.reasons)
    return conclusion


def test_pays_and_does_not() -> None:
    pays = judged(benchmark(0.7))
    assert pays.conclusion == "pays" and pays.sentence.startswith("Pays: 1.39x (95% CI 1.3")
    assert "over 6 questions at K = 3, because acceptance length x t_target" in pays.sentence
    assert judged(benchmark(1.5)).sentence.startswith("Does not pay: 0.6")
    tree = judged(benchmark(0.7, k=20), tree=True)
    assert "at a tree of depth 3" in tree.sentence


def replaced(records: list[Record], engine: str, repeat: int, tokens: list[int]) -> list[Record]:
    """The same records, but one engine answered otherwise in one repeat."""
    return [
        Record.from_json({**r.to_json(), "token_ids": tokens}) if (r.engine, r.repeat) == (engine, repeat) else r
        for r in records
    ]


OTHER = list(range(1, 12))

REASONS: list[tuple[str, list[Record], dict[str, Any], str]] = [
    ("interval", benchmark(0.97), {}, "the interval of the speedup includes 1"),
    ("length", benchmark(0.7, accepted=(0,) * 10), {}, "acceptance length is 1.00, which means wrong weights"),
    ("greedy", benchmark(0.7, tokens=OTHER), {}, "greedy output differs from the target's own in 100.0% of the runs"),
    ("where", benchmark(0.7, tokens=[0, 1, 2, 9, *range(4, 11)]), {}, "first in s/q0 at token 3"),
    ("unstable", replaced(benchmark(0.7), "baseline", 1, OTHER), {}, "alone answers otherwise from repeat to repeat"),
    ("one", benchmark(0.7, questions=1), {}, "1 question gives no interval"),
    ("two", benchmark(0.7, questions=2), {}, "2 questions give no interval"),
    ("no baseline", [r for r in benchmark(0.7) if r.engine == "draft"], {}, "the target alone did not run"),
    ("no draft", [r for r in benchmark(0.7) if r.engine == "baseline"], {}, "the draft did not run"),
    ("shared", benchmark(0.7), {"conditions": Conditions(shared_cpu=True)}, "several workers measured on one CPU"),
    (
        "busy",
        benchmark(0.7),
        {"conditions": Conditions(busy_share=0.5)},
        "other processes used 50% of the machine's cores",
    ),
    (
        "drift",
        [r for r in benchmark(0.7) if r.repeat < 2] + [r for r in benchmark(1.2) if r.repeat == 2],
        {},
        "the speedup drifted by more than the effect of 12.6% between repeats (1.39, 1.39, 0.81)",
    ),
    (
        "reference",
        [*benchmark(0.7), record([0] * 10, engine="oracle", tokens=OTHER, repeat=1)],
        {},
        "greedy output of reference row oracle differs",
    ),
    (
        "null",
        [*benchmark(0.7), record([1] * 5, engine="null", repeat=1)],
        {},
        "wrong drafts were accepted (reference row null: 2.000)",
    ),
]


@pytest.mark.parametrize(("records", "kwargs", "reason"), [case[1:] for case in REASONS], ids=[c[0] for c in REASONS])
def test_no_conclusion(records: list[Record], kwargs: dict[str, Any], reason: str) -> None:
    found = judged(records, **kwargs)
    assert found.sentence.startswith("No conclusion: ") and reason in found.sentence
    assert len([text for text in found.reasons if reason in text]) == 1


def test_wrong_drafts_that_are_faster_than_none_accuse_the_clock() -> None:
    """A draft that is always wrong costs its own time. Only an interval above 1 says otherwise, not a lucky value."""

    def with_null(seconds: list[float]) -> list[Record]:
        null = [record([0] * 10, engine="null", question=f"q{q}", repeat=1, seconds=s) for q, s in enumerate(seconds)]
        return [*benchmark(0.7), *null]

    found = judged(with_null([0.80, 0.82, 0.81, 0.83, 0.80, 0.82]))
    (reason,) = found.reasons
    assert reason.startswith("wrong drafts are faster than none (reference row null: 1.26x, 95% CI 1.2")
    assert judged(with_null([1.3, 0.70, 0.9, 1.1, 0.8, 0.9])).conclusion == "pays", "1.08x, but it scatters"
    assert judged(with_null([1.10] * 6)).conclusion == "pays"


def test_every_reason_is_told() -> None:
    found = judged(benchmark(0.97), conditions=Conditions(shared_cpu=True, busy_share=0.9))
    assert len(found.reasons) == 3


def test_drift_of_the_machine_is_told_with_the_conclusion() -> None:
    """10 % a repeat on both sides, more than the effect of 8.5 %: the pairs' ratio is the same in each repeat."""
    found = judged(benchmark(0.9, slower=0.1))
    assert found.conclusion == "pays" and len(found.notes) == 1
    assert "own speed changed by -19.1% over the run; speedup by repeat 1.08, 1.08, 1.08." in found.sentence
    assert judged(benchmark(0.5, slower=0.01)).notes == []


def test_what_is_not_known_does_not_count() -> None:
    assert judged(benchmark(0.7), conditions=Conditions(busy_share=None)).conclusion == "pays"
    untimed = [Record.from_json({**r.to_json(), "started_at": 0.0}) for r in benchmark(0.7, slower=0.3)]
    assert judged(untimed).conclusion == "pays"


def test_sampling_says_nothing_of_outputs() -> None:
    assert judged(benchmark(0.7, tokens=OTHER), greedy=False).conclusion == "pays"
    assert plain(3).engine == "baseline"
