"""Stage `report`: a self-contained page per family, one across families first, and Markdown for pull requests.

Reads files only and computes nothing that a stage did not measure, so every number can be traced to a raw file. What a
benchmark did not measure is left out of its page.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specflow.bench.served.metrics import latencies
from specflow.bench.statistics.records import BASELINE, DRAFT, Record, by_engine
from specflow.config import STAGE_NAMES, Params
from specflow.errors import UserError
from specflow.files import atomic_path, read_json
from specflow.pages import charts
from specflow.pages.page import environment, tone
from specflow.paths import Paths
from specflow.report import figures

OVERVIEW = "report"
"""Name of the page across families, which no family may have."""
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


def run_report(params: Params, all_paths: dict[str, Paths]) -> None:
    """Write the report folder. Raises UserError naming the family whose benchmark is missing."""
    if clash := [name for name in all_paths if name.lower() == OVERVIEW]:
        raise UserError(f"a family cannot be called {clash[0]!r}, which is the page across families: rename it")
    families = [_family(name, paths) for name, paths in all_paths.items()]
    drawn = figures.overview(families)
    pages = {OVERVIEW: {"families": families, "differences": _differences(families), "figures": drawn}}
    pages |= {family["name"]: {"family": family, "figures": figures.family(family)} for family in families}
    folder = next(iter(all_paths.values())).report
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for name, context in pages.items():
            template = "overview" if name == OVERVIEW else "family"
            for kind in ("html", "md"):
                text = environment().get_template(f"report/templates/{template}.{kind}.j2").render(context)
                (temporary / f"{name}.{kind}").write_text(text.rstrip() + "\n", encoding="utf-8")


def _family(name: str, paths: Paths) -> dict[str, Any]:
    summary = read_json(paths.bench / "summary.json", what="benchmark", made_by=f"dvc repro bench@{name}")
    facts = read_json(paths.target, what="target facts", made_by=f"dvc repro fetch@{name}")
    evals = _optional(paths.plot("eval.json")) or []
    best = max(evals, key=lambda point: point["expected_acceptance_length"], default=None)
    overall, sets = summary["overall"], summary["sets"]
    identity = {**summary["identity"], "architecture": facts["architecture"], "parameters": facts["num_parameters"]}
    return {
        "name": name,
        "summary": summary,
        "tone": tone(summary["verdict"]),
        "overall": overall,
        "sets": sets,
        "rows": {**sets, "all sets": overall} if len(sets) > 1 else sets,
        "drafting": drafting(summary),
        "machine": _machine(summary["identity"]),
        "source": summary["identity"]["target"].get("source", facts["architecture"]),
        "references": _references(overall),
        "latency": _latency(paths.bench / "records.jsonl"),
        "cost": _cost(summary),
        "accuracy": _accuracy(summary.get("accuracy") or {}),
        "drift": summary.get("drift") or {},
        "tune": _tune(paths, summary),
        "trained": _trained(best, summary),
        "training": _optional(paths.plot("training.json")) or [],
        "evals": evals,
        "eval_survival": _survival(best) if best else [],
        "coverage": {p["category"]: p["coverage"] for p in _optional(paths.plot("coverage.json")) or []},
        "data": _optional(paths.prompts / "data_report.json"),
        "served": _served(paths),
        "identity": _rows(identity),
        "settings": _rows({key: value for key, value in summary["settings"].items() if not key.endswith("questions")}),
        "spent": _spent(paths),
        "raw": _raw_files(paths),
    }


def drafting(summary: Mapping[str, Any]) -> str:
    """How tokens are drafted, in words."""
    tree, k = summary.get("tree"), summary["num_speculative_tokens"]
    if tree is None:
        return f"chain of {k} token{'s' if k != 1 else ''}"
    if "branches" in tree:
        return f"static tree of {len(tree['branches'])} tokens, {k} deep"
    return f"tree of at most {tree['total_token'] - 1} tokens, {tree['depth']} deep, {tree['top_k']} branches a level"


def _machine(identity: Mapping[str, Any]) -> str:
    """The device that answered, and the software that drove it."""
    on_gpu = identity.get("device", "cpu") != "cpu"
    device = (
        identity["device"] if on_gpu else f"{identity.get('cpu', 'CPU')}, {identity.get('torch_threads', '?')} threads"
    )
    dtype = identity["target"].get("dtype")
    return ", ".join([device, *([dtype] if dtype else []), f"torch {identity['versions']['torch']}"])


def _references(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reference rows with what they bound; `step_cost` is the length of one of their steps in plain steps."""
    found = result.get("references") or {}
    return [
        {
            "key": key,
            "label": label,
            "bounds": bounds,
            **found[key],
            "step_cost": _step_cost(found[key]),
        }
        for key, (label, bounds) in REFERENCES.items()
        if key in found
    ]


def _step_cost(row: Mapping[str, Any]) -> float | None:
    """Acceptance length over decode speedup: how many plain steps of the target a step takes."""
    speedup = row.get("decode_speedup")
    return row["acceptance_length"] / speedup if speedup and row["acceptance_length"] else None


def _latency(file: Path) -> list[dict[str, Any]]:
    """Times of single requests in process, batch 1, by engine: percentiles over all runs, and each request's own."""
    if not file.exists():
        return []
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line)
    engines = by_engine([Record.from_json(row) for row in rows])
    return [
        {
            "engine": label,
            "num_runs": len(records),
            "ttft_ms": latencies([record.prefill_s for record in records]),
            "tpot_ms": latencies(
                tpots := [r.decode_s / (len(r.token_ids) - 1) for r in records if len(r.token_ids) > 1]
            ),
            "e2e_ms": latencies([record.total_s for record in records]),
            "tpots_ms": sorted(1e3 * tpot for tpot in tpots),
        }
        for engine, label in ENGINES.items()
        if (records := engines.get(engine))
    ]


def _cost(summary: dict[str, Any]) -> dict[str, Any]:
    """The cost block with the acceptance length that its prediction was made from, and the measured speedup."""
    cost, overall = summary["cost"], summary["overall"]
    return {
        **cost,
        "acceptance_length": overall["acceptance_length"],
        "measured": overall["decode_speedup"],
        "step_cost": _step_cost(overall),
        "model": summary.get("cost_model"),
    }


def _accuracy(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"set": name, **row} for name, row in scores.items()]


def _survival(point: dict[str, float]) -> list[float]:
    rates: list[float] = []
    while (key := f"survival_{len(rates) + 1}") in point:
        rates.append(point[key])
    return rates


def _trained(best: dict[str, float] | None, summary: dict[str, Any]) -> dict[str, Any] | None:
    """The best evaluation of training beside the benchmark: whole, and for the benchmark's number of drafted tokens."""
    if best is None:
        return None
    survival, k = _survival(best), summary["num_speculative_tokens"]
    chain = summary.get("tree") is None and len(survival) >= k
    return {
        "step": best["step"],
        "acceptance_length": best["expected_acceptance_length"],
        "num_positions": len(survival),
        "acceptance_length_at_k": 1.0 + sum(survival[:k]) if chain else None,
        "heldout": summary["sets"].get("heldout"),
    }


def _served(paths: Paths) -> dict[str, Any] | None:
    """The benchmark through servers, where there was one."""
    served = _optional(paths.bench / "served.json")
    if served is None:
        return None
    levels = [
        {**level, **{key: level["draft"][key] + level["baseline"][key] for key in ("num_errors", "num_requests")}}
        for level in served["levels"]
    ]
    has_gpus = any(level["draft"]["tok_s_per_gpu"] is not None for level in levels)
    servers = {name: {"command": None, **server} for name, server in served["servers"].items()}
    return {
        **served,
        "levels": levels,
        "has_gpus": has_gpus,
        "servers": servers,
        "tone": tone(served["verdict"]),
        "pays_up_to": _pays_up_to(served),
    }


def _pays_up_to(served: Mapping[str, Any]) -> str:
    """Up to how many requests at once the draft pays, for a cell of a table; `-` where that is not concluded."""
    if tone(served["verdict"]) == "open":
        return "no conclusion"
    if tone(served["verdict"]) == "bad":
        return "does not pay"
    stops = served["break_even_concurrency"]
    return f"{served['levels'][-1]['concurrency']} or more" if stops is None else f"about {stops:.1f}"


def _differences(families: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each condition that the benchmarks do not share: their speeds do not compare across it."""
    conditions = {
        "target": lambda f: f["source"],
        "machine": lambda f: f["machine"],
        "token limit": lambda f: str(f["summary"]["settings"]["max_new_tokens"]),
        "sampling": lambda f: f"temperature {f['summary']['settings']['temperature']:g}",
        "prompt sets": lambda f: ", ".join(f["sets"]),
    }
    sentences = []
    for what, told in conditions.items():
        groups: dict[str, list[str]] = {}
        for family in families:
            groups.setdefault(told(family), []).append(family["name"])
        if len(groups) > 1:
            parts = "; ".join(f"{', '.join(names)}: {value}" for value, names in groups.items())
            sentences.append(f"Not the same {what} ({parts}).")
    return sentences


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


def _tune(paths: Paths, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `specflow tune` last found for this very draft, with a link to its page."""
    found = _optional(paths.state / "tune" / "tune.json")
    if found is None or found["identity"]["draft_digest"] != summary["identity"]["draft_digest"]:
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
    """(name, link relative to the report) of the files that the numbers come from."""
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
