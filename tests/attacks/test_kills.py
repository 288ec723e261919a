"""A round of `kill -9` for each stage that resumes; `python -m tests.attacks.kills --rounds 60` is the large form."""

from __future__ import annotations

import subprocess
import sys


def test_a_killed_stage_goes_on_to_the_result_of_an_undisturbed_one() -> None:
    """In a process of its own, which forks."""
    command = [sys.executable, "-m", "tests.attacks.kills", "--rounds", "5", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    rounds, kills, faults = map(int, lines[-1].strip("| ").split(" | ")[1:])
    assert rounds == 5 and kills >= 3 and faults == 0, done.stdout
