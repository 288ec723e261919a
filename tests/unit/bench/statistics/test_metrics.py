"""Benchmark definitions against numbers worked out by hand."""

import dataclasses

import pytest

from specflow.bench.statistics import metrics
from specflow.bench.statistics.records import Record, paired
from tests.bench_records import plain, record


def test_gap_in_the_histogram() -> None:
    """{1: 50, 3: 50}: half of the steps reach 3, and all that reach 2 reach 3."""
    accepted = [0] * 50 + [2] * 50
    histogram = metrics.histogram_of(accepted)
    assert histogram == {1: 50, 3: 50}
    assert metrics.survival_of(histogram, 2) == [0.5, 0.5]
    assert metrics.conditional_of([0.5, 0.5]) == [0.5, 1.0]
    survival = metrics.survival_of(histogram, 3)
    assert survival == [0.5, 0.5, 0.0]
    assert metrics.conditional_of(survival) == [0.5, 1.0, 0.0]
    result = metrics.acceptance([record(accepted)], 3)
    assert result.length == 2.0 == 1 + sum(result.survival) == 1 + result.num_accepted / result.num_steps


def test_the_bonus_token_counts() -> None:
    """Two steps that accept all 3 of 3 drafts emit 4 tokens each; the prefill's token belongs to no step."""
    row = record([3, 3])
    assert len(row.token_ids) == 9
    result = metrics.acceptance([row], 3)
    assert (result.length, result.survival, result.histogram) == (4.0, [1.0, 1.0, 1.0], {4: 2})
    assert result.draft_acceptance_rate == 1.0


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
    assert result.survival == [0.5, 0.0, 0.0] and result.length == 1.5 and result.draft_acceptance_rate == 1.0


def test_zero_drafts() -> None:
    result = metrics.acceptance([plain(5)], 3)
    assert (result.num_drafted, result.draft_acceptance_rate, result.length) == (0, 0.0, 1.0)
    assert result.survival == [0.0, 0.0, 0.0] == result.conditional and result.histogram == {1: 4}


def test_max_token_cut_inside_a_run() -> None:
    """A limit of 7 tokens: prefill 1, a step of 4, and 2 of the 4 that the last step verified."""
    row = record([3, 3], cut=2)
    assert len(row.token_ids) == 7
    result = metrics.acceptance([row], 3)
    assert result.length == 4.0 and result.num_accepted == 6
    assert metrics.decode_tok_s([row]) == pytest.approx(6 / 0.75) and metrics.tok_s([row]) == pytest.approx(7.0)


def test_end_of_sequence_inside_an_accepted_run() -> None:
    """The end token is the first of 2 accepted drafts: one draft and the bonus behind it were verified, not emitted."""
    row = dataclasses.replace(record([0, 2], cut=2), finish_reason="stop")
    assert len(row.token_ids) == 3  # the prefill's, a step's, the end token
    result = metrics.acceptance([row], 3)
    assert result.histogram == {1: 1, 3: 1} and result.length == 2.0 and result.survival == [0.5, 0.5, 0.0]


def test_tree_steps() -> None:
    """A tree drafts more nodes than a path has: 8 nodes a step of depth 3, accepted paths of 2, 0 and 3."""
    result = metrics.acceptance([record([2, 0, 3], k=8)], 3)
    assert result.length == pytest.approx(1 + 5 / 3) and result.survival == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert result.conditional == pytest.approx([2 / 3, 1.0, 0.5])
    assert (result.num_drafted, result.draft_acceptance_rate) == (24, pytest.approx(5 / 24))
    with pytest.raises(AssertionError, match="accepted over drafted"):
        metrics.acceptance([record([4], k=8)], 3)


def test_inconsistent_records_are_refused() -> None:
    with pytest.raises(AssertionError, match="steps say"):
        record([1, 1], tokens=[1, 2])
    with pytest.raises(AssertionError, match="accepted over drafted"):
        record([2], k=1)


def test_speed_is_a_ratio_of_sums_and_its_mean_another_number() -> None:
    pairs = paired(
        [plain(10, seconds=1.0), plain(90, question="q1", seconds=9.0)],
        [record([0] * 9, seconds=0.5), record([0] * 89, question="q1", seconds=9.0)],
    )
    assert metrics.speedup(pairs) == pytest.approx(10 / 9.5)
    assert metrics.speedup_mean_of_ratios(pairs) == pytest.approx((2 + 1) / 2)
    assert metrics.decode_speedup(pairs) == pytest.approx(10 / 9.5)
    assert metrics.speedup([]) is None is metrics.speedup_mean_of_ratios([]) is metrics.decode_speedup([])


def test_speedup_of_engines_that_emit_other_numbers_of_tokens() -> None:
    """Under sampling answers differ in length: rates are compared, 20 tokens in 1 s against 10 in 1 s."""
    assert metrics.speedup(paired([plain(10)], [record([1] * 9 + [0])])) == pytest.approx(2.0)


def test_pairs_need_the_same_request_sample_and_repeat() -> None:
    baseline = [plain(3), plain(3, repeat=1)]
    others = [record([1]), record([1], repeat=2), record([1], turn=1), record([1], sample=1)]
    assert [engine for _, engine in paired(baseline, others)] == [others[0]]


def test_first_divergence() -> None:
    base = plain(4, tokens=[1, 2, 3, 4])
    same, other = record([0, 0, 0], tokens=[1, 2, 3, 4]), record([0, 0, 0], tokens=[1, 2, 9, 4])
    assert metrics.losslessness([(base, same)]) == (1.0, None)
    rate, first = metrics.losslessness([(base, same), (base, other)])
    assert rate == 0.5 and first is not None
    assert (first.position, first.expected, first.got) == (2, 3, 9)
    shorter = record([0, 0], tokens=[1, 2, 3])
    first = metrics.losslessness([(base, shorter)])[1]
    assert first is not None and (first.position, first.got) == (3, None)


def test_repeats_equal() -> None:
    one, two = plain(3), plain(3, repeat=1)
    assert metrics.repeats_equal([one, two, plain(3, sample=1, tokens=[7, 8, 9])])
    assert not metrics.repeats_equal([one, plain(3, repeat=1, tokens=[7, 8, 9])])


def test_cost_predicts_the_decode_speedup() -> None:
    baseline, draft = [plain(9, seconds=0.8)], [record([1] * 4, seconds=0.5)]
    costs = metrics.cost(baseline, draft, 2.0)
    assert costs.t_target_ms == pytest.approx(0.6 * 800 / 8)
    assert costs.t_verify_ms == pytest.approx(0.6 * 500 / 4)
    assert costs.t_draft_ms == pytest.approx(0.15 * 500 / 4)
    assert costs.predicted_speedup == pytest.approx(2 * 60 / (75 + 18.75))
    assert costs.outside_share == pytest.approx(1 - 0.72 / 0.75)
    alone = metrics.cost([], draft, 2.0)
    assert alone.t_target_ms is None is alone.predicted_speedup and alone.t_draft_ms == costs.t_draft_ms


def test_records_survive_json() -> None:
    row = record([1, 2], sample=2, started_at=1e9)
    assert Record.from_json(row.to_json()) == row
    assert row.to_json()["id"] == "s/q0/0/2/0/draft"
    old = {name: value for name, value in row.to_json().items() if name not in ("sample", "started_at", "model_s")}
    assert Record.from_json(old).request == ("s", "q0", 0, 0)
    assert metrics.cost([], [row, Record.from_json(old)], 1.5).outside_share is None, "not measured in all of them"
