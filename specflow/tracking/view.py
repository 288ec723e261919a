"""A saved view of an experiment's page in MLflow: pipeline runs only, the headline numbers as columns and charts.

The page keeps saved views as JSON in experiment tags (not a documented format: as of MLflow 3.17, found by saving one).
One that a later MLflow cannot read is an entry in the menu that does not open, nothing more.
"""

from __future__ import annotations

import json
from typing import Any

VIEW_TAG = "mlflow.sharedViewState.specflow"
NAME = "Pipeline runs"
METRICS = (
    "accept/length",
    "bench/speedup",
    "vocab/coverage",
    "train/tokens",
    "cost/gpu_seconds",
    "cost/seconds",
)
BARS = (
    "accept/length",
    "accept/pos_1",
    "accept/pos_2",
    "accept/pos_3",
    "bench/speedup",
    "vocab/coverage",
    "train/tokens",
    "cost/gpu_seconds",
    "cost/seconds",
)
PARAMS = ("train.lr", "train.epochs", "vocab.draft_vocab_size")
SECTION = "specflow"


def view_tag() -> str:
    """Value of VIEW_TAG."""
    state = {
        "searchFilter": "tags.stage = 'pipeline'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "selectedColumns": [
            "tags.`mode`",
            *(f"metrics.`{name}`" for name in METRICS),
            *(f"params.`{name}`" for name in PARAMS),
        ],
        "compareRunCharts": [_parallel(), _scatter(), *(_bar(name) for name in BARS)],
        "isAccordionReordered": True,  # else the sections stand in the order of the alphabet
        "compareRunSections": [
            {"uuid": SECTION, "name": "Comparison", "display": True, "isReordered": False, "deleted": False}
        ],
    }
    return json.dumps({"name": NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _chart(kind: str, what: str, **how: Any) -> dict[str, Any]:
    common = {"runsCountToCompare": 20, "metricSectionId": SECTION, "deleted": False, "isGenerated": False}
    return {"uuid": f"specflow-{kind.lower()}-{what}", "type": kind, **common, **how}


def _bar(metric: str) -> dict[str, Any]:
    return _chart("BAR", metric, metricKey=metric)


def _parallel() -> dict[str, Any]:
    params = ["train.lr", "train.epochs"]  # a card has room for four axes
    metrics = ["accept/length", "bench/speedup"]
    return _chart("PARALLEL", "result", selectedParams=params, selectedMetrics=metrics, showAllRuns=False)


def _scatter() -> dict[str, Any]:
    axes = {"xaxis": {"key": "accept/length", "type": "METRIC"}, "yaxis": {"key": "bench/speedup", "type": "METRIC"}}
    return _chart("SCATTER", "speedup", **axes)
