"""The checks of `tests/on_device` on a GPU. Skipped without one; `tests/unit/test_device.py` runs them on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.on_device import attention, decoding, stages, throughput, training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")
SHAPE = training.Shape()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("shape", [attention.Shape(5, 120), attention.Shape(3, 900, 32, 8, 128, 6)], ids=str)
def test_attention_and_its_gradients(shape: attention.Shape, dtype: torch.dtype, tolerance: float) -> None:
    attention.check_attention(GPU, dtype, tolerance, shape)


@pytest.mark.parametrize("loss", ["kl", "lk_hybrid"])
def test_offline_training(tmp_path: Path, loss: str) -> None:
    training.check_offline(tmp_path, GPU, SHAPE, loss=loss, fit_tokens=300 if loss == "kl" else 0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 0.02)], ids=str)
def test_online_training(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    training.check_online(tmp_path, GPU, SHAPE, dtype, tolerance)


def test_kill_and_resume(tmp_path: Path) -> None:
    training.check_resume(tmp_path, GPU, SHAPE, tolerance=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)], ids=str)
def test_capture(dtype: torch.dtype, tolerance: float) -> None:
    training.check_capture(GPU, SHAPE, dtype, tolerance)


def test_threads_capture_their_own() -> None:
    training.check_threads_capture_their_own(GPU, SHAPE)


@pytest.mark.parametrize("draft_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chains_and_trees_are_lossless(target_dtype: torch.dtype, draft_dtype: torch.dtype) -> None:
    decoding.check_lossless(GPU, target_dtype, draft_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_are_lossless(dtype: torch.dtype) -> None:
    decoding.check_batches(GPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_sampled_has_the_targets_distribution(dtype: torch.dtype) -> None:
    decoding.check_sampling(GPU, dtype)


@pytest.mark.parametrize(("online", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_stages(tmp_path: Path, online: bool, dtype: str) -> None:
    stages.check_stages(tmp_path, online=online, dtype=dtype)


@pytest.fixture(scope="module")
def llama_8b() -> throughput.Trainer:
    return throughput.make_trainer(throughput.LLAMA_8B, GPU, ttt_steps=7)


@pytest.mark.parametrize("tokens", [2048, 16384])
def test_throughput(llama_8b: throughput.Trainer, speeds: list[throughput.Speed], tokens: int) -> None:
    """A training step of a draft of Llama-3.1-8B; nothing but the table judges its speed."""
    speeds.append(throughput.measure(llama_8b, tokens))
    assert 0.0 < speeds[-1].peak_share < 1.0
