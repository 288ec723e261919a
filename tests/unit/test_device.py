"""What a GPU would run, on the CPU: the checks of `tests/on_device` under a GPU's choices; and the choices."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from specflow import device as module
from specflow.device import CPU, GPU, HostMark, executing, execution
from specflow.model_time import ModelTime
from tests import ROOT
from tests.on_device import decoding, stages, throughput, training

HOST = torch.device("cpu")
SHAPE = training.Shape()


@pytest.mark.parametrize("loss", ["kl", "lk_hybrid"])
def test_offline_training(tmp_path: Path, as_gpu: None, loss: str) -> None:
    training.check_offline(tmp_path, HOST, SHAPE, loss=loss, fit_tokens=300 if loss == "kl" else 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)], ids=str)
def test_online_training(tmp_path: Path, as_gpu: None, dtype: torch.dtype, tolerance: float) -> None:
    training.check_online(tmp_path, HOST, SHAPE, dtype, tolerance)


def test_kill_and_resume(tmp_path: Path, as_gpu: None) -> None:
    training.check_resume(tmp_path, HOST, SHAPE, tolerance=0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_capture(as_gpu: None, dtype: torch.dtype, tolerance: float) -> None:
    training.check_capture(HOST, SHAPE, dtype, tolerance)


@pytest.mark.parametrize("choices", [CPU, GPU], ids=["cpu", "gpu"])
def test_threads_capture_their_own(choices: module.Execution) -> None:
    with executing(choices):
        training.check_threads_capture_their_own(HOST, SHAPE)


@pytest.mark.parametrize("draft_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chains_and_trees_are_lossless(as_gpu: None, target_dtype: torch.dtype, draft_dtype: torch.dtype) -> None:
    decoding.check_lossless(HOST, target_dtype, draft_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_are_lossless(as_gpu: None, dtype: torch.dtype) -> None:
    decoding.check_batches(HOST, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_sampled_has_the_targets_distribution(as_gpu: None, dtype: torch.dtype) -> None:
    decoding.check_sampling(HOST, dtype)


@pytest.mark.parametrize(("online", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_stages(tmp_path: Path, as_gpu: None, online: bool, dtype: str) -> None:
    stages.check_stages(tmp_path, online=online, dtype=dtype)


def test_throughput(as_gpu: None) -> None:
    """Its FLOPs are those of the definition, counted here by hand; nothing is said of its speed."""
    shape = {"hidden_size": 8, "target_hidden_size": 8, "intermediate_size": 12, "vocab_size": 30, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "draft_vocab_size": 20}
    trainer = throughput.make_trainer(throughput.LLAMA_8B.model_copy(update=shape | heads), HOST, ttt_steps=2)
    speed = throughput.measure(trainer, 64, runs=1, peak_size=32)
    starts = 62  # a chain starts at all rows but the last two
    rows, filled = 96, 64  # with filler, whose two queries see one key and two
    every_row = 2 * (3 * 8 * 8) + 3 * (2 * 16 * 16)  # fc without the features' gradient, k and v
    layer = 16 * 32 + 32 * 8 + 3 * 8 * 12
    attention = 3 * 2 * 32 * (2 * (starts * (starts + 1) / 2 + 1 + 2) + filled)
    per_step = 3 * (2 * filled * layer + filled * 2 * 16 * 16 + (62 + 61) * 8 * 20)
    teacher = 63 * 8 * 20
    flops = 2.0 * (rows * every_row + attention + per_step + teacher)
    assert speed.tflops * 1e9 * speed.ms == pytest.approx(flops)
    assert (speed.memory_gb, speed.tokens, speed.ttt_steps) == (0.0, 64, 2)
    row = throughput.table([throughput.Speed(16384, 7, 250.0, 395.04, 0.4951, 41.26)]).splitlines()[-1]
    assert row == "| 16,384 | 7 | 250.0 | 65,536 | 395.0 | 50% | 41.3 GB |"


def test_choices_are_the_devices_and_can_be_a_gpus_on_a_cpu() -> None:
    assert execution(HOST) is CPU and execution(torch.device("cuda", 1)) is GPU
    with pytest.raises(KeyError), executing(GPU):
        assert execution(HOST) is GPU
        raise KeyError
    assert execution(HOST) is CPU


def test_model_time_adds_up_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of 1, 10 and 100 s with a second between them; marks that have not passed yet are waited for."""
    now, inside = 0.0, ModelTime()
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    waited = []
    monkeypatch.setattr(HostMark, "query", lambda mark: False)
    monkeypatch.setattr(HostMark, "synchronize", lambda mark: waited.append(mark.at))
    for seconds in (1.0, 10.0, 100.0):
        with inside.call(HOST):
            now += seconds
        now += 1.0
    assert inside.seconds() == pytest.approx(111.0) and waited == [1.0, 12.0, 113.0]
    assert inside.seconds() == pytest.approx(111.0) and len(waited) == 3
    monkeypatch.setattr(HostMark, "query", lambda mark: True)
    for _ in range(50):
        with inside.call(HOST):
            now += 1.0
    assert len(inside._calls) == 1, "few are held where nobody reads"


def test_nobody_else_asks_for_a_devices_type() -> None:
    """All that depends on it is decided in specflow/device.py; leases ask whether CUDA has started."""
    found = set()
    for file in (ROOT / "specflow").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            of_device = isinstance(node, ast.Attribute) and node.attr == "type" and "device" in ast.unparse(node.value)
            of_cuda = isinstance(node, ast.Attribute) and node.attr in ("cuda", "is_cuda", "pin_memory")
            if of_device or of_cuda:
                found.add(file.relative_to(ROOT / "specflow").as_posix())
    assert found == {"device.py", "gpus/leases.py"}
