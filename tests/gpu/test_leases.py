"""Leases on a real card: NVML's readings against nvidia-smi's and torch's. Run by `pytest tests/gpu/test_leases.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specflow.gpus import nvml
from specflow.gpus.nvml import GB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not nvml.has_gpus(), reason="needs an NVIDIA GPU that NVML knows")]

LEASED = """
import json, logging, sys, time
logging.basicConfig(level=logging.INFO, format="%(message)s")
from specflow.gpus import leases
from specflow.gpus.resources import Resources
with leases.lease(Resources(1, declared=True), "sample@real") as lease:
    import torch
    matrix = torch.randn(8192, 8192, device="cuda")
    until = time.monotonic() + 4
    while time.monotonic() < until:
        matrix = (matrix @ matrix).clamp(-1, 1)
        torch.cuda.synchronize()
    print(json.dumps({
        "count": torch.cuda.device_count(),
        "uuid": str(torch.cuda.get_device_properties(0).uuid),
        "leased": [device.uuid for device in lease.devices],
        "strangers": lease.strangers(),
        "cost": lease.cost(),
    }))
"""


def run(program: str, folder: Path, **variables: str) -> dict[str, object]:
    environment = {**os.environ, "SPECFLOW_LEASE_DIR": str(folder), **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_inventory_is_that_of_nvidia_smi() -> None:
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [[word.strip() for word in line.split(",")] for line in lines]
    devices = nvml.inventory()
    assert {device.gpu_uuid for device in devices} == {row[1] for row in rows}
    for device in devices:
        if device.mig is None:
            row = rows[[row[1] for row in rows].index(device.uuid)]
            assert (str(device.index), device.name) == (row[0], row[2])
            assert (device.memory_bytes or 0) / 2**20 == pytest.approx(float(row[3]), abs=1)


def test_torch_sees_the_leased_device_and_the_meters_run(tmp_path: Path) -> None:
    found = run(LEASED, tmp_path)
    leased, cost = found["leased"], found["cost"]
    assert isinstance(leased, list) and isinstance(cost, dict)
    assert found["count"] == 1 and leased[0].endswith(str(found["uuid"])) and found["strangers"] == []
    assert cost["gpu_seconds"] >= 4 and cost["gpu_memory_peak_gb"] > 3 * 4 * 8192**2 / GB
    if leased[0].startswith("GPU-"):  # a MIG device has no energy counter
        assert 0.3 < cost["gpu_utilisation_mean"] <= 1
        assert 30 < cost["gpu_joules"] / cost["gpu_seconds"] < 2000  # watts


def test_the_last_device_by_index_is_the_one_that_nvidia_smi_means(tmp_path: Path) -> None:
    last = nvml.inventory()[-1]
    found = run(LEASED, tmp_path, CUDA_VISIBLE_DEVICES=str(last.index), CUDA_DEVICE_ORDER="FASTEST_FIRST")
    assert isinstance(found["leased"], list) and found["leased"][0].endswith(str(found["uuid"]))


def test_a_process_without_a_lease_keeps_its_device(tmp_path: Path) -> None:
    device = nvml.my_devices()[0]
    assert device.memory_bytes is not None
    program = (
        f"import torch; x = torch.empty({int(0.4 * device.memory_bytes)}, dtype=torch.uint8, device='cuda')\n"
        "print('ready', flush=True); input()"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": nvml.visible_setting([device], nvml.inventory())}
    other = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        assert nvml.busy_reason(device, None) is not None
        assert nvml.busy_reason(device, 0.3 * device.memory_bytes / GB) is None
        assert nvml.busy_reason(device, 0.7 * device.memory_bytes / GB) is not None
    finally:
        other.communicate("\n", timeout=60)


def test_a_real_out_of_memory_is_recognised() -> None:
    import torch

    from specflow.stage import _out_of_memory

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert _out_of_memory(caught.value)
