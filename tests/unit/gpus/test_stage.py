"""A stage and its devices: what it declares, what it gets, what it costs, and how it ends without memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from specflow import config, stage
from specflow.config import Params, parse_params
from specflow.errors import RetryableError, UserError
from specflow.gpus.resources import Resources, stage_resources
from specflow.paths import Paths
from tests import ROOT
from tests.fake_nvml import GB, Machine, gpu


@pytest.fixture
def declared(project: Path) -> Path:
    """A project whose dvc.yaml is specflow's own, without a usable MLflow store (its start takes seconds)."""
    shutil.copy(ROOT / "dvc.yaml", project / "dvc.yaml")
    (project / "mlflow.db").mkdir()
    return project


def change(**family: object) -> Params:
    """Change the family in params.yaml."""
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["families"]["tiny"] |= family
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    return parse_params(raw)


def toy_stage(function: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """`sample` with other work; call it as the command line does."""
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "toy_run", lambda *_: function(), raising=False)
    monkeypatch.setitem(stage.STAGES, "sample", (__name__, "toy_run"))
    return lambda: stage.run_stage("sample", "tiny", Path("params.yaml"))


def test_stage_names_are_those_of_the_stages() -> None:
    assert list(config.STAGE_NAMES) == list(stage.STAGES)


def test_resources(declared: Path) -> None:
    plain = change().family("tiny")
    root = Path()
    assert stage_resources(root, "sample", plain) == Resources(1, None, 86400, 1, declared=True)
    assert stage_resources(root, "vocab", plain) == Resources(0, None, 3600, 1, declared=True)
    assert stage_resources(root, "report", None) == Resources(0, None, 600, 1, declared=True)
    special = change(resources={"sample": {"gpus": 4, "gpu_memory_gb": 70, "shards": 2}, "bench": {"timeout_s": 5}})
    family = special.family("tiny")
    assert stage_resources(root, "sample", family) == Resources(4, 70, 86400, 2, declared=True)
    assert stage_resources(root, "bench", family) == Resources(1, None, 5, 1, declared=True)
    Path("dvc.yaml").unlink()
    assert stage_resources(root, "bench", family) == Resources(0, None, 5, 1, declared=False)
    assert stage_resources(root, "sample", family) == Resources(4, 70, None, 2, declared=True)


@pytest.mark.parametrize(
    "meta, message",
    [
        ({"gpu": 1}, "stages.sample.meta.gpu: did you mean 'gpus'"),
        ({"gpus": -1}, "stages.sample.meta.gpus: Input should be greater than or equal to 0, got -1"),
        ({"gpus": "${families.tiny.gpus}"}, "goes to families.F.resources"),
        ([1], "expected keys such as gpus"),
    ],
)
def test_bad_meta(project: Path, params: Params, meta: object, message: str) -> None:
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"sample": {"cmd": "x", "meta": meta}}}))
    with pytest.raises(UserError) as caught:
        stage_resources(Path(), "sample", params.family("tiny"))
    assert message in str(caught.value)


def test_other_tools_may_use_meta(project: Path, params: Params) -> None:
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"sample": {"cmd": "x", "meta": {"owner": "ann"}}}}))
    assert stage_resources(Path(), "sample", params.family("tiny")) == Resources()


def test_misspelt_resources(project: Path) -> None:
    with pytest.raises(UserError, match=r"families\.tiny: resources\.sampel is no stage: did you mean 'sample'"):
        change(resources={"sampel": {"gpus": 1}})
    with pytest.raises(UserError, match=r"families\.tiny\.resources\.sample\.gpu'.* did you mean 'gpus'"):
        change(resources={"sample": {"gpu": 1}})


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Messages of specflow's own logger, which does not propagate once a stage has run."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("specflow").addHandler(handler)
    yield messages
    logging.getLogger("specflow").removeHandler(handler)


def test_without_a_gpu(
    declared: Path, machine: Machine, paths: Paths, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Either the family allows the CPU and the stage says that it runs there, or one line and nothing done."""
    monkeypatch.delenv("FAKE_NVML")
    run = toy_stage(lambda: {"rows": 7}, monkeypatch)
    assert set(run()) == {"rows", "seconds"}
    assert [line for line in said if "CPU" in line] == [
        "sample@tiny runs on the CPU: no GPU here (NVML Shared Library Not Found)"
    ]
    assert toy_stage(lambda: {"seconds": 3.0}, monkeypatch)() == {"seconds": 3.0}  # a stage's own number stays
    paths.metrics("sample").unlink()
    change(allow_cpu=False)
    with pytest.raises(UserError) as caught:
        run()
    assert "sample@tiny needs 1 GPU and there is none (NVML Shared Library Not Found)" in str(caught.value)
    assert "families.tiny.allow_cpu: true" in str(caught.value) and not paths.metrics("sample").exists()
    # Where torch finds a device that NVML does not know (AMD), there is nothing to lease, and no reason to stop.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run() == {"seconds": 3.0}
    assert "sample@tiny: no leases without NVML (NVML Shared Library Not Found); it uses what torch finds" in said


def test_a_stage_holds_its_devices_and_pays_for_them(
    declared: Path, machine: Machine, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set([gpu(n, energy_mj=0, used=0) for n in range(3)])
    change(resources={"sample": {"gpus": 2}})

    def work() -> dict[str, float]:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        machine.set([gpu(n, energy_mj=1_500_000, used=12 * GB) for n in range(3)])
        return {"rows": 7}

    metrics = toy_stage(work, monkeypatch)()
    assert (metrics["rows"], metrics["gpu_joules"], metrics["gpu_memory_peak_gb"]) == (7, 3000, 12)
    assert metrics["gpu_seconds"] > 2 * metrics["seconds"] > 0  # held from before the imports on
    assert json.loads(paths.metrics("sample").read_text()) == metrics
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def out_of_memory() -> dict[str, float]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_context() -> dict[str, float]:
    raise RuntimeError("CUDA error: out of memory\nCompile with ...")


@pytest.mark.parametrize("fail", [out_of_memory, no_context])
def test_out_of_memory(
    declared: Path,
    machine: Machine,
    paths: Paths,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[], dict[str, float]],
) -> None:
    own = [[os.getpid(), 60 * GB]]
    machine.set([gpu(0, used=60 * GB, processes=own)])
    run = toy_stage(fail, monkeypatch)
    change(resources={"sample": {"gpu_memory_gb": 10}})
    with pytest.raises(UserError) as caught:
        run()
    assert not isinstance(caught.value, RetryableError)
    assert "lower families.tiny.sample.batch_size (now 8)" in str(caught.value)
    machine.set([gpu(0, used=70 * GB, processes=[*own, [os.getppid(), 10 * GB]])])
    with pytest.raises(RetryableError, match=rf"pid {os.getppid()} .*10\.0 GB.* uses too: try again later"):
        run()
    assert not paths.metrics("sample").exists()


def test_other_errors_are_not_explained_away(declared: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        toy_stage(broken, monkeypatch)()


def test_what_may_go_well_later_exits_with_75(declared: Path) -> None:
    program = (
        "import sys, specflow.stage, specflow.cli, specflow.errors\n"
        "def run_stage(*_, **__): raise specflow.errors.RetryableError('the server\\nis gone')\n"
        "specflow.stage.run_stage = run_stage\n"
        "sys.argv = ['specflow', 'fetch', 'tiny']\n"
        "specflow.cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "specflow: the server is gone\n")
