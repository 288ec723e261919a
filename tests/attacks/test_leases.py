"""The attack on leases in small."""

from __future__ import annotations

import os
import subprocess
import sys

from tests import ROOT


def test_no_device_is_leased_twice_under_kills() -> None:
    """In a process of its own, which may fork and reap as it likes."""
    command = [sys.executable, "-m", "tests.attacks.leases", "--leases", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines()[2:]]
    assert run.returncode == 0, run.stdout + run.stderr
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert all(int(row[1]) >= 20 and int(row[5]) >= 4 for row in rows), "leases, kills"
    assert [row[6:] for row in rows] == [["0", "0", "0"]] * 3, "double, starved, left"
