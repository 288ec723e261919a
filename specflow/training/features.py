"""Where a document's hidden states come from: the store (offline) or the target's forward (online). Same documents
out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from specflow.errors import UserError
from specflow.extract.capture import StateCapture, plan_batches, select_rows
from specflow.hidden_states import HiddenStateStore, check_finite
from specflow.training.packing import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specflow.config import Extract


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
    """Online: runs the target on the very rows that `extract` would capture, in the target's dtype; writes nothing."""

    def __init__(
        self, model: PreTrainedModel, samples: dict[str, list[Any]], extract: Extract, aux_ids: list[int]
    ) -> None:
        self._rows, _ = select_rows(samples, extract)
        self._tokens = {row.info.id: row.token_ids for row in self._rows}
        self._batch_tokens = extract.batch_tokens
        self._capture = StateCapture(model, aux_ids, next(model.parameters()).dtype)

    def rows(self, split: str) -> Sequence[Row]:
        return [row.info for row in self._rows if row.info.split == split]

    def documents(self, rows: Sequence[Row]) -> list[Document]:
        by_length = sorted(rows, key=lambda row: -row.length)
        found = {}
        for part in plan_batches(by_length, self._batch_tokens):
            token_ids, aux, final, finite = self._capture([self._tokens[row.id] for row in part])
            lengths = [row.length for row in part]
            check_finite([row.id for row in part], lengths, finite, str(aux.dtype))
            pieces = zip(part, *(x.split(lengths) for x in (token_ids, aux, final)), strict=True)
            found |= {
                row.id: Document(row.id, ids.long(), a.clone(), f.clone(), row.spans) for row, ids, a, f in pieces
            }
        return [found[row.id] for row in rows]


def check_rows(rows: Sequence[Row], split: str) -> None:
    if not rows:
        raise UserError(
            f"the {split} split has no supervised row: raise data.{split}_conversations or sample.max_new_tokens"
        )
