"""The sentence that a benchmark ends in: pays, does not pay, or no conclusion and why."""

from __future__ import annotations

from specflow.results.schema import Concluded, Conclusion, Conditions, Cost, Drift, SetResult

LEAST_LENGTH = 1.02
"""Below this acceptance length weights or template are wrong, whatever the clock says."""
MOST_BUSY = 0.25
"""Share of the machine's cores that others may use as a run begins."""
NOTED_DRIFT = 0.05
"""Change of the target's own speed over a run from which on it is told. It is no reason by itself: the two sides of a
pair run one after the other, in alternating order, so that what makes both slower leaves their ratio alone."""


def verdict(
    overall: SetResult,
    costs: Cost,
    num_speculative_tokens: int,
    *,
    tree: bool,
    drift: Drift,
    conditions: Conditions,
) -> Conclusion:
    """Judge a run by the result over all its sets. What is not known does not count against the run."""
    reasons = [
        *_wrong_output(overall),
        *_too_little(overall),
        *_unsteady(overall, drift),
        *_bad_conditions(conditions),
    ]
    notes = _notes(overall, drift)
    measured = _measured(overall, num_speculative_tokens, tree)
    if reasons:
        because = "; ".join([*reasons, *([f"measured {measured}"] if measured else [])])
        return _concluded("no conclusion", f"No conclusion: {because}", reasons, notes)
    assert overall.speedup_ci is not None, "else there is a reason"
    because = _because(overall, costs)
    if overall.speedup_ci[0] > 1.0:
        return _concluded("pays", f"Pays: {measured}{because}", [], notes)
    return _concluded("does not pay", f"Does not pay: {measured}{because}", [], notes)


def _concluded(conclusion: Concluded, sentence: str, reasons: list[str], notes: list[str]) -> Conclusion:
    text = _sentences(sentence, *notes)
    return Conclusion(conclusion=conclusion, sentence=text, reasons=reasons, notes=notes)


def _sentences(*parts: str) -> str:
    return " ".join(f"{part}." for part in parts)


def _wrong_output(overall: SetResult) -> list[str]:
    """Reasons for which the numbers are of something else than lossless decoding."""
    found = []
    if overall.baseline_repeats_equal is False:
        found.append("the target alone answers otherwise from repeat to repeat, so nothing can be held against it")
    if overall.lossless is False:
        where, rate = overall.first_divergence, overall.lossless_rate
        assert where is not None and rate is not None, "known where `lossless` is"
        found.append(
            f"greedy output differs from the target's own in {1 - rate:.1%} of the runs, first in "
            f"{where.set}/{where.question_id} at token {where.position}"
        )
    for name, row in overall.references.items():
        if row.lossless is False:
            found.append(f"greedy output of reference row {name} differs from the target's own: verification is wrong")
    null = overall.references.get("null")
    if null is not None and null.acceptance_length > 1.0 and null.lossless:
        found.append(f"wrong drafts were accepted (reference row null: {null.acceptance_length:.3f})")
    elif null is not None and null.speedup_ci is not None and null.speedup_ci[0] > 1.0:
        low, high = null.speedup_ci
        found.append(
            f"wrong drafts are faster than none (reference row null: {null.speedup:.2f}x, 95% CI {low:.2f} to "
            f"{high:.2f}), which no honest clock shows"
        )
    length = overall.acceptance_length
    if length is not None and length < LEAST_LENGTH:
        found.append(f"acceptance length is {length:.2f}, which means wrong weights or template")
    return found


def _too_little(overall: SetResult) -> list[str]:
    if overall.acceptance_length is None:
        return ["the draft did not run"]
    if overall.speedup is None:
        return ["the target alone did not run, so there is nothing to compare with"]
    if overall.speedup_ci is None:
        number = overall.num_questions
        return [f"{number} question{'s give' if number > 1 else ' gives'} no interval"]
    low, high = overall.speedup_ci
    return ["the interval of the speedup includes 1"] if low <= 1.0 <= high else []


def _unsteady(overall: SetResult, drift: Drift) -> list[str]:
    if overall.speedup is None:
        return []
    effect = abs(overall.speedup - 1.0)
    speedups = [row.speedup for row in drift.by_repeat if row.speedup is not None]
    if max(speedups) - min(speedups) <= effect:
        return []
    told = ", ".join(f"{value:.2f}" for value in speedups)
    return [f"the speedup drifted by more than the effect of {effect:.1%} between repeats ({told})"]


def _shown_change(drift: Drift) -> float:
    """Change of the target's own speed over the run; 0 where it is not known or not more than scatter."""
    change, interval = drift.baseline_change, drift.baseline_change_ci
    return 0.0 if change is None or interval is None or interval[0] <= 0.0 <= interval[1] else change


def _bad_conditions(conditions: Conditions) -> list[str]:
    found = []
    if conditions.shared_cpu:
        found.append("several workers measured on one CPU at the same time")
    busy = conditions.busy_share
    if busy is not None and busy > MOST_BUSY:
        found.append(f"other processes used {busy:.0%} of the machine's cores as the run began")
    return found


def _notes(overall: SetResult, drift: Drift) -> list[str]:
    change = _shown_change(drift)
    if overall.speedup is None or abs(change) < NOTED_DRIFT:
        return []
    speedups = ", ".join(f"{row.speedup:.2f}" for row in drift.by_repeat if row.speedup is not None)
    return [f"The target's own speed changed by {change:+.1%} over the run; speedup by repeat {speedups}"]


def _measured(overall: SetResult, num_speculative_tokens: int, tree: bool) -> str:
    if overall.speedup is None or overall.acceptance_length is None:
        return ""
    interval, number = overall.speedup_ci, overall.num_questions
    within = "" if interval is None else f" (95% CI {interval[0]:.2f} to {interval[1]:.2f})"
    drafting = f"a tree of depth {num_speculative_tokens}" if tree else f"K = {num_speculative_tokens}"
    return f"{overall.speedup:.2f}x{within} over {number} question{'s' if number > 1 else ''} at {drafting}"


def _because(overall: SetResult, costs: Cost) -> str:
    if costs.predicted_speedup is None:
        return ""
    return (
        f", because acceptance length x t_target / (t_draft + t_verify) = {overall.acceptance_length:.2f} x "
        f"{costs.t_target_ms:.1f} ms / ({costs.t_draft_ms:.1f} + {costs.t_verify_ms:.1f} ms) = "
        f"{costs.predicted_speedup:.2f}"
    )
