"""`python -m flows.serve`: every deployment of prefect.yaml from this one process, without a worker or a work pool."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import yaml
from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron


def deployments(file: Path) -> list[RunnerDeployment]:
    """Deployments as prefect.yaml describes them, to be served instead of deployed."""
    return [_deployment(entry) for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"]]


def _deployment(entry: dict[str, Any]) -> RunnerDeployment:
    path, _, name = entry["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    schedules = [Cron(each["cron"], timezone=each["timezone"], active=each["active"]) for each in entry["schedules"]]
    made: RunnerDeployment = flow.to_deployment(
        name=entry["name"],
        description=entry["description"],
        tags=entry["tags"],
        parameters=entry["parameters"],
        concurrency_limit=entry["concurrency_limit"]["limit"],
        schedules=schedules,
    )
    return made


if __name__ == "__main__":
    serve(*deployments(Path("prefect.yaml")))
