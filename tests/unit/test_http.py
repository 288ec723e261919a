"""Servers on this machine are reached whatever proxies the environment names, and by nothing but specflow/http.py."""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from specflow import http
from specflow.bench.served import gap, measuring
from specflow.bench.served.client import Asking, Request, run_block
from specflow.config import Serve
from specflow.serving import client as serving_client
from specflow.serving.client import Client, Lane, engine_version
from specflow.serving.server import Endpoint, attach, free_port
from specflow.targets.model import TargetFacts
from tests import ROOT
from tests.fake_engine import FakeServer, serving

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture(autouse=True)
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    for name in ("NO_PROXY", "no_proxy", *(name.lower() for name in PROXIES)):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.setenv(name, dead)
        monkeypatch.setenv(name.lower(), dead)


def attached(server: FakeServer) -> object:
    return attach(Serve(url=server.url), "tiny").max_model_len


def counters(server: FakeServer) -> object:
    measuring._counters(Endpoint(server.url, "tiny"))  # the fake has no counters; a lost connection looks the same
    return measuring._get(Endpoint(server.url, "tiny"), "/version")


def sampled(server: FakeServer) -> object:
    async def ask() -> object:
        async with Client([Lane(Endpoint(server.url, "tiny"))], "vllm", timeout_s=10) as client:
            return await client.complete(serving_client.Request((7, 8), 5, 0.0, 0, (2,)))

    return asyncio.run(ask()).token_ids  # type: ignore[attr-defined]


def benchmarked(server: FakeServer) -> object:
    request = Request("s", "q", 0, "c", "hello", [7, 8])
    asking = Asking("vllm", max_new_tokens=4, temperature=0.0, seed=0, eos_ids=(2,), timeout_s=10)
    replies, _ = run_block(Endpoint(server.url, "tiny"), [request], asking, 1)
    return "ConnectError" in (replies[0].error or ""), len(server.seen)


CALLS: list[tuple[Callable[[FakeServer], object], object]] = [
    (attached, 2048),
    (lambda server: engine_version(Endpoint(server.url, "tiny"), "vllm"), "vllm 9.9"),
    (counters, {"version": "9.9"}),
    (benchmarked, (False, 1)),
]


@pytest.mark.parametrize(("call", "expected"), CALLS, ids=["attach", "version", "counters", "benchmark"])
def test_a_proxy_is_not_asked_for_a_server_here(call: Callable[[FakeServer], object], expected: object) -> None:
    with serving() as server:
        assert call(server) == expected


def test_sampling_and_the_template_check_pass_a_proxy_by() -> None:
    with serving() as server:
        assert sampled(server)
        facts = TargetFacts.model_construct(template_options={})
        gap.check_template(Endpoint(server.url, "tiny"), Request("s", "q", 0, "c", "hello", [7, 8]), facts, 10)
        assert [path for path, _ in server.seen] == ["/v1/completions", "/v1/chat/completions"]


def test_elsewhere_the_proxy_is_asked() -> None:
    for url in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "http://127.0.0.2:1"):
        assert not http.client(url).trust_env
    assert http.client("http://10.0.0.1:8000").trust_env and http.client("http://example.org").trust_env
    assert http.client("http://127.0.0.1:1", "http://10.0.0.1:1").trust_env, "one of two lies elsewhere"


def test_other_libraries_spare_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """urllib stands for the clients of MLflow and Prefect: they read NO_PROXY alike."""
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "")
    with serving() as server:
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{server.url}/version", timeout=5)
        http.spare_loopback()
        http.spare_loopback()
        assert os.environ["NO_PROXY"] == "example.org,localhost,127.0.0.1,::1"
        with urllib.request.urlopen(f"{server.url}/version", timeout=5) as answer:
            assert json.load(answer) == {"version": "9.9"}


def test_nothing_else_makes_requests() -> None:
    call = re.compile(
        r"httpx\.(get|post|put|head|delete|request|stream|Client|AsyncClient)\("
        r"|(import|from) (requests|aiohttp|urllib3?\.request|urllib3|http\.client)\b|urlopen\("
    )
    found: dict[str, Any] = {}
    for package in ("specflow", "flows"):
        for file in (ROOT / package).rglob("*.py"):
            if lines := [line for line in file.read_text().splitlines() if call.search(line)]:
                found[str(file.relative_to(ROOT))] = lines
    assert list(found) == ["specflow/http.py"], found
