"""Prompt-lookup drafting: propose what followed the same words before. Needs no model; a benchmark's reference row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specflow.decoding.verify import NOTHING, Proposal


class LookupDrafter:
    """Proposes what followed the longest suffix of at most `max_ngram` tokens where it last occurred before."""

    def __init__(self, max_ngram: int = 3) -> None:
        self.max_ngram = max_ngram
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position of what last followed it
        self._indexed = 0

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        self._ends, self._indexed = {}, 0

    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> Proposal:
        """Up to `num_tokens` tokens as certainties; none where no suffix occurred before."""
        for end in range(self._indexed + 1, len(history)):  # n-grams with a follower
            for n in range(1, min(self.max_ngram, end) + 1):
                self._ends[tuple(history[end - n : end])] = end
        self._indexed = max(self._indexed, len(history) - 1)
        for n in range(min(self.max_ngram, len(history) - 1), 0, -1):
            end = self._ends.get(tuple(history[-n:]))
            if end is not None:
                return Proposal(list(history[end : end + num_tokens]))
        return NOTHING
