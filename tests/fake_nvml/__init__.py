"""A machine with GPUs that do not exist: see pynvml.py here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
GB = 10**9


def gpu(number: int, **facts: Any) -> dict[str, Any]:
    """A GPU of 80 GB with nobody on it, unless `facts` say otherwise."""
    uuid = f"GPU-{number:08x}-0000-4000-8000-{number:012x}"
    return {"uuid": uuid, "name": "Fake H100", "memory": 80 * GB, "used": 0, **facts}


def mig(number: int, memory_gb: int = 10) -> dict[str, Any]:
    """A MIG device."""
    return {"uuid": f"MIG-{number:08x}-0000-5000-8000-{number:012x}", "memory": memory_gb * GB, "used": 0}


class Machine:
    """The fake machine of a test: its GPUs, and the environment that processes see them in."""

    def __init__(self, folder: Path, gpus: list[dict[str, Any]]) -> None:
        self.file, self.leases = folder / "machine.json", folder / "leases"
        self.set(gpus)

    def set(self, gpus: list[dict[str, Any]]) -> None:
        """Change the machine, also under running processes."""
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(gpus))
        temporary.replace(self.file)

    @property
    def variables(self) -> dict[str, str]:
        return {"FAKE_NVML": str(self.file), "SPECFLOW_LEASE_DIR": str(self.leases)}

    def environment(self, **more: str) -> dict[str, str]:
        """For a subprocess."""
        kept = {
            key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "SPECFLOW_LEASE")
        }
        path = os.pathsep.join([str(FOLDER), str(FOLDER.parents[1])])
        return {**kept, **self.variables, "PYTHONPATH": path, **more}

    def start(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        """Start lease_worker.py; its messages go to the pipe."""
        command = [sys.executable, str(FOLDER / "lease_worker.py"), *map(str, arguments)]
        environment = self.environment(**variables)
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Until `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
