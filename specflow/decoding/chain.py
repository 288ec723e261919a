"""Chain drafting with an EAGLE-3 draft: K tokens, each fed back with the state that produced it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specflow.decoding.eagle3 import Eagle3Session
from specflow.decoding.sampling import Dense, Few, Sampling
from specflow.decoding.verify import Proposal


class ChainDrafter:
    """Drafts greedily where the target is greedy, else samples as the target does: temperature, top-k and top-p."""

    def __init__(self, session: Eagle3Session) -> None:
        self.session = session

    def start(self, history: Sequence[int], aux: Tensor | None) -> None:
        self.session.start(history, aux)

    def max_nodes(self, num_tokens: int) -> int:
        return num_tokens

    @torch.inference_mode()
    def propose(
        self,
        history: Sequence[int],
        aux: Tensor | None,
        num_tokens: int,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> Proposal:
        """Draft `num_tokens` tokens after `history`; the host waits for the device once, at the end.

        `aux` [n, A * H] are the rows of the n positions verified since the last call: those before the last token.
        """
        session = self.session
        hidden = session.ingest(history, aux)[-1:]
        tokens: list[Tensor] = []
        draws: list[Dense | Few] = []
        for k in range(num_tokens):
            if k > 0:
                hidden = session.step(tokens[-1], hidden)
            logits = session.logits(hidden)
            if sampling.greedy:
                tokens.append(session.target_ids[logits.argmax(-1)])
            else:
                token, drawn_from = sampling.draft(logits[0], session.target_ids, generator)
                tokens.append(token)
                draws.append(drawn_from)
        return Proposal(torch.cat(tokens).tolist(), draws=draws)
