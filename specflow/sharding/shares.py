"""Which rows of a stage one process does, where several share it (`families.F.resources.<stage>.shards`).

A share leaves its finished rows in the resume state, under its own name; the stage itself then finds them there, as if
it had been killed and resumed, and writes its outputs. What starts the processes is `launch.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specflow.errors import UserError
from specflow.files import RowLog, read_rows
from specflow.resume import State


@dataclass(frozen=True)
class Share:
    """Every `count`-th row from number `index` on, by the rows' place in the stage's inputs."""

    index: int = 0
    count: int = 1

    def owns(self, number: int) -> bool:
        return self.count > 0 and number % self.count == self.index

    @property
    def name(self) -> str:
        """In file names; no `count` in it, so that another number of shares goes on from what there is."""
        return f"share-{self.index}"

    def check_nothing_left(self, stage: str, left: int) -> None:
        """Raise UserError where this share only merges, but `left` rows are missing."""
        if self == MERGE and left:
            raise UserError(
                f"{stage}: {left} rows are missing although every share is done: nodes see different files or run "
                "different versions or devices; use one kind of node and one shared folder, then run the stage again"
            )


WHOLE = Share()
MERGE = Share(0, 0)
"""No row at all: what the shares left is put together."""


def open_state(base: Path, what: str, parts: Mapping[str, Any], share: Share) -> State:
    """The state of a run, which its shares write together and everybody else alone."""
    return State(base, what, parts, part=share.name if share.count > 1 else None)


def open_log(state: Path, stem: str, key: str, share: Share) -> RowLog:
    """The log that a process appends to, of the whole stage or of its share; its `rows` are those of all logs.

    `state` is the folder of the run.
    """
    own = state / (f"{stem}.{share.name}.jsonl" if share.count > 1 else f"{stem}.jsonl")
    others: dict[str, Any] = {}
    for path in _files(state, stem):
        if path != own:
            others |= read_rows(path, key) or {}
    log = RowLog(own, key)
    log.rows = others | log.rows
    return log


def only_key(state: Path, stem: str) -> str:
    """The key under which the shares wrote. Raises UserError unless they agree on it."""
    heads = [path.read_bytes().partition(b"\n") for path in _files(state, stem) if path.exists()]
    keys = {json.loads(head)["key"] for head, end, _ in heads if end}
    if len(keys) != 1:
        raise UserError(
            f"{stem}: shares of {len(keys)} kinds of machine or software: use one kind of node, delete "
            f"{state / stem}.*jsonl and run the stage again"
        )
    return keys.pop()


def _files(state: Path, stem: str) -> Iterator[Path]:
    yield state / f"{stem}.jsonl"
    yield from sorted(state.glob(f"{stem}.share-*.jsonl"))
