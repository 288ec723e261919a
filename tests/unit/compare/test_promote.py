"""Who becomes champion: closed-form cases of the paired interval, and everything that forbids a comparison."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from specflow.compare.promote import Evidence, decide, differences, paired_interval, shortcomings
from specflow.results.schema import Conditions
from tests.evidence import make_records, make_summary
from tests.results import changed, summary_from

FASTER = {"a": 2.0, "b": 2.0, "c": 2.0}
QUESTIONS = [f"q{number}" for number in range(8)]


def evidence(
    speedups: float | dict[str, float], *, base_s: float = 1.0, draft: str = "old", **changes: Any
) -> Evidence:
    by_question = speedups if isinstance(speedups, dict) else dict.fromkeys(QUESTIONS, speedups)
    records = make_records(by_question, base_s=base_s)
    return Evidence(make_summary(records, draft=draft, **changes), records)


def test_equal_ratios_give_an_interval_without_width() -> None:
    """1.5 over 1.25 is 1.2 on every question, so without any of them; a slower machine changes nothing."""
    new, old = evidence(1.5, base_s=3.0, draft="new"), evidence(1.25)
    assert paired_interval(new, old) == pytest.approx((1.2, 1.2, 1.2))
    decision = decide(new, [old])
    assert decision.promote
    assert "1.200 times as fast (95 % interval 1.200 to 1.200)" in " ".join(decision.sentences)


def test_a_slower_draft_stays_behind() -> None:
    decision = decide(evidence(1.25, draft="new"), [evidence(1.5)])
    assert not decision.promote and "lies below 1" in decision.sentences[-1]


def test_pairing_sees_what_separate_intervals_hide() -> None:
    """Speedups from 1.1 to 2.5 have wide intervals that overlap, but 4 % more on each question is 4 % more."""
    spread = {question: 1.1 + 0.2 * number for number, question in enumerate(QUESTIONS)}
    old, new = evidence(spread), evidence({q: 1.04 * s for q, s in spread.items()}, draft="new")
    interval, before = new.summary.overall.speedup_ci, old.summary.overall.speedup
    assert interval is not None and before is not None and interval[0] < before
    value, low, high = paired_interval(new, old)
    assert value == pytest.approx(1.04) and low == pytest.approx(1.04) and high == pytest.approx(1.04)
    assert decide(new, [old]).promote


def test_better_here_and_worse_there_decides_nothing() -> None:
    """Half of the questions twice and half of them half as fast: 1, and as far below it as above."""
    old = evidence({"a": 2.0, "b": 4.0, "c": 2.0, "d": 4.0})
    new = evidence({"a": 4.0, "b": 2.0, "c": 4.0, "d": 2.0}, draft="new")
    value, low, high = paired_interval(new, old)
    assert value == pytest.approx(1.0) and low * high == pytest.approx(1.0) and low < 0.4
    decision = decide(new, [old])
    assert not decision.promote and "includes 1" in decision.sentences[-1]


def test_ratio_of_sums_weighs_questions_by_their_time() -> None:
    """Draft seconds 1/2 + 2/1.25 = 2.1 against 3/1.25 = 2.4 for the same tokens: 2.4 / 2.1."""
    new, old = evidence({"a": 2.0, "b": 1.25, "c": 1.25}, draft="new"), evidence({"a": 1.25, "b": 1.25, "c": 1.25})
    value, low, high = paired_interval(new, old)
    assert value == pytest.approx(2.4 / 2.1)
    assert low < 1.0 < high


def test_the_first_champion_must_pay() -> None:
    assert decide(evidence(1.2), None).promote
    slow = decide(evidence(0.9), None)
    assert not slow.promote and "0.90 to 0.90, does not lie above 1" in slow.sentences[-1]
    unsure = decide(evidence({"a": 0.8, "b": 1.5}), None)
    assert not unsure.promote


def test_a_lossy_draft_is_never_champion() -> None:
    new = evidence(3.0, draft="new")
    new.records[1].token_ids[5] = 99
    lossy = Evidence(make_summary(new.records, draft="new"), new.records)
    decision = decide(lossy, [evidence(1.1)])
    assert not decision.promote and "differs from the target's own in 4.2% of the runs" in decision.sentences[-1]


def test_one_question_and_a_length_of_one_are_shortcomings() -> None:
    none = "its benchmark allows no conclusion: "
    assert shortcomings(evidence({"a": 2.0})) == [f"{none}1 question gives no interval"]
    rejected = [dataclasses.replace(r, steps=[[1, 0]] * 12) if r.engine == "draft" else r for r in make_records(FASTER)]
    broken = Evidence(make_summary(rejected), rejected)
    assert shortcomings(broken) == [f"{none}acceptance length is 1.00, which means wrong weights or template"]


def test_a_benchmark_that_allows_no_conclusion_makes_no_champion() -> None:
    records = make_records(FASTER)
    busy = summary_from(records, num_speculative_tokens=1, conditions=Conditions(busy_share=0.5))
    decision = decide(Evidence(busy, records), None)
    assert not decision.promote and "allows no conclusion: other processes used 50%" in decision.sentences[-1]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"target": {"digest": "another"}}, "other target (another then, target-digest now)"),
        ({"target": {"dtype": "bfloat16"}}, "other dtype"),
        ({"cpu": "Other CPU"}, "other machine (Other CPU, 2 threads, cpu then"),
        ({"torch_threads": 4}, "other machine"),
        ({"device": "H100"}, "other machine"),
        ({"versions": {"torch": "2.12.0"}}, "other engine"),
        ({"versions": {"engine": "ba9876543210"}}, "other engine"),
        ({"max_new_tokens": 64}, "other prompts or limits"),
        ({"temperature": 1.0}, "other prompts or limits"),
        ({"questions": {"questions": ["q0"]}}, "other prompts or limits"),
    ],
)
def test_other_conditions_give_no_decision(changes: dict[str, Any], reason: str) -> None:
    decision = decide(evidence(1.5, draft="new"), [evidence(1.2, **changes)])
    text = " ".join(decision.sentences)
    assert not decision.promote and "No decision" in text and reason in text
    # The champion's older benchmark under the same conditions will do.
    assert decide(evidence(1.5, draft="new"), [evidence(1.2, **changes), evidence(1.2)]).promote


def test_other_prompts_and_other_answers_give_no_decision() -> None:
    new, old = evidence(1.5, draft="new"), evidence(1.2)
    old.records[:] = [record for record in old.records if record.question_id != "q3"]
    assert differences(new, old) == ["1 of 8 prompts are not in both"]
    old = evidence(1.2)
    for record in old.records:
        record.token_ids[-1] = 77
    assert "the target alone answers otherwise now" in differences(new, old)[0]


def test_a_champion_without_records_gives_no_decision() -> None:
    decision = decide(evidence(1.5), [])
    assert not decision.promote and "no benchmark with records of it" in decision.sentences[-2]


def test_other_numbers_of_repeats_and_drafted_tokens_compare() -> None:
    new, old = evidence(1.5, draft="new"), evidence(1.25)
    records = make_records(dict.fromkeys(QUESTIONS, 1.5), repeats=5)
    summary = changed(make_summary(records, draft="new"), num_speculative_tokens=4)
    assert paired_interval(Evidence(summary, records), old) == pytest.approx(paired_interval(new, old))
    assert decide(Evidence(summary, records), [old]).promote
