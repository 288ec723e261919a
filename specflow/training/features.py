"""Where a document's hidden states come from: the store (offline) or the target's forward (online). Same documents out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from specflow.errors import UserError
from specflow.hidden_states import HiddenStateStore
from specflow.training.packing import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Row(Protocol):
    """What training must know of a document before its states: enough to plan the whole run."""

    id: str
    length: int
    spans: list[tuple[int, int]]


class Features(Protocol):
    def rows(self, split: str) -> Sequence[Row]: ...

    def documents(self, rows: Sequence[Row]) -> list[Document]: ...


class StoredFeatures:
    """Offline: reads the hidden-state store that `extract` filled."""

    def __init__(self, store: HiddenStateStore) -> None:
        self.store = store

    def rows(self, split: str) -> Sequence[Row]:
        return self.store.rows(split)

    def documents(self, rows: Sequence[Row]) -> list[Document]:
        return [Document(row.id, *self.store.read(row), row.spans) for row in rows]


class LiveFeatures:
    """Online: runs the target on the very rows that `extract` would capture; nothing is written."""

    def __init__(
        self, model: PreTrainedModel, samples: dict[str, Path], *, aux_layer_ids: list[int], extract: object
    ) -> None:
        from specflow.targets.extract import StateCapture, plan_rows

        self._planned = {split: plan_rows(path, extract) for split, path in samples.items()}
        self._capture = StateCapture(model, aux_layer_ids)

    def rows(self, split: str) -> Sequence[Row]:
        return self._planned[split]

    def documents(self, rows: Sequence[Row]) -> list[Document]:
        states = self._capture([row.token_ids for row in rows])
        return [
            Document(row.id, torch.tensor(row.token_ids), aux, final, row.spans)
            for row, (aux, final) in zip(rows, states, strict=True)
        ]


def check_rows(rows: Sequence[Row], split: str) -> None:
    if not rows:
        raise UserError(
            f"the {split} split has no supervised row: raise data.{split}_conversations or sample.max_new_tokens"
        )
