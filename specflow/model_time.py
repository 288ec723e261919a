"""How long this process has been inside model calls, the target's and the drafts': the rest of decoding is overhead.

`CachedTarget` and the drafters' sessions run each call within `MODEL_TIME.call`; whoever decodes reads `seconds()`
before and after. What is in no call counts as outside: masks, choices, sampling, compaction, Python.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from specflow.device import Mark, mark


class ModelTime:
    """Adds up model calls, which must not lie within each other."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._calls: deque[tuple[Mark, Mark]] = deque()

    @contextmanager
    def call(self, device: torch.device) -> Iterator[None]:
        """Counts what runs inside, as marks in the device's work time it: the host never waits for them."""
        begin = mark(device)
        yield
        self._calls.append((begin, mark(device)))
        while len(self._calls) > 1 and self._calls[0][1].query():  # so that few are held where nobody reads
            self._take()

    def seconds(self) -> float:
        """Seconds so far, once the calls have ended, for which a reading of `clock_of` waits anyway."""
        while self._calls:
            self._calls[0][1].synchronize()
            self._take()
        return self._seconds

    def _take(self) -> None:
        begin, end = self._calls.popleft()
        self._seconds += 1e-3 * begin.elapsed_time(end)


MODEL_TIME = ModelTime()
