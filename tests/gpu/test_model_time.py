"""Model time on a GPU: events in the stream, no waiting. Skipped without one."""

import time

import pytest
import torch

from specflow.model_time import ModelTime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: calls are timed by its events"),
]


def test_calls_are_timed_where_they_run_and_the_host_does_not_wait() -> None:
    device, inside = torch.device("cuda"), ModelTime()
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            with inside.call(device):
                matrix = (matrix @ matrix).clamp(-1, 1)
            matrix = (matrix @ matrix).clamp(-1, 1)  # as long, outside
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    wall = time.perf_counter() - began
    assert 0.35 * wall < inside.seconds() < 0.65 * wall
    assert inside.seconds() == inside.seconds()
