"""Which MLflow store is used, and what one that does not answer costs."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from specflow.config import Params
from specflow.errors import UserError
from specflow.paths import Paths
from specflow.tracking import record, store

LIMIT_S = 20.0
"""An unreachable server must cost seconds; MLflow's own limits make it minutes."""


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_projects_file_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store.where_to_look(tmp_path) == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")  # of the project, wherever a stage runs
    assert store.tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////srv/team.db")
    assert store.tracking_uri(tmp_path) == "sqlite:////srv/team.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@runs.example.org/mlflow")
    assert store.tracking_uri(tmp_path) == "https://me:secret@runs.example.org/mlflow"
    assert store.where_to_look(tmp_path) == "https://runs.example.org/mlflow"


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_an_unreachable_server_costs_one_warning_and_seconds(
    project: Path,
    params: Params,
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_warnings: list[str],
    free_port: int,
    silent_port: int,
    kind: str,
) -> None:
    port = free_port if kind == "closed" else silent_port
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    for name in store.FIRST_CONTACT:
        monkeypatch.setenv(name, "unset")  # so that both are as before after the test
        monkeypatch.delenv(name)
    began = time.monotonic()
    with record.stage_run("vocab", "tiny", params, paths) as run:
        run.log({"x": 1.0}, 1)
        run.finish({"x": 1.0})
    assert time.monotonic() - began < LIMIT_S
    assert len(mlflow_warnings) == 1 and f"127.0.0.1:{port} cannot be used" in mlflow_warnings[0]
    assert not Path(store.STORE).exists()


def test_where_a_store_is_needed_an_unreachable_one_is_an_error(
    project: Path, params: Params, paths: Paths, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port}")
    with pytest.raises(UserError, match="start it, or unset MLFLOW_TRACKING_URI") as caught:
        record.sync("tiny", params, paths)
    assert "secret" not in str(caught.value)


def test_the_users_own_limits_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_port: int) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    with pytest.raises(UserError):
        store.open_store(tmp_path)
    import os

    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1" and os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("bench/accept_length", "bench/accept_length"),
        ("gsm8k@main/accept_length", "gsm8k_main/accept_length"),
        ("vocab/coverage 'code'", "vocab/coverage _code_"),
        ("数学/speedup", "数学/speedup"),
        ("a/../b", "a____b"),
        ("/a", "_a"),
        ("x" * 300, "x" * 250),
    ],
)
def test_metric_names_are_what_mlflow_takes(name: str, safe: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert store.metric_name(name) == safe
    _validate_metric_name(safe)


def test_an_older_schema_gets_mlflows_own_cure(store: Path) -> None:
    """The file of an older MLflow holds the history: it is upgraded, not moved away."""
    from specflow.tracking.store import open_store

    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("update alembic_version set version_num = '75868b020152'")
        connection.commit()
    with pytest.raises(UserError) as caught:
        open_store(Path())
    assert f"mlflow db upgrade sqlite:///{store.resolve()}" in str(caught.value)
    assert "keep a copy" in str(caught.value) and "move it away" not in str(caught.value)
