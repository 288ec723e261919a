"""From fetch to bench by the stages' own functions, on whatever device they find."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from specflow.config import parse_params
from specflow.paths import Paths
from specflow.stage import STAGES
from tests.toys import make_project_inputs, tiny_params


def check_stages(folder: Path, *, online: bool, dtype: str) -> dict[str, dict[str, Any]]:
    """Target and states in `dtype`. What stages say of the same thing agrees, and in float32 every drafted answer is
    the target's own. Returns metrics by stage.
    """
    make_project_inputs(folder)
    raw = tiny_params(folder)
    family = raw["families"]["tiny"]
    family["target"]["dtype"] = family["extract"]["dtype"] = dtype
    family["train"] |= {"ttt_steps": 2, "evals": 50, "fit_tokens": 2000}
    family["bench"] |= {"num_speculative_tokens": 2, "cost_tokens": [1, 2], "batch_sizes": [2]}
    raw |= {"offline": [] if online else ["tiny"], "online": ["tiny"] if online else []}
    params, paths = parse_params(raw), Paths(root=folder, family="tiny", cache=folder / "cache")
    left_out = ["extract", "train_offline"] if online else ["train_online"]
    metrics: dict[str, dict[str, Any]] = {}
    for stage, (module, function) in STAGES.items():
        if stage not in left_out:
            run = getattr(importlib.import_module(module), function)
            metrics[stage] = run("tiny", params.family("tiny"), params, paths, lambda values, step: None)
    trained = metrics["train_online" if online else "train_offline"]
    points = json.loads(paths.plot("eval.json").read_text())
    assert trained["expected_acceptance_length"] == max(p["expected_acceptance_length"] for p in points)
    assert trained["expected_acceptance_length"] >= points[0]["expected_acceptance_length"] >= 1.0
    losses = [point["loss"] for point in json.loads(paths.plot("training.json").read_text())]
    assert len(losses) == len(points) == trained["steps"] and sum(losses[-4:]) < sum(losses[:4])
    summary = json.loads((paths.bench / "summary.json").read_text())
    overall = summary["overall"]
    assert abs(overall["acceptance_length"] - 1 - sum(overall["survival"])) < 1e-9
    assert summary["identity"]["target"]["dtype"] == dtype
    assert summary["cost_model"]["target_ms"] > 0 and summary["batch"][0]["acceptance_length"] >= 1
    if dtype == "float32":
        assert overall["lossless"] is True and summary["batch"][0]["lossless_rate"] == 1.0
    return metrics
