"""The MLflow record: an experiment per family, a parent run per pipeline run, a child per stage.

Only this folder imports mlflow. MLflow is a log, never an input: a store that cannot be used costs one
warning and the stage goes on. A stage's run carries the md5 of its metrics file, which dvc.lock records too: by it the
run of a cached stage is found again (`link_reused`) and a lost record is rebuilt (`sync`).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from specflow import __version__
from specflow.config import Params
from specflow.errors import UserError
from specflow.gpus import nvml
from specflow.paths import Paths, outside, project_home
from specflow.results.schema import family_summary
from specflow.tracking import results
from specflow.tracking.registry import find_version, register_draft
from specflow.tracking.store import (
    create_run,
    ensure_experiment,
    flatten,
    locked,
    log_params,
    log_points,
    now_ms,
    open_store,
    points,
    reason,
    search,
    set_tags,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion

PIPELINE_VARIABLE = "SPECFLOW_PIPELINE"
"""Environment: what identifies the pipeline run that this process is a stage of, where `dvc repro` alone does not."""
PIPELINE = "pipeline"
"""Value of the tag `stage` on parent runs, so that `tags.stage = 'pipeline'` lists them alone."""
FLUSH_POINTS = 500
"""Curve points kept before a write: a call of log_batch costs about 20 ms, whatever it holds."""
FLUSH_SECONDS = 15.0
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
        self._try(lambda record: record.link_reused())

    def end(self, status: str) -> None:
        self._try(lambda record: record.end(status))
        self._record = None

    def _try(self, action: Callable[[_Record], object]) -> None:
        if self._record is None:
            return
        record = self._record
        try:
            action(record)
        except Exception as error:  # whatever the store throws must not take the stage's work down with it
            self._record = None
            _warn(error)
            with contextlib.suppress(Exception):  # a run that lost something is not left as if it still ran
                record.end("FAILED")


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

        self.stage, self.params, self.paths = stage, params, paths
        home = project_home(paths.root)
        self.client = open_store(home)
        self.experiment_id = ensure_experiment(self.client, name, home)
        self.tags = _tags(name, params)
        self.parent_id = parent_run_id or _pipeline_run(
            self.client, self.experiment_id, _pipeline_key(), self.tags, home
        )
        own = {**self.tags, "stage": stage, "mlflow.parentRunId": self.parent_id}
        self.run_id = create_run(self.client, self.experiment_id, stage, own)
        self.client.update_run(self.parent_id, status="RUNNING")
        self._points: list[Metric] = []
        flat = flatten(params.families[name].model_dump(mode="json"))
        try:
            for run_id in (self.run_id, self.parent_id):
                log_params(self.client, run_id, flat)
        except Exception:
            self.client.set_terminated(self.run_id, "FAILED")
            raise
        self._flushed = time.monotonic()
        self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=tracking_uri(home))
        nvml.watch_only_mine(self._monitor)
        self._monitor.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._points += points(metrics, step, now_ms())
        if len(self._points) >= FLUSH_POINTS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def finish(self, metrics: dict[str, float]) -> None:
        digests = _digest_tags(self.stage, self.paths)
        parts: list[Callable[[], object]] = [
            lambda: self._headline(metrics),
            lambda: set_tags(self.client, self.run_id, digests),
            lambda: set_tags(self.client, self.parent_id, _of_parent(digests)),
            lambda: _log_artifacts(self.client, self.run_id, self.stage, self.paths),
        ]
        lost: list[Exception] = []
        for part in parts:
            try:
                part()
            except Exception as error:  # what one part loses, the others keep
                lost.append(error)
        if self.stage == "bench":
            try:
                _register(self.client, self.run_id, self.params, self.paths, self.tags | digests)
            except Exception as error:  # a store without a registry still records the run
                logger.warning("MLflow does not register this draft. %s", reason(error))
        if lost:
            raise lost[0]

    def _headline(self, metrics: dict[str, float]) -> None:
        self._points += points(results.headline(self.stage, metrics, self.paths), 0, now_ms())
        self._flush()

    def link_reused(self) -> None:
        mode = results.mode(self.paths.family, self.params)
        link_reused(self.client, self.experiment_id, self.parent_id, self.paths, mode)

    def end(self, status: str) -> None:
        try:
            self._flush()
        finally:
            self._monitor.finish()
            self.client.set_terminated(self.run_id, status)
            with locked(project_home(self.paths.root)):
                _settle(self.client, self.experiment_id, self.parent_id)

    def _flush(self) -> None:
        metrics, self._points, self._flushed = self._points, [], time.monotonic()
        log_points(self.client, self.run_id, metrics)


def link_pipeline(key: str, names: Iterable[str], params: Params, tags: dict[str, str]) -> dict[str, str]:
    """Complete the parent runs of the pipeline run `key`, one of each family in `names`; return their ids by family.

    For whoever drives the pipeline, at its end: makes the parents that are missing (where every stage was cached there
    is none), adds `tags`, gives them the headline metrics of all stages and the ids of the runs that were reused, and
    ends them: FINISHED, or as the worst of their stages. Calling it again changes nothing. A store that cannot be used
    is one warning; the answer then lacks what was not reached.
    """
    parents = {}
    try:
        client = open_store(project_home(Path()))
        for name in names:
            paths = Paths(root=Path(), family=name, cache=outside(params.cache_dir))
            home = project_home(paths.root)
            experiment_id = ensure_experiment(client, name, home)
            parent_id = _pipeline_run(client, experiment_id, _clean(key), _tags(name, params), home)
            log_params(client, parent_id, flatten(params.families[name].model_dump(mode="json")))
            set_tags(client, parent_id, tags)
            link_reused(client, experiment_id, parent_id, paths, results.mode(name, params))
            with locked(home):
                _settle(client, experiment_id, parent_id, over=True)
            parents[name] = parent_id
    except Exception as error:  # see StageRun._try
        _warn(error)
    return parents


def link_reused(client: MlflowClient, experiment_id: str, parent_id: str, paths: Paths, mode: str) -> None:
    """Copy every stage's headline metrics to the parent; tag it `reused.<stage>` = run id for what it did not run."""
    parent = client.get_run(parent_id)
    stages = results.locked_stages(paths, mode)
    tags: dict[str, str] = {}
    for stage, md5 in stages.items():
        tags |= _of_parent(_digest_tags(stage, paths))
        run = _find_run(client, experiment_id, stage, md5)
        # One is missing where the store was lost or made later: `sync` rebuilds it.
        if run is not None and run.data.tags.get("mlflow.parentRunId") != parent_id:
            tags[f"reused.{stage}"] = run.info.run_id
    named = results.family_metrics(paths, stages)
    # What is there already is not written again: linking twice adds no second point.
    new = {key: value for key, value in named.items() if parent.data.metrics.get(key) != value}
    log_points(client, parent_id, points(new, 0, now_ms()))
    if "bench" in stages:
        tags["mlflow.note.content"] = results.verdict(paths)  # the description on the run's page
    set_tags(client, parent_id, tags)


def sync(name: str, params: Params, paths: Paths) -> list[str]:
    """Rebuild the runs that dvc.lock and the metrics files vouch for and the store lacks; return their stages.

    Calling it again creates nothing. The newest parent run of the family then carries every stage's metrics, and the
    draft is registered.
    """
    home = project_home(paths.root)
    client = open_store(home)
    experiment_id = ensure_experiment(client, name, home)
    mode = results.mode(name, params)
    done = results.locked_stages(paths, mode)
    missing = [stage for stage, md5 in done.items() if not _find_run(client, experiment_id, stage, md5)]
    if missing:
        key = f"dvc.lock {results.md5(paths.root / 'dvc.lock')}"
        parent_id = _pipeline_run(client, experiment_id, key, {**_tags(name, params), "rebuilt": "true"}, home)
        flat: dict[str, str] = {}
        for stage in done:
            flat |= flatten(results.locked_params(paths, stage))
        log_params(client, parent_id, flat)
        for stage in missing:
            _rebuild(client, experiment_id, parent_id, stage, params, paths)
        client.set_terminated(parent_id, "FINISHED")
    else:
        newest = search(client, experiment_id, "tags.pipeline LIKE '%'")
        if not newest:
            return []
        parent_id = newest[0].info.run_id
    link_reused(client, experiment_id, parent_id, paths, mode)
    if "bench" in done:
        _ensure_registered(client, experiment_id, done["bench"], params, paths)
    return missing


def _rebuild(
    client: MlflowClient, experiment_id: str, parent_id: str, stage: str, params: Params, paths: Paths
) -> None:
    made_ms = int(paths.metrics(stage).stat().st_mtime * 1000)
    tags = {**_tags(paths.family, params), "stage": stage, "rebuilt": "true", "mlflow.parentRunId": parent_id}
    run_id = create_run(client, experiment_id, stage, {**tags, **_digest_tags(stage, paths)}, start_time=made_ms)
    log_params(client, run_id, flatten(results.locked_params(paths, stage)))
    metrics = points(results.headline(stage, results.read_metrics(paths, stage), paths), 0, made_ms)
    if stage.startswith("train_"):
        for prefix, plot in (("train", "training.json"), ("eval", "eval.json")):
            if paths.plot(plot).exists():
                for row in json.loads(paths.plot(plot).read_text(encoding="utf-8")):
                    step = int(row.pop("step"))
                    metrics += points({f"{prefix}/{key}": value for key, value in row.items()}, step, made_ms)
    log_points(client, run_id, metrics)
    _log_artifacts(client, run_id, stage, paths)
    client.set_terminated(run_id, "FINISHED", end_time=made_ms)


def _register(client: MlflowClient, run_id: str, params: Params, paths: Paths, tags: dict[str, str]) -> None:
    kept = ("family", "method", "mode", "git_commit", "metrics_md5")
    told = {key: tags[key] for key in kept if key in tags}
    register_draft(client, run_id, paths, told, weights=params.register_weights)


def registered_version(client: MlflowClient, name: str, params: Params, paths: Paths) -> ModelVersion:
    """The version of the draft whose benchmark lies on disk, registered where it is not yet.

    Raises UserError where no run of that benchmark is recorded and dvc.lock does not vouch for it.
    """
    digest = str(family_summary(paths).identity.draft_digest)
    version = find_version(client, name, digest)
    if version is None:
        sync(name, params, paths)  # which registers it too
        version = find_version(client, name, digest)
    if version is None:
        raise UserError(f"no run of the benchmark of {name!r} is recorded: run `dvc repro bench@{name}`")
    return version


def _ensure_registered(client: MlflowClient, experiment_id: str, md5: str, params: Params, paths: Paths) -> None:
    run = _find_run(client, experiment_id, "bench", md5)
    assert run is not None, "made by now"
    if find_version(client, paths.family, run.data.tags.get("draft_digest", "")) is None:
        _register(client, run.info.run_id, params, paths, run.data.tags)


def _clean(key: str) -> str:
    """A key that can stand in quotes in a search."""
    return key.replace("'", "")


def _pipeline_key() -> str | None:
    """What the environment says, else the `dvc repro` or `dvc exp run` above us (process id and start).

    None when run by hand.
    """
    if told := os.environ.get(PIPELINE_VARIABLE, "").strip():
        return _clean(told)
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            names = [Path(word).name for word in words[:4]]
            if "dvc" in names and {"repro", "exp"} & set(words):
                return f"dvc {process.pid} {process.create_time():.2f}"
    return None


def _pipeline_run(client: MlflowClient, experiment_id: str, key: str | None, tags: dict[str, str], home: Path) -> str:
    """Id of the parent run with this key, created where it is missing; without a key always a new one."""
    with locked(home):
        if key is not None:
            found = client.search_runs([experiment_id], f"tags.pipeline = '{key}'", max_results=1)
            if found:
                return str(found[0].info.run_id)
        # A list of runs shows some twenty characters of a name.
        name = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {tags['family']}"
        tags = {**tags, "stage": PIPELINE, "pipeline": key or "by hand"}
        return create_run(client, experiment_id, name, tags)


def _settle(client: MlflowClient, experiment_id: str, parent_id: str, *, over: bool = False) -> None:
    """Give the parent the worst state of its stages' newest runs; while one still runs it does too, unless all is over.

    `over` also ends runs that a killed process left open.
    """
    newest: dict[str, Run] = {}
    for run in search(client, experiment_id, f"tags.`mlflow.parentRunId` = '{parent_id}'", limit=1000):
        newest.setdefault(run.data.tags.get("stage", ""), run)
    states = set()
    for run in newest.values():
        state = run.info.status
        if over and state == "RUNNING":
            state = "KILLED"
            client.set_terminated(run.info.run_id, state)
        states.add(state)
    worst = next((state for state in ("RUNNING", "FAILED", "KILLED") if state in states), "FINISHED")
    if worst != "RUNNING":
        client.set_terminated(parent_id, worst)


def _find_run(client: MlflowClient, experiment_id: str, stage: str, md5: str) -> Run | None:
    found = search(client, experiment_id, f"tags.stage = '{stage}' and tags.metrics_md5 = '{md5}'")
    return found[0] if found else None


def _tags(name: str, params: Params) -> dict[str, str]:
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    tags = {"family": name, "method": results.METHOD, "mode": results.mode(name, params)}
    tags |= {"specflow_version": __version__, "mlflow.user": getpass.getuser(), "mlflow.source.name": "specflow"}
    return {**tags, "git_commit": commit or "none", **({"mlflow.source.git.commit": commit} if commit else {})}


def _digest_tags(stage: str, paths: Paths) -> dict[str, str]:
    tags = {}
    if paths.target.exists():
        tags["target_digest"] = json.loads(paths.target.read_text(encoding="utf-8"))["digest"]
    if stage == "bench" and (paths.bench / "summary.json").exists():
        summary = family_summary(paths)
        tags |= {**results.conditions(summary), "draft_digest": str(summary.identity.draft_digest)}
    if paths.metrics(stage).exists():
        tags["metrics_md5"] = results.md5(paths.metrics(stage))
    if (lock := paths.root / "dvc.lock").exists():  # as it stands while the stage runs: what its inputs were locked at
        tags["dvc_lock_md5"] = results.md5(lock)
    return tags


def _of_parent(digests: dict[str, str]) -> dict[str, str]:
    """The tags of a stage that are true of the whole pipeline run."""
    return {key: value for key, value in digests.items() if key not in ("metrics_md5", "dvc_lock_md5")}


def _log_artifacts(client: MlflowClient, run_id: str, stage: str, paths: Paths) -> None:
    for file in results.artifacts(stage, paths):
        client.log_artifact(run_id, str(file))


def _warn(error: Exception) -> None:
    logger.warning("MLflow does not record this run; the stage goes on. %s", reason(error))
