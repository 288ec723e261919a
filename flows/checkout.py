"""One pipeline at a time in a checkout, whatever started it: DVC's workspace and lock are per checkout."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.5


@contextmanager
def sole_pipeline(root: Path, run: str, log: Callable[..., None]) -> Iterator[None]:
    """Wait until no other pipeline works in `root`. The lock goes with its process, however that ends."""
    folder = root / ".specflow"
    folder.mkdir(exist_ok=True)
    with (folder / "pipeline.lock").open("a+", encoding="utf-8") as stream:
        said = False
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    stream.seek(0)
                    log("waiting for %s, which works in this checkout", stream.read().strip() or "another pipeline")
                    said = True
                time.sleep(POLL_S)
        stream.truncate(0)
        stream.write(run)
        stream.flush()
        yield
