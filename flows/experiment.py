"""`dvc exp run --temp` that shares no queue with other runs: `python -m flows.experiment --name NAME ...`.

DVC 3.67 puts an experiment into one stash of the repository, lets go of its lock, and takes out whatever is first until
the stash is empty. Of two that start together each may run the other's setting, or both the same one; a run that ends
while another starts takes that as well; and what a killed run left behind is run by the next. Here each run has a
stash of its own. Needs what pyproject.toml pins of DVC.
"""

from __future__ import annotations

import subprocess
import sys
import uuid

from dvc.cli import main
from dvc.repo.experiments import Experiments
from dvc.repo.experiments.queue.tempdir import TempDirQueue
from dvc.repo.experiments.refs import TEMP_NAMESPACE

OWN_STASH = f"{TEMP_NAMESPACE}/stash-{uuid.uuid4().hex}"


def own_queue(experiments: Experiments) -> TempDirQueue:
    return TempDirQueue(experiments.repo, OWN_STASH)


def missing_identity() -> str:
    """What git lacks to commit an experiment, as one line; empty where it lacks nothing."""
    for key in ("user.name", "user.email"):
        done = subprocess.run(["git", "config", "--get", key], capture_output=True, text=True, check=False)
        if not done.stdout.strip():
            return f"an experiment is a git commit and git has no {key}: run `git config --global {key} ...` first"
    return ""


if __name__ == "__main__":
    if said := missing_identity():
        sys.stderr.write(f"specflow: {said}\n")
        sys.exit(2)
    Experiments.tempdir_queue = property(own_queue)
    sys.exit(main(["--wait-for-lock", "exp", "run", "--temp", *sys.argv[1:]]))  # waits as `plan.dvc_command` does
