"""Prompt-lookup drafting: propose what followed the same words before. Needs no model; a benchmark's reference row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specflow.decoding.sampling import Sampling
from specflow.decoding.verify import NOTHING, Proposal


class LookupDrafter:
    """Proposes what followed the longest suffix of at most `max_ngram` tokens where it last occurred before.

    With `earliest` where it first occurred: what transformers' prompt lookup does (with `max_ngram` 2, its default
    max_matching_ngram_size). Drafts are not cut at an end token, as there; verification ends an answer there anyway.
    """

    def __init__(self, max_ngram: int = 3, *, earliest: bool = False) -> None:
        self.max_ngram, self.earliest = max_ngram, earliest
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position of what followed it
        self._indexed = 0

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        self._ends, self._indexed = {}, 0

    def max_nodes(self, num_tokens: int) -> int:
        return num_tokens

    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        """Up to `num_tokens` tokens as certainties; none where no suffix occurred before."""
        for end in range(self._indexed + 1, len(history)):  # n-grams with a follower
            for n in range(1, min(self.max_ngram, end) + 1):
                ngram = tuple(history[end - n : end])
                if not (self.earliest and ngram in self._ends):
                    self._ends[ngram] = end
        self._indexed = max(self._indexed, len(history) - 1)
        for n in range(min(self.max_ngram, len(history) - 1), 0, -1):
            end = self._ends.get(tuple(history[-n:]))
            if end is not None:
                return Proposal(list(history[end : end + num_tokens]))
        return NOTHING
