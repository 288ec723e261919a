"""Drafters that know the answer: one is always right, the other always wrong. They bound what the harness itself costs.

The oracle's speedup is the most that any draft of its length could reach, as it accepts everything and drafts for
nothing. The null draft's is what verification costs where nothing is accepted. Greedy decoding only: a sampled answer
is not known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specflow.decoding.sampling import Sampling
from specflow.decoding.verify import Proposal


class KnownAnswerDrafter:
    """Proposes the answer that `expect` was told of: as it is, or with every token replaced by another one."""

    def __init__(self, right: bool, vocab_size: int) -> None:
        self.right, self.vocab_size = right, vocab_size
        self._answer: list[int] = []
        self._num_prompt_tokens = 0

    def expect(self, token_ids: Sequence[int]) -> None:
        """The greedy answer to the request that comes next."""
        self._answer = list(token_ids)

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        self._num_prompt_tokens = len(history) - 1

    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        """`num_tokens` tokens, fewer only where a right answer ends: what would follow it is not known."""
        assert sampling.greedy, "only a greedy answer is known beforehand"
        at = len(history) - self._num_prompt_tokens
        known = self._answer[at : at + num_tokens]
        if self.right:
            return Proposal(known)
        unknown = [0] * (num_tokens - len(known))
        return Proposal([(token + 1) % self.vocab_size for token in known] + unknown)

    def max_nodes(self, num_tokens: int) -> int:
        return num_tokens
