"""Runs of the MLflow store, read for `specflow compare`: pipeline runs of a family, or any run by its id."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specflow.errors import UserError
from specflow.tracking.registry import champion
from specflow.tracking.store import describe, open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RUN_ID = re.compile(r"[0-9a-f]{32}")
MEASURED = "accept/length"
"""A run that has this metric has a benchmark."""
MAX_RUNS = 20


@dataclass(frozen=True)
class StoredRun:
    run_id: str
    name: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]


def is_reference(text: str) -> bool:
    """Whether `text` names runs of the store rather than a family: a run id, or family@latest, @all, @champion."""
    return RUN_ID.fullmatch(text) is not None or "@" in text


def find_runs(home: Path, reference: str) -> list[StoredRun]:
    """The runs that a reference names, oldest first. Raises UserError where there is none, or none with a benchmark."""
    client = open_store(home)
    if RUN_ID.fullmatch(reference):
        return [_stored(_by_id(client, reference, home))]
    family, _, which = reference.rpartition("@")
    choose: dict[str, Callable[[], list[Run]]] = {
        "latest": lambda: _pipeline_runs(client, family, home)[:1],
        "all": lambda: _pipeline_runs(client, family, home)[MAX_RUNS - 1 :: -1],
        "champion": lambda: [_of_champion(client, family, home)],
    }
    if which not in choose:
        raise UserError(f"{reference!r}: after the @ comes latest, all or champion, as in {family}@latest")
    return [_stored(run) for run in choose[which]()]


def _pipeline_runs(client: MlflowClient, family: str, home: Path) -> list[Run]:
    """Pipeline runs of a family with a benchmark, newest first."""
    experiment = client.get_experiment_by_name(family)
    found = []
    if experiment is not None:
        found = client.search_runs(
            [experiment.experiment_id],
            f"tags.pipeline LIKE '%' and metrics.`{MEASURED}` > 0",
            max_results=MAX_RUNS,
            order_by=["attributes.start_time DESC"],
        )
    if not found:
        raise UserError(
            f"{describe(home)} has no pipeline run of {family!r} with a benchmark: "
            f"run `dvc repro`, or `specflow mlflow-sync` to rebuild it from the files"
        )
    return list(found)


def _of_champion(client: MlflowClient, family: str, home: Path) -> Run:
    version = champion(client, family)
    if version is None:
        raise UserError(f"{family!r} has no champion yet: run `specflow promote {family}`")
    run = _by_id(client, version.tags["bench_run_id"], home)
    parent_id = run.data.tags.get("mlflow.parentRunId")
    parent = client.get_run(parent_id) if parent_id else run
    # The parent knows of training and cost too, unless its pipeline run went on to another draft.
    same = parent.data.tags.get("draft_digest") == version.tags["draft_digest"]
    return parent if same and MEASURED in parent.data.metrics else run


def _by_id(client: MlflowClient, run_id: str, home: Path) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{describe(home)} has no run {run_id}: copy the id from the run's page") from None
    if MEASURED not in run.data.metrics:
        what = f"run {run_id} ({run.data.tags.get('stage', 'unknown')}) has no benchmark"
        parent_id = run.data.tags.get("mlflow.parentRunId")
        raise UserError(f"{what}: its pipeline run is {parent_id}" if parent_id else f"{what}: compare one that has")
    return run


def _stored(run: Run) -> StoredRun:
    return StoredRun(run.info.run_id, run.info.run_name, run.data.tags, run.data.params, run.data.metrics)
