"""A process that leases fake devices, for unit/gpus/test_leases.py; light, so that many can start: imports no torch.

`lease_worker.py HOLDER GPUS HOLD_SECONDS LOG [MEMORY_GB]`: writes what it was given and what CUDA would see to LOG,
one line when it holds the devices and one before it gives them back. HOLD_SECONDS may be a path:
until it exists; or `fork` or `nest`: a forked child then outlives the worker, with `nest` under its lease.
"""

import json
import logging
import os
import sys
import time
from pathlib import Path

from specflow.errors import UserError
from specflow.gpus import leases, queue
from specflow.gpus.resources import Resources


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    holder, count, seconds, log = sys.argv[1:5]
    memory = float(sys.argv[5]) if len(sys.argv) > 5 else None
    with leases.lease(Resources(int(count), memory, declared=True), holder) as lease:
        request = next(found for found in queue.requests_now() if found.pid == os.getpid())
        line = {
            "holder": holder,
            "pid": os.getpid(),
            "number": request.number,
            "granted_s": request.granted_s,
            "devices": [device.uuid for device in lease.devices],
            "visible": os.environ["CUDA_VISIBLE_DEVICES"],
        }
        forks = seconds in ("fork", "nest")
        if forks and (child := os.fork()) == 0:
            if seconds == "nest":
                nested = leases.lease(Resources(1, declared=True), "bench@child")
                nested.__enter__()  # until it is killed
                append(Path(log), {"event": "nested"})
            time.sleep(30)
            os._exit(0)
        append(Path(log), {"event": "hold", **line, "child": child if forks else None})
        if seconds.startswith("/"):
            while not Path(seconds).exists():
                time.sleep(0.02)
        else:
            time.sleep(30 if forks else float(seconds))
        append(Path(log), {"event": "free", **line})


def append(log: Path, line: dict[str, object]) -> None:
    """One write to a file opened for appending, so that lines of several processes lie in the order of time."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"refused: {error}")
