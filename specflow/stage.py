"""Runs one stage: parameters in, tracked run around it, flat metrics file out. What DVC and the command line call.

Owns the list of stages and where each one's code is; knows nothing of what a stage does.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from specflow import files, inputs
from specflow.config import Family, Params, load_params
from specflow.errors import RetryableError, UserError
from specflow.gpus import leases
from specflow.gpus.resources import stage_resources
from specflow.paths import Paths, outside
from specflow.sharding import launch
from specflow.sharding.shares import Share
from specflow.watch import end_with_dvc

STAGES = {
    "fetch": ("specflow.targets.fetch", "run"),
    "prepare": ("specflow.data.prepare", "run"),
    "sample": ("specflow.sample.stage", "run"),
    "vocab": ("specflow.data.vocab", "run"),
    "extract": ("specflow.extract.stage", "run"),
    "train_offline": ("specflow.training.stage", "run_offline"),
    "train_online": ("specflow.training.stage", "run_online"),
    "export": ("specflow.export.stage", "run"),
    "bench": ("specflow.bench.stage", "run"),
}
"""Stages of one family, in pipeline order; `report` is over all families."""

OUT_OF_MEMORY = {
    "sample": [("sample", "batch_size"), ("sample", "max_new_tokens")],
    "extract": [("extract", "batch_tokens")],
    "train_offline": [("train", "batch_tokens"), ("train", "ttt_steps")],
    "train_online": [("train", "batch_tokens"), ("extract", "batch_tokens")],
    "bench": [("bench", "max_new_tokens")],
}
"""Parameters that a stage's GPU memory grows with, the one to lower first in front."""

THIRD_PARTY_LOGGERS = (
    "transformers",
    "datasets",
    "mlflow",
    "alembic",
    "httpx",
    "huggingface_hub",
    "filelock",
)

logger = logging.getLogger("specflow")


def run_stage(stage: str, name: str, params_path: Path, *, parent_run_id: str | None = None) -> dict[str, float]:
    """Run `stage` for family `name` in the current folder, under a tracked run; return its headline metrics.

    Its devices are leased first, so neither its time nor its record counts the wait for them. The metrics get
    `seconds` and, where there were GPUs, their cost. Raises UserError for whatever the user can mend.
    """
    end_with_dvc()
    params, paths = load_project(params_path, name)
    family = params.family(name)
    check_listed(stage, name, params)
    configure_logging()
    files.remove_leftovers(paths.base)
    check_cache(paths.cache)
    found = inputs.of_family(family, params, paths) if stage == "fetch" else {}
    if stage != "fetch":
        inputs.check_unchanged(stage, family, params, paths)
    resources = launch.split(stage, name, stage_resources(paths.root, stage, family))
    with leases.lease(launch.own_devices(resources), f"{stage}@{name}", allow_cpu=family.allow_cpu) as lease:
        from specflow.tracking import record

        run_function = _load(*STAGES[stage])
        if resources.shards > 1:
            run_function = launch.over_shares(stage, run_function, run_share, params_path, resources)
        with record.stage_run(stage, name, params, paths, parent_run_id=parent_run_id) as run:
            started = time.perf_counter()
            with _out_of_memory_explained(stage, name, family, lease):
                metrics: dict[str, float] = run_function(name, family, params, paths, run.log)
            inputs.write(found, paths)  # of a fetch by hand, where `specflow inputs` has not
            metrics = {**metrics, **lease.cost()}
            metrics.setdefault("seconds", time.perf_counter() - started)
            files.write_json(paths.metrics(stage), metrics)
            run.finish(metrics)
    logger.info("%s@%s done in %.1f s", stage, name, metrics["seconds"])
    return metrics


def run_inputs(name: str, params_path: Path) -> None:
    """Bring the digests of what family `name` reads from outside up to date; no devices, no tracked run."""
    params, paths = load_project(params_path, name)
    family = params.family(name)
    check_listed("inputs", name, params)
    configure_logging()
    check_cache(paths.cache)
    changed = inputs.write(inputs.of_family(family, params, paths), paths)
    logger.info("inputs@%s: %s", name, f"changed for {', '.join(changed)}" if changed else "as they were")


def inputs_are_current(name: str, params_path: Path) -> bool:
    """Whether `run_inputs` would change nothing; an error is its to raise, in the stage's own name."""
    try:
        params, paths = load_project(params_path, name)
        return inputs.are_current(inputs.of_family(params.family(name), params, paths), paths)
    except UserError:
        return False


def run_share(stage: str, name: str, params_path: Path, share: Share, *, first: bool = False) -> dict[str, float]:
    """Do the rows of one share, or with `first` what is measured before them, and leave them in the resume state.

    Leases devices as the stage itself does. Returns rates and costs; no output, metrics file or tracked run is written.
    """
    params, paths = load_project(params_path, name)
    family = params.family(name)
    check_listed(stage, name, params)
    configure_logging()
    inputs.check_unchanged(stage, family, params, paths)
    resources = stage_resources(paths.root, stage, family)
    with leases.lease(resources, f"{stage}@{name}", allow_cpu=family.allow_cpu) as lease:
        run_function = _load(STAGES[stage][0], "run_first" if first else "run_share")
        started = time.perf_counter()
        with _out_of_memory_explained(stage, name, family, lease):
            result: dict[str, float] = run_function(name, family, params, paths, share)
        result = {**result, **lease.cost()}
    done = "what comes first" if first else f"{share.name} of {share.count}"
    logger.info("%s@%s: %s done in %.1f s", stage, name, done, time.perf_counter() - started)
    return result


@contextmanager
def _out_of_memory_explained(stage: str, name: str, family: Family, lease: leases.Lease) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        raise explain_out_of_memory(stage, name, family, lease.strangers()) from None


def explain_out_of_memory(stage: str, name: str, family: Family, strangers: list[str]) -> UserError:
    """A GPU's memory ran out: a later try may do where somebody else is on it, otherwise the request is too large."""
    if strangers:
        return RetryableError(
            f"{stage}@{name} ran out of GPU memory, which {' and '.join(strangers)} uses too: try again later, or set "
            f"families.{name}.resources.{stage}.gpu_memory_gb to what the stage needs"
        )
    ways = [
        f"lower families.{name}.{section}.{key} (now {getattr(getattr(family, section), key)})"
        for section, key in OUT_OF_MEMORY.get(stage, ())
    ]
    ways.append(f"choose GPUs with more by families.{name}.resources.{stage}.gpu_memory_gb")
    return UserError(f"{stage}@{name} ran out of GPU memory, and nobody else uses the GPU: {', or '.join(ways)}")


def _out_of_memory(error: RuntimeError) -> bool:
    """torch's own error, or CUDA's where even a context or a cuBLAS workspace found no room."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


def run_report(params_path: Path, *, parent_run_id: str | None = None) -> None:
    """Write the report over every listed family and link the runs that this pipeline run reused."""
    end_with_dvc()
    params, _ = load_project(params_path, "report")
    configure_logging()
    from specflow.tracking import record

    all_paths = {name: family_paths(name, params) for name in listed_families(params)}
    if not all_paths:
        raise UserError("nothing to report: params.yaml lists no family in offline or online")
    for folder in {folder for paths in all_paths.values() for folder in (paths.base, paths.report)}:
        files.remove_leftovers(folder)
    _load("specflow.report.stage", "run_report")(params, all_paths)
    for name, paths in all_paths.items():
        with record.stage_run("report", name, params, paths, parent_run_id=parent_run_id) as run:
            run.finish({})
            run.link_reused()


def load_project(params_path: Path, name: str) -> tuple[Params, Paths]:
    """Parameters of the project in the current folder, and the paths of one of its families."""
    params = load_params(params_path)
    return params, family_paths(name, params)


def family_paths(name: str, params: Params) -> Paths:
    return Paths(root=Path(), family=name, cache=outside(params.cache_dir))


def check_cache(cache: Path) -> None:
    """Make the cache folder. Raises UserError where that cannot be, before anything is fetched or computed."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        usable, reason = os.access(cache, os.W_OK | os.X_OK), "no right to write"
    except OSError as error:
        usable, reason = False, error.strerror or str(error)
    if not usable:
        raise UserError(
            f"the cache folder {cache} cannot be used ({reason}): set cache_dir in params.yaml to a folder that you "
            "can write, on a disk with room for the models"
        )


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
