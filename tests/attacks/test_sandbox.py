"""The attack on the sandbox. What is skipped where the kernel grants no boundary is refused there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from specflow.bench.scoring.confinement import missing
from specflow.bench.scoring.sandbox import Sandbox
from tests.attacks import sandbox as attack


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if lack := missing():
        pytest.skip(lack)
    yield Sandbox.open(attack.LIMITS)
    assert attack.left_behind() == []


def test_nothing_gets_out(sandbox: Sandbox, tmp_path: Path) -> None:
    with attack.world(tmp_path) as world:
        assert attack.escapes(sandbox, world) == []


def test_the_attempts_succeed_without_the_boundary(tmp_path: Path) -> None:
    """Which ones an ordinary user has the right to is the machine's; most must, or the test above shows little."""
    with attack.world(tmp_path) as world:
        succeeded = attack.unconfined(world)
        assert len(succeeded) >= 0.8 * len(attack.CONTAINED), set(attack.CONTAINED) - succeeded
        assert {"dir_fd", "sqlite attach", "our file", "inherited files", "fork", "signal", "tcp"} <= succeeded
        assert {"b", "e.db", "kept", "signal", "tcp"} <= set(world.reached())
    for path in Path("/dev/shm").glob("outside*"):
        path.unlink()


@pytest.mark.parametrize("name", attack.FORGED)
def test_no_wrong_answer_passes(name: str, sandbox: Sandbox) -> None:
    assert attack.forge(sandbox, name).status != "passed"


@pytest.mark.parametrize("name", attack.HOGS)
def test_what_takes_all_ends(name: str, sandbox: Sandbox) -> None:
    assert attack.hog(sandbox, name).status in ("failed", "timeout")
