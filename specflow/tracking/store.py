"""The MLflow store itself: which one, opening it, experiments, and the few writes that the record is made of.

A project has its own sqlite file; where MLFLOW_TRACKING_URI is set, that store (a team's server) is used instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import posixpath
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specflow.errors import UserError
from specflow.http import spare_loopback
from specflow.tracking.view import VIEW_TAG, view_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, Run

STORE = "mlflow.db"
MAX_PARAM_LENGTH = 6000
"""MLflow's limit on a parameter's value."""
MAX_METRIC_NAME = 250
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""MLflow's own limits (7 retries, 120 s each) would hold a stage up for minutes where no server answers."""
AFTERWARDS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
KIND_TAG = "mlflow.experimentKind"
"""Tells MLflow's page that an experiment holds training runs, which it would otherwise ask the user."""


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the project's sqlite file; a relative sqlite path is the project's."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"sqlite:///{STORE}"
    if (file := _sqlite_file(uri)) is None:
        return uri
    return f"sqlite:///{(home.resolve() / file)}"


def describe(home: Path) -> str:
    """The store in words for a user: a file of the project or an address, without any password in it."""
    uri = tracking_uri(home)
    file = _sqlite_file(uri)
    return str(file) if file is not None else _without_password(uri)


def where_to_look(home: Path) -> str:
    """How a user gets to the runs: the server's address, or the command that serves the project's file."""
    uri = tracking_uri(home)
    if (file := _sqlite_file(uri)) is None:
        return describe(home)
    shown = file.relative_to(home.resolve()) if file.is_relative_to(home.resolve()) else file
    return f"mlflow ui --backend-store-uri sqlite:///{shown}"


def open_store(home: Path) -> MlflowClient:
    """A client of the store. Raises UserError, within seconds, where the store cannot be used."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # MLflow has no other switch
    spare_loopback()
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)  # the import has set its own level
    uri = tracking_uri(home)
    file = _sqlite_file(uri)
    if file is not None and "?" in str(file):  # the address of the file would end there
        raise UserError(f"MLflow cannot keep its store at {file}, for the ? in its path: rename that folder")
    if file is not None:
        return _open_sqlite(uri, file, home)
    try:
        with _http_limits():
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # requests' or MLflow's own, by what is wrong with the address
        raise UserError(
            f"MLflow server {describe(home)} cannot be used ({reason(error)}): start it, or unset MLFLOW_TRACKING_URI"
        ) from None
    return client


def _open_sqlite(uri: str, file: Path, home: Path) -> MlflowClient:
    """Created and migrated under a lock: two processes doing that at once break the file."""
    from mlflow import MlflowClient

    with locked(home):
        try:
            # MLflow itself would retry for minutes
            with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        except Exception as error:  # sqlite3's, SQLAlchemy's, Alembic's or MLflow's own, by what is wrong with the file
            raise UserError(f"MLflow store {file} cannot be used: {_cure(error, uri)}") from None
    return client


def _cure(error: Exception, uri: str) -> str:
    """What to do about a store that MLflow does not open."""
    text = str(error)
    if "out-of-date database schema" in text:
        return f"an older MLflow made it; keep a copy of it, then run `mlflow db upgrade {uri}`"
    if "Can't locate revision" in text:
        return "a newer MLflow made it; install that version, or name another store in MLFLOW_TRACKING_URI"
    return f"{reason(error)}; move it away and run `specflow init`"


def ensure_experiment(client: MlflowClient, name: str, home: Path) -> str:
    """Id of the experiment of family `name`, created where it is missing.

    Its artifacts lie in the project, or where the team's server puts them.
    """
    from mlflow.exceptions import MlflowException

    local = _sqlite_file(tracking_uri(home)) is not None
    location = (home / "mlartifacts").resolve().as_uri() if local else None
    with locked(home):
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                tags = {KIND_TAG: "custom_model_development", VIEW_TAG: view_tag()}
                return str(client.create_experiment(name, location, tags))
            except MlflowException:  # another machine was quicker, or the name is taken by a deleted one
                experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise UserError(f"MLflow experiment {name!r} is deleted: restore it (`mlflow experiments restore`) or purge it")
    if VIEW_TAG not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view_tag())
    return str(experiment.experiment_id)


def create_run(
    client: MlflowClient, experiment_id: str, name: str, tags: dict[str, str], start_time: int | None = None
) -> str:
    run = client.create_run(experiment_id, start_time=start_time, tags=tags, run_name=name)
    return str(run.info.run_id)


def search(client: MlflowClient, experiment_id: str, query: str, limit: int = 1) -> list[Run]:
    """Runs that a filter finds, newest first."""
    return list(client.search_runs([experiment_id], query, max_results=limit, order_by=["attributes.start_time DESC"]))


def set_tags(client: MlflowClient, run_id: str, tags: dict[str, str]) -> None:
    from mlflow.entities import RunTag

    if tags:  # one call: each costs a commit, or a request
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def log_params(client: MlflowClient, run_id: str, flat: dict[str, str]) -> None:
    """Add the parameters that the run lacks: a parent gets the same ones from each of its stages."""
    from mlflow.exceptions import MlflowException

    new = _missing_params(client, run_id, flat)
    while True:
        try:
            for first in range(0, len(new), 100):  # log_batch's limit
                client.log_batch(run_id, params=new[first : first + 100])
            return
        except MlflowException:
            left = _missing_params(client, run_id, flat)
            if len(left) == len(new):
                raise
            new = left  # another stage wrote one between our look and our write, and the store refused the whole batch


def _missing_params(client: MlflowClient, run_id: str, flat: dict[str, str]) -> list[Param]:
    from mlflow.entities import Param

    have = client.get_run(run_id).data.params
    return [Param(key, value[:MAX_PARAM_LENGTH]) for key, value in flat.items() if key not in have]


def points(values: dict[str, float], step: int, time_ms: int) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(metric_name(key), float(value), time_ms, step) for key, value in values.items()]


def metric_name(name: str) -> str:
    """`name` with what MLflow refuses in a metric's name as `_`: prompt sets and categories name metrics too.

    One refused name would lose the whole batch that it is in.
    """
    plain = re.sub(r"[^\w.\- /]", "_", name)[:MAX_METRIC_NAME]
    return plain if posixpath.normpath(plain) == plain and plain[0] not in "/." else re.sub(r"[/.]", "_", plain)


def log_points(client: MlflowClient, run_id: str, metrics: list[Metric]) -> None:
    for first in range(0, len(metrics), 1000):  # log_batch's limit
        client.log_batch(run_id, metrics=metrics[first : first + 1000])


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """{"train": {"lr": 0.001}} -> {"train.lr": "0.001"}; lists as JSON."""
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, str) else json.dumps(value)}
    flat: dict[str, str] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def now_ms() -> int:
    return int(time.time() * 1000)


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Held while this machine's processes must not find the store half-made. Not reentrant."""
    folder = home / ".specflow"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "mlflow.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _http_limits() -> Iterator[None]:
    """Tight limits for the first contact, wider ones afterwards; whatever the user has set stays."""
    ours = [name for name in FIRST_CONTACT if name not in os.environ]
    os.environ.update({name: FIRST_CONTACT[name] for name in ours})
    try:
        yield
    finally:
        os.environ.update({name: AFTERWARDS[name] for name in ours})


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def reason(error: Exception) -> str:
    """What an error says, in one line and without any password of an address."""
    return _without_password(" ".join(str(error).split()))[:200]


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
