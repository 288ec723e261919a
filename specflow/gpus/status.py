"""What `specflow gpus` shows: devices, who holds them, who waits."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from specflow.gpus import leases, nvml, queue
from specflow.gpus.nvml import GB, Device, NoGpus


def status() -> dict[str, Any]:
    """`gpus` (each with its lease), `requests` (all live ones, in order) and `reason` where NVML cannot be used."""
    requests = queue.requests_now()
    found: dict[str, Any] = {"gpus": [], "requests": [asdict(request) for request in requests], "reason": None}
    try:
        devices = nvml.inventory()
        visible = set(nvml.visible_devices(devices, os.environ.get(leases.VISIBLE)))
    except NoGpus as error:
        return found | {"reason": str(error)}
    holders = queue.holders(requests)
    for device in devices:
        holder = holders.get(device.uuid)
        found["gpus"].append(
            _state(device)
            | {
                "visible": device in visible,
                "lease": None if holder is None else asdict(holder),
                "busy": None if holder is not None else nvml.busy_reason(device, None),
            }
        )
    return found


def _state(device: Device) -> dict[str, Any]:
    facts = {"label": device.label, **asdict(device)}
    try:
        now = nvml.load(device)
    except nvml.driver().NVMLError:  # `busy` says so
        return facts | {"memory_used_bytes": None, "utilisation": None, "power_w": None, "processes": []}
    total, free = device.memory_bytes, now.memory_free_bytes
    return facts | {
        "memory_used_bytes": None if total is None or free is None else total - free,
        "utilisation": now.utilisation,
        "power_w": now.power_w,
        "processes": [{"pid": pid, "bytes": used} for pid, used in now.processes],
    }


def status_text(found: dict[str, Any]) -> str:
    """A table of the devices and the queue."""
    requests = [queue.request_of(raw) for raw in found["requests"]]
    waiting = [request for request in requests if request.granted_s is None]
    if not found["gpus"]:
        lines = [f"No GPU on this machine ({found['reason'] or 'NVML lists none'})."]
    else:
        rows = [["GPU", "name", "memory", "used", "utilisation", "lease"], *(_row(gpu) for gpu in found["gpus"])]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if waiting:
        lines += ["", "Waiting, first come first served:"]
        for request in waiting:
            aside = ", lets others pass: foreign processes are on its GPUs" if request.aside else ""
            number = f"{request.gpus} GPU{'s' if request.gpus > 1 else ''}"
            lines.append(f"  {number} for {leases.describe_request(request)}{aside}")
    return "\n".join(lines)


def _row(gpu: dict[str, Any]) -> list[str]:
    total, used, share = gpu["memory_bytes"], gpu["memory_used_bytes"], gpu["utilisation"]
    if gpu["lease"] is not None:
        lease = leases.describe_request(queue.request_of(gpu["lease"]))
    else:
        lease = gpu["busy"] or "free"
    return [
        gpu["label"],
        gpu["name"],
        "-" if total is None else f"{total / GB:.1f} GB",
        "-" if used is None else f"{used / GB:.1f} GB",
        "-" if share is None else f"{100 * share:.0f} %",
        lease if gpu["visible"] else f"{lease} ({leases.VISIBLE} hides it here)",
    ]
