"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from specflow.config import Params, parse_params
from specflow.device import executing
from specflow.gpus import nvml
from specflow.paths import Paths
from specflow.tracking.store import STORE, open_store
from tests import fake_nvml
from tests.choices import AS_GPU, flex_trains_on_cpu
from tests.toys import tiny_params


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start, also where a script started them in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a project with one offline family `tiny` in params.yaml, whose inputs do not exist."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params(tmp_path)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def params(project: Path) -> Params:
    return parse_params(yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8")))


@pytest.fixture
def paths(project: Path) -> Paths:
    return Paths(root=Path(), family="tiny", cache=project / "cache")


@pytest.fixture
def as_gpu() -> Iterator[None]:
    """Work on the CPU takes a GPU's choices: bfloat16 autocast and tables, flex attention, a loading thread, torch's
    own kernels, results read at once.
    """
    with executing(AS_GPU), flex_trains_on_cpu():
        yield


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_nvml.Machine]:
    """This process on a fake machine with four GPUs of 80 GB and leases of its own."""
    made = fake_nvml.Machine(tmp_path, [fake_nvml.gpu(number) for number in range(4)])
    for key in ("CUDA_VISIBLE_DEVICES", "SPECFLOW_LEASE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in made.variables.items():
        monkeypatch.setenv(key, value)
    real = sys.modules.pop("pynvml", None)
    monkeypatch.syspath_prepend(str(fake_nvml.FOLDER))
    nvml.driver.cache_clear()
    yield made
    nvml.driver.cache_clear()
    sys.modules.pop("pynvml", None)
    if real is not None:
        sys.modules["pynvml"] = real


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated MLflow store: making one takes seconds, copying it none."""
    home = tmp_path_factory.mktemp("store")
    open_store(home)
    return home / STORE


@pytest.fixture
def store(project: Path, empty_store: Path) -> Path:
    """The project's own MLflow store, without a run."""
    return Path(shutil.copy(empty_store, project / STORE))


@pytest.fixture
def mlflow_warnings() -> Iterator[list[str]]:
    """What specflow's logger says of MLflow, as it comes (pytest's own capture depends on the logger's settings)."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage()) if "MLflow" in record.msg else None  # type: ignore
    logger = logging.getLogger("specflow")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)
