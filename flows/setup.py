"""Work pool and GPU limit on the Prefect server, where one answers: what `specflow init` runs. Starts no server."""

from __future__ import annotations

import sys
from contextlib import suppress

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.plan import num_devices
from flows.slots import LIMIT, release_dead
from specflow import http

POOL = "specflow"
DEFAULT_API = "http://127.0.0.1:4200/api"
ANSWER_S = 2.0


def ensure_server_objects() -> str:
    """Create what is missing on the server and say in one line what is there. Safe to repeat.

    An existing limit is left as it is: on a server that several machines share it is not this one's to lower.
    """
    url = PREFECT_API_URL.value() or DEFAULT_API
    if not _answers(url):
        return f"no server at {url}; `prefect server start`, then `specflow init` again, if you want one"
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        with suppress(ObjectAlreadyExists):
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=LIMIT, limit=num_devices()))
        limit = client.read_global_concurrency_limit_by_name(LIMIT).limit
        release_dead(client)
    return f"{url}, work pool {POOL!r}, limit {LIMIT!r} of {limit}"


def _answers(url: str) -> bool:
    try:
        return http.get(f"{url.rstrip('/')}/health", timeout=ANSWER_S).status_code == 200
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return False


if __name__ == "__main__":
    sys.stdout.write(ensure_server_objects() + "\n")
