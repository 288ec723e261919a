"""What held devices cost: GPU-seconds, energy, peak memory, utilisation. Measured by NVML while a lease lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from specflow.gpus import nvml
from specflow.gpus.nvml import GB, Device, Load

SAMPLE_SECONDS = 1.0
"""Between two readings: NVML's own utilisation is a mean over up to a second, and a reading takes about 1 ms."""


@dataclass(frozen=True)
class Reading:
    """All devices at one time (monotonic seconds)."""

    time_s: float
    loads: tuple[Load, ...]


class Meter:
    """Watches `devices` from a thread of its own until `stop`; a forked child does not inherit the thread."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = tuple(devices)
        self._readings = _Totals(self._devices, self._read())
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-meter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def cost(self) -> dict[str, float]:
        """Cost up to now; a quantity that a device does not measure is left out."""
        with self._lock:
            self._readings.add(self._read())
            return self._readings.cost()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            with self._lock:
                self._readings.add(self._read())

    def _read(self) -> Reading:
        loads = []
        for device in self._devices:
            try:
                loads.append(nvml.load(device))
            except nvml.driver().NVMLError:  # the device fell off the bus; the stage will notice
                loads.append(Load(None, None, None, None, ()))
        return Reading(time.monotonic(), tuple(loads))


class _Totals:
    """Sums over readings, so that a stage of days keeps two readings and not a day's worth."""

    def __init__(self, devices: tuple[Device, ...], first: Reading) -> None:
        self.devices, self.first, self.last = devices, first, first
        self.power_j: float | None = 0.0
        self.peak_bytes = 0
        self.utilisation: list[float] = [0.0, 0.0]
        """Sum of the shares, and how many."""
        self._look(first)

    def add(self, reading: Reading) -> None:
        watts = [load.power_w for load in (*self.last.loads, *reading.loads)]
        known = [value for value in watts if value is not None]
        if len(known) < len(watts) or self.power_j is None:
            self.power_j = None
        else:  # trapezoid between the two readings
            self.power_j += sum(known) / 2 * (reading.time_s - self.last.time_s)
        self.last = reading
        self._look(reading)
        for load in reading.loads:  # not of the first one, which tells what was before
            if load.utilisation is not None:
                self.utilisation[0] += load.utilisation
                self.utilisation[1] += 1

    def cost(self) -> dict[str, float]:
        values = {"gpu_seconds": len(self.devices) * (self.last.time_s - self.first.time_s)}
        joules = self._counted_j() if self._counted_j() is not None else self.power_j
        if joules is not None:
            values["gpu_joules"] = joules
        if self.peak_bytes:
            values["gpu_memory_peak_gb"] = self.peak_bytes / GB
        if self.utilisation[1]:
            values["gpu_utilisation_mean"] = self.utilisation[0] / self.utilisation[1]
        return values

    def _counted_j(self) -> float | None:
        """By the energy counters, or None where one is missing or was set back by a reload of the driver."""
        total = 0.0
        for before, after in zip(self.first.loads, self.last.loads, strict=True):
            if before.energy_j is None or after.energy_j is None or after.energy_j < before.energy_j:
                return None
            total += after.energy_j - before.energy_j
        return total

    def _look(self, reading: Reading) -> None:
        for device, load in zip(self.devices, reading.loads, strict=True):
            if load.memory_free_bytes is not None and device.memory_bytes is not None:
                self.peak_bytes = max(self.peak_bytes, device.memory_bytes - load.memory_free_bytes)
