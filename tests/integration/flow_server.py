"""A real Prefect server on loopback, and toy DVC projects whose flows run against it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import ROOT

DRIVER = """
import importlib, json, sys
from prefect.client.orchestration import get_client
for name, parameters in json.loads(sys.argv[1]):
    flow = getattr(importlib.import_module(f"flows.{name}"), name)
    state = flow(**parameters, return_state=True)
    run = {"id": str(state.state_details.flow_run_id), "type": state.type.value, "message": state.message}
    print("FLOW RUN " + json.dumps(run), flush=True)
"""


@dataclass(frozen=True)
class FlowRun:
    id: str
    type: str
    message: str
    stages: dict[str, tuple[str, str]]
    """Name and message of each task's final state, by task run name."""
    tries: dict[str, int]

    @property
    def names(self) -> dict[str, str]:
        return {stage: name for stage, (name, _) in self.stages.items()}


class Server:
    """A running server and the environment that reaches it."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.api = f"http://127.0.0.1:{port}/api"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
        self.process = self.start(command, home, home / "server.log")
        try:
            wait_for(self._answers, 180.0, "the server answers")
        except BaseException:
            self.stop()
            raise

    def start(self, command: list[str], folder: Path, log: Path) -> subprocess.Popen[bytes]:
        """A process of a session of its own, its output in `log`."""
        with log.open("wb") as stream:
            return subprocess.Popen(
                command,
                cwd=folder,
                env=self.environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.api}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read() or b"null")

    def set_limit(self, slots: int | None) -> None:
        """The global limit `gpu`: so many slots, all free, or none at all."""
        request = urllib.request.Request(f"{self.api}/v2/concurrency_limits/gpu", method="DELETE")
        try:
            urllib.request.urlopen(request, timeout=10).close()
        except urllib.error.HTTPError as error:
            assert error.code == 404
        if slots is not None:
            self.post("v2/concurrency_limits/", {"name": "gpu", "limit": slots})

    def flows(self, folder: Path, *flows: tuple[str, dict[str, Any]]) -> list[FlowRun]:
        """Run flows one after the other in `folder`, in one process."""
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(flows)],
            cwd=folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        said = [line.removeprefix("FLOW RUN ") for line in done.stdout.splitlines() if line.startswith("FLOW RUN ")]
        assert done.returncode == 0 and len(said) == len(flows), done.stdout
        return [self.read(**json.loads(line)) for line in said]

    def pipeline(self, folder: Path, **parameters: Any) -> FlowRun:
        return self.flows(folder, ("pipeline", parameters))[0]

    def start_pipeline(self, folder: Path, **parameters: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", DRIVER, json.dumps([("pipeline", parameters)])]
        return self.start(command, folder, folder / "flow.log")

    def tasks(self, flow_run_id: str) -> list[dict[str, Any]]:
        return list(self.post("task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}}))

    def read(self, id: str, type: str, message: str | None, *, wait: bool = True) -> FlowRun:
        """A flow run with its tasks; their last events reach the database a moment after the flow has ended."""
        settled = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

        def over() -> bool:
            return not wait or all(task["state_type"] in settled for task in self.tasks(id))

        wait_for(over, 20.0, "the states of all tasks are written")
        found = self.tasks(id)
        return FlowRun(
            id,
            type,
            message or "",
            {task["name"]: (task["state"]["name"], task["state"]["message"] or "") for task in found},
            {task["name"]: task["run_count"] for task in found},
        )

    def artifacts(self, flow_run_id: str) -> dict[str, Any]:
        found = self.post("artifacts/filter", {"flow_runs": {"id": {"any_": [flow_run_id]}}})
        return {artifact["key"]: artifact["data"] for artifact in found}

    def stop(self) -> None:
        end(self.process)


@contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of `Server.start` with its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> float:
    """Seconds until `condition` held; fails the test after `seconds`."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
    return time.monotonic() - started


def make_toy(folder: Path, dvc_yaml: str, **inputs: str) -> Path:
    """A DVC project without specflow's parameters: stages of a few trivial commands, which the flows must not mind."""
    folder.mkdir(parents=True, exist_ok=True)
    dvc(folder, "init", "--quiet", "--no-scm")
    (folder / "dvc.yaml").write_text(dvc_yaml, encoding="utf-8")
    for name, text in inputs.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def dvc(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "dvc", *words]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout
