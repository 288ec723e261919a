"""What finished stages left on disk, as the MLflow record shows it: headline names, files worth keeping, dvc.lock."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from specflow.paths import Paths

STAGE_ARTIFACTS = {
    "prepare": ["prompts/data_report.json"],
    "vocab": ["vocab/coverage.json", "plots/coverage.json"],
    "train_offline": ["draft/config.json", "plots/training.json", "plots/eval.json"],
    "train_online": ["draft/config.json", "plots/training.json", "plots/eval.json"],
    "export": ["export/eagle3/config.json"],
    "bench": ["bench/summary.json", "plots/survival.json", "plots/sweep.json"],
}
"""Result files kept with a stage's run, below the family's artifacts."""


def headline(stage: str, metrics: dict[str, float], paths: Paths) -> dict[str, float]:
    """A stage's metrics by MLflow name: `<stage>/<key>`, and for bench the fixed names, of all sets and of each."""
    prefix = "train" if stage.startswith("train_") else stage
    named = {f"{prefix}/{key}": float(value) for key, value in metrics.items() if value is not None}
    file = paths.bench / "summary.json"
    if stage == "bench" and file.exists():
        summary = json.loads(file.read_text(encoding="utf-8"))
        for name, result in summary["sets"].items():
            named |= {f"{key}.{name}": value for key, value in _bench_names(result).items()}
        named |= _bench_names(summary["overall"])
    return named


def _bench_names(result: dict[str, Any]) -> dict[str, float]:
    low, high = result["speedup_ci"]
    return {
        "accept/length": result["acceptance_length"],
        **{f"accept/pos_{i}": rate for i, rate in enumerate(result["survival"], 1)},
        "bench/speedup": result["speedup"],
        "bench/speedup_low": low,
        "bench/speedup_high": high,
        "bench/tok_s": result["tok_s"],
        "bench/baseline_tok_s": result["baseline_tok_s"],
        # Under sampling outputs may differ and the field is null.
        **({"bench/lossless": float(result["lossless"])} if result["lossless"] is not None else {}),
    }


def artifacts(stage: str, paths: Paths) -> list[Path]:
    """Result files of a stage that exist."""
    if stage == "report":
        return sorted(paths.report.glob("report.*"))
    files = [paths.base / name for name in STAGE_ARTIFACTS.get(stage, [])]
    return [file for file in files if file.exists()]


def read_metrics(paths: Paths, stage: str) -> dict[str, float]:
    return dict(json.loads(paths.metrics(stage).read_text(encoding="utf-8")))


def locked_stages(paths: Paths) -> dict[str, str]:
    """md5 of the metrics file by stage, for the family's stages whose file on disk is the one that dvc.lock records."""
    found = {}
    for address, entry in _lock(paths).items():
        stage, _, family = address.partition("@")
        file = paths.metrics(stage)
        if family != paths.family or not file.exists():
            continue
        outs = {Path(out["path"]): out.get("md5") for out in entry.get("outs", [])}
        if outs.get(file.relative_to(paths.root)) == (digest := md5(file)):
            found[stage] = digest
    return found


def locked_params(paths: Paths, stage: str) -> dict[str, Any]:
    """Parameters that dvc.lock records for a stage, below its family where they belong to one."""
    locked = _lock(paths)[f"{stage}@{paths.family}"].get("params", {}).get("params.yaml", {})
    return {key.removeprefix(f"families.{paths.family}."): value for key, value in locked.items()}


def md5(file: Path) -> str:
    """The digest that DVC records for a file."""
    return hashlib.md5(file.read_bytes()).hexdigest()


def _lock(paths: Paths) -> dict[str, Any]:
    file = paths.root / "dvc.lock"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return dict((yaml.safe_load(text) or {}).get("stages", {}))
