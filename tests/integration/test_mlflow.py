"""The record across processes and on a real MLflow server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specflow.compare.promote import promote
from specflow.config import Params
from specflow.paths import Paths
from specflow.tracking import record, registry, store
from tests.evidence import write_bench

SPEEDUPS = {"a": 1.25, "b": 1.25, "c": 1.25}


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of an MLflow server with a store and artifacts of its own."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/team.db", "--artifacts-destination", str(folder / "files")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield address, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_bench(params: Params, paths: Paths, speedup: float, draft: str) -> None:
    with record.stage_run("bench", "tiny", params, paths) as run:
        run.finish(write_bench(paths, dict.fromkeys(SPEEDUPS, speedup), draft=draft))


def by_stage(client: Any) -> dict[str, Any]:
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len({run.data.tags["stage"] for run in runs}) == len(runs)
    return {run.data.tags["stage"]: run for run in runs}


def test_the_environment_names_the_pipeline_across_processes(
    project: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four stages at once, a process each, on a store that does not exist yet: one parent, four children."""
    code = (
        "import sys, time; from pathlib import Path; from specflow import files; "
        "from specflow.tracking import record; "
        "from specflow.stage import load_project; params, paths = load_project(Path('params.yaml'), 'tiny')\n"
        "with record.stage_run(sys.argv[1], 'tiny', params, paths) as run:\n"
        "    files.write_json(paths.metrics(sys.argv[1]), {'n': 1}); run.finish({'n': 1})"
    )
    monkeypatch.setenv("SPECFLOW_PIPELINE", "prefect 12-34")
    stages = ["fetch", "vocab", "extract", "export"]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, stage], stderr=subprocess.PIPE, text=True) for stage in stages
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert not any("MLflow" in text for text in said), said
    client = store.open_store(Path())
    runs = by_stage(client)
    assert set(runs) == {"pipeline", *stages}
    parent = runs["pipeline"]
    assert parent.data.tags["pipeline"] == "prefect 12-34"
    assert {runs[stage].data.tags["mlflow.parentRunId"] for stage in stages} == {parent.info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_a_parameter_that_another_stage_writes_meanwhile_loses_nothing(tmp_path: Path) -> None:
    """The other stage's write falls between MLflow's own look at the table and its insert, as two processes' may."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    client = store.open_store(tmp_path)
    run_id = client.create_run(store.ensure_experiment(client, "tiny", tmp_path)).info.run_id
    others: list[dict[str, str]] = [{"train.lr": "0.1"}]

    def insert_first(session: Session, *_: object) -> None:
        if others and any(type(row).__name__ == "SqlParam" for row in session.new):
            raise sqlite3.IntegrityError(f"UNIQUE constraint failed: params {store_other(others.pop())}")

    def store_other(flat: dict[str, str]) -> str:
        event.remove(Session, "before_flush", insert_first)
        store.log_params(client, run_id, flat)
        return ", ".join(flat)

    event.listen(Session, "before_flush", insert_first)
    store.log_params(client, run_id, {"train.lr": "0.1", "train.seed": "7"})
    assert client.get_run(run_id).data.params == {"train.lr": "0.1", "train.seed": "7"}
    assert others == []
    with pytest.raises(MlflowException, match=r"Invalid value.*train!"):  # nobody wrote it meanwhile: no second try
        store.log_params(client, run_id, {"train!": "1"})


def test_a_teams_server_holds_runs_weights_and_champion(
    server: tuple[str, subprocess.Popen[bytes]],
    project: Path,
    params: Params,
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_warnings: list[str],
) -> None:
    address, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    for name in store.FIRST_CONTACT:
        monkeypatch.setenv(name, "unset")  # so that both are as before after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("SPECFLOW_PIPELINE", "prefect 12-34")

    run_bench(params, paths, 1.25, "one")
    assert promote("tiny", params, paths).promote
    run_bench(params, paths, 1.5, "two")
    assert promote("tiny", params, paths).promote  # the champion's records came from the server
    (parent,) = record.link_pipeline("prefect 12-34", ["tiny"], params, {}).values()

    client = store.open_store(Path())
    assert {run.data.tags["mlflow.parentRunId"] for run in runs_of(client) if run.info.run_id != parent} == {parent}
    best = registry.champion(client, "tiny")
    assert best is not None and (str(best.version), best.tags["speedup"]) == ("2", "1.5000")
    artifact_uri = client.get_run(best.run_id).info.artifact_uri
    assert artifact_uri.startswith("mlflow-artifacts:")
    folder = client.download_artifacts(best.run_id, "draft")
    assert (Path(folder) / "model.safetensors").read_bytes() == b"two"
    assert not (project / "mlflow.db").exists() and not (project / "mlartifacts").exists()
    assert mlflow_warnings == []

    began = time.monotonic()
    with record.stage_run("vocab", "tiny", params, paths) as run:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        run.log({"x": 1.0}, 1)
        run.finish({"x": 1.0})
    assert time.monotonic() - began < 30.0
    assert len(mlflow_warnings) == 1 and "does not record" in mlflow_warnings[0]


def runs_of(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("tiny").experiment_id]))
