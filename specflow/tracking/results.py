"""What finished stages left on disk, as MLflow and `specflow compare` show it: fixed names, files, dvc.lock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from specflow.config import Params
from specflow.config_bench import REFERENCES
from specflow.files import sha256_json
from specflow.paths import Paths
from specflow.results.schema import SetResult, Settings, Summary, family_summary

METHOD = "eagle3"
COSTS = ("seconds", "gpu_seconds", "gpu_joules")
"""Keys of any stage's metrics that `cost/<key>` sums over the stages."""

STAGE_ARTIFACTS = {
    "prepare": ["prompts/data_report.json"],
    "vocab": ["vocab/coverage.json", "plots/coverage.json"],
    "train_offline": ["draft/config.json", "plots/training.json", "plots/eval.json"],
    "train_online": ["draft/config.json", "plots/training.json", "plots/eval.json"],
    "export": ["export/eagle3/config.json"],
    "bench": [
        "bench/summary.json",
        "bench/records.jsonl",
        "bench/scores.jsonl",
        "bench/served.json",
        "bench/served_records.jsonl",
        "plots/survival.json",
        "plots/sweep.json",
    ],
}
"""Result files kept with a stage's run, below the family's artifacts."""


TRAIN_NAMES = {"train_tokens": "tokens_per_epoch", "train_tok_s": "tok_s", "train_s": "loop_seconds"}
VOCAB_NAMES = {"coverage_eval": "coverage"}
"""What is compared is the coverage of held-out answers: that of the training answers is 1 or nearly so."""


def mode(name: str, params: Params) -> str:
    """How a family trains: offline (from stored hidden states) or online."""
    return "offline" if name in params.offline else "online"


def belongs(stage: str, mode: str) -> bool:
    """Whether a family of this mode has the stage; files of the other mode may lie about after a change of list."""
    if stage == "inputs":  # has no results, and what it sees change makes none of those recorded another's
        return False
    return stage not in (("train_online",) if mode == "offline" else ("train_offline", "extract"))


def headline(stage: str, metrics: dict[str, float], paths: Paths) -> dict[str, float]:
    """A stage's metrics by the names that MLflow and `specflow compare` show: docs/mlflow.md defines each."""
    known = {key: float(value) for key, value in metrics.items() if value is not None}
    if stage.startswith("train_"):
        named = {f"train/{TRAIN_NAMES.get(key, key)}": value for key, value in known.items()}
        if {"train_tok_s", "train_s"} <= set(known):  # the rate is defined as tokens of all epochs over these seconds
            named["train/tokens"] = float(round(known["train_tok_s"] * known["train_s"]))
        return named
    if stage == "vocab":
        return {f"vocab/{VOCAB_NAMES.get(key, key)}": value for key, value in known.items()}
    if stage != "bench" or not (paths.bench / "summary.json").exists():
        return {f"{stage}/{key}": value for key, value in known.items()}
    summary = family_summary(paths)
    named = _bench_names(summary.overall)
    named |= {f"bench/{key}": value for key, value in known.items() if not _said_already(key)}
    named |= _extra_names(summary)
    for name, result in summary.sets.items():
        named |= {f"{name}/{key.replace('/', '_')}": value for key, value in _bench_names(result).items()}
    return named


def _bench_names(result: SetResult) -> dict[str, float]:
    names: dict[str, float | None] = {
        "accept/length": result.acceptance_length,
        "bench/speedup": result.speedup,
        **{f"accept/pos_{i}": rate for i, rate in enumerate(result.survival, 1)},
    }
    for name, interval in (("accept/length", result.acceptance_length_ci), ("bench/speedup", result.speedup_ci)):
        names[f"{name}_low"], names[f"{name}_high"] = interval or (None, None)
    names |= {
        "accept/length_macro": result.acceptance_length_macro,
        "bench/speedup_mean_of_ratios": result.speedup_mean_of_ratios,
        "bench/tok_s": result.tok_s,
        "bench/baseline_tok_s": result.baseline_tok_s,
        "bench/lossless": result.lossless,
    }
    return {name: float(value) for name, value in names.items() if value is not None}


def _extra_names(summary: Summary) -> dict[str, float]:
    """What not every benchmark has: reference rows, accuracy, several requests at once, a tree, drift."""
    names: dict[str, float | None] = {}
    for engine, reference in summary.overall.references.items():
        names[f"reference/{engine}_speedup"] = reference.speedup
        names[f"reference/{engine}_accept_length"] = reference.acceptance_length
    for name, scored in (summary.accuracy or {}).items():
        names[f"accuracy/{name}_baseline"] = scored.baseline
        names[f"accuracy/{name}_draft"] = scored.draft
        names[f"accuracy/{name}_difference"] = scored.difference
    for row in summary.batch:
        names[f"batch/{row.batch_size}_speedup"] = row.speedup
        names[f"batch/{row.batch_size}_tok_s"] = row.tok_s
        names[f"batch/{row.batch_size}_acceptance_length"] = row.acceptance_length
    if summary.tree is not None:
        names["bench/drafted_per_step"] = summary.overall.drafted_per_step
    names["bench/drift"] = summary.drift.baseline_change
    return {name: float(value) for name, value in names.items() if value is not None}


def _said_already(key: str) -> bool:
    """Keys of metrics/bench.json that the names made from the summary repeat."""
    repeated = ("acceptance_length", "speedup", "tok_s", "baseline_tok_s", "acceptance_length_macro")
    bounds = ("speedup_ci_", "acceptance_length_ci_", "survival_", "accuracy_", "batch_", "drift")
    return key in repeated or key.startswith(bounds) or key in REFERENCE_KEYS or "." in key


REFERENCE_KEYS = tuple(f"{engine}_speedup" for engine in REFERENCES)

COMPARED = ("bench", "train_offline", "train_online", "vocab")
"""Stages whose metrics are compared between pipeline runs; the others' counts stay with their own runs."""


def family_metrics(paths: Paths, stages: Iterable[str]) -> dict[str, float]:
    """What pipeline runs are compared by, the most telling first, and what all these stages cost (`cost/...`).

    MLflow's page offers the first metric of a run as the one to plot.
    """
    named: dict[str, float] = {}
    costs: dict[str, float] = {}
    done = list(stages)
    for stage in [*(stage for stage in COMPARED if stage in done), *(stage for stage in done if stage not in COMPARED)]:
        metrics = read_metrics(paths, stage)
        if stage in COMPARED:
            named |= headline(stage, metrics, paths)
        for key in COSTS:
            if metrics.get(key) is not None:
                costs[f"cost/{key}"] = costs.get(f"cost/{key}", 0.0) + metrics[key]
    return named | costs


def measured_stages(paths: Paths, mode: str) -> list[str]:
    """Stages of a family whose metrics lie on disk, by name."""
    found = sorted(file.stem for file in (paths.base / "metrics").glob("*.json"))
    return [stage for stage in found if belongs(stage, mode)]


def verdict(paths: Paths) -> str:
    """The benchmark's one sentence."""
    return family_summary(paths).verdict


ASKED = {"questions", "max_new_tokens", "max_turns", "num_samples", "temperature", "top_p", "top_k"}
"""Settings that say what was asked and how it was answered."""
assert set(Settings.model_fields) >= ASKED


def conditions(summary: Summary) -> dict[str, str]:
    """What two benchmarks must share before their speeds may be compared, as short texts."""
    identity, versions = summary.identity, summary.identity.versions
    return {
        "target_digest": identity.target.digest,
        "target_dtype": identity.target.dtype,
        "machine": f"{identity.cpu}, {identity.torch_threads} threads, {identity.device}",
        "engine": f"torch {versions.torch}, transformers {versions.transformers}, code {versions.engine}",
        "bench_settings": sha256_json(summary.settings.model_dump(mode="json", include=ASKED))[:12],
    }


def artifacts(stage: str, paths: Paths) -> list[Path]:
    """Result files of a stage that exist."""
    if stage == "report":
        return sorted(file for name in ("report", paths.family) for file in paths.report.glob(f"{name}.*"))
    files = [paths.base / name for name in STAGE_ARTIFACTS.get(stage, [])]
    return [file for file in files if file.exists()]


def read_metrics(paths: Paths, stage: str) -> dict[str, float]:
    return dict(json.loads(paths.metrics(stage).read_text(encoding="utf-8")))


def locked_stages(paths: Paths, mode: str) -> dict[str, str]:
    """md5 of the metrics file by stage, for the stages of the family that are done and belong together.

    That is: the file on disk is the one that dvc.lock records, and so is every input that another of its stages made,
    back to the first. Results of a draft that has been trained anew since are not this draft's.
    """
    entries = {}
    for address, entry in _lock(paths).items():
        stage, _, family = address.partition("@")
        if family == paths.family and belongs(stage, mode):
            entries[address] = entry
    made = {
        out["path"]: (address, out.get("md5")) for address, entry in entries.items() for out in entry.get("outs", [])
    }
    stale: set[str] = set()
    for _ in entries:  # as often as the longest chain of stages could need
        for address, entry in entries.items():
            for dep in entry.get("deps", []):
                producer, digest = made.get(dep["path"], ("", dep.get("md5")))
                if producer in stale or digest != dep.get("md5"):
                    stale.add(address)
    found = {}
    for address, entry in entries.items():
        stage = address.partition("@")[0]
        file = paths.metrics(stage)
        if address in stale or not file.exists():
            continue
        outs = {Path(out["path"]): out.get("md5") for out in entry.get("outs", [])}
        if outs.get(file.relative_to(paths.root)) == (digest := md5(file)):
            found[stage] = digest
    return found


def locked_export(paths: Paths) -> str | None:
    """DVC's digest of the export folder, by which its cache or remote still has the weights."""
    for out in _lock(paths).get(f"export@{paths.family}", {}).get("outs", []):
        if Path(out["path"]) == paths.export.relative_to(paths.root):
            return str(out["md5"])
    return None


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
