"""A stage ends with the dvc that started it, through the shell between them; one started by hand does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

STAGE = "from specflow.watch import end_with_dvc; end_with_dvc(); print('up', flush=True); import time; time.sleep(60)"
# The parent of a stage: starts a shell that stays between the two, or gives its place to the command, as DVC's does.
PARENT = """
import subprocess, sys
command = "'%s' -c '%s'" % (sys.executable, sys.argv[1].replace("'", "'\\\\''"))
subprocess.run(command + ("; true" if sys.argv[2] == "stays" else ""), shell=True)
"""


@pytest.mark.parametrize("shell", ["stays", "makes way"])
@pytest.mark.parametrize("by_dvc", [True, False])
def test_a_stage_ends_with_its_dvc_alone(shell: str, by_dvc: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    if by_dvc:
        environment["DVC_STAGE"] = "sample@tiny"
    command = [sys.executable, "-c", PARENT, STAGE, shell]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as dvc:
        assert dvc.stdout is not None and dvc.stdout.readline() == "up\n"
        stage = max(psutil.Process(dvc.pid).children(recursive=True), key=lambda child: child.pid)
        try:
            assert "end_with_dvc" in " ".join(stage.cmdline()) and stage.name() not in ("sh", "dash", "bash")
            dvc.send_signal(signal.SIGKILL)
            dvc.wait()
            if by_dvc:
                assert psutil.wait_procs([stage], timeout=30)[1] == []
            else:
                time.sleep(2)  # four looks of a watcher
                assert stage.is_running() and stage.status() != psutil.STATUS_ZOMBIE
        finally:
            if stage.is_running():
                stage.kill()
