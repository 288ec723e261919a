"""The table of speeds at the end of a run, as docs/gpu.md takes it."""

from __future__ import annotations

import platform
from datetime import date
from typing import Any

import pytest
import torch
import transformers

from specflow.bench.identity import git_commit
from specflow.device import name_of
from tests import ROOT
from tests.on_device.throughput import Speed, table

SPEEDS = pytest.StashKey[list[Speed]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SPEEDS] = []


@pytest.fixture
def speeds(request: pytest.FixtureRequest) -> list[Speed]:
    """What a test puts here is printed when all are done."""
    return request.config.stash[SPEEDS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if found := config.stash[SPEEDS]:
        commit = git_commit(ROOT)
        terminalreporter.section("for docs/gpu.md")
        terminalreporter.write_line(
            f"{name_of(torch.device('cuda'))}, Python {platform.python_version()}, torch {torch.__version__}, CUDA "
            f"{torch.version.cuda}, transformers {transformers.__version__}, commit {str(commit)[:7]}, {date.today()}\n"
        )
        terminalreporter.write_line(table(found))
