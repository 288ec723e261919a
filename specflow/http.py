"""HTTP to servers: the one place that makes clients, because no proxy leads to a server on this machine.

httpx, requests and urllib ask whatever HTTP_PROXY, HTTPS_PROXY and ALL_PROXY name, for 127.0.0.1 too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import httpx

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def client(*urls: str, **options: Any) -> httpx.Client:
    """A client for servers at `urls`. Proxies of the environment are asked only where one of them is elsewhere."""
    return httpx.Client(trust_env=not all(map(is_here, urls)), **options)


def async_client(*urls: str, **options: Any) -> httpx.AsyncClient:
    """`client` for asyncio."""
    return httpx.AsyncClient(trust_env=not all(map(is_here, urls)), **options)


def get(url: str, *, headers: Mapping[str, str] | None = None, timeout: float) -> httpx.Response:
    """One request; `timeout` in seconds. Raises httpx.HTTPError."""
    with client(url, headers=headers, timeout=timeout) as once:
        return once.get(url)


def post(url: str, *, json: Any, headers: Mapping[str, str] | None = None, timeout: float) -> httpx.Response:
    """One request with a JSON body; `timeout` in seconds. Raises httpx.HTTPError."""
    with client(url, headers=headers, timeout=timeout) as once:
        return once.post(url, json=json)


def is_here(url: str) -> bool:
    """Whether `url` is of the loopback interface."""
    host = httpx.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def spare_loopback() -> None:
    """Tell libraries with clients of their own (MLflow, Prefect) and child processes the same, by NO_PROXY."""
    for name in ("NO_PROXY", "no_proxy"):
        listed = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join([*listed, *(host for host in LOOPBACK if host not in listed)])
