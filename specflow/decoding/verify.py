"""Verification of drafted tokens: what the target accepts, and the one token that it adds itself.

Greedy verification reproduces the target's argmax decoding; sampling verification reproduces the target's distribution
exactly, whatever the draft proposes (Leviathan et al., arXiv 2211.17192, algorithm 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """A chain of drafted tokens. Without probabilities each token is a certainty: a point mass, or a greedy draft."""

    token_ids: list[int]
    """Target ids."""
    draft_probs: Tensor | None = None
    """[K, D] fp32: what each token was sampled from, over the draft vocabulary."""
    target_ids: Tensor | None = None
    """[D] int64: target id of each draft token."""

    def probs(self, position: int, vocab_size: int) -> Tensor:
        """Distribution [vocab_size] fp32 (over target ids) that the token at `position` came from."""
        if self.draft_probs is None or self.target_ids is None:
            full = torch.zeros(vocab_size)
            full[self.token_ids[position]] = 1.0
            return full
        row = self.draft_probs[position]
        return row.new_zeros(vocab_size).scatter_(0, self.target_ids, row)


@dataclass(frozen=True)
class Verdict:
    accepted: int
    """Drafted tokens accepted, 0..K."""
    next_token: int
    """The target's own token after them: the correction of a rejected draft, or the bonus."""


NOTHING = Proposal([])


def verify(proposal: Proposal, logits: Tensor, temperature: float, generator: torch.Generator | None) -> Verdict:
    """Check a proposal against target logits [K + 1, V]; row i predicts the token that draft i proposes.

    Temperature 0 is greedy. `generator` lives on the device of `logits`.
    """
    if temperature == 0.0:
        return verify_greedy(proposal, logits)
    return verify_sampling(proposal, probabilities(logits, temperature), generator)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax in fp32 of logits [..., V] at a temperature above 0."""
    return torch.softmax(logits.float() / temperature, dim=-1)


def verify_greedy(proposal: Proposal, logits: Tensor) -> Verdict:
    """Accept drafts while each equals the target's argmax."""
    choices = logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(proposal.token_ids) and proposal.token_ids[accepted] == choices[accepted]:
        accepted += 1
    return Verdict(accepted, choices[accepted])


def verify_sampling(proposal: Proposal, target_probs: Tensor, generator: torch.Generator | None) -> Verdict:
    """Accept draft x with probability min(1, target_probs[x] / draft_probs[x]); after a rejection sample what is left,
    (target_probs - draft_probs)+ normalised, so that the emitted token is distributed as target_probs.

    `target_probs` [K + 1, V].
    """
    num_drafted = len(proposal.token_ids)
    chances = torch.rand(num_drafted, generator=generator, device=target_probs.device).tolist() if num_drafted else []
    for i, (token, chance) in enumerate(zip(proposal.token_ids, chances, strict=True)):
        draft_probs = proposal.probs(i, target_probs.shape[1]).to(target_probs.device)
        # chance < target / draft, without the division
        if chance * float(draft_probs[token]) < float(target_probs[i, token]):
            continue
        left = (target_probs[i] - draft_probs).clamp_(min=0.0)
        # equal distributions leave nothing but rounding; then the target's own is the answer
        return Verdict(i, sample(left if float(left.sum()) > 0.0 else target_probs[i], generator))
    return Verdict(num_drafted, sample(target_probs[num_drafted], generator))


def sample(weights: Tensor, generator: torch.Generator | None) -> int:
    """Draw an index of non-negative `weights` [V], not necessarily normalised."""
    return int(torch.multinomial(weights, 1, generator=generator))
