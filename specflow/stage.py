"""Runs one stage: parameters in, tracked run around it, flat metrics file out. What DVC and the command line call.

Owns the list of stages and where each one's code is; knows nothing of what a stage does.
"""

from __future__ import annotations

import importlib
import logging
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

from specflow import files
from specflow.config import Params, load_params
from specflow.errors import UserError
from specflow.paths import Paths

STAGES = {
    "fetch": ("specflow.targets.fetch", "run"),
    "prepare": ("specflow.data.prepare", "run"),
    "sample": ("specflow.targets.sampling", "run"),
    "vocab": ("specflow.data.vocab", "run"),
    "extract": ("specflow.targets.extract", "run"),
    "train_offline": ("specflow.training.stage", "run_offline"),
    "train_online": ("specflow.training.stage", "run_online"),
    "export": ("specflow.export.stage", "run"),
    "bench": ("specflow.bench.stage", "run"),
}
"""Stages of one family, in pipeline order; `report` is over all families."""

THIRD_PARTY_LOGGERS = (
    "transformers",
    "datasets",
    "mlflow",
    "alembic",
    "httpx",
    "huggingface_hub",
    "filelock",
    "matplotlib",
)

logger = logging.getLogger("specflow")


def run_stage(stage: str, name: str, params_path: Path, *, parent_run_id: str | None = None) -> dict[str, float]:
    """Run `stage` for family `name` in the current folder, under a tracked run; return its headline metrics.

    Raises UserError for whatever the user can mend.
    """
    params, paths = load_project(params_path, name)
    family = params.family(name)
    check_listed(stage, name, params)
    configure_logging()
    from specflow import tracking

    run_function = _load(*STAGES[stage])
    with tracking.stage_run(stage, name, params, paths, parent_run_id=parent_run_id) as run:
        started = time.perf_counter()
        metrics: dict[str, float] = run_function(name, family, params, paths, run.log)
        files.write_json(paths.metrics(stage), metrics)
        run.finish(metrics)
    logger.info("%s@%s done in %.1f s", stage, name, time.perf_counter() - started)
    return metrics


def run_report(params_path: Path, *, parent_run_id: str | None = None) -> None:
    """Write the report over every listed family and link the runs that this pipeline run reused."""
    params, _ = load_project(params_path, "report")
    configure_logging()
    from specflow import tracking

    all_paths = {name: family_paths(name, params) for name in listed_families(params)}
    if not all_paths:
        raise UserError("nothing to report: params.yaml lists no family in offline or online")
    _load("specflow.bench.report", "run_report")(params, all_paths)
    for name, paths in all_paths.items():
        with tracking.stage_run("report", name, params, paths, parent_run_id=parent_run_id) as run:
            run.finish({})
            run.link_reused()


def load_project(params_path: Path, name: str) -> tuple[Params, Paths]:
    """Parameters of the project in the current folder, and the paths of one of its families."""
    params = load_params(params_path)
    return params, family_paths(name, params)


def family_paths(name: str, params: Params) -> Paths:
    return Paths(root=Path(), family=name, cache=Path(params.cache_dir).expanduser())


def listed_families(params: Params) -> list[str]:
    return [*params.offline, *params.online]


def check_listed(stage: str, name: str, params: Params) -> None:
    """A family trains one way and is listed for it; DVC's graph is made from the same lists."""
    if name not in listed_families(params):
        raise UserError(
            f"family {name!r} stands in neither offline nor online of params.yaml: list it in one, or remove it"
        )
    needs = {"extract": "offline", "train_offline": "offline", "train_online": "online"}.get(stage)
    if needs is not None and name not in getattr(params, needs):
        other = "online" if needs == "offline" else "offline"
        raise UserError(
            f"{stage} is for families listed in {needs}, but params.yaml lists {name!r} in {other}: run train_{other}"
        )


def configure_logging() -> None:
    """specflow's own messages to stderr, everybody else's only from errors up."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for third_party in THIRD_PARTY_LOGGERS:
        logging.getLogger(third_party).setLevel(logging.ERROR)


def quieten_transformers() -> None:
    """No advice and no progress bars from transformers; ours say what takes time."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def exit_on_sigterm() -> None:
    """SIGTERM unwinds the stack (exit code 143), so temporary files go and the tracked run ends as killed."""

    def leave(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)


def _load(module: str, function: str) -> Any:
    loaded = getattr(importlib.import_module(module), function)
    quieten_transformers()
    return loaded
