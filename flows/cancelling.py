"""A cancelled flow ends what its tasks run, before Prefect kills it.

Prefect interrupts the flow's thread alone and kills the process 30 s later; tasks in other threads would go on until
then. They look at a flag here instead. A task in another process (Ray) has a flag of its own that nobody sets: there
the process is killed, and its supervisor ends the command.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.futures import PrefectFuture

from flows.runner import END_S

_stops: dict[str, threading.Event] = {}


def stop_of(flow_run_id: str) -> threading.Event:
    """Set once the flow run is being cancelled."""
    return _stops.get(flow_run_id) or threading.Event()


@contextmanager
def ending_tasks(flow_run_id: str) -> Iterator[list[PrefectFuture[Any]]]:
    """Yields a list for the futures of submitted tasks; at the end waits for them, and ends them if interrupted."""
    stop = _stops.setdefault(flow_run_id, threading.Event())
    futures: list[PrefectFuture[Any]] = []
    try:
        yield futures
        for future in futures:
            future.wait()
    except BaseException:
        stop.set()
        deadline = time.monotonic() + END_S
        for future in futures:
            future.wait(timeout=max(0.0, deadline - time.monotonic()))
        raise
    finally:
        del _stops[flow_run_id]
