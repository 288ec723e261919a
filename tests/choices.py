"""A GPU's choices where there is none: what `specflow.device` decides, taken on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch.nn.attention.flex_attention as flex

from specflow.device import GPU

AS_GPU = replace(GPU, compiler="eager")
"""All of them but the kernel: flex attention, traced as for it, runs as torch's plain operations and their gradient."""


@contextmanager
def flex_trains_on_cpu() -> Iterator[None]:
    """Let flex attention's gradient, which torch defines by plain operations for any device, run on a CPU: torch
    refuses it there as it has no fast kernel for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "_validate_device", lambda *tensors: None)
        yield
