"""What of a stage can be split, how ends and numbers of its shares are read. Processes: integration/test_shares.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from specflow.errors import RetryableError, UserError
from specflow.gpus.resources import Resources
from specflow.sharding import launch
from specflow.stage import run_share


def test_what_the_exit_code_of_a_share_means() -> None:
    assert isinstance(launch._failure("sample@x: share-0", 75), RetryableError)
    killed = launch._failure("sample@x: share-0", -9)
    assert not isinstance(killed, RetryableError) and "killed 4 times" in str(killed)


def test_numbers_of_shares_are_put_together() -> None:
    results = [
        {"tok_s": 10.0, "gpu_seconds": 4.0, "gpu_joules": 7.0, "gpu_memory_peak_gb": 3.0, "gpu_utilisation_mean": 0.5},
        {"tok_s": 20.0, "gpu_seconds": 12.0, "gpu_joules": 1.0, "gpu_memory_peak_gb": 5.0, "gpu_utilisation_mean": 1.0},
        {"gpu_seconds": 0.0},
    ]
    assert launch.combine(results) == {
        "tok_s": 30.0,
        "gpu_seconds": 16.0,
        "gpu_joules": 8.0,
        "gpu_memory_peak_gb": 5.0,
        "gpu_utilisation_mean": (0.5 * 4 + 1.0 * 12) / 16,
    }


def test_what_can_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launch.RAY_ADDRESS, raising=False)
    monkeypatch.setattr(launch, "has_gpus", lambda: False)
    asked = Resources(gpus=1, shards=4, declared=True)
    assert launch.split("extract", "x", asked) == asked
    assert launch.split("train_offline", "x", asked).shards == 1
    assert launch.split("bench", "x", asked).shards == 1  # on a CPU its shares would time each other
    monkeypatch.setenv(launch.RAY_ADDRESS, "auto")
    assert launch.split("bench", "x", asked) == asked
    assert launch.split("bench", "x", Resources(gpus=0, shards=4, declared=True)).shards == 1
    assert launch.own_devices(asked) == Resources(shards=4)  # declares nothing: hides no device from the shares
    alone = Resources(gpus=1, declared=True)
    assert launch.own_devices(alone) == alone


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"SPECFLOW_RAY_ADDRESS is set, but ray is not installed: pip install"):
        launch._on_ray(run_share, "sample", "x", Path("params.yaml"), [], Resources(), first=False)
