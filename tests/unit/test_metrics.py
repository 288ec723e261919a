"""Benchmark definitions against numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest

from specflow.bench import metrics
from specflow.bench.metrics import Record


def record(
    accepted: list[int],
    *,
    engine: str = "draft",
    question: str = "q0",
    repeat: int = 0,
    k: int = 3,
    seconds: float = 1.0,
    tokens: list[int] | None = None,
    turn: int = 0,
    cut: int = 0,
    category: str = "c",
    set: str = "s",
) -> Record:
    num_tokens = 1 + sum(a + 1 for a in accepted) - cut
    return Record(
        set=set,
        question_id=question,
        category=category,
        turn=turn,
        repeat=repeat,
        engine=engine,
        order=0,
        num_prompt_tokens=5,
        token_ids=tokens or list(range(num_tokens)),
        steps=[[k, a] for a in accepted],
        num_cut=cut,
        prefill_s=0.25 * seconds,
        draft_s=0.15 * seconds,
        verify_s=0.45 * seconds,
        decode_s=0.75 * seconds,
        finish_reason="length",
    )


def plain(num_tokens: int, **kwargs: object) -> Record:
    return record([0] * (num_tokens - 1), engine="baseline", k=0, **kwargs)


def test_gap_in_the_histogram() -> None:
    """{1: 50, 3: 50}: half of the steps reach 3, and all that reach 2 reach 3."""
    accepted = [0] * 50 + [2] * 50
    histogram = metrics.histogram_of(accepted)
    assert histogram == {1: 50, 3: 50}
    survival = metrics.survival_of(histogram, 3)
    assert survival == [0.5, 0.5, 0.0]
    assert metrics.conditional_of(survival) == [0.5, 1.0, 0.0]
    result = metrics.acceptance([record(accepted)], 3)
    assert result.length == 2.0 == 1 + sum(result.survival) == 1 + result.num_accepted / result.num_steps


def test_pooled_and_macro_differ() -> None:
    result = metrics.acceptance([record([3] * 1), record([0] * 9)], 3)
    assert result.length == pytest.approx(1.3)
    assert result.macro_length == pytest.approx((4 + 1) / 2)


def test_no_steps_at_all() -> None:
    result = metrics.acceptance([record([])], 3)
    assert (result.length, result.survival, result.histogram) == (1.0, [0.0, 0.0, 0.0], {})


def test_shorter_proposals_count_as_not_accepted() -> None:
    row = dataclasses.replace(record([1, 0]), steps=[[1, 1], [0, 0]])
    result = metrics.acceptance([row], 3)
    assert result.survival == [0.5, 0.0, 0.0] and result.length == 1.5


def test_cut_last_step_counts_as_verified() -> None:
    row = record([3, 3], cut=2)
    assert len(row.token_ids) == 7
    assert metrics.acceptance([row], 3).length == 4.0


def test_inconsistent_records_are_refused() -> None:
    with pytest.raises(AssertionError, match="steps say"):
        record([1, 1], tokens=[1, 2])
    with pytest.raises(AssertionError, match="accepted over drafted"):
        metrics.acceptance([record([2], k=1)], 3)


def test_speed_is_a_ratio_of_sums_and_its_mean_another_number() -> None:
    pairs = metrics.paired(
        [plain(10, seconds=1.0), plain(90, question="q1", seconds=9.0)],
        [record([0] * 9, seconds=0.5), record([0] * 89, question="q1", seconds=9.0)],
    )
    assert metrics.speedup(pairs) == pytest.approx(10 / 9.5)
    assert metrics.speedup_mean_of_ratios(pairs) == pytest.approx((2 + 1) / 2)


def test_pairs_need_the_same_request_and_repeat() -> None:
    baseline = [plain(3), plain(3, repeat=1)]
    assert len(metrics.paired(baseline, [record([1]), record([1], repeat=2), record([1], turn=1)])) == 1


def test_interval_covers_a_known_speedup() -> None:
    """Per-question speedups around 1.5: the 95 % interval covers the truth about that often, not by being wide."""
    generator, covered, widths = np.random.default_rng(0), 0, []
    for trial in range(60):
        baseline, draft = [], []
        for q in range(25):
            for repeat in range(2):
                baseline.append(plain(20, question=f"q{q}", repeat=repeat, seconds=1.5))
            seconds = 1.0 + generator.normal(0, 0.1)
            draft += [record([0] * 19, question=f"q{q}", repeat=r, seconds=seconds) for r in range(2)]
        low, high = metrics.speedup_interval(metrics.paired(baseline, draft), seed=trial)
        covered += low <= 1.5 <= high
        widths.append(high - low)
    assert covered >= 50 and np.mean(widths) < 0.2


def test_interval_resamples_questions_not_repeats() -> None:
    """More repeats of the same two questions add no certainty."""

    def width(repeats: int) -> float:
        baseline = [plain(10, question=f"q{q}", repeat=r) for q in range(2) for r in range(repeats)]
        draft = [record([0] * 9, question=f"q{q}", repeat=r, seconds=0.5 + q) for q in range(2) for r in range(repeats)]
        low, high = metrics.speedup_interval(metrics.paired(baseline, draft), seed=0)
        return high - low

    assert width(1) == pytest.approx(width(20)) and width(1) > 0.5


def test_first_divergence() -> None:
    base = plain(4, tokens=[1, 2, 3, 4])
    same, other = record([0, 0, 0], tokens=[1, 2, 3, 4]), record([0, 0, 0], tokens=[1, 2, 9, 4])
    assert metrics.losslessness([(base, same)]) == (1.0, None)
    rate, first = metrics.losslessness([(base, same), (base, other)])
    assert rate == 0.5 and first is not None
    assert (first["position"], first["expected"], first["got"]) == (2, 3, 9)
    shorter = record([0, 0], tokens=[1, 2, 3])
    first = metrics.losslessness([(base, shorter)])[1]
    assert first is not None and (first["position"], first["got"]) == (3, None)


def test_cost_predicts_the_decode_speedup() -> None:
    baseline, draft = [plain(9, seconds=0.8)], [record([1] * 4, seconds=0.5)]
    costs = metrics.cost(baseline, draft, 2.0)
    assert costs["t_target_ms"] == pytest.approx(0.45 * 800 / 8)
    assert costs["t_verify_ms"] == pytest.approx(0.45 * 500 / 4)
    assert costs["t_draft_ms"] == pytest.approx(0.15 * 500 / 4)
    assert costs["predicted_speedup"] == pytest.approx(2 * 45 / (56.25 + 18.75))
    assert costs["outside_share"] == pytest.approx(1 - 0.6 / 0.75)


def summary(draft_seconds: float, **kwargs: object) -> tuple[dict[str, object], str]:
    accepted = kwargs.pop("accepted", [1] * 5)
    num_tokens = 1 + sum(a + 1 for a in accepted)
    records = []
    for q in range(6):
        for repeat in range(3):
            records.append(plain(num_tokens, question=f"q{q}", repeat=repeat, seconds=1 + 0.01 * q))
            records.append(
                record(accepted, question=f"q{q}", repeat=repeat, seconds=draft_seconds * (1 + 0.02 * q), **kwargs)
            )
    overall = metrics.summarise(records, num_speculative_tokens=3, temperature=0.0, seed=0)
    costs = metrics.cost(records[::2], records[1::2], overall["acceptance_length"])
    return overall, metrics.verdict(overall, costs, 3)


@pytest.mark.parametrize(
    ("seconds", "kwargs", "starts"),
    [
        (0.7, {}, "Pays: 1."),
        (1.5, {}, "Does not pay: 0."),
        (0.97, {}, "No conclusion: the interval"),
        (0.7, {"accepted": [0] * 10}, "No conclusion: acceptance length is 1.00"),
        (0.7, {"tokens": list(range(1, 12))}, "No conclusion: greedy output differs"),
    ],
)
def test_verdicts(seconds: float, kwargs: dict[str, object], starts: str) -> None:
    overall, sentence = summary(seconds, **kwargs)
    assert sentence.startswith(starts)
    assert overall["num_requests"] == 6 and overall["num_questions"] == 6


def test_summary_by_category_adds_up() -> None:
    records = []
    for category, accepted in (("a", [3, 3]), ("b", [0, 0, 0, 0])):
        num_tokens = 1 + sum(x + 1 for x in accepted)
        records += [
            plain(num_tokens, question=category, category=category),
            record(accepted, question=category, category=category),
        ]
    overall = metrics.summarise(records, num_speculative_tokens=3, temperature=0.0, seed=0)
    assert overall["acceptance_length"] == 2.0 and overall["acceptance_length_macro"] == 2.5
    assert {c: s["acceptance_length"] for c, s in overall["by_category"].items()} == {"a": 4.0, "b": 1.0}
    assert overall["lookup"] is None
    sampled = metrics.summarise(records, num_speculative_tokens=3, temperature=1.0, seed=0)
    assert sampled["lossless"] is None


def test_records_survive_json() -> None:
    row = record([1, 2])
    assert Record.from_json(row.to_json()) == row
