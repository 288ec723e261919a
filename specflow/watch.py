"""Ends a stage when the `dvc` that started it is gone: it would go on beside the next one."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

POLL_S = 0.5
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh"}
"""DVC runs a command through one, which may give its place to the command or stay between the two."""


def end_with_dvc() -> None:
    """Send this process SIGTERM once the dvc that runs it has ended, killed with -9 included.

    DVC marks what it runs with DVC_STAGE. A stage that was started by hand, from whatever shell, is left alone, and so
    are shares and servers, whose stage ends them.
    """
    if "DVC_STAGE" in os.environ:
        threading.Thread(target=_watch, args=(_up_to_dvc(),), name="end-with-dvc", daemon=True).start()


def _up_to_dvc() -> list[psutil.Process]:
    """This process's parent, and where that is a shell its parent, up to the first that is none."""
    found: list[psutil.Process] = []
    process = psutil.Process().parent()
    while process is not None:
        found.append(process)
        if process.name().lstrip("-") not in SHELLS:
            return found
        process = process.parent()
    return []  # nothing but shells: dvc ended before we looked


def _watch(ancestors: list[psutil.Process]) -> None:
    while ancestors and all(map(_lives, ancestors)):
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
