"""Stage `report`: report.md and a self-contained report.html from the artifacts of every family.

Reads files only and computes nothing that a stage did not measure, so every number can be traced to a raw file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from specflow.bench import figures
from specflow.config import STAGE_NAMES, Params
from specflow.files import atomic_path, read_json
from specflow.paths import Paths

SPENT = ("seconds", "gpu_seconds", "gpu_joules", "gpu_memory_peak_gb", "gpu_utilisation_mean")
"""Of a stage's metrics: what it took (docs/gpus.md)."""


def run_report(params: Params, all_paths: dict[str, Paths]) -> None:
    """Write the report folder. Raises UserError naming the family whose benchmark is missing."""
    families = [_family(name, paths) for name, paths in all_paths.items()]
    environment = Environment(
        loader=PackageLoader("specflow.bench", "."),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ratio": _ratio, "percent": _percent, "lossless": _lossless, "count": _count}
    environment.filters["measured"] = _measured
    folder = next(iter(all_paths.values())).report
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        for kind in ("html", "md"):
            text = environment.get_template(f"report.{kind}.j2").render(families=families)
            (temporary / f"report.{kind}").write_text(text, encoding="utf-8")


def _family(name: str, paths: Paths) -> dict[str, Any]:
    summary = read_json(paths.bench / "summary.json", what="benchmark", made_by=f"dvc repro bench@{name}")
    facts = read_json(paths.target, what="target facts", made_by=f"dvc repro fetch@{name}")
    training, evals = _optional(paths.plot("training.json")) or [], _optional(paths.plot("eval.json")) or []
    coverage = {point["category"]: point["coverage"] for point in _optional(paths.plot("coverage.json")) or []}
    best = max(evals, key=lambda point: point["expected_acceptance_length"], default=None)
    served = _served(paths)
    return {
        "name": name,
        "summary": summary,
        "sets": summary["sets"],
        "rows": {**summary["sets"], "all sets": summary["overall"]} if len(summary["sets"]) > 1 else summary["sets"],
        "target": facts,
        "trained": _trained(best, summary),
        "cost": _cost(summary),
        "coverage": coverage,
        "data": _optional(paths.prompts / "data_report.json"),
        "figures": _figures(summary, training, evals, best, coverage) | _served_figures(served),
        "served": served,
        "identity": _rows(
            {**summary["identity"], "architecture": facts["architecture"], "parameters": facts["num_parameters"]}
        ),
        "settings": _rows({key: value for key, value in summary["settings"].items() if not key.endswith("questions")}),
        "spent": _spent(paths),
        "raw": _raw_files(paths),
    }


def _figures(
    summary: dict[str, Any],
    training: list[dict[str, float]],
    evals: list[dict[str, float]],
    best: dict[str, float] | None,
    coverage: dict[str, float],
) -> dict[str, str]:
    """SVG by name, only for what was measured."""
    survival = {name: result["survival"] for name, result in summary["sets"].items()}
    if best is not None:
        survival["training's eval"] = _survival(best)
    drawn = {
        "speedup": figures.speedup_figure(summary["sets"]),
        "survival": figures.survival_figure(survival),
    }
    if summary.get("sweep"):
        drawn["sweep"] = figures.sweep_figure(summary["sweep"], summary["num_speculative_tokens"])
    if training:
        drawn["training"] = figures.training_figure(training)
    if evals:
        drawn["eval"] = figures.eval_figure(evals)
    if coverage:
        drawn["coverage"] = figures.coverage_figure(coverage)
    return drawn


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
    return {
        "step": best["step"],
        "acceptance_length": best["expected_acceptance_length"],
        "num_positions": len(survival),
        "acceptance_length_at_k": 1.0 + sum(survival[:k]) if len(survival) >= k else None,
        "heldout": summary["sets"].get("heldout"),
    }


def _cost(summary: dict[str, Any]) -> dict[str, Any]:
    """The cost block with the acceptance length that its prediction was made from."""
    cost = summary["cost"]
    step_ms = cost["t_draft_ms"] + cost["t_verify_ms"]
    length = cost["predicted_speedup"] * step_ms / cost["t_target_ms"] if cost["t_target_ms"] else 0.0
    return {**cost, "acceptance_length": length, "measured": summary["overall"]["decode_speedup"]}


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
    return {**served, "levels": levels, "has_gpus": has_gpus, "servers": servers}


def _served_figures(served: dict[str, Any] | None) -> dict[str, str]:
    if served is None:
        return {}
    return {
        "served_throughput": figures.served_throughput_figure(served["levels"]),
        "served_users": figures.served_users_figure(served["levels"]),
    }


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
    return {"rows": [*rows, total] if len(rows) > 1 else rows, "gpus": total["gpu_seconds"] is not None}


def _rows(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
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
    files += [paths.bench / "served.json", paths.bench / "served_records.jsonl"]
    files += sorted((paths.base / "metrics").glob("*.json")) + sorted((paths.base / "plots").glob("*.json"))
    found = [file for file in files if file.exists()]
    return [
        (file.relative_to(paths.base).as_posix(), Path(os.path.relpath(file, paths.report)).as_posix())
        for file in found
    ]


def _optional(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _count(value: float) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else f"{value:,.4g}".replace(",", " ")


def _measured(value: float | None, form: str = "{:,.1f}", scale: float = 1.0) -> str:
    """A reading by `form`, or a dash where there is none."""
    return "-" if value is None else form.format(value * scale).replace(",", " ")


def _lossless(value: bool | None) -> str:
    return {True: "yes", False: "NO", None: "sampled"}[value]
