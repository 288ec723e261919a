"""A stand-in for nvidia-ml-py on machines without a GPU: put this folder first on PYTHONPATH.

The JSON file that FAKE_NVML names is read anew at each call, so a test can change the machine under running processes:
a list of GPUs, each {uuid, memory, used, processes: [[pid, bytes]], name?, utilisation?, energy_mj?, power_mw?,
mig: [{uuid, memory, used, processes}]?, lost?}. What is absent is NotSupported. Without FAKE_NVML there is no driver.
unit/gpus/test_nvml.py checks that the real module has every name of this one.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

NVML_DEVICE_MIG_ENABLE = 1


class NVMLError(Exception):
    def __str__(self):
        return TEXTS[type(self)]


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_FunctionNotFound(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class NVMLError_InvalidArgument(NVMLError):
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


TEXTS = {
    NVMLError_LibraryNotFound: "NVML Shared Library Not Found",
    NVMLError_NotSupported: "Not Supported",
    NVMLError_FunctionNotFound: "Function Not Found",
    NVMLError_NoPermission: "Insufficient Permissions",
    NVMLError_InvalidArgument: "Invalid Argument",
    NVMLError_NotFound: "Not Found",
    NVMLError_GpuIsLost: "GPU is lost",
}


def _machine():
    return json.loads(Path(os.environ["FAKE_NVML"]).read_text())


def _found(uuid):
    for gpu in _machine():
        for device in (gpu, *gpu.get("mig", [])):
            if device["uuid"] == uuid:
                if device.get("lost"):
                    raise NVMLError_GpuIsLost
                return device
    raise NVMLError_NotFound


def _reading(handle, key):
    device = _found(handle)
    if key not in device:
        raise NVMLError_NotSupported
    return device[key]


def nvmlInit():
    if "FAKE_NVML" not in os.environ:
        raise NVMLError_LibraryNotFound


def nvmlDeviceGetCount():
    return len(_machine())


def nvmlDeviceGetHandleByIndex(index):
    return nvmlDeviceGetHandleByUUID(_machine()[index]["uuid"])


def nvmlDeviceGetHandleByUUID(uuid):
    _found(uuid)
    return uuid


def nvmlDeviceGetUUID(handle):
    return handle


def nvmlDeviceGetName(handle):
    return _found(handle).get("name", "Fake GPU")


def nvmlDeviceGetMigMode(handle):
    _reading(handle, "mig")
    return [NVML_DEVICE_MIG_ENABLE, NVML_DEVICE_MIG_ENABLE]


def nvmlDeviceGetMaxMigDeviceCount(handle):
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(handle, number):
    parts = _found(handle)["mig"]
    if number >= len(parts):
        raise NVMLError_NotFound
    return parts[number]["uuid"]


def nvmlDeviceGetMemoryInfo(handle):
    total, used = _reading(handle, "memory"), _reading(handle, "used")
    return SimpleNamespace(total=total, used=used, free=total - used)


def nvmlDeviceGetUtilizationRates(handle):
    return SimpleNamespace(gpu=_reading(handle, "utilisation"))


def nvmlDeviceGetPowerUsage(handle):
    return _reading(handle, "power_mw")


def nvmlDeviceGetEnforcedPowerLimit(handle):
    return _reading(handle, "power_limit_mw")


def nvmlDeviceGetTotalEnergyConsumption(handle):
    return _reading(handle, "energy_mj")


def nvmlDeviceGetComputeRunningProcesses(handle):
    return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in _found(handle).get("processes", [])]
