"""Which rows are captured, and the target's forward in transformers: what `extract` and online training share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specflow.hidden_states import RowInfo
from specflow.targets.attention import optimise_for_inference
from specflow.targets.cached import capture_hooks
from specflow.targets.model import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specflow.config import Extract


@dataclass(frozen=True)
class SampleRow:
    """A sample row that is to be captured; `info` has no place in a shard yet."""

    info: RowInfo
    token_ids: list[int]


def select_rows(samples: dict[str, list[Any]], settings: Extract) -> tuple[list[SampleRow], dict[str, float]]:
    """Rows to capture, by policy for long ones, and counts of what was cut, dropped or had nothing supervised."""
    limit = settings.max_length_tokens
    counts: dict[str, float] = {"rows": 0, "cut_rows": 0, "dropped_rows": 0, "unsupervised_rows": 0}
    kept = []
    for split, rows in samples.items():
        for row in rows:
            counts["rows"] += 1
            token_ids = row["token_ids"]
            if len(token_ids) > limit:
                counts["cut_rows" if settings.on_too_long == "cut" else "dropped_rows"] += 1
                if settings.on_too_long == "drop":
                    continue
            spans = [(start, min(end, limit)) for start, end in row["spans"] if start < min(end, limit)]
            if not spans:
                counts["unsupervised_rows"] += 1
                continue
            token_ids = token_ids[:limit]
            info = RowInfo(
                id=row["id"],
                split=split,
                category=row["category"],
                shard=0,
                offset=0,
                length=len(token_ids),
                spans=spans,
            )
            kept.append(SampleRow(info, token_ids))
    return kept, counts


def plan_batches(rows: Sequence[RowInfo], batch_tokens: int) -> Iterator[Sequence[RowInfo]]:
    """Consecutive rows, longest first, whose right-padded batch has at most `batch_tokens` tokens (or a single row)."""
    start = 0
    while start < len(rows):
        size = max(batch_tokens // rows[start].length, 1)
        yield rows[start : start + size]
        start += size


class StateCapture:
    """Runs the target's decoder, without its head, and keeps the residual streams and the post-norm last state.

    Threads may share one: its hooks write to one place, so that captures take turns.
    """

    def __init__(self, model: PreTrainedModel, aux_layer_ids: Sequence[int], dtype: torch.dtype) -> None:
        """`dtype` is that of the states given back. The model is optimised for inference in place."""
        self._decoder = decoder_of(optimise_for_inference(model))
        self._aux: dict[int, Tensor] = {}
        self._turn = Lock()  # from a forward until its states are read
        self._aux_layer_ids, self._dtype = list(aux_layer_ids), dtype
        self._hooks = capture_hooks(self._decoder, aux_layer_ids, self._aux)

    def __enter__(self) -> StateCapture:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.inference_mode()
    def __call__(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of token lists, end to end without padding: ids int32 [N], aux [N, A * H], final [N, H], finite
        bool [N].

        One right-padded forward, so rows of similar length cost least; causal attention keeps the padding from the
        tokens before it.
        """
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        padded = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = torch.tensor(row)
        real = (torch.arange(width) < lengths[:, None]).flatten().nonzero()[:, 0]
        device = next(self._decoder.parameters()).device
        index = real.to(device)

        def packed(states: Tensor) -> Tensor:
            states = states.flatten(0, 1)
            return (states if len(real) == len(states) else states[index]).to(self._dtype)

        with self._turn:
            final = self._decoder(input_ids=padded.to(device), use_cache=False).last_hidden_state
            features = torch.cat([packed(self._aux[layer]) for layer in self._aux_layer_ids], dim=-1)
        last = packed(final)
        finite = torch.isfinite(features).all(-1) & torch.isfinite(last).all(-1)
        return padded.flatten()[real].int(), features, last, finite
