"""Servers as children of a stage: started, known to answer, watched and stopped, whatever ends the stage.

A server runs under specflow/supervisor.py, which ends it and all it started as soon as this process is gone, killed
with -9 included: no orphan holds a GPU. A server that somebody else runs is checked and used, never stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from specflow import http, supervisor
from specflow.config import Serve
from specflow.errors import RetryableError, UserError
from specflow.serving.engines import Launch

POLL_S = 0.5
STOP_S = 28.0
"""The supervisor's graces together, and some more."""
_ERROR = re.compile(r"\b(\w*(?:Error|Exception))\b: .+")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|No available memory for the cache blocks|less than desired", re.I
)


@dataclass(frozen=True)
class Endpoint:
    """A server that answers: where, and by which name it knows the target."""

    url: str
    """http://host:port, without /v1."""
    model: str
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    max_model_len: int | None = None
    """Context in tokens, where the server says it."""


class Server:
    """A running child. `endpoint` is valid until `running` is left."""

    def __init__(self, process: subprocess.Popen[bytes], pipe: int, endpoint: Endpoint, log: Path) -> None:
        self.process, self.endpoint, self.log = process, endpoint, log
        self._pipe: int | None = pipe

    @property
    def port(self) -> int:
        return int(self.endpoint.url.rpartition(":")[2])

    def why_ended(self) -> str | None:
        """Exit code and last error of a server that has ended by itself."""
        code = self.process.poll()
        if code is not None and code > 128:
            return f"it was killed by signal {code - 128}"
        return None if code is None else f"it ended by itself with exit code {code}: {_last_error(self.log)}"

    def check(self) -> None:
        """Raises RetryableError with the server's last error where it has ended."""
        if why := self.why_ended():
            raise RetryableError(f"the server is lost: {why}")

    def stop(self) -> None:
        """End the server and everything it started."""
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            os.close(pipe)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """A port of the loopback interface that is free now; the server may still lose a race for it, and says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raises UserError where somebody listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"port {port} is taken: stop what listens there or choose another with --port") from None


@contextlib.contextmanager
def running(launch: Launch, *, port: int, model: str, log: Path, start_timeout_s: float) -> Iterator[Server]:
    """The server that `launch` starts, from its first real answer on; stopped when the block is left.

    Its output goes to `log`. Raises UserError with the server's own last error where it dies or hangs at the start.
    """
    server = start(launch, port=port, model=model, log=log)
    try:
        wait_until_ready(server, start_timeout_s)
        yield server
    finally:
        server.stop()


def start(launch: Launch, *, port: int, model: str, log: Path) -> Server:
    """The server that `launch` starts, not ready yet: `wait_until_ready` waits for it. The caller stops it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    read_end, write_end = os.pipe()
    with log.open("wb") as output:
        output.write(f"{launch}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [sys.executable, "-I", supervisor.__file__, str(read_end), *launch.argv],
            env={**os.environ, **launch.environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[read_end],
            start_new_session=True,
        )
    os.close(read_end)
    return Server(process, write_end, Endpoint(f"http://127.0.0.1:{port}", model), log)


def attach(serve: Serve, model: str) -> Endpoint:
    """The server at `serve.url`, after it has answered a real request by the name `model`."""
    assert serve.url is not None
    headers = {}
    if serve.api_key_env is not None:
        key = os.environ.get(serve.api_key_env)
        if not key:
            raise UserError(f"serve.api_key_env names {serve.api_key_env}, which is not set: export it")
        headers["Authorization"] = f"Bearer {key}"
    endpoint = Endpoint(serve.url.rstrip("/").removesuffix("/v1"), model, headers)
    try:
        found = _describe(endpoint)
        _first_answer(found, serve.request_timeout_s)
    except (httpx.HTTPError, OSError) as error:
        raise UserError(f"no answer from serve.url {serve.url} ({_one_line(error)}): is the server up?") from None
    return found


def wait_until_ready(server: Server, timeout_s: float) -> None:
    """Return once the server has answered; its endpoint then has its context. Raises UserError where it never does."""
    deadline = time.monotonic() + timeout_s
    while True:
        if (code := server.process.poll()) is not None:
            raise UserError(_why_dead(server.log, code))
        if time.monotonic() > deadline:
            raise UserError(
                f"the server gave no answer within start_timeout_s = {timeout_s:g} s: {_last_error(server.log)}; "
                f"its output is in {server.log}"
            )
        with contextlib.suppress(httpx.HTTPError, OSError):
            if http.get(f"{server.endpoint.url}/health", timeout=5.0).status_code == 200:
                found = _describe(server.endpoint)
                _first_answer(found, max(1.0, deadline - time.monotonic()))
                server.endpoint = found
                return
        time.sleep(POLL_S)


def _describe(endpoint: Endpoint) -> Endpoint:
    """The endpoint with its context. Raises UserError where it serves another model or speaks another protocol."""
    answer = http.get(f"{endpoint.url}/v1/models", headers=endpoint.headers, timeout=30.0)
    if answer.status_code in (401, 403):
        raise UserError(f"{endpoint.url} refuses the key ({answer.status_code}): set serve.api_key_env to its variable")
    try:
        models: list[dict[str, Any]] = answer.json()["data"]
        names = [model["id"] for model in models]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{endpoint.url}/v1/models answers {answer.status_code} and no list of models: not an OpenAI-compatible "
            "server; give the base URL of one"
        ) from None
    if endpoint.model not in names:
        raise UserError(f"{endpoint.url} serves {names}, not {endpoint.model!r}: set serve.model_name")
    length = models[names.index(endpoint.model)].get("max_model_len")
    return Endpoint(endpoint.url, endpoint.model, endpoint.headers, length)


def _first_answer(endpoint: Endpoint, timeout_s: float) -> None:
    """A health check passes before a model can answer; only a completion shows that it does."""
    body = {"model": endpoint.model, "prompt": "a", "max_tokens": 1}
    answer = http.post(f"{endpoint.url}/v1/completions", json=body, headers=endpoint.headers, timeout=timeout_s)
    if answer.status_code != 200:
        raise UserError(f"{endpoint.url} answers a completion with {answer.status_code}: {_one_line(answer.text)}")


def check_context(endpoint: Endpoint, needed: int) -> None:
    """Raises UserError where the server's context is below `needed` tokens."""
    if endpoint.max_model_len is not None and endpoint.max_model_len < needed:
        raise UserError(
            f"{endpoint.url} has a context of {endpoint.max_model_len} tokens, {needed} are needed: "
            "raise serve.max_model_len, or shorten prompts and answers"
        )


def _why_dead(log: Path, code: int) -> str:
    for line in _output(log):
        if not _OUT_OF_MEMORY.search(line):
            continue
        return f"the server ran out of memory ({_one_line(line)}): lower serve.gpu_memory_utilization or max_model_len"
    return f"the server died at its start with exit code {code}: {_last_error(log)}; its output is in {log}"


def _last_error(log: Path) -> str:
    """The last line that names an exception, else the last line."""
    lines = _output(log)
    for line in reversed(lines):
        if match := _ERROR.search(line):
            return _one_line(match[0])
    return _one_line(lines[-1]) if lines else "no output"


def _output(log: Path) -> list[str]:
    """What the server printed; the first line of the file is our command."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    return [line for line in lines if line.strip()]


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
