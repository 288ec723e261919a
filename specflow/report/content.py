"""What a family's page shows: its results as their files have them, and what is told beside them.

Templates and figures read these by attribute, so that a field that is renamed ends in an error, never in a gap.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specflow.bench.served.metrics import latencies
from specflow.bench.statistics.records import BASELINE, DRAFT, by_engine, read_records
from specflow.config import STAGE_NAMES
from specflow.config_bench import HELDOUT, StaticTree
from specflow.files import read_json
from specflow.pages import charts
from specflow.pages.page import tone
from specflow.paths import Paths
from specflow.results.schema import Identity, ReferenceRow, SetResult, Summary, family_summary
from specflow.results.served import Percentiles, Served, family_served

SPENT = ("seconds", "gpu_seconds", "gpu_joules", "gpu_memory_peak_gb", "gpu_utilisation_mean")
"""Of a stage's metrics: what it took (docs/gpus.md)."""
REFERENCES = {
    "oracle": (
        "always right",
        "knows the target's answer and pays for no draft: no draft of this length is faster here",
    ),
    "null": ("always wrong", "every draft is refused: what verifying for nothing costs"),
    "lookup": ("n-gram lookup", "copies from the text so far, without a model: what a trained draft has to beat"),
    "assistant": ("assistant model", "an independent small model with the same tokenizer"),
}
"""Reference rows: their name, and what they bound."""
ENGINES = {DRAFT: charts.DRAFT, BASELINE: charts.ALONE}


@dataclass(frozen=True)
class Bound:
    """A reference row with what it bounds."""

    label: str
    bounds: str
    row: ReferenceRow
    step_cost: float | None
    """Length of one of its steps in plain steps of the target."""


@dataclass(frozen=True)
class Latency:
    """Times of single requests in process, batch 1, by one engine."""

    engine: str
    num_runs: int
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    e2e_ms: Percentiles
    tpots_ms: list[float]
    """Of each request, ascending."""


@dataclass(frozen=True)
class Trained:
    """The best evaluation of training, to be set against the benchmark."""

    step: int
    acceptance_length: float
    num_positions: int
    acceptance_length_at_k: float | None
    """For the benchmark's number of drafted tokens; None for a tree, or where training did not look that far."""
    heldout: SetResult | None


@dataclass(frozen=True)
class FamilyPage:
    name: str
    summary: Summary
    tone: str
    drafting: str
    machine: str
    references: list[Bound]
    latency: list[Latency]
    step_cost: float | None
    """Length of a step with the draft in plain steps of the target."""
    served: Served | None
    tune: Mapping[str, Any] | None
    """What `specflow tune` last found for this very draft, with a link to its page."""
    trained: Trained | None
    training: list[Mapping[str, Any]]
    """Points of the training loss."""
    evals: list[Mapping[str, Any]]
    eval_survival: list[float]
    coverage: Mapping[str, float]
    """Share of answer tokens in the draft vocabulary, by category."""
    data: Mapping[str, Any] | None
    """data_report.json."""
    identity: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    spent: Mapping[str, Any]
    raw: list[tuple[str, str]]
    """(name, link relative to the report) of the files that the numbers come from."""

    @property
    def overall(self) -> SetResult:
        return self.summary.overall

    @property
    def rows(self) -> dict[str, SetResult]:
        """Results by prompt set, of several sets all together last."""
        sets = self.summary.sets
        return {**sets, "all sets": self.overall} if len(sets) > 1 else sets

    @property
    def source(self) -> str:
        return self.summary.identity.target.source

    @property
    def served_tone(self) -> str:
        return tone(self.served.verdict) if self.served else ""

    @property
    def pays_up_to(self) -> str:
        """Up to how many requests at once the draft pays through a server, for a cell of a table."""
        if self.served is None:
            return "-"
        if self.served_tone == "open":
            return "no conclusion"
        if self.served_tone == "bad":
            return "does not pay"
        stops = self.served.break_even_concurrency
        return f"{self.served.levels[-1].concurrency} or more" if stops is None else f"about {stops:.1f}"


def read_family(name: str, paths: Paths) -> FamilyPage:
    """Raises UserError naming the stage whose file is missing, damaged or of another version."""
    summary = family_summary(paths)
    facts = read_json(paths.target, what="target facts", made_by=f"dvc repro fetch@{name}")
    evals = _optional(paths.plot("eval.json")) or []
    best = max(evals, key=lambda point: point["expected_acceptance_length"], default=None)
    identity = summary.identity.to_json()
    identity |= {"architecture": facts["architecture"], "parameters": facts["num_parameters"]}
    settings = summary.settings.model_dump(mode="json", exclude={"questions", "sweep_questions"})
    return FamilyPage(
        name=name,
        summary=summary,
        tone=tone(summary.verdict),
        drafting=drafting(summary),
        machine=_machine(summary.identity),
        references=_bounds(summary.overall),
        latency=_latency(paths.bench / "records.jsonl", name),
        step_cost=_step_cost(summary.overall),
        served=family_served(paths),
        tune=_tune(paths, summary),
        trained=_trained(best, summary),
        training=_optional(paths.plot("training.json")) or [],
        evals=evals,
        eval_survival=_survival(best) if best else [],
        coverage={p["category"]: p["coverage"] for p in _optional(paths.plot("coverage.json")) or []},
        data=_optional(paths.prompts / "data_report.json"),
        identity=_rows(identity),
        settings=_rows(settings),
        spent=_spent(paths),
        raw=_raw_files(paths),
    )


def drafting(summary: Summary) -> str:
    """How tokens are drafted, in words."""
    tree, k = summary.tree, summary.num_speculative_tokens
    if tree is None:
        return f"chain of {k} token{'s' if k != 1 else ''}"
    if isinstance(tree, StaticTree):
        return f"static tree of {len(tree.branches)} tokens, {k} deep"
    return f"tree of at most {tree.total_token - 1} tokens, {tree.depth} deep, {tree.top_k} branches a level"


def _machine(identity: Identity) -> str:
    """The device that answered, and the software that drove it."""
    on_gpu = identity.device != "cpu"
    device = identity.device if on_gpu else f"{identity.cpu}, {identity.torch_threads} threads"
    return f"{device}, {identity.target.dtype}, torch {identity.versions.torch}"


def _bounds(result: SetResult) -> list[Bound]:
    return [
        Bound(label, bounds, row, _step_cost(row))
        for key, (label, bounds) in REFERENCES.items()
        if (row := result.references.get(key)) is not None
    ]


def _step_cost(row: SetResult | ReferenceRow) -> float | None:
    """Acceptance length over decode speedup: how many plain steps of the target a step takes."""
    return row.acceptance_length / row.decode_speedup if row.decode_speedup and row.acceptance_length else None


def _latency(file: Path, family: str) -> list[Latency]:
    if not file.exists():
        return []
    engines = by_engine(read_records(file, made_by=f"dvc repro bench@{family}"))
    return [
        Latency(
            engine=label,
            num_runs=len(records),
            ttft_ms=latencies([record.prefill_s for record in records]),
            tpot_ms=latencies(tpots := [r.decode_s / (len(r.token_ids) - 1) for r in records if len(r.token_ids) > 1]),
            e2e_ms=latencies([record.total_s for record in records]),
            tpots_ms=sorted(1e3 * tpot for tpot in tpots),
        )
        for engine, label in ENGINES.items()
        if (records := engines.get(engine))
    ]


def _survival(point: Mapping[str, float]) -> list[float]:
    rates: list[float] = []
    while (key := f"survival_{len(rates) + 1}") in point:
        rates.append(point[key])
    return rates


def _trained(best: Mapping[str, Any] | None, summary: Summary) -> Trained | None:
    if best is None:
        return None
    survival, k = _survival(best), summary.num_speculative_tokens
    chain = summary.tree is None and len(survival) >= k
    return Trained(
        step=best["step"],
        acceptance_length=best["expected_acceptance_length"],
        num_positions=len(survival),
        acceptance_length_at_k=1.0 + sum(survival[:k]) if chain else None,
        heldout=summary.sets.get(HELDOUT),
    )


def _spent(paths: Paths) -> dict[str, Any]:
    """What each stage took, of those that measured it, and the sums; `gpus` says whether any had a GPU."""
    rows = []
    for stage in STAGE_NAMES:
        metrics = _optional(paths.metrics(stage)) or {}
        if "seconds" in metrics:
            rows.append({"stage": stage, **{key: metrics.get(key) for key in SPENT}})
    total: dict[str, Any] = {"stage": "all stages"} | dict.fromkeys(SPENT)
    for key in ("seconds", "gpu_seconds", "gpu_joules"):
        if known := [row[key] for row in rows if row[key] is not None]:
            total[key] = sum(known)
    return {"rows": [*rows, total] if len(rows) > 1 else rows, "gpus": total["gpu_seconds"] is not None, "total": total}


def _tune(paths: Paths, summary: Summary) -> dict[str, Any] | None:
    found = _optional(paths.state / "tune" / "tune.json")
    if found is None or found["identity"]["draft_digest"] != summary.identity.draft_digest:
        return None
    return {**found, "link": _link(paths.state / "tune" / "tune.html", paths)}


def _rows(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (key, text) rows."""
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        label = f"{prefix}{key}".replace("_", " ")
        if isinstance(inner, dict):
            rows += _rows(inner, f"{label} / ")
        else:
            rows.append((label, inner if isinstance(inner, str) else json.dumps(inner)))
    return rows


def _raw_files(paths: Paths) -> list[tuple[str, str]]:
    files = [
        paths.target,
        paths.prompts / "data_report.json",
        paths.vocab / "coverage.json",
        paths.draft / "config.json",
    ]
    files += [paths.export, paths.bench / "summary.json", paths.bench / "records.jsonl"]
    files += [paths.bench / name for name in ("scores.jsonl", "served.json", "served_records.jsonl")]
    files += sorted((paths.base / "metrics").glob("*.json")) + sorted((paths.base / "plots").glob("*.json"))
    found = [file for file in files if file.exists()]
    return [(file.relative_to(paths.base).as_posix(), _link(file, paths)) for file in found]


def _link(file: Path, paths: Paths) -> str:
    return Path(os.path.relpath(file, paths.report)).as_posix()


def _optional(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
