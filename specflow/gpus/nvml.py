"""NVIDIA devices of this machine through NVML: what is there, what CUDA may see, what is busy. Imports no torch.

The only importer of pynvml (nvidia-ml-py). A device is a GPU, or on a GPU with MIG enabled each of its MIG devices.
Leases are in leases.py.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("specflow")
GB = 10**9
UNUSED_SHARE = 0.8
"""A device without visible processes still counts as busy below this share of free memory: NVML does not always list
processes of another container. What a desktop holds stays below it.
"""


@dataclass(frozen=True)
class Device:
    """A GPU or a MIG device; what never changes while the machine runs."""

    index: int
    """Of the GPU, in the order of nvidia-smi (PCI bus)."""
    uuid: str
    name: str
    memory_bytes: int | None
    """Total; None where NVML does not say (unified memory)."""
    gpu_uuid: str
    """The GPU's own, which differs from `uuid` on a MIG device."""
    mig: int | None = None
    """Number of the MIG device on its GPU."""

    @property
    def label(self) -> str:
        return str(self.index) if self.mig is None else f"{self.index}:{self.mig}"


@dataclass(frozen=True)
class Load:
    """What a device does now; None for what it does not measure (a MIG device measures memory only)."""

    memory_free_bytes: int | None
    utilisation: float | None
    """Share of the last sampling period (up to a second) in which a kernel ran, 0..1."""
    power_w: float | None
    energy_j: float | None
    """Since the driver was loaded."""
    processes: tuple[tuple[int, int | None], ...]
    """Compute processes as (pid, bytes)."""


class NoGpus(Exception):
    """NVML cannot be used; the message says why."""


@functools.cache
def driver() -> Any:
    """pynvml, initialised once for this process. Raises NoGpus where there is no NVIDIA driver, or a broken one."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoGpus(str(error) if "NVML" in str(error) else f"NVML: {error}") from None
    return pynvml


def inventory() -> list[Device]:
    """Every device of the machine, CUDA_VISIBLE_DEVICES or not; a GPU that does not answer is named and left out.

    Raises NoGpus where NVML cannot be used.
    """
    library = driver()
    devices: list[Device] = []
    for index in range(library.nvmlDeviceGetCount()):
        try:
            devices += _devices_of(index)
        except library.NVMLError as error:
            logger.warning("GPU %d does not answer (%s)", index, error)
    return devices


def visible_devices(devices: Sequence[Device], setting: str | None) -> list[Device]:
    """Of `devices`, those that a CUDA_VISIBLE_DEVICES of `setting` leaves, in its order; all of them for None.

    An entry is an index of nvidia-smi or a GPU-/MIG- UUID, which may be cut short. As in CUDA the list ends at the
    first entry that is invalid, and a repeated one hides everything. A GPU with MIG stands for all its MIG devices.
    Source: CUDA programming guide, environment variables; torch.cuda._parse_visible_devices.
    """
    if setting is None:
        return list(devices)
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if setting.startswith(prefix)), None)
    chosen: list[Device] = []
    for entry in setting.split(","):
        found = _by_index(devices, entry) if prefix is None else _by_uuid(devices, entry.strip(), prefix)
        if not found:
            break
        if set(found) & set(chosen):
            return []
        chosen += found
    return chosen


def my_devices() -> list[Device]:
    """The devices that this process may use. Raises NoGpus where NVML cannot be used."""
    return visible_devices(inventory(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def has_gpus() -> bool:
    """Whether this process may use any device."""
    try:
        return bool(my_devices())
    except NoGpus:
        return False


def visible_setting(chosen: Sequence[Device], devices: Sequence[Device]) -> str:
    """CUDA_VISIBLE_DEVICES for `chosen` out of all `devices`, read under CUDA_DEVICE_ORDER=PCI_BUS_ID.

    Indices where they are clear: vLLM cannot read UUIDs (vllm-project/vllm#46132). With MIG anywhere CUDA's indices
    are no longer nvidia-smi's, so UUIDs.
    """
    plain = all(device.mig is None for device in devices)
    return ",".join(str(device.index) if plain else device.uuid for device in chosen)


def load(device: Device) -> Load:
    """Measure a device now. A device that fell off the bus has no load; NVMLError of pynvml is raised."""
    library = driver()
    handle = _handle(device)
    memory = _measure(library.nvmlDeviceGetMemoryInfo, handle)
    utilisation = _measure(library.nvmlDeviceGetUtilizationRates, handle)
    milliwatts = _measure(library.nvmlDeviceGetPowerUsage, handle)
    millijoules = _measure(library.nvmlDeviceGetTotalEnergyConsumption, handle)
    processes = _measure(library.nvmlDeviceGetComputeRunningProcesses, handle) or []
    return Load(
        memory_free_bytes=None if memory is None else int(memory.free),
        utilisation=None if utilisation is None else utilisation.gpu / 100,
        power_w=None if milliwatts is None else milliwatts / 1000,
        energy_j=None if millijoules is None else millijoules / 1000,
        processes=tuple((int(process.pid), process.usedGpuMemory) for process in processes),
    )


def busy_reason(device: Device, memory_gb: float | None, ours: frozenset[int] = frozenset()) -> str | None:
    """Why a device that nobody leases cannot be taken now, or None where it can.

    With `memory_gb` it must have that much free, whoever else is on it. Without, no compute process but `ours` may be
    there, and most of its memory must be free.
    """
    try:
        now = load(device)
    except driver().NVMLError as error:
        return f"does not answer ({error})"
    free = now.memory_free_bytes
    strangers = [(pid, used) for pid, used in now.processes if pid not in ours]
    if memory_gb is not None:
        if free is None or free >= memory_gb * GB:
            return None
        return f"has {free / GB:.1f} GB free of the {memory_gb:g} GB asked for" + "".join(
            f", {describe_process(pid, used)} is on it" for pid, used in strangers[:1]
        )
    if strangers:
        return f"in use by {describe_process(*strangers[0])}, not by specflow"
    if free is not None and device.memory_bytes and free < UNUSED_SHARE * device.memory_bytes:
        return f"has only {free / GB:.1f} of {device.memory_bytes / GB:.1f} GB free, taken by a process that NVML hides"
    return None


def strangers(device: Device, ours: frozenset[int]) -> list[tuple[int, int | None]]:
    """Compute processes on a device that are not `ours`, as (pid, bytes); only those that this machine knows.

    In a container NVML may give the host's ids, where our own process is a stranger too: those name nobody here.
    """
    import psutil

    try:
        processes = load(device).processes
    except driver().NVMLError:  # it fell off the bus: whatever ends the stage says more
        return []
    return [(pid, used) for pid, used in processes if pid not in ours and psutil.pid_exists(pid)]


def describe_process(pid: int, used_bytes: int | None) -> str:
    """`pid 77 (python, ann, 10.3 GB)`, with what can be found out."""
    import psutil

    words: list[str] = []
    try:
        process = psutil.Process(pid)
        words += [process.name(), process.username()]
    except psutil.Error:
        pass
    if used_bytes is not None:
        words.append(f"{used_bytes / GB:.1f} GB")
    return f"pid {pid} ({', '.join(words)})" if words else f"pid {pid}"


def watch_only_mine(monitor: Any) -> None:
    """Limit MLflow's SystemMetricsMonitor to this process's devices; it watches all of the machine, whoever has them.

    `gpu_0` is then the stage's first device on every machine, so that curves of two runs lie over each other.
    """
    try:
        devices = my_devices()
    except NoGpus:
        return
    for part in monitor.monitors:
        if hasattr(part, "gpu_handles"):
            part.gpu_handles = [_handle(device) for device in devices]
            part.num_gpus = len(devices)


def _devices_of(index: int) -> list[Device]:
    """The GPU of this index, or its MIG devices."""
    library = driver()
    gpu = library.nvmlDeviceGetHandleByIndex(index)
    uuid = library.nvmlDeviceGetUUID(gpu)
    if not _mig_enabled(gpu):
        return [_device(index, gpu, uuid, uuid, None)]
    devices = []
    for number in range(library.nvmlDeviceGetMaxMigDeviceCount(gpu)):
        try:
            part = library.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number)
        except (library.NVMLError_NotFound, library.NVMLError_NoPermission):  # no such device, or not for us
            continue
        devices.append(_device(index, part, library.nvmlDeviceGetUUID(part), uuid, number))
    return devices


def _device(index: int, handle: Any, uuid: str, gpu_uuid: str, mig: int | None) -> Device:
    library = driver()
    memory = _measure(library.nvmlDeviceGetMemoryInfo, handle)
    total = None if memory is None else int(memory.total)
    return Device(index, uuid, library.nvmlDeviceGetName(handle), total, gpu_uuid, mig)


def _handle(device: Device) -> Any:
    return driver().nvmlDeviceGetHandleByUUID(device.uuid)


def _measure(function: Callable[[Any], Any], handle: Any) -> Any:
    """A reading, or None where this device or driver has no such thing."""
    library = driver()
    try:
        return function(handle)
    except (
        library.NVMLError_NotSupported,
        library.NVMLError_FunctionNotFound,
        library.NVMLError_NoPermission,
        library.NVMLError_InvalidArgument,  # what MIG devices answer for whole-GPU readings
    ):
        return None


def _mig_enabled(gpu: Any) -> bool:
    mode = _measure(driver().nvmlDeviceGetMigMode, gpu)
    return mode is not None and mode[0] == driver().NVML_DEVICE_MIG_ENABLE


def _by_index(devices: Sequence[Device], entry: str) -> list[Device]:
    number = re.match(r"\s*\+?(\d+)", entry)  # CUDA reads `1gpu` as 1
    return [device for device in devices if number and device.index == int(number[1])]


def _by_uuid(devices: Sequence[Device], entry: str, prefix: str) -> list[Device]:
    if not entry.startswith(prefix):
        return []
    found = [d for d in devices if (d.gpu_uuid if prefix == "GPU-" else d.uuid).startswith(entry)]
    one_gpu = len({d.gpu_uuid if prefix == "GPU-" else d.uuid for d in found}) == 1
    return found if one_gpu else []  # a prefix of several is invalid
