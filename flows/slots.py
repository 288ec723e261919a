"""Admission: a stage that needs GPUs first takes that many slots of the server's global concurrency limit `gpu`.

Slots count, they do not pick a device; the stage's own process leases devices (specflow/gpus/leases.py), which is what
makes sharing one impossible. So a lease that cannot be renewed costs a warning here, never a running stage.

prefect.concurrency.sync.concurrency would do, but for three things: it waits as long as the server says (up to 39 s
between tries), it cannot be interrupted, and it hides the id of its lease, so that the slots of a flow killed with -9
stay taken until the lease expires (60 s at least, and up to 45 s less or 15 s more by when it was renewed and reaped).
Here every holder on a machine keeps a locked file; whoever waits gives back the leases whose holder is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.runner import StageStopped
from specflow.errors import UserError

LIMIT = "gpu"
LEASE_S = 60.0
"""The shortest lease that the server grants."""
RENEW_S = 20.0
POLL_S = 1.0
MISSING = f"no global concurrency limit {LIMIT!r} on this Prefect server: run `specflow init`"

_queue: deque[object] = deque()
"""Tickets of this process in order: only the first asks the server, so that a request for two is not overtaken."""
_queue_lock = threading.Lock()


def check_limit(wanted: dict[str, int]) -> None:
    """Raise UserError where the limit is missing or smaller than what a stage (address -> slots) asks for."""
    if not any(wanted.values()):
        return
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(LIMIT)
        except ObjectNotFound:
            raise UserError(MISSING) from None
    for address, slots in wanted.items():
        if slots > limit.limit:
            raise UserError(_too_many(address, slots, limit.limit))


@contextmanager
def gpu_slots(
    slots: int, address: str, *, task_run_id: UUID, stop: threading.Event, log: Callable[..., None]
) -> Iterator[float]:
    """Hold `slots` of the limit; yields the seconds waited for them. Raises UserError, or StageStopped on `stop`."""
    started = time.monotonic()
    with get_client(sync_client=True) as client:
        with _turn(stop):
            lease = _acquire(client, slots, address, task_run_id, stop, log)
        ended = threading.Event()
        renewal = threading.Thread(target=_renew, args=(lease, ended, log), name=f"renew-{address}", daemon=True)
        try:
            with _holder_file(lease):
                renewal.start()
                yield time.monotonic() - started
        finally:
            ended.set()
            try:
                client.release_concurrency_slots_with_lease(lease)
            except httpx.HTTPError as error:  # the stage's work is done and locked; the lease runs out by itself
                log("the slots of %r could not be given back (%s): free in %.0f s", LIMIT, error, LEASE_S)


@contextmanager
def _turn(stop: threading.Event) -> Iterator[None]:
    ticket = object()
    with _queue_lock:
        _queue.append(ticket)
    try:
        while _queue[0] is not ticket:
            if stop.wait(0.1):
                raise StageStopped("cancelled while it waited for a GPU slot")
        yield
    finally:
        with _queue_lock:
            _queue.remove(ticket)


def _acquire(
    client: SyncPrefectClient,
    slots: int,
    address: str,
    task_run_id: UUID,
    stop: threading.Event,
    log: Callable[..., None],
) -> UUID:
    holder = ConcurrencyLeaseHolder(type="task_run", id=task_run_id)
    said = False
    while True:
        try:
            response = client.increment_concurrency_slots_with_lease([LIMIT], slots, "concurrency", LEASE_S, holder)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
                limit = client.read_global_concurrency_limit_by_name(LIMIT).limit
                raise UserError(_too_many(address, slots, limit)) from None
            if error.response.status_code != httpx.codes.LOCKED:
                raise
        else:
            granted = response.json()
            if not granted["limits"]:  # the server grants what it has no limit for
                raise UserError(MISSING)
            return UUID(granted["lease_id"])
        if release_dead(client):
            continue
        if not said:
            log("%s waits for %d of the slots of %r", address, slots, LIMIT)
            said = True
        if stop.wait(POLL_S * random.uniform(0.5, 1.5)):
            raise StageStopped("cancelled while it waited for a GPU slot")


def _too_many(address: str, slots: int, limit: int) -> str:
    return (
        f"{address} asks for {slots} GPUs (gpus times shards) and the limit {LIMIT!r} has {limit}: lower them in "
        f"resources of params.yaml, or raise the limit with `prefect gcl update {LIMIT} --limit {slots}`"
    )


def _renew(lease: UUID, ended: threading.Event, log: Callable[..., None]) -> None:
    with get_client(sync_client=True) as client:
        while not ended.wait(RENEW_S):
            try:
                client.renew_concurrency_lease(lease, LEASE_S)
            except Exception as error:  # a server that restarts or is away; the device itself is locked elsewhere
                log("the slots of %r could not be renewed (%s); the stage goes on", LIMIT, error)


def _holders() -> Path:
    folder = Path(tempfile.gettempdir()) / f"specflow-slots-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def _holder_file(lease: UUID) -> Iterator[None]:
    """A file that stays locked as long as this process lives and holds the lease."""
    file = _holders() / f"{lease}.json"
    new = file.with_suffix(".new")
    with new.open("w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        json.dump({"api": PREFECT_API_URL.value(), "pid": os.getpid()}, stream)
        stream.flush()
        new.rename(file)  # seen by others only once it is locked
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def release_dead(client: SyncPrefectClient) -> int:
    """Give back the slots whose holder on this machine was killed; how many leases that were."""
    released = 0
    for file in _holders().glob("*.json"):
        with suppress(FileNotFoundError, BlockingIOError, json.JSONDecodeError), file.open(encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            record: dict[str, Any] = json.load(stream)
            if record["api"] == PREFECT_API_URL.value():
                client.release_concurrency_slots_with_lease(UUID(file.stem))
                file.unlink(missing_ok=True)
                released += 1
    return released
