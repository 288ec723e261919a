"""All that depends on the device: dtypes, kernels, threads, clocks. The one place that decides it.

Whoever needs a choice asks `execution(device)`; nobody else looks at a device's type. A CPU can take a GPU's choices
(`executing`), so that tests run them without one. What calls CUDA itself are the few lines of the functions at the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass(frozen=True)
class Execution:
    """How a stage runs where it runs."""

    training_dtype: torch.dtype
    """Of training's products, of what they read and of the target's frozen tables. Trained weights, their gradients and
    sums of losses are float32 in any case.
    """
    loads_ahead: bool
    """A thread loads the next batch while the present one trains. On a CPU it takes more from the products' threads
    than the hundredth of a step that loading takes.
    """
    attention: Literal["flash", "flex"]
    """Of training: the CPU's flash kernel by segments, or flex attention over a block mask (drafters/attention.py)."""
    compiler: Literal["inductor", "eager"]
    """What torch.compile makes of flex attention: one kernel; or plain operations on a mask of pairs, for tests."""
    own_kernels: bool
    """oneDNN's products, weights in its layout, gradients written by hand (kernels.py); else torch's own."""
    host_memory: bool
    """Results lie in the host's memory: it looks at single rows as it needs them, where a GPU's are read at once."""
    loss_logits: int
    """Draft logits (float32) of all steps that exist at a time in the loss."""
    loss_block: int | None
    """Of these, how many a pass over them takes at a time; None: all."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which training and its evaluation compute."""
        return torch.autocast(device.type, self.training_dtype, enabled=self.training_dtype != torch.float32)


CPU = Execution(
    training_dtype=torch.float32,
    loads_ahead=False,
    attention="flash",
    compiler="eager",
    own_kernels=True,
    host_memory=True,
    loss_logits=960 * 8192,  # below the 32 MB that `kernels.keep_freed_memory` can keep
    loss_block=1 << 18,  # 1 MB, as half of a core's second-level cache holds with the teacher's beside them
)
GPU = Execution(
    training_dtype=torch.bfloat16,
    loads_ahead=True,
    attention="flex",
    compiler="inductor",
    own_kernels=False,
    host_memory=False,
    loss_logits=32 << 20,
    loss_block=None,
)
_by_type = {"cpu": CPU}


def execution(device: torch.device) -> Execution:
    """The choices for work on `device`; for any but a CPU a GPU's."""
    return _by_type.get(device.type, GPU)


@contextmanager
def executing(choices: Execution) -> Iterator[None]:
    """Work on the CPU takes `choices`, in all threads: how tests run what a GPU would."""
    before, _by_type["cpu"] = _by_type["cpu"], choices
    try:
        yield
    finally:
        _by_type["cpu"] = before


def default_device() -> torch.device:
    """Where a stage of this process computes: the first GPU that it sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_for_loading(device: torch.device, num_gpus: int) -> str:
    """Where `load_model` puts a model that computes on `device`: "auto" spreads it over `num_gpus` GPUs."""
    return "auto" if num_gpus > 1 and device.type != "cpu" else str(device)


class Mark(Protocol):
    """A moment in a device's work, as a CUDA event is one."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end: Mark, /) -> float:
        """Milliseconds from here to `end`."""


class HostMark:
    """A moment of the host, whose work is done when a call returns."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostMark, /) -> float:
        return 1e3 * (end.at - self.at)


def mark(device: torch.device) -> Mark:
    """This moment in the work that was given to `device`: on CUDA behind it in the stream, and the host does not wait;
    of a model over several GPUs it sees what runs on `device`.
    """
    if device.type != "cuda":
        return HostMark()
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))


def wait(device: torch.device) -> None:
    """Until all work that was given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back what torch keeps of freed memory, to another process, say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def name_of(device: torch.device) -> str:
    """The device's product name, "cpu" for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
