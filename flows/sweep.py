"""Many settings of one family side by side, each a DVC experiment in its own temporary copy of the workspace."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import artifacts, runner, slots
from flows.cancelling import ending_tasks, stop_of
from flows.graph import experiment_metrics, stage_graph
from flows.plan import Job, make_jobs, select, stage_environment
from specflow.errors import UserError
from specflow.files import write_text

HEADLINE = [["expected_acceptance_length"], ["acceptance_length"], ["speedup"], ["speedup_ci_low"], ["speedup_ci_high"]]
HEADLINE += [["tok_s"], ["lossless_rate"]]
"""Keys of a metrics file that the table shows."""


@dataclass(frozen=True)
class Point:
    """One setting: an experiment to run."""

    name: str
    overrides: dict[str, Any]
    """Values by dotted key of params.yaml."""
    address: str
    """The stage that the experiment ends in."""
    single: bool
    """Only that stage (`-s`), with its upstream as it is in the workspace."""
    slots: int
    timeout_s: float | None
    flow_run_id: str


@flow(name="sweep", flow_run_name="sweep of {family}")
def sweep(
    family: str,
    grid: dict[str, list[Any]] | None = None,
    points: list[dict[str, Any]] | None = None,
    target: str = "bench",
    name: str | None = None,
) -> Any:
    """Run a family with every combination of `grid`, then every setting of `points`; the workspace stays as it is.

    Args:
        family: The family whose parameters vary.
        grid: Values to combine, by parameter below the family: {"train.lr": [1e-4, 3e-4], "train.epochs": [1, 2]}.
        points: Settings of their own, as a list: [{"train.lr": 1e-3, "train.epochs": 4}].
        target: Stage that each setting runs up to.
        name: Prefix of the experiments' names; default the family and the time.
    """
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    return run_points(family, [*combined, *(points or [])], target=target, single=False, name=name)


def run_points(
    family: str, settings: Sequence[Mapping[str, Any]], *, target: str, single: bool, name: str | None
) -> Any:
    """Run each setting as an experiment and put the results side by side; final state of the flow that calls it.

    One that fails does not stop the others. Results go to .specflow/sweeps/NAME.csv and .md, and into the UI.
    """
    root, run_id = Path.cwd(), str(runtime.flow_run.id)
    sweep_name = name or f"{target}-{family}-{time.strftime('%m%d-%H%M%S')}"
    try:
        points = _plan(root, family, settings, target, single, sweep_name, run_id)
        slots.check_limit({point.name: point.slots for point in points})
    except UserError as error:
        return Failed(message=str(error))
    submitted = {}
    with ending_tasks(run_id) as futures:
        for point in points:
            submitted[point.name] = run_point.submit(point)
            futures.append(submitted[point.name])
    states = {name: _problem(future.state) for name, future in submitted.items()}
    done = [point for point in points if states[point.name] == ""]
    found = experiment_metrics(root, [point.name for point in done])
    rows = [_row(point, states[point.name], found.get(point.name, {}), family) for point in points]
    _publish(root, sweep_name, {parameter for setting in settings for parameter in setting}, rows)
    failed = len(points) - len(done)
    said = f"{len(done)} settings done; `dvc exp apply {sweep_name}-N` takes one over"
    if failed:
        return Failed(message=f"{failed} of {len(points)} settings failed; the others are in the table")
    return Completed(message=said)


def _plan(
    root: Path, family: str, settings: Sequence[Mapping[str, Any]], target: str, single: bool, name: str, run_id: str
) -> list[Point]:
    """A point per setting, every one checked against the schema before the first runs."""
    if not settings:
        raise UserError("nothing to run: give a grid, {parameter: [values]}, or points, [{parameter: value}]")
    nodes = select(stage_graph(root), [family], [target])
    address = next(node.address for node in nodes.values() if target in (node.stage, node.address))
    jobs = list(make_jobs(root, nodes.values(), set(), force=False, flow_run_id=run_id).values())
    used: list[Job] = [job for job in jobs if job.address == address] if single else jobs
    limits = [job.timeout_s for job in used]
    points = []
    for number, setting in enumerate(settings, 1):
        overrides = {f"families.{family}.{parameter}": value for parameter, value in setting.items()}
        _check(root, overrides)
        points.append(
            Point(
                name=f"{name}-{number}",
                overrides=overrides,
                address=address,
                single=single,
                slots=max(job.slots for job in used),
                timeout_s=None if None in limits else sum(limit for limit in limits if limit is not None),
                flow_run_id=run_id,
            )
        )
    return points


def _check(root: Path, overrides: Mapping[str, Any]) -> None:
    from specflow.params.file import set_params

    if (root / "params.yaml").exists():
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(shutil.copy(root / "params.yaml", scratch))
            set_params(copy, overrides)


def _problem(state: State[Any]) -> str:
    return "" if state.is_completed() else state.message or state.name or "failed"


@task(task_run_name="{point.name}", cache_policy=NO_CACHE, persist_result=False)
def run_point(point: Point) -> Any:
    """Run one experiment."""
    logger, stop = get_run_logger(), stop_of(point.flow_run_id)
    changes = [word for key, value in point.overrides.items() for word in _set_param(key, value)]
    single = ["-s"] if point.single else []
    command = [sys.executable, "-m", "flows.experiment", "--name", point.name, *single, *changes, point.address]
    try:
        with ExitStack() as stack:
            if point.slots:
                take = partial(slots.gpu_slots, task_run_id=runtime.task_run.id, stop=stop, log=logger.info)
                stack.enter_context(take(point.slots, point.name))
            finished = runner.run_command(
                command,
                root=Path.cwd(),
                # A parent of its own in MLflow: settings are compared with each other.
                environment=stage_environment(f"prefect {point.flow_run_id} {point.name}"),
                timeout_s=point.timeout_s,
                stop=stop,
                on_line=logger.info,
                on_progress=artifacts.Progress(point.name).update,
            )
    except (UserError, runner.StageStopped, runner.StageTimeout) as error:
        return Failed(message=str(error))
    verdict = runner.read_verdict(finished)
    if verdict.state == "failed":
        return Failed(message=verdict.message)
    return Completed(message=f"done in {finished.seconds:.0f} s", data=point.name)


def _set_param(key: str, value: Any) -> list[str]:
    """Words of `dvc exp run`. ++: whether params.yaml says the parameter or leaves it at its default."""
    # a mapping or list is merged with what is there, so that goes first
    values = [None, value] if isinstance(value, Mapping | list) else [value]
    return [word for each in values for word in ("-S", f"++{key}={_override(each)}")]


def _override(value: Any) -> str:
    """A value in the grammar of `dvc exp run -S`, which is Hydra's: keys are not quoted."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_override(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _row(point: Point, error: str, measured: Mapping[str, Any], family: str) -> dict[str, Any]:
    """One line of the table: setting, state, and every number in the family's metrics files as `file.key`."""
    below = f"families.{family}."
    row = {"experiment": point.name, **{key.removeprefix(below): value for key, value in point.overrides.items()}}
    row["state"] = error or "done"
    for path, values in sorted(measured.items()):
        if family in Path(path).parts and isinstance(values, dict):
            numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
            row |= {f"{Path(path).stem}.{key}": value for key, value in numbers.items()}
    return row


def _publish(root: Path, name: str, settings: Iterable[str], rows: Sequence[dict[str, Any]]) -> None:
    """Every column into the csv; into the table the settings, the state and the headline numbers."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    told = {"experiment", *settings, "state"}
    shown = [column for column in columns if column in told or column.split(".")[1:] in HEADLINE]
    table = [{column: _cell(row.get(column)) for column in shown} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    lines = [shown, ["---"] * len(shown), *([row[column] for column in shown] for row in table)]
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    folder = root / ".specflow" / "sweeps"
    write_text(folder / f"{name}.csv", text.getvalue())
    write_text(folder / f"{name}.md", markdown)
    create_table_artifact(table, key=artifacts.key("sweep", name), description=f"{folder / name}.csv")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
