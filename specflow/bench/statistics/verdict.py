"""The sentence that a benchmark ends in: pays, does not pay, or no conclusion and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LEAST_LENGTH = 1.02
"""Below this acceptance length weights or template are wrong, whatever the clock says."""
MOST_BUSY = 0.25
"""Share of the machine's cores that others may use as a run begins."""
NOTED_DRIFT = 0.05
"""Change of the target's own speed over a run from which on it is told. It is no reason by itself: the two sides of a
pair run one after the other, in alternating order, so that what makes both slower leaves their ratio alone."""


@dataclass(frozen=True)
class Verdict:
    conclusion: str
    """pays, does not pay, or no conclusion."""
    sentence: str
    reasons: list[str]
    """Why no conclusion can be drawn; empty where one can."""
    notes: list[str]
    """What a reader should know besides."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verdict(
    overall: Mapping[str, Any],
    costs: Mapping[str, float | None],
    num_speculative_tokens: int,
    *,
    tree: bool = False,
    drift: Mapping[str, Any] | None = None,
    conditions: Mapping[str, Any] | None = None,
) -> Verdict:
    """Judge a run by the summary over all its sets.

    `drift` is drift.drift's. `conditions`: `busy_share` of drift.machine_load, and `shared_cpu`, whether several
    workers measured on one CPU at the same time; what is not known does not count against the run.
    """
    reasons = [
        *_wrong_output(overall),
        *_too_little(overall),
        *_unsteady(overall, drift or {}),
        *_bad_conditions(conditions or {}),
    ]
    notes = _notes(overall, drift or {})
    measured = _measured(overall, num_speculative_tokens, tree)
    if reasons:
        because = "; ".join([*reasons, *([f"measured {measured}"] if measured else [])])
        return Verdict("no conclusion", _sentences(f"No conclusion: {because}", *notes), reasons, notes)
    pays = overall["speedup_ci"][0] > 1.0
    sentence = f"{'Pays' if pays else 'Does not pay'}: {measured}{_because(overall, costs)}"
    return Verdict("pays" if pays else "does not pay", _sentences(sentence, *notes), [], notes)


def _sentences(*parts: str) -> str:
    return " ".join(f"{part}." for part in parts)


def _wrong_output(overall: Mapping[str, Any]) -> list[str]:
    """Reasons for which the numbers are of something else than lossless decoding."""
    found = []
    if overall["baseline_repeats_equal"] is False:
        found.append("the target alone answers otherwise from repeat to repeat, so nothing can be held against it")
    if overall["lossless"] is False:
        where = overall["first_divergence"]
        found.append(
            f"greedy output differs from the target's own in {1 - overall['lossless_rate']:.1%} of the runs, first in "
            f"{where['set']}/{where['question_id']} at token {where['position']}"
        )
    for name, row in overall["references"].items():
        if row["lossless"] is False:
            found.append(f"greedy output of reference row {name} differs from the target's own: verification is wrong")
    null = overall["references"].get("null")
    if null is not None and null["acceptance_length"] > 1.0 and null["lossless"]:
        found.append(f"wrong drafts were accepted (reference row null: {null['acceptance_length']:.3f})")
    elif null is not None and (interval := null.get("speedup_ci")) and interval[0] > 1.0:
        found.append(
            f"wrong drafts are faster than none (reference row null: {null['speedup']:.2f}x, 95% CI {interval[0]:.2f} "
            f"to {interval[1]:.2f}), which no honest clock shows"
        )
    length = overall["acceptance_length"]
    if length is not None and length < LEAST_LENGTH:
        found.append(f"acceptance length is {length:.2f}, which means wrong weights or template")
    return found


def _too_little(overall: Mapping[str, Any]) -> list[str]:
    if overall["acceptance_length"] is None:
        return ["the draft did not run"]
    if overall["speedup"] is None:
        return ["the target alone did not run, so there is nothing to compare with"]
    if overall["speedup_ci"] is None:
        number = overall["num_questions"]
        return [f"{number} question{'s give' if number > 1 else ' gives'} no interval"]
    low, high = overall["speedup_ci"]
    return ["the interval of the speedup includes 1"] if low <= 1.0 <= high else []


def _unsteady(overall: Mapping[str, Any], drift: Mapping[str, Any]) -> list[str]:
    if overall["speedup"] is None or not drift:
        return []
    effect, speedups = abs(overall["speedup"] - 1.0), [row["speedup"] for row in drift["by_repeat"]]
    if max(speedups) - min(speedups) <= effect:
        return []
    told = ", ".join(f"{value:.2f}" for value in speedups)
    return [f"the speedup drifted by more than the effect of {effect:.1%} between repeats ({told})"]


def _shown_change(drift: Mapping[str, Any]) -> float:
    """Change of the target's own speed over the run; 0 where it is not known or not more than scatter."""
    interval = drift.get("baseline_change_ci")
    return 0.0 if interval is None or interval[0] <= 0.0 <= interval[1] else float(drift["baseline_change"])


def _bad_conditions(conditions: Mapping[str, Any]) -> list[str]:
    found = []
    if conditions.get("shared_cpu"):
        found.append("several workers measured on one CPU at the same time")
    busy = conditions.get("busy_share")
    if busy is not None and busy > MOST_BUSY:
        found.append(f"other processes used {busy:.0%} of the machine's cores as the run began")
    return found


def _notes(overall: Mapping[str, Any], drift: Mapping[str, Any]) -> list[str]:
    change = _shown_change(drift)
    if overall["speedup"] is None or abs(change) < NOTED_DRIFT:
        return []
    speedups = ", ".join(f"{row['speedup']:.2f}" for row in drift["by_repeat"])
    return [f"The target's own speed changed by {change:+.1%} over the run; speedup by repeat {speedups}"]


def _measured(overall: Mapping[str, Any], num_speculative_tokens: int, tree: bool) -> str:
    if overall["speedup"] is None or overall["acceptance_length"] is None:
        return ""
    interval, number = overall["speedup_ci"], overall["num_questions"]
    within = "" if interval is None else f" (95% CI {interval[0]:.2f} to {interval[1]:.2f})"
    drafting = f"a tree of depth {num_speculative_tokens}" if tree else f"K = {num_speculative_tokens}"
    return f"{overall['speedup']:.2f}x{within} over {number} question{'s' if number > 1 else ''} at {drafting}"


def _because(overall: Mapping[str, Any], costs: Mapping[str, float | None]) -> str:
    if costs["predicted_speedup"] is None:
        return ""
    return (
        f", because acceptance length x t_target / (t_draft + t_verify) = {overall['acceptance_length']:.2f} x "
        f"{costs['t_target_ms']:.1f} ms / ({costs['t_draft_ms']:.1f} + {costs['t_verify_ms']:.1f} ms) = "
        f"{costs['predicted_speedup']:.2f}"
    )
