"""The pipeline as a Prefect flow: one task per stage of DVC's graph, each of which is `dvc repro -s <stage>`.

DVC decides what is stale and what follows from what; the flow decides when and how many at once. `dvc repro` without
it leaves the same dvc.lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from prefect import allow_failure, flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from prefect.tasks import Task

from flows import artifacts, runner, slots
from flows.cancelling import ending_tasks, stop_of
from flows.checkout import sole_pipeline
from flows.graph import StageNode, changed_stages, stage_graph
from flows.plan import Job, Outcome, dvc_command, make_jobs, select, stage_environment
from flows.records import Link
from specflow.errors import UserError

RETRY_DELAYS_S = [15.0, 60.0, 240.0]
"""Before each further try of a stage that lost a server, or whose GPU another tenant had filled."""
STATE_NAMES = {"ran": "Completed", "restored": "Restored", "cached": "Cached", "skipped": "Skipped"}
"""Name of a stage's final state in the Prefect UI."""
TRY_AGAIN = "TryAgain"

_status_lock = threading.Lock()
"""DVC's Python API is not safe for threads."""


def _run_name() -> str:
    families = runtime.flow_run.parameters.get("families")
    return f"pipeline {', '.join(families) if families else 'of all families'}"


@flow(name="pipeline", flow_run_name=_run_name)
def pipeline(
    families: list[str] | None = None,
    stages: list[str] | None = None,
    force: bool = False,
    params: dict[str, Any] | None = None,
    retry_delays_s: list[float] | None = None,
) -> Any:
    """Run what is stale, families side by side as far as GPUs allow; a failing family does not stop another.

    Args:
        families: Families to work on; none: all that params.yaml lists. Stages over all families (report) are included.
        stages: Stages (`bench`) or addresses (`bench@smollm2`) to bring up to date, with what they need; none: all.
        force: Run the stages even if nothing changed.
        params: Values to set in params.yaml first, by dotted key, as `dvc exp run -S` does. They stay there.
        retry_delays_s: Seconds before each further try after a lost server or a GPU filled by somebody else.
    """
    root, run_id, logger = Path.cwd(), str(runtime.flow_run.id), get_run_logger()
    delays = RETRY_DELAYS_S if retry_delays_s is None else retry_delays_s
    try:
        with sole_pipeline(root, f"pipeline run {run_id}", logger.info):
            if params:
                from specflow.params.file import set_params

                set_params(root / "params.yaml", params)
            link = Link(root)
            nodes = select(stage_graph(root), families, stages)
            changed = set(nodes) if force else changed_stages(root, nodes)
            jobs = make_jobs(root, nodes.values(), changed, force=force, flow_run_id=run_id)
            slots.check_limit({address: job.slots for address, job in jobs.items()})
            logger.info("%d stages, %d of them stale at the start", len(jobs), len(changed))
            outcomes = _run_all(nodes, jobs, delays)
            links = link.finish(f"prefect {run_id}", nodes.values(), {"prefect_flow_run_id": run_id}, logger)
            artifacts.publish(root, nodes.values(), outcomes, links)
    except UserError as error:
        return Failed(message=str(error))
    return _flow_state(outcomes)


def _run_all(nodes: dict[str, StageNode], jobs: dict[str, Job], delays: Sequence[float]) -> list[Outcome]:
    """Submit every stage with its edges and wait for all."""
    stage = run_stage.with_options(retries=len(delays), retry_delay_seconds=list(delays) or None)
    submitted: dict[str, PrefectFuture[Any]] = {}
    with ending_tasks(str(runtime.flow_run.id)) as futures:
        for address, node in nodes.items():
            submitted[address] = submit_stage(stage, jobs[address], [submitted[up] for up in node.upstream])
            futures.append(submitted[address])
    return [_outcome(jobs[address], future.state) for address, future in submitted.items()]


def submit_stage(stage: Task[..., Any], job: Job, upstream: list[PrefectFuture[Any]]) -> PrefectFuture[Any]:
    """Hand a stage to the flow's task runner; it starts once every future in `upstream` is finished, well or not."""
    return stage.with_options(name=job.address).submit(job, [allow_failure(future) for future in upstream])


def _worth_a_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    return bool(state.name == TRY_AGAIN)


@task(
    task_run_name="{job.address}",
    cache_policy=NO_CACHE,  # DVC's cache is the one truth
    persist_result=False,
    retry_condition_fn=_worth_a_retry,
    retry_jitter_factor=0.5,
)
def run_stage(job: Job, upstream: list[Outcome]) -> Any:
    """Bring one stage up to date. Returns its final state, which carries the Outcome."""
    logger = get_run_logger()
    # What raised instead of returning an outcome comes as its exception.
    lost = [each for each in upstream if not isinstance(each, Outcome) or each.state in ("failed", "skipped")]
    if lost:
        names = " and ".join(each.address if isinstance(each, Outcome) else "a stage before it" for each in lost)
        return _final(Outcome(job.address, "skipped", message=f"{names} did not succeed"))
    started = time.monotonic()
    moved = any(outcome.moved for outcome in upstream)
    if not job.changed and not moved:
        return _final(Outcome(job.address, "cached", message="nothing changed"))
    if job.slots and moved and not job.force:
        with _status_lock:  # before it queues for a GPU: the upstream may have come out as it was
            if not changed_stages(Path(job.root), [job.address]):
                return _final(Outcome(job.address, "cached", message="nothing changed"))
    stop, waited, name = stop_of(job.flow_run_id), 0.0, None
    try:
        with ExitStack() as stack:
            if job.slots:
                take = partial(slots.gpu_slots, task_run_id=runtime.task_run.id, stop=stop, log=logger.info)
                waited = stack.enter_context(take(job.slots, job.address))
            verdict = _reproduce(job, stop, logger)
    except (UserError, runner.StageStopped, runner.StageTimeout) as error:
        verdict = runner.Verdict("failed", message=str(error))
        name = "TimedOut" if isinstance(error, runner.StageTimeout) else None
    if verdict.retryable:
        name = TRY_AGAIN
    seconds = time.monotonic() - started - waited
    return _final(Outcome(job.address, verdict.state, seconds, waited, job.gpus, verdict.message), name)


def _reproduce(job: Job, stop: threading.Event, logger: Any) -> runner.Verdict:
    words = ["repro", "-s", *(["-f"] if job.force else []), job.address]
    finished = runner.run_command(
        dvc_command(*words),
        root=Path(job.root),
        environment=stage_environment(job.pipeline_key),
        timeout_s=job.timeout_s,
        stop=stop,
        on_line=logger.info,
        on_progress=artifacts.Progress(job.address).update,
    )
    return runner.read_verdict(finished)


def _final(outcome: Outcome, name: str | None = None) -> State[Outcome]:
    took = f"{outcome.state} after {outcome.seconds:.1f} s" if outcome.seconds else ""
    message = ": ".join(filter(None, [took, outcome.message]))
    if outcome.state == "failed":
        return Failed(name=name or "Failed", message=f"{outcome.address} {message}", data=outcome)
    return Completed(name=STATE_NAMES[outcome.state], message=message, data=outcome)


def _outcome(job: Job, state: State[Any]) -> Outcome:
    if not state.is_final():  # NotReady: something before it crashed
        return Outcome(job.address, "skipped", message="a stage before it crashed")
    outcome = state.result(raise_on_failure=False)
    if isinstance(outcome, Outcome):
        return outcome
    return Outcome(job.address, "failed", message=f"ended as {state.name}: {state.message}")


def _flow_state(outcomes: Sequence[Outcome]) -> State[Any]:
    counts = [(state, sum(outcome.state == state for outcome in outcomes)) for state in artifacts.STATES]
    said = ", ".join(f"{count} {state}" for state, count in counts if count)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        return Failed(message=f"{failed[0].address}: {failed[0].message} ({said})")
    return Completed(message=said or "no stages")
