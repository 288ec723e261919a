"""What NVML's readings are taken for, on machines that a fake pynvml plays."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from specflow.gpus import leases, nvml
from specflow.gpus.cost import Meter
from specflow.gpus.nvml import GB
from specflow.gpus.resources import Resources
from tests.fake_nvml import FOLDER, Machine, gpu, mig, wait_for


def seen(setting: str | None) -> str:
    return " ".join(device.label for device in nvml.visible_devices(nvml.inventory(), setting))


def test_the_real_module_has_every_name_of_the_fake_one() -> None:
    real = importlib.import_module("pynvml")
    assert Path(real.__file__ or "").parent != FOLDER
    fake = ast.parse((FOLDER / "pynvml.py").read_text())
    names = [node.name for node in fake.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = [name for name in names if not name.startswith("_")]
    assert len(public) > 15 and [name for name in public if not hasattr(real, name)] == []
    assert real.NVML_DEVICE_MIG_ENABLE == 1


@pytest.mark.parametrize(
    "setting, expected",
    [
        (None, "0 1 2 3"),
        ("", ""),
        ("-1", ""),
        ("NoDevFiles", ""),  # what Slurm sets for a job without GPUs
        ("0", "0"),
        ("2,0", "2 0"),
        (" 1 , 3 ", "1 3"),
        ("0,7,1", "0"),
        ("1,-1,2", "1"),
        ("0,GPU-00000001", "0"),
        ("1,1", ""),
        ("0,1,0", ""),
        ("2gpu,1", "2 1"),
        ("GPU-00000001-0000-4000-8000-000000000001", "1"),
        ("GPU-00000003,GPU-00000000-0000", "3 0"),
        ("GPU-0000000", ""),  # the start of four
        ("GPU-00000002,1", "2"),
        ("GPU-00000002,GPU-000000ff,GPU-00000001", "2"),
        ("GPU-00000002,GPU-00000002-00", ""),
        ("MIG-00000001", ""),
    ],
)
def test_visible_devices(machine: Machine, setting: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(setting) == expected
    # torch reads the variable as CUDA does, but for what only a look at the machine tells: existence and short UUIDs.
    if setting is not None and not setting.startswith(("GPU-", "MIG-")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
        known = [number for number in torch.cuda._parse_visible_devices() if number < 64]
        cut = next((i for i, number in enumerate(known) if number > 3), len(known))
        assert expected == " ".join(map(str, known[:cut]))


def test_mig(machine: Machine) -> None:
    parts = [mig(0xA0), mig(0xA1, 20)]
    machine.set([gpu(0, mig=parts), gpu(1), gpu(2, mig=[])])
    assert seen(None) == "0:0 0:1 1"  # a GPU with MIG is only its MIG devices, here none on GPU 2
    assert seen("0") == "0:0 0:1" and seen("1,0") == "1 0:0 0:1"
    assert seen(parts[1]["uuid"]) == "0:1" and seen("MIG-000000a0,MIG-000000a1") == "0:0 0:1" and seen("MIG-0") == ""
    assert seen("GPU-00000000") == "0:0 0:1"
    with leases.lease(Resources(1, 15, declared=True), "sample@tiny") as lease:
        assert [device.label for device in lease.devices] == ["0:1"]  # the smallest that is large enough
        assert os.environ["CUDA_VISIBLE_DEVICES"] == parts[1]["uuid"]
        assert set(lease.cost()) == {"gpu_seconds"}  # energy and utilisation are of whole GPUs
    with leases.lease(Resources(1, 40, declared=True), "sample@tiny"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu(1)["uuid"]  # indices would not be CUDA's beside MIG
    with pytest.raises(ValueError, match=r"needs 2 GPUs, but 1 of .* one MIG device only"):
        leases.lease(Resources(2, declared=True), "sample@tiny").__enter__()


def test_busy(machine: Machine) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        machine.set(
            [
                gpu(0, used=30 * GB, processes=[[other.pid, 29 * GB]]),
                gpu(1, used=2 * GB),  # a desktop
                gpu(2, used=30 * GB),  # a container whose processes NVML does not list
                gpu(3, used=30 * GB, processes=[[os.getpid(), 29 * GB]]),
            ]
        )
        devices = nvml.inventory()
        ours = frozenset({os.getpid()})
        stranger = f"pid {other.pid} (sleep, "
        first = nvml.busy_reason(devices[0], None, ours)
        assert first is not None and stranger in first and "29.0 GB" in first
        assert nvml.busy_reason(devices[1], None, ours) is None
        assert "50.0 of 80.0 GB free" in str(nvml.busy_reason(devices[2], None, ours))
        assert "50.0 of 80.0 GB free" in str(nvml.busy_reason(devices[3], None, ours))
        # With memory asked for, it alone decides.
        assert [nvml.busy_reason(device, 50, ours) for device in devices] == [None] * 4
        short = nvml.busy_reason(devices[0], 50.1, ours)
        assert short is not None and "50.0 GB free of the 50.1 GB" in short and stranger in short
        assert nvml.strangers(devices[0], ours) == [(other.pid, 29 * GB)] and nvml.strangers(devices[3], ours) == []
        machine.set([gpu(0), gpu(1), gpu(2, lost=True), gpu(3, processes=[[2**22 + 1, GB]])])
        assert "GPU is lost" in str(nvml.busy_reason(devices[2], None, ours))
        assert nvml.strangers(devices[3], ours) == []  # an id of another namespace names nobody
        assert [device.index for device in nvml.inventory()] == [0, 1, 3]
    finally:
        other.kill()
        other.wait()


def test_cost_is_the_difference_of_the_energy_counters(machine: Machine) -> None:
    before = [gpu(n, energy_mj=1_000_000 * n, power_mw=300_000, utilisation=90, used=10 * GB) for n in range(2)]
    machine.set(before)
    meter = Meter(nvml.inventory())
    started = time.monotonic()
    machine.set([gpu(n, energy_mj=1_000_000 * n + 2_500_000, utilisation=40, used=70 * GB) for n in range(2)])
    peak = meter.cost()
    machine.set([gpu(n, energy_mj=1_000_000 * n + 4_000_000, utilisation=40, used=5 * GB) for n in range(2)])
    meter.stop()
    cost = meter.cost()
    assert peak["gpu_joules"] == 5000 and cost["gpu_joules"] == 8000
    assert cost["gpu_memory_peak_gb"] == 70 and cost["gpu_utilisation_mean"] == pytest.approx(0.4)
    assert peak["gpu_seconds"] < cost["gpu_seconds"] == pytest.approx(2 * (time.monotonic() - started), abs=0.5)


def test_cost_without_energy_counters(machine: Machine) -> None:
    def run(first: list[dict[str, object]], then: list[dict[str, object]]) -> dict[str, float]:
        machine.set(first)
        meter = Meter(nvml.inventory())
        machine.set(then)
        meter.stop()
        return meter.cost()

    power = [gpu(0, power_mw=300_000), gpu(1, power_mw=100_000)]
    cost = run(power, power)
    assert cost["gpu_joules"] == pytest.approx(200 * cost["gpu_seconds"])  # constant: 400 W over half as many seconds
    rising = run([gpu(0, power_mw=100_000)], [gpu(0, power_mw=300_000)])
    assert rising["gpu_joules"] == pytest.approx(200 * rising["gpu_seconds"])  # trapezoid
    reset = run([gpu(0, power_mw=50_000, energy_mj=9_000)], [gpu(0, power_mw=50_000, energy_mj=10)])
    assert reset["gpu_joules"] == pytest.approx(50 * reset["gpu_seconds"])
    assert "gpu_joules" not in run([gpu(0, power_mw=1), gpu(1)], [gpu(0, power_mw=1), gpu(1)])  # no half a sum


def test_mlflow_watches_the_devices_of_this_process_only(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own monitor takes every GPU of the machine, whoever has leased them."""
    from mlflow.system_metrics.metrics import gpu_monitor
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    machine.set([gpu(n, used=(10 + n) * 10**6, utilisation=n) for n in range(4)])
    monkeypatch.setattr(gpu_monitor, "pynvml", nvml.driver(), raising=False)

    def watched() -> dict[str, float]:
        monitor = SystemMetricsMonitor("0" * 32, tracking_uri="http://127.0.0.1:9")
        nvml.watch_only_mine(monitor)
        monitor.collect_metrics()
        return {key: value for key, value in monitor.aggregate_metrics().items() if "gpu" in key and "mega" in key}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert watched() == {"gpu_0_memory_usage_megabytes": 13, "gpu_1_memory_usage_megabytes": 11}
    with leases.lease(Resources(1, declared=True), "sample@tiny"):
        assert watched() == {"gpu_0_memory_usage_megabytes": 13}
    with leases.lease(Resources(0, declared=True), "vocab@tiny"):
        assert watched() == {}


def test_gpus_command(machine: Machine) -> None:
    machine.set([gpu(0, utilisation=37, used=5 * GB), gpu(1, used=40 * GB), gpu(2), gpu(3)])
    log = machine.file.parent / "log"
    holder = machine.start("train_offline@tiny", 1, 60, log)
    waiter = None
    try:
        wait_for(log.exists)
        waiter = machine.start("sample@tiny", 4, 60, log)
        wait_for(lambda: f"pid {waiter.pid}" in command(machine))
        text = command(machine, CUDA_VISIBLE_DEVICES="0,1")
        rows = [line.split() for line in text.splitlines()]
        assert rows[1][:9] == ["0", "Fake", "H100", "80.0", "GB", "5.0", "GB", "37", "%"]
        assert f"train_offline@tiny (pid {holder.pid}, " in text.splitlines()[1]
        assert "40.0 of 80.0 GB free" in text.splitlines()[2] and "free (CUDA_VISIBLE_DEVICES hides it" in text
        assert f"4 GPUs for sample@tiny (pid {waiter.pid}, " in text
        found = json.loads(command(machine, "--json"))
        assert found["gpus"][0]["lease"]["pid"] == holder.pid and found["gpus"][2]["lease"] is None
        assert [(r["pid"], r["gpus"], r["devices"]) for r in found["requests"]] == [
            (holder.pid, 1, [gpu(0)["uuid"]]),
            (waiter.pid, 4, []),
        ]
    finally:
        for process in filter(None, (holder, waiter)):
            process.kill()
            process.wait()
    machine.set([])
    assert command(machine) == "No GPU on this machine (NVML lists none).\n"
    environment = machine.environment()
    del environment["FAKE_NVML"]
    done = subprocess.run([sys.executable, "-m", "specflow", "gpus"], env=environment, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("No GPU on this machine (NVML Shared Library Not Found).\n", 0)


def command(machine: Machine, *arguments: str, **variables: str) -> str:
    words = [sys.executable, "-m", "specflow", "gpus", *arguments]
    return subprocess.run(
        words, env=machine.environment(**variables), capture_output=True, text=True, check=True
    ).stdout
