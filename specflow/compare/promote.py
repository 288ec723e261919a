"""`specflow promote`: whether a family's new draft becomes its champion, decided by a paired comparison, and why.

A draft's speedup is relative to the target alone in its own benchmark run, which takes the machine's state of that day
out of it. Two drafts are compared by the ratio of their speedups over the same questions (`statistics/intervals.py`).
The alias moves only where the whole interval of that ratio lies above 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specflow.bench.statistics.intervals import Sums, ratio_interval, speed_sums, speedup_of
from specflow.bench.statistics.records import BASELINE, DRAFT, Record, paired, read_records
from specflow.compare.command import CONDITIONS
from specflow.config import Params
from specflow.errors import UserError
from specflow.files import sha256_file
from specflow.paths import Paths, project_home
from specflow.results.schema import Summary, read_summary
from specflow.tracking import results


@dataclass(frozen=True)
class Evidence:
    """One benchmark of one draft."""

    summary: Summary
    records: list[Record]

    @property
    def digest(self) -> str:
        return str(self.summary.identity.draft_digest)

    def of(self, engine: str) -> list[Record]:
        return [record for record in self.records if record.engine == engine]


@dataclass(frozen=True)
class Decision:
    promote: bool
    sentences: list[str]


def read_evidence(folder: Path, made_by: str) -> Evidence:
    return Evidence(
        read_summary(folder / "summary.json", made_by=made_by),
        read_records(folder / "records.jsonl", made_by=made_by),
    )


def shortcomings(draft: Evidence) -> list[str]:
    """Why a draft may not be champion whatever it is compared with; empty where nothing speaks against it."""
    if reasons := draft.summary.conclusion.reasons:
        return [f"its benchmark allows no conclusion: {reason}" for reason in reasons]
    interval = draft.summary.overall.speedup_ci
    assert interval is not None, "else there is a reason"
    low, high = interval
    return [] if low > 1.0 else [f"the interval of its speedup, {low:.2f} to {high:.2f}, does not lie above 1"]


def differences(new: Evidence, old: Evidence) -> list[str]:
    """Why two benchmarks cannot be paired; empty where they can."""
    ours, theirs = results.conditions(new.summary), results.conditions(old.summary)
    found = [
        f"other {what} ({theirs[k]} then, {ours[k]} now)" for k, what in CONDITIONS.items() if ours[k] != theirs[k]
    ]
    if found:
        return found
    asked = [{(*r.request, r.num_prompt_tokens) for r in evidence.of(BASELINE)} for evidence in (new, old)]
    if asked[0] != asked[1]:
        return [f"{len(asked[0] ^ asked[1])} of {len(asked[0] | asked[1])} prompts are not in both"]
    if new.summary.settings.greedy:
        answers = [{r.request: r.token_ids for r in evidence.of(BASELINE)} for evidence in (new, old)]
        if answers[0] != answers[1]:
            return ["the target alone answers otherwise now, so it is not the same target or engine"]
    return []


def paired_interval(new: Evidence, old: Evidence) -> tuple[float, float, float]:
    """Speedup of the new draft over that of the old one, with its interval over questions: value, low, high.

    Each speedup is a ratio of sums: tokens per second with the draft over those of the target alone, of its own run. A
    question's turns and repeats stay together, of both drafts.
    """
    sums = [speed_sums(paired(evidence.of(BASELINE), evidence.of(DRAFT))) for evidence in (new, old)]
    assert list(sums[0]) == list(sums[1]), "checked by differences()"
    both = [np.concatenate(parts) for parts in zip(sums[0].values(), sums[1].values(), strict=True)]

    def ratio(table: Sums) -> Sums:
        found: Sums = speedup_of(table[..., :4]) / speedup_of(table[..., 4:])
        return found

    interval = ratio_interval(both, ratio)
    assert interval is not None, "a draft with too few questions has shortcomings()"
    return float(ratio(np.sum(both, axis=0))), *interval


def decide(new: Evidence, champion: Iterable[Evidence] | None) -> Decision:
    """Whether the new draft takes the alias. `champion`: its benchmarks, newest first, read only as far as needed.

    None means that the family has no champion.
    """
    overall, told = new.summary.overall, []
    if overall.speedup_ci is not None:
        low, high = overall.speedup_ci
        told.append(
            f"The new draft {new.digest[:12]} reaches {overall.speedup:.2f}x (95 % interval {low:.2f} to "
            f"{high:.2f}) at acceptance length {overall.acceptance_length:.2f}."
        )
    if overall.lossless is None:
        told.append("It was measured with sampling, so the benchmark says nothing about losslessness.")
    if found := shortcomings(new):
        return Decision(False, [*told, f"It is not promoted: {'; '.join(found)}."])
    if champion is None:
        return Decision(True, [*told, "The family has no champion, and this draft pays: it becomes the first."])
    newest: list[str] | None = None
    for old in champion:
        reasons = differences(new, old)
        if not reasons:
            return _verdict(told, new, old)
        newest = newest or reasons
    because = "; ".join(newest) if newest else "no benchmark with records of it is in the store"
    return Decision(
        False, [*told, f"No decision: the champion was measured under other conditions: {because}.", REMEDY]
    )


REMEDY = (
    "Benchmark the champion under today's conditions, or take the alias away in MLflow's model registry to start anew."
)


def _verdict(told: list[str], new: Evidence, old: Evidence) -> Decision:
    theirs = old.summary.overall
    value, low, high = paired_interval(new, old)
    told = [
        *told,
        f"The champion {old.digest[:12]} reaches {theirs.speedup:.2f}x on the same {theirs.num_questions} "
        "questions, machine and engine.",
        f"Question by question the new draft is {value:.3f} times as fast (95 % interval {low:.3f} to {high:.3f}).",
    ]
    if low > 1.0:
        return Decision(True, [*told, "The whole interval lies above 1: the new draft becomes champion."])
    if high < 1.0:
        return Decision(
            False, [*told, "The whole interval lies below 1: the new draft is slower and the champion stays."]
        )
    return Decision(False, [*told, "The interval includes 1: no difference is shown and the champion stays."])


def promote(name: str, params: Params, paths: Paths, *, dry_run: bool = False) -> Decision:
    """Decide on the family's draft as it lies on disk, and move the alias unless `dry_run`.

    Raises UserError where there is no benchmark of the exported draft, or no store.
    """
    from specflow.tracking import record, registry

    if not (paths.bench / "summary.json").exists():
        raise UserError(f"family {name!r} has no benchmark: run `dvc repro bench@{name}` first")
    bench = f"dvc repro bench@{name}"
    new = read_evidence(paths.bench, bench)
    weights = paths.export / "eagle3" / "model.safetensors"
    if not weights.exists() or sha256_file(weights) != new.digest:
        raise UserError(f"the benchmark of {name!r} is of another draft than {weights}: run `dvc repro bench@{name}`")
    home = project_home(paths.root)
    client = registry.open_registry(paths)
    current = registry.champion(client, name)
    if current is None:
        decision = decide(new, None)
    elif current.tags["draft_digest"] == new.digest:
        return Decision(False, [f"The draft {new.digest[:12]} is the champion already: version {current.version}."])
    else:
        with registry.benchmarks(client, name, current.tags["draft_digest"], home) as folders:
            decision = decide(new, (read_evidence(folder, f"{bench}, with the champion's draft") for folder in folders))
    if dry_run:
        return Decision(decision.promote, [*decision.sentences, "Dry run: the alias stays where it is."])
    version = record.registered_version(client, name, params, paths)
    why = " ".join(decision.sentences)
    if decision.promote:
        registry.crown(client, version, why)
        where = f"models:/{version.name}@{registry.CHAMPION}"
        return Decision(True, [*decision.sentences, f"{where} is now version {version.version}."])
    registry.tag_version(client, version, {"last_decision": why})
    return decision
