"""Leases of GPUs: a stage takes its devices before CUDA starts, sees no others, and gives them back when it ends.

Works the same under `dvc repro`, `dvc queue` and a flow, because the stage's own process holds the lease. Imports no
torch: CUDA reads CUDA_VISIBLE_DEVICES when it starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specflow.errors import UserError
from specflow.gpus import nvml, queue
from specflow.gpus.cost import Meter
from specflow.gpus.nvml import GB, Device, NoGpus

if TYPE_CHECKING:
    from specflow.gpus.resources import Resources

MARK = "SPECFLOW_LEASE"
"""Environment of a lease's holder and its children: the token of the lease that they may use."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 0.25
REPEAT_SECONDS = 300.0
"""Between two lines that say what a request waits for."""
logger = logging.getLogger("specflow")


@dataclass(frozen=True)
class Lease:
    """Devices that are ours, in the order in which CUDA numbers them; none on the CPU."""

    devices: tuple[Device, ...] = ()
    root_pid: int = 0
    """Process that holds the lease: it and its descendants are the ones that belong on the devices."""
    meter: Meter | None = None

    def cost(self) -> dict[str, float]:
        """`gpu_seconds`, `gpu_joules`, `gpu_memory_peak_gb`, `gpu_utilisation_mean` up to now; empty on the CPU."""
        return self.meter.cost() if self.meter else {}

    def strangers(self) -> list[str]:
        """Descriptions of foreign compute processes that are on the devices now."""
        ours = _with_children(self.root_pid)
        return [nvml.describe_process(*found) for device in self.devices for found in nvml.strangers(device, ours)]


@contextlib.contextmanager
def lease(resources: Resources, holder: str, *, allow_cpu: bool = False) -> Iterator[Lease]:
    """Hold what `resources` ask for while the block runs, for `holder` (`stage@family`); wait for it if need be.

    A stage that declares no GPU sees none; one of which nothing is declared is left alone. Under a parent's lease its
    devices are used. Raises UserError for what this machine can never give, and without any GPU unless `allow_cpu`.
    """
    if not resources.declared:
        yield Lease()
        return
    if resources.gpus == 0:
        with _environment({VISIBLE: ""}):
            yield Lease()
        return
    candidates = _candidates(resources, holder, allow_cpu=allow_cpu)
    if not candidates:
        yield Lease()
        return
    with contextlib.ExitStack() as stack:
        joined = _joined(candidates, resources, holder)
        if joined is not None:
            parent, ticket = joined
            stack.callback(ticket.release)
            devices = tuple(device for device in candidates if device.uuid in ticket.request.devices)
            mark, root = ticket.request.token, parent.pid
        else:
            _check_cuda_not_started(candidates, resources, holder)
            mark, root = secrets.token_hex(8), os.getpid()
            devices = stack.enter_context(_held(candidates, resources, holder, mark))
            names = ", ".join(f"GPU {device.label} ({device.name})" for device in devices)
            logger.info("%s runs on %s", holder, names)
        setting = nvml.visible_setting(devices, nvml.inventory())
        stack.enter_context(_environment({"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE: setting, MARK: mark}))
        meter = Meter(devices)
        stack.callback(meter.stop)
        yield Lease(tuple(devices), root, meter)


def _candidates(resources: Resources, holder: str, *, allow_cpu: bool) -> list[Device]:
    """Devices that could serve the request; none where it runs without a lease. Raises UserError where none can."""
    setting = os.environ.get(VISIBLE)
    try:
        devices, reason = nvml.inventory(), "NVML lists none"
    except NoGpus as error:
        devices, reason = [], str(error)
    visible = nvml.visible_devices(devices, setting)
    if visible:
        return _fitting(visible, resources, holder)
    if devices:
        reason = f"{VISIBLE}={setting!r} hides all {len(devices)}"
    elif _torch_sees_a_device():
        logger.warning("%s: no leases without NVML (%s); it uses what torch finds", holder, reason)
        return []
    if not allow_cpu:
        raise UserError(
            f"{holder} needs {_count(resources)} and there is none ({reason}): run it on a machine with one, "
            f"or set families.{holder.partition('@')[2]}.allow_cpu: true in params.yaml to run on the CPU"
        )
    logger.info("%s runs on the CPU: no GPU here (%s)", holder, reason)
    return []


def _fitting(visible: list[Device], resources: Resources, holder: str) -> list[Device]:
    """Devices large enough, the smallest first where memory is asked for. Raises UserError for too few of them."""
    needed = (resources.gpu_memory_gb or 0.0) * GB
    fitting = [device for device in visible if device.memory_bytes is None or device.memory_bytes >= needed]
    if resources.gpus > 1:  # CUDA gives a process one MIG device at most
        fitting = [device for device in fitting if device.mig is None]
    if len(fitting) < resources.gpus:
        there = ", ".join(_describe(device) for device in visible)
        one = " (a process can use one MIG device only)" if any(device.mig is not None for device in visible) else ""
        raise UserError(
            f"{holder} needs {_count(resources)}, but {len(fitting)} of the visible devices can serve{one}: {there}; "
            f"lower families.{holder.partition('@')[2]}.resources.{holder.partition('@')[0]}, or widen {VISIBLE}"
        )
    return sorted(fitting, key=lambda device: device.memory_bytes or 0) if needed else fitting


def _joined(
    candidates: Sequence[Device], resources: Resources, holder: str
) -> tuple[queue.Request, queue.Ticket] | None:
    """The parent's lease and our share in it; None without a parent whose lease lives. Raises UserError if it has less
    than we need."""

    def choose(parent: queue.Request) -> tuple[str, ...]:
        devices = [device.uuid for device in candidates if device.uuid in parent.devices]
        if len(devices) < resources.gpus:
            raise UserError(
                f"{holder} needs {_count(resources)}, but runs under the lease of {parent.holder} (pid {parent.pid}), "
                f"which has {len(devices)} for it: give {parent.holder} more GPUs"
            )
        return tuple(devices[: resources.gpus])

    token = os.environ.get(MARK)
    if not token:
        return None
    return queue.join(queue.folder(), holder=holder, gpus=resources.gpus, token=token, choose=choose)


@contextlib.contextmanager
def _held(candidates: Sequence[Device], resources: Resources, holder: str, token: str) -> Iterator[tuple[Device, ...]]:
    """Queue up, wait, hold."""
    place = queue.folder()
    by_uuid = {device.uuid: device for device in candidates}
    ours = _with_children(os.getpid())

    def busy(uuid: str) -> str | None:
        return nvml.busy_reason(by_uuid[uuid], resources.gpu_memory_gb, ours)

    ticket = queue.ask(place, holder=holder, gpus=resources.gpus, candidates=list(by_uuid), token=token)
    try:
        said = -REPEAT_SECONDS
        while (answer := queue.attempt(place, ticket, busy)).devices is None:
            if time.monotonic() - said >= REPEAT_SECONDS:
                said = time.monotonic()
                logger.info("%s waits for %s: %s", holder, _count(resources), _obstacles(answer, ticket, by_uuid))
            time.sleep(POLL_SECONDS)
        yield tuple(by_uuid[uuid] for uuid in answer.devices)
    finally:
        ticket.release()


def _obstacles(answer: queue.Answer, ticket: queue.Ticket, by_uuid: dict[str, Device]) -> str:
    """Who holds what, in one line."""
    parts = []
    holders = queue.holders(answer.requests)
    for request in answer.requests:
        mine = [device.label for uuid, device in by_uuid.items() if holders.get(uuid) is request]
        if mine:
            parts.append(f"GPU {', '.join(mine)} held by {describe_request(request)}")
    parts += [f"GPU {by_uuid[uuid].label} {reason}" for uuid, reason in answer.reasons]
    parts += [f"GPU {by_uuid[uuid].label} has its lease file locked by another program" for uuid in answer.locked]
    ahead = [r for r in answer.requests if r.number < ticket.request.number and r.granted_s is None and not r.aside]
    if ahead:
        parts.append(f"{len(ahead)} ahead, first {describe_request(ahead[0])}")
    return "; ".join(parts) or "another process is just looking"


def describe_request(request: queue.Request) -> str:
    """`train_offline@smollm2 (pid 77, ann, since 12:03)`."""
    since = time.localtime(request.granted_s or request.asked_s)
    day = "" if time.strftime("%F", since) == time.strftime("%F") else time.strftime("%F ", since)
    return f"{request.holder} (pid {request.pid}, {request.user}, since {day}{time.strftime('%H:%M', since)})"


def _check_cuda_not_started(candidates: Sequence[Device], resources: Resources, holder: str) -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and len(candidates) > resources.gpus:
        raise UserError(
            f"{holder}: CUDA already runs in this process, which can no longer be limited to leased devices: "
            "run the stage in a process of its own"
        )


def _torch_sees_a_device() -> bool:
    """Where NVML is missing: an AMD GPU, or a driver without its library."""
    import torch

    return torch.cuda.is_available()


def _with_children(pid: int) -> frozenset[int]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return frozenset({pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))})
    return frozenset({pid})


def _count(resources: Resources) -> str:
    memory = f" with {resources.gpu_memory_gb:g} GB free" if resources.gpu_memory_gb else ""
    return f"{resources.gpus} GPU{'s' if resources.gpus > 1 else ''}{memory}"


def _describe(device: Device) -> str:
    memory = f", {device.memory_bytes / GB:.1f} GB" if device.memory_bytes else ""
    return f"{device.label} ({device.name}{memory})"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
