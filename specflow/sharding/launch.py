"""Runs the shares of a stage side by side: as processes of this machine, or as tasks of a Ray cluster.

`families.F.resources.<stage>.shards: N` asks for it, the environment variable SPECFLOW_RAY_ADDRESS for the cluster.
Each share leases its own devices, as a stage does. A share whose process or node dies is started again, a bounded
number of times: its finished rows are still there (`shares.py`). The machine's leases or Ray place them.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from specflow.errors import RetryableError, UserError
from specflow.gpus.nvml import has_gpus
from specflow.gpus.resources import Resources
from specflow.sharding.shares import MERGE, Share

SHARDED = {"sample": False, "extract": False, "bench": True}
"""Stages that can be split by row, and whether something is measured once before the shares."""
RAY_ADDRESS = "SPECFLOW_RAY_ADDRESS"
"""`auto`, `host:6379` or `ray://host:10001`; without it shares are processes of this machine."""
MAX_RESTARTS = 3
"""Of one share, after its process was killed or its node was lost."""
KILLED = frozenset({-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM})
"""Exit codes of a share that somebody ended, the kernel for want of memory, say; other codes are errors of its own."""
END_S = 10.0
"""Seconds that a share has to end after SIGTERM."""
POLL_S = 0.1

logger = logging.getLogger("specflow")
Stage = Callable[..., dict[str, float]]
RunShare = Callable[..., dict[str, float]]


def split(stage: str, name: str, resources: Resources) -> Resources:
    """`resources` with the number of shares that the stage really runs in.

    One for stages that have no rows, and for a benchmark without GPUs: side by side on one CPU it would time the
    neighbours.
    """
    if resources.shards == 1 or stage not in SHARDED:
        return replace(resources, shards=1)
    if stage == "bench" and (resources.gpus == 0 or not (ray_address() or has_gpus())):
        logger.info("%s@%s: not split, its shares would disturb each other's timing on the CPU", stage, name)
        return replace(resources, shards=1)
    return resources


def own_devices(resources: Resources) -> Resources:
    """What the coordinating process itself leases: nothing where shares do the work. Nothing is hidden from them."""
    return resources if resources.shards == 1 else Resources(shards=resources.shards)


def over_shares(stage: str, run: Stage, run_share: RunShare, params_path: Path, resources: Resources) -> Stage:
    """The stage function `run`, its rows first done by shares. Metrics: rates and costs summed over the shares.

    A process of this machine does a share by `specflow shard`, a Ray worker by `run_share`, which is the same.
    """

    def split_run(name: str, family: Any, params: Any, paths: Any, log: Any) -> dict[str, float]:
        launch = partial(_on_ray, run_share) if ray_address() else _as_processes
        shares = [Share(index, resources.shards) for index in range(resources.shards)]
        where = f"Ray at {ray_address()}" if ray_address() else "this machine"
        logger.info("%s@%s: %d shares on %s", stage, name, len(shares), where)
        results = []
        if SHARDED[stage]:
            results += launch(stage, name, params_path, shares[:1], resources, first=True)
        results += launch(stage, name, params_path, shares, resources, first=False)
        return run(name, family, params, paths, log, MERGE) | combine(results)

    return split_run


def combine(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Numbers of several shares as those of one stage: peaks by their maximum, utilisation by the time, sums else."""
    combined: dict[str, float] = {}
    for name in {name for result in results for name in result} - {"seconds"}:
        values = [result[name] for result in results if name in result]
        if name.endswith("_mean"):
            weights = [result["gpu_seconds"] for result in results if name in result]
            combined[name] = sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1e-9)
        else:
            combined[name] = max(values) if "peak" in name else sum(values)
    return combined


def ray_address() -> str | None:
    return os.environ.get(RAY_ADDRESS) or None


def _as_processes(
    stage: str, name: str, params_path: Path, shares: Sequence[Share], resources: Resources, *, first: bool
) -> list[dict[str, float]]:
    def command(share: Share) -> list[str]:
        words = ["shard", stage, name, "--index", str(share.index), "--count", str(share.count), "--tied"]
        only = ["--first"] if first else []
        return [sys.executable, "-m", "specflow", *words, "--params", str(params_path), *only]

    return run_processes(f"{stage}@{name}", shares, command)


def run_processes(what: str, shares: Sequence[Share], command: Callable[[Share], list[str]]) -> list[dict[str, float]]:
    """Run shares as processes of this machine; all of them are ended when this one is interrupted or one fails.

    Each prints its result as a line of JSON. They stay in this process's group, so that a signal to the group reaches
    them, and end when their input closes, so that none outlives a SIGKILL of this process.
    """
    running: dict[Share, subprocess.Popen[str]] = {}
    restarts = dict.fromkeys(shares, 0)
    results: dict[Share, dict[str, float]] = {}
    try:
        for share in shares:
            running[share] = _start(command(share), share)
        while running:
            time.sleep(POLL_S)
            for share, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[share]
                if code in KILLED and restarts[share] < MAX_RESTARTS:
                    restarts[share] += 1
                    logger.warning("%s: %s was killed (%d), starting it again", what, share.name, code)
                    running[share] = _start(command(share), share)
                elif code != 0:
                    raise _failure(f"{what}: {share.name}", code)
                else:
                    assert process.stdout is not None
                    results[share] = json.loads(process.stdout.read().splitlines()[-1])
    finally:
        _end(list(running.values()))
    return [results[share] for share in shares]


def _start(command: list[str], share: Share) -> subprocess.Popen[str]:
    quiet = {"TQDM_DISABLE": "1"} if share.index else {}  # one bar stands for all
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **quiet}
    )


def _failure(what: str, code: int) -> UserError:
    """The share has said itself, on stderr, what is wrong."""
    if code == RetryableError.EXIT_CODE:
        return RetryableError(f"{what} stopped for a reason that may pass, its message stands above")
    if code in KILLED:
        return UserError(
            f"{what} was killed {MAX_RESTARTS + 1} times (exit code {code}), mostly for want of memory: "
            "finished rows are kept, so run the stage again with fewer shares or a smaller batch"
        )
    return UserError(f"{what} ended with exit code {code}, its message stands above")


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """SIGTERM, a grace, SIGKILL; returns when none is left."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_parent() -> None:
    """End this process when its standard input closes, which a parent's death does too."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not through the buffered reader, whose lock would hinder the exit
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _on_ray(
    run_share: RunShare,
    stage: str,
    name: str,
    params_path: Path,
    shares: Sequence[Share],
    resources: Resources,
    *,
    first: bool,
) -> list[dict[str, float]]:
    """Run shares as Ray tasks, which take `gpus` each; Ray starts those of a lost worker or node again elsewhere.

    The nodes see this folder under the same path and have specflow installed. Leaving cancels what still runs.
    """
    try:
        import ray
    except ImportError:
        raise UserError(f"{RAY_ADDRESS} is set, but ray is not installed: pip install 'specflow[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=ray_address(), logging_level="WARNING")
    # a process of its own for each task: CUDA starts in it, and its memory goes with it
    task = ray.remote(max_calls=1, max_retries=MAX_RESTARTS, num_gpus=resources.gpus)(_ray_share)
    folder, waiting = str(Path.cwd()), []
    try:
        waiting = [
            task.options(name=f"{stage}@{name} {share.name}").remote(
                run_share, folder, stage, name, str(params_path), share.index, share.count, first
            )
            for share in shares
        ]
        results: list[dict[str, float]] = ray.get(waiting)
        return results
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise type(error.cause)(str(error.cause)) from None
        raise
    except ray.exceptions.RayError as error:
        raise RetryableError(
            f"{stage}@{name}: a share was lost on Ray {MAX_RESTARTS + 1} times ({type(error).__name__}): finished rows "
            "are kept, run the stage again"
        ) from None
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _ray_share(
    run_share: RunShare, folder: str, stage: str, name: str, params_path: str, index: int, count: int, first: bool
) -> dict[str, float]:
    if index:
        os.environ["TQDM_DISABLE"] = "1"  # one bar stands for all
    os.chdir(folder)
    return run_share(stage, name, Path(params_path), Share(index, count), first=first)
