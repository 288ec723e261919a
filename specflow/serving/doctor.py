"""`specflow doctor`: what of specflow works on this machine, and what is missing for the rest."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

from specflow.config import Serve
from specflow.errors import UserError
from specflow.gpus.nvml import Device, NoGpus, inventory
from specflow.serving.engines import EngineName, find_install

PACKAGES = ("torch", "transformers", "dvc", "prefect", "mlflow", "ray")
ENGINES: tuple[EngineName, ...] = ("vllm", "sglang")


def findings(cache: Path, serves: dict[str, Serve]) -> list[str]:
    """One line per thing; `serves` are the families' settings by name, whose environments are looked at."""
    packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    devices = _devices()
    free = shutil.disk_usage(cache if cache.exists() else Path.home()).free
    lines = [
        f"python {platform.python_version()}: {packages}",
        f"GPUs: {', '.join(f'{device.index} {device.name}' for device in devices) or 'none that NVML shows'}",
        f"cache {cache}: {free / 1e9:.0f} GB free",
        f"transformers engine: works on the {'GPU' if devices else 'CPU'}",
    ]
    for name, serve in serves.items():
        if serve.url is not None:
            lines.append(f"{name}: a server at {serve.url}")
    for engine in ENGINES:
        for where in {serve.venv: serve for serve in serves.values() if serve.url is None}.values():
            lines.append(f"{engine} engine: {_engine(engine, where, cache, bool(devices))}")
    return lines


def _devices() -> list[Device]:
    try:
        return inventory()
    except NoGpus:
        return []


def _engine(engine: EngineName, serve: Serve, cache: Path, has_gpu: bool) -> str:
    try:
        install = find_install(engine, serve, cache)
    except UserError as error:
        return str(error).removeprefix(f"{engine} is ")
    where = f"{install.version} in {install.python.parent.parent}"
    if install.on_cpu:
        return f"{where}, for CPU"
    return where if has_gpu else f"{where}, but it needs a GPU and NVML shows none"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
