"""Chain drafting with an EAGLE-3 draft: K tokens, each fed back with the state that produced it.

Row t of the draft reads the target's aux state at position t and the embedding of the token that follows it. So a
proposal first feeds one row per newly verified position; the last of them proposes the first token, and every further
token takes one row of its own, forgotten before the next proposal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from specflow.decoding.verify import Proposal, probabilities
from specflow.drafters.eagle3 import DraftCache, Eagle3Draft, Linear
from specflow.kernels import prepack


class ChainDrafter:
    """Holds the draft's cache of one sequence. Takes the draft over: its products are prepacked for inference.

    `embedding` [V, H] is the target's input table.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, max_length: int) -> None:
        self.draft = draft.eval().requires_grad_(False)
        weight = draft.norm.weight
        self._device, self._dtype = weight.device, weight.dtype
        prepack(self.draft, kinds=(Linear,))
        self.embedding = embedding
        self._target_ids = draft.d2t + torch.arange(draft.config.draft_vocab_size, device=draft.d2t.device)
        self._cache = DraftCache(draft.config, max_length, self._dtype, self._device)
        self._verified = 0  # rows of verified positions in the cache

    @torch.inference_mode()
    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        """Begin a sequence: `history` [n + 1] tokens, of which the first n have aux rows [n, A * H].

        The last row is left for the first proposal.
        """
        assert aux is not None, "EAGLE-3 drafts from the target's aux states"
        self._verified = self._cache.length = 0
        if len(aux) > 1:
            self._ingest(list(history[1:-1]), aux[:-1])

    @torch.inference_mode()
    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> Proposal:
        """Draft `num_tokens` tokens after `history`.

        `aux` [n, A * H] are the rows of the n positions verified since the last call: those before the last token.
        """
        assert aux is not None, "EAGLE-3 drafts from the target's aux states"
        hidden = self._ingest(list(history[-len(aux) :]), aux)[-1:]
        tokens, rows = [], []
        for k in range(num_tokens):
            if k > 0:
                hidden = self.draft.decode(self._embed(tokens[-1]), hidden, self._cache)
            logits = self.draft.logits(hidden)
            if temperature == 0.0:
                choice = logits.argmax(-1)
            else:
                rows.append(probabilities(logits, temperature))
                choice = torch.multinomial(rows[-1], 1, generator=generator)[0]
            tokens.append(self._target_ids[choice])
        self._cache.length = self._verified
        token_ids = torch.cat(tokens).tolist()
        return Proposal(token_ids, torch.cat(rows), self._target_ids) if rows else Proposal(token_ids)

    def _ingest(self, following: list[int], aux: Tensor) -> Tensor:
        """Feed rows of verified positions: the token after each, and its aux state. Returns recycled states [n, H]."""
        embeddings = self._embed(torch.tensor(following, device=self.embedding.device))
        features = self.draft.project(aux.to(self._device, self._dtype))
        hidden = self.draft.decode(embeddings, features, self._cache)
        self._verified = self._cache.length
        return hidden

    def _embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.embedding).to(self._device, self._dtype)
