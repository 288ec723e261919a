"""What every EAGLE-3 drafter of one sequence works on: the draft prepared for inference, and its cache.

Row t of the draft reads the target's aux state at position t and the embedding of the token that follows it. So a
proposal first feeds one row per newly verified position; the last of them proposes the first token, and every further
token takes one row of its own, forgotten before the next proposal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from specflow.drafters.eagle3 import DraftCache, Eagle3Draft
from specflow.drafters.inference import prepare
from specflow.model_time import MODEL_TIME


class Eagle3Session:
    """Holds the draft's cache of one sequence; drafters that run one after the other can share it. Takes the draft
    over: its products are prepacked for inference.

    `embedding` [V, H] is the target's input table, `max_length` the target's.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, max_length: int) -> None:
        self.draft = prepare(draft)
        weight = draft.norm.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.embedding, self.max_length = embedding, max_length
        self.target_ids = draft.d2t + torch.arange(draft.config.draft_vocab_size, device=draft.d2t.device)
        """[D] int64: target id of each draft token."""
        self.cache = DraftCache(draft.config, max_length, self.dtype, self.device)
        self.verified = 0
        """Rows of verified positions in the cache."""

    def reserve(self, num_rows: int) -> None:
        """Make room for `num_rows` rows of a proposal beyond `max_length`; forgets the sequence."""
        if self.cache.max_length < self.max_length + num_rows:
            self.cache = DraftCache(self.draft.config, self.max_length + num_rows, self.dtype, self.device)
            self.verified = 0

    @torch.inference_mode()
    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        """Begin a sequence: `history` [n + 1] tokens, of which the first n have aux rows [n, A * H].

        The last row is left for the first proposal.
        """
        assert aux is not None, "EAGLE-3 drafts from the target's aux states"
        self.verified = self.cache.length = 0
        if len(aux) > 1:
            self.ingest(history[:-1], aux[:-1])

    def ingest(self, history: Sequence[int], aux: Tensor | None) -> Tensor:
        """Feed rows of newly verified positions: `aux` [n, A * H] of those before the last token of `history`.

        Forgets the rows of the last proposal. Returns recycled states [n, H].
        """
        assert aux is not None, "EAGLE-3 drafts from the target's aux states"
        self.cache.length = self.verified
        following = torch.tensor(history[len(history) - len(aux) :], device=self.embedding.device)
        with MODEL_TIME.call(self.device):
            features = self.draft.project(aux.to(self.device, self.dtype))
            hidden = self.draft.decode(self._embed(following), features, self.cache)
        self.verified = self.cache.length
        return hidden

    def step(
        self, token_ids: Tensor, hidden: Tensor, position: int | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Feed rows of drafted tokens [n] (target ids, on the device) and the recycled states [n, H] they came from.

        `position` and `mask` as in `Eagle3Draft.decode`. Returns recycled states [n, H].
        """
        with MODEL_TIME.call(self.device):
            return self.draft.decode(self._embed(token_ids), hidden, self.cache, position, mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft-vocabulary logits [n, D] of recycled states [n, H]."""
        with MODEL_TIME.call(self.device):
            return self.draft.logits(hidden)

    def _embed(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.embedding).to(self.device, self.dtype)
