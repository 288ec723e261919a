"""`specflow bench --output`: a benchmark of its own, from options instead of a family's parameters or on top of them.

The folder gets job.json (all that determines the run), records.jsonl and summary.json. Several workers, processes that
each read job.json, divide the questions; their records are those of one worker but for the times.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from specflow import files
from specflow.bench import measuring
from specflow.bench.job import Job, check_same, read_job
from specflow.bench.options import make_job, num_workers
from specflow.bench.stage import write_results
from specflow.bench.table import table
from specflow.errors import UserError
from specflow.gpus import leases
from specflow.gpus.resources import Resources
from specflow.results.schema import read_summary
from specflow.sharding import launch
from specflow.sharding.shares import MERGE, WHOLE, Share
from specflow.stage import configure_logging, quieten_transformers

logger = logging.getLogger("specflow")


def benchmark(
    family: str | None, params_path: Path, folder: Path, options: Mapping[str, Any], *, resume: bool
) -> list[str]:
    """Measure what `options` (names and values as on the command line) say into `folder`; lines to print.

    Raises UserError for a folder that holds something else, and for whatever does not fit together before measuring.
    """
    configure_logging()
    quieten_transformers()
    workers = num_workers(options)
    job = make_job(family, params_path, folder.resolve(), options)
    path = folder / "job.json"
    files.remove_leftovers(folder)
    _check_folder(job, folder, path, resume=resume)
    if not (folder / "summary.json").exists():
        measuring.Inputs.load(job)
        job.write(path)
        with ExitStack() as stack:
            measured = _over_workers(stack, job, folder, workers) if workers > 1 else _alone(stack, job)
            write_results(measured, folder)
            measured.state.finish()
        _forget_state(job)
    summary = read_summary(folder / "summary.json", made_by="specflow bench --output <folder>")
    return [*table(summary), "", f"Records, summary and settings: {folder}/"]


def _check_folder(job: Job, folder: Path, path: Path, *, resume: bool) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not path.exists():
        raise UserError(f"{folder} is not empty and holds no benchmark (job.json): give another folder")
    if not resume:
        raise UserError(f"{folder} holds a benchmark: give another folder, or --resume to go on with it")
    check_same(job, read_job(path), path)


def _alone(stack: ExitStack, job: Job) -> measuring.Measured:
    with leases.lease(_resources(job), f"bench@{job.name}", allow_cpu=True):
        return measuring.measure(stack, job, WHOLE)


def _over_workers(stack: ExitStack, job: Job, folder: Path, workers: int) -> measuring.Measured:
    """What comes first by one process, then the shares side by side, put together here."""
    words = [sys.executable, "-m", "specflow", "bench-worker", str(folder), "--count", str(workers), "--index"]
    shares = [Share(index, workers) for index in range(workers)]
    what = f"bench@{job.name}"
    logger.info("%s: %d workers", what, workers)
    launch.run_processes(what, shares[:1], lambda share: [*words, "0", "--first"])
    launch.run_processes(what, shares, lambda share: [*words, str(share.index)])
    return measuring.measure(stack, job, MERGE)


def work_on(folder: Path, share: Share, *, first: bool) -> dict[str, float]:
    """A worker's part of the benchmark in `folder`, on devices of its own; what the devices cost."""
    configure_logging()
    quieten_transformers()
    job = read_job(folder / "job.json")
    with leases.lease(_resources(job), f"bench@{job.name}", allow_cpu=True) as lease:
        (measuring.measure_first if first else measuring.measure_share)(job, share)
        return lease.cost()


def _resources(job: Job) -> Resources:
    return Resources(gpus=job.gpus_per_model, declared=True)


def _forget_state(job: Job) -> None:
    (job.state / measuring.MACHINE).unlink(missing_ok=True)
    with suppress(OSError):  # another process waits there
        (job.state / "bench").rmdir()
        job.state.rmdir()
