"""The pipeline with its tasks on a Ray cluster: stages run on whichever node has the GPUs that they ask for.

`python -m flows.ray_runner [FAMILY...]`, or a deployment with the entrypoint `flows/ray_runner.py:pipeline_on_ray`. The
cluster is SPECFLOW_RAY_ADDRESS. Its nodes see the checkout under one path, have specflow[ray] installed and reach the
Prefect server.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
from prefect.futures import PrefectFuture
from prefect.tasks import Task
from prefect.utilities.annotations import BaseAnnotation
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

from flows.pipeline import pipeline
from flows.plan import Job, Outcome
from specflow.config import load_params
from specflow.gpus.resources import stage_resources
from specflow.sharding import launch


class StageTaskRunner(RayTaskRunner):
    """A RayTaskRunner that asks for the GPUs of each task's stage, and hands it what came before as plain outcomes."""

    def submit(self, task: Task[..., Any], parameters: dict[str, Any], *args: Any, **kwargs: Any) -> PrefectFuture[Any]:
        remote = task.with_options()
        remote.fn = remote.__wrapped__ = run_there
        # prefect's annotations do not survive pickling: a tuple's value comes back inside another tuple
        upstream = [each.unwrap() if isinstance(each, BaseAnnotation) else each for each in parameters["upstream"]]
        with remote_options(**ray_options(parameters["job"])):
            return super().submit(remote, {**parameters, "upstream": upstream}, *args, **kwargs)

    @staticmethod
    def _run_prefect_task(*states: Any, parameters: dict[str, Any], **kwargs: Any) -> Any:
        """On the node; `states` are those of the tasks in `upstream`."""
        outcomes = [state.result(raise_on_failure=False) for state in states]
        lost = Outcome("a stage", "failed")  # crashed: there is no outcome of it
        upstream = [outcome if isinstance(outcome, Outcome) else lost for outcome in outcomes]
        return RayTaskRunner._run_prefect_task(parameters={**parameters, "upstream": upstream}, **kwargs)


def run_there(job: Job, upstream: list[Outcome]) -> Any:
    """`pipeline.run_stage` by its name: pickled as it is, it would take this process's locks along."""
    from flows.pipeline import run_stage

    return run_stage.fn(job, upstream)


def ray_options(job: Job) -> dict[str, Any]:
    """What the task of a stage takes of a node. One whose rows are split takes nothing: its shares ask for themselves.

    A process of its own, so that neither the environment of a lease nor CUDA's memory is passed on to the next task.
    """
    stage, _, family = job.address.partition("@")
    params = Path(job.root) / "params.yaml"
    known = load_params(params).families if params.exists() else {}
    needs = launch.split(stage, family, stage_resources(Path(job.root), stage, known.get(family)))
    split = needs.shards > 1
    return {"num_gpus": 0 if split else needs.gpus, "num_cpus": 0 if split else 1, "max_calls": 1}


def runner() -> StageTaskRunner:
    """Connects to SPECFLOW_RAY_ADDRESS when a flow starts; tasks import from this checkout and know the address."""
    address = launch.ray_address()
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    variables = {"PYTHONPATH": path, **({launch.RAY_ADDRESS: address} if address else {})}
    return StageTaskRunner(address=address, init_kwargs={"runtime_env": {"env_vars": variables}})


pipeline_on_ray = pipeline.with_options(name="pipeline-ray", task_runner=runner())

if __name__ == "__main__":
    if launch.ray_address() is None:
        sys.exit(f"flows.ray_runner: set {launch.RAY_ADDRESS} to the cluster's address")
    state = pipeline_on_ray(families=sys.argv[1:] or None, return_state=True)
    ray.shutdown()
    sys.exit(0 if state.is_completed() else 1)
