"""How long this process has been inside model calls, the target's and the drafts': the rest of decoding is overhead.

`CachedTarget` and the drafters' sessions run each call within `MODEL_TIME.call`; whoever decodes reads `seconds()`
before and after. What is in no call counts as outside: masks, choices, sampling, compaction, Python.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


class ModelTime:
    """Adds up model calls, which must not lie within each other."""

    def __init__(self) -> None:
        self._seconds = self._began = 0.0
        self._in_stream: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def call(self, device: torch.device) -> AbstractContextManager[object]:
        """Counts what runs inside. On CUDA two events in the device's stream time it, so that the host never waits; of
        a model over several GPUs they see what runs on `device`.
        """
        return self if device.type != "cuda" else self._call_in_stream(torch.cuda.current_stream(device))

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._began

    @contextmanager
    def _call_in_stream(self, stream: torch.cuda.Stream) -> Iterator[None]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        self._in_stream.append((begin, end))
        while len(self._in_stream) > 1 and self._in_stream[0][1].query():  # so that few are held where nobody reads
            self._take()

    def seconds(self) -> float:
        """Seconds so far. On CUDA once the calls have ended, for which a reading of `clock_of` waits anyway."""
        while self._in_stream:
            self._in_stream[0][1].synchronize()
            self._take()
        return self._seconds

    def _take(self) -> None:
        begin, end = self._in_stream.popleft()
        self._seconds += 1e-3 * begin.elapsed_time(end)


MODEL_TIME = ModelTime()
