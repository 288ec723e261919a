"""The MLflow record: an experiment per family, a parent run per pipeline run, a child per stage.

The only importer of mlflow. MLflow is a log, never an input: a store that cannot be used costs one warning and the
stage goes on. A stage's run carries the md5 of its metrics file, which dvc.lock records too: by it the run of a cached
stage is found again (`link_reused`) and a lost record is rebuilt (`sync`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from specflow import __version__, results
from specflow.config import Params
from specflow.errors import UserError
from specflow.paths import Paths, project_home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

STORE = "mlflow.db"
FLUSH_POINTS = 500
"""Curve points kept before a write: a call of log_batch costs about 20 ms, whatever it holds."""
FLUSH_SECONDS = 15.0
MAX_PARAM_LENGTH = 6000
"""MLflow's limit on a parameter's value."""
logger = logging.getLogger("specflow")


class StageRun:
    """What a stage writes its record to; silent after the first failure of the store."""

    def __init__(self, record: _Record | None) -> None:
        self._record = record

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Add a point to each named curve."""
        self._try(lambda record: record.log(metrics, step))

    def finish(self, metrics: dict[str, float]) -> None:
        """Record the stage's headline metrics, the digests and the result files."""
        self._try(lambda record: record.finish(metrics))

    def link_reused(self) -> None:
        """Give the parent the headline metrics of every stage, and the ids of runs that this pipeline run reused."""
        self._try(lambda record: link_reused(record.client, record.experiment_id, record.parent_id, record.paths))

    def end(self, status: str) -> None:
        self._try(lambda record: record.end(status))
        self._record = None

    def _try(self, action: Callable[[_Record], object]) -> None:
        if self._record is None:
            return
        try:
            action(self._record)
        except Exception as error:  # whatever the store throws must not take the stage's work down with it
            self._record = None
            _warn(error)


@contextlib.contextmanager
def stage_run(
    stage: str, name: str, params: Params, paths: Paths, *, parent_run_id: str | None = None
) -> Iterator[StageRun]:
    """A run for `stage` of family `name`, nested in `parent_run_id`, or in the run of the `dvc repro` that runs us."""
    try:
        run = StageRun(_Record(stage, name, params, paths, parent_run_id))
    except Exception as error:  # see StageRun._try
        _warn(error)
        run = StageRun(None)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        run.end(status)


class _Record:
    """The MLflow run of one stage; every method may raise what the store raises."""

    def __init__(self, stage: str, name: str, params: Params, paths: Paths, parent_run_id: str | None) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.stage, self.paths = stage, paths
        home = project_home(paths.root)
        self.client = open_store(home)
        self.experiment_id = ensure_experiment(self.client, name, home)
        tags = _tags(name, params)
        with _locked(home):
            self.parent_id = parent_run_id or _pipeline_run(self.client, self.experiment_id, _pipeline_key(), tags)
        self.run_id = _create_run(
            self.client, self.experiment_id, stage, {**tags, "mlflow.parentRunId": self.parent_id}
        )
        self.client.update_run(self.parent_id, status="RUNNING")
        flat = _flatten(params.families[name].model_dump(mode="json"))
        for run_id in (self.run_id, self.parent_id):
            _log_params(self.client, run_id, flat)
        self._points: list[Metric] = []
        self._flushed = time.monotonic()
        self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=_uri(home))
        self._monitor.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._points += _metrics(metrics, step, _now_ms())
        if len(self._points) >= FLUSH_POINTS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def finish(self, metrics: dict[str, float]) -> None:
        self._points += _metrics(results.headline(self.stage, metrics, self.paths), 0, _now_ms())
        self._flush()
        digests = _digest_tags(self.stage, self.paths)
        for key, value in digests.items():
            self.client.set_tag(self.run_id, key, value)
        if "target_digest" in digests:
            self.client.set_tag(self.parent_id, "target_digest", digests["target_digest"])
        _log_artifacts(self.client, self.run_id, self.stage, self.paths)

    def end(self, status: str) -> None:
        self._flush()
        self._monitor.finish()
        self.client.set_terminated(self.run_id, status)
        self.client.set_terminated(self.parent_id, status)

    def _flush(self) -> None:
        points, self._points, self._flushed = self._points, [], time.monotonic()
        _log_metrics(self.client, self.run_id, points)


def open_store(home: Path) -> MlflowClient:
    """The project's sqlite store, created and migrated under a lock: two processes doing that at once break it.

    Raises UserError where the file cannot be used; MLflow itself would retry for minutes.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # MLflow has no other switch
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)  # the import has set its own level
    store = home / STORE
    with _locked(home):
        try:
            with contextlib.closing(sqlite3.connect(store, timeout=60)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
            client = MlflowClient(_uri(home))
            client.search_experiments(max_results=1)
        except Exception as error:  # sqlite3's, SQLAlchemy's, Alembic's or MLflow's own, by what is wrong with the file
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"MLflow store {store} cannot be used ({reason}): move it away and run `specflow init`"
            ) from None
    return client


def ensure_experiment(client: MlflowClient, name: str, home: Path) -> str:
    """Id of the experiment of family `name`, created where it is missing; its artifacts lie in the project."""
    with _locked(home):
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(client.create_experiment(name, artifact_location=(home / "mlartifacts").resolve().as_uri()))


def link_reused(client: MlflowClient, experiment_id: str, parent_id: str, paths: Paths) -> None:
    """Copy every stage's headline metrics to the parent; tag it `reused.<stage>` = run id for what it did not run."""
    parent = client.get_run(parent_id)
    for stage, md5 in results.locked_stages(paths).items():
        run = _find_run(client, experiment_id, stage, md5)
        if run is None:  # lost, or made before the store: `sync` rebuilds it
            continue
        if run.data.tags.get("mlflow.parentRunId") != parent_id:
            client.set_tag(parent_id, f"reused.{stage}", run.info.run_id)
        named = results.headline(stage, results.read_metrics(paths, stage), paths)
        # One fixed time, so that linking twice writes the same rows and no second point.
        _log_metrics(client, parent_id, _metrics(named, 0, parent.info.start_time))


def sync(name: str, params: Params, paths: Paths) -> list[str]:
    """Rebuild the runs that dvc.lock and the metrics files vouch for and the store lacks; return their stages.

    Calling it again creates nothing. The newest parent run of the family then carries every stage's metrics.
    """
    home = project_home(paths.root)
    client = open_store(home)
    experiment_id = ensure_experiment(client, name, home)
    missing = [
        stage for stage, md5 in results.locked_stages(paths).items() if not _find_run(client, experiment_id, stage, md5)
    ]
    if missing:
        lock_digest = results.md5(paths.root / "dvc.lock")
        key = f"dvc.lock {lock_digest}"
        parent_id = _pipeline_run(client, experiment_id, key, {**_tags(name, params), "rebuilt": "true"})
        for stage in missing:
            _rebuild(client, experiment_id, parent_id, stage, params, paths)
        client.set_terminated(parent_id, "FINISHED")
    else:
        newest = _newest_parent(client, experiment_id)
        if newest is None:
            return []
        parent_id = newest
    link_reused(client, experiment_id, parent_id, paths)
    return missing


def _rebuild(
    client: MlflowClient, experiment_id: str, parent_id: str, stage: str, params: Params, paths: Paths
) -> None:
    file = paths.metrics(stage)
    made_ms = int(file.stat().st_mtime * 1000)
    tags = {**_tags(paths.family, params), "rebuilt": "true", "mlflow.parentRunId": parent_id}
    run_id = _create_run(client, experiment_id, stage, {**tags, **_digest_tags(stage, paths)}, start_time=made_ms)
    _log_params(client, run_id, _flatten(results.locked_params(paths, stage)))
    points = _metrics(results.headline(stage, results.read_metrics(paths, stage), paths), 0, made_ms)
    if stage.startswith("train_"):
        for prefix, plot in (("train", "training.json"), ("eval", "eval.json")):
            if paths.plot(plot).exists():
                for row in json.loads(paths.plot(plot).read_text(encoding="utf-8")):
                    step = int(row.pop("step"))
                    points += _metrics({f"{prefix}/{key}": value for key, value in row.items()}, step, made_ms)
    _log_metrics(client, run_id, points)
    _log_artifacts(client, run_id, stage, paths)
    client.set_terminated(run_id, "FINISHED", end_time=made_ms)


def _pipeline_key() -> str | None:
    """Identity of the `dvc repro` or `dvc exp run` above us (process id and start), or None when run by hand."""
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            names = [Path(word).name for word in words[:4]]
            if "dvc" in names and {"repro", "exp"} & set(words):
                return f"dvc {process.pid} {process.create_time():.2f}"
    return None


def _pipeline_run(client: MlflowClient, experiment_id: str, key: str | None, tags: dict[str, str]) -> str:
    """Id of the parent run with this key, created where it is missing; without a key always a new one."""
    if key is not None:
        found = client.search_runs([experiment_id], f"tags.pipeline = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
    name = "pipeline " + time.strftime("%Y-%m-%d %H:%M:%S")
    return _create_run(client, experiment_id, None, {**tags, "pipeline": key or "by hand"}, name=name)


def _create_run(
    client: MlflowClient,
    experiment_id: str,
    stage: str | None,
    tags: dict[str, str],
    *,
    name: str | None = None,
    start_time: int | None = None,
) -> str:
    tags = {**tags, **({"stage": stage} if stage else {})}
    run = client.create_run(experiment_id, start_time=start_time, tags=tags, run_name=name or stage)
    return str(run.info.run_id)


def _find_run(client: MlflowClient, experiment_id: str, stage: str, md5: str) -> Run | None:
    query = f"tags.stage = '{stage}' and tags.metrics_md5 = '{md5}'"
    found = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time DESC"])
    return found[0] if found else None


def _newest_parent(client: MlflowClient, experiment_id: str) -> str | None:
    order = ["attributes.start_time DESC"]
    found = client.search_runs([experiment_id], "tags.pipeline LIKE '%'", max_results=1, order_by=order)
    return str(found[0].info.run_id) if found else None


def _tags(name: str, params: Params) -> dict[str, str]:
    mode = "offline" if name in params.offline else "online"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    tags = {"family": name, "method": "eagle3", "mode": mode, "specflow_version": __version__}
    return {**tags, "git_commit": commit or "none", **({"mlflow.source.git.commit": commit} if commit else {})}


def _digest_tags(stage: str, paths: Paths) -> dict[str, str]:
    tags = {}
    if paths.target.exists():
        tags["target_digest"] = json.loads(paths.target.read_text(encoding="utf-8"))["digest"]
    if paths.metrics(stage).exists():
        tags["metrics_md5"] = results.md5(paths.metrics(stage))
    if (lock := paths.root / "dvc.lock").exists():  # as it stands while the stage runs: what its inputs were locked at
        tags["dvc_lock_md5"] = results.md5(lock)
    return tags


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """{"train": {"lr": 0.001}} -> {"train.lr": "0.001"}; lists as JSON."""
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else json.dumps(value)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _log_params(client: MlflowClient, run_id: str, flat: dict[str, str]) -> None:
    from mlflow.entities import Param

    have = client.get_run(run_id).data.params  # a parent gets the same ones from each of its stages
    new = [Param(key, value[:MAX_PARAM_LENGTH]) for key, value in flat.items() if key not in have]
    for first in range(0, len(new), 100):  # log_batch's limit
        client.log_batch(run_id, params=new[first : first + 100])


def _metrics(values: dict[str, float], step: int, time_ms: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(key, float(value), time_ms, step) for key, value in values.items()]


def _log_metrics(client: MlflowClient, run_id: str, points: list[Metric]) -> None:
    for first in range(0, len(points), 1000):  # log_batch's limit
        client.log_batch(run_id, metrics=points[first : first + 1000])


def _log_artifacts(client: MlflowClient, run_id: str, stage: str, paths: Paths) -> None:
    for file in results.artifacts(stage, paths):
        client.log_artifact(run_id, str(file))


def _uri(home: Path) -> str:
    return f"sqlite:///{(home / STORE).resolve()}"


def _now_ms() -> int:
    return int(time.time() * 1000)


def _warn(error: Exception) -> None:
    logger.warning("MLflow does not record this run; the stage goes on. %s", " ".join(str(error).split())[:300])


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    folder = home / ".specflow"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mlflow.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
