"""Verification of drafted tokens: what the target accepts, and the one token that it adds itself.

Greedy verification reproduces the target's argmax decoding; sampling verification reproduces the target's distribution
exactly, whatever the draft proposes. Tokens drafted as certainties (trees, prompt lookup) are checked against the
target's own choice at each node; a chain that was sampled is checked by Leviathan et al., arXiv 2211.17192,
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specflow.decoding.sampling import Sampling, draw


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens: a chain, or the nodes of a tree. Without probabilities each token is a certainty."""

    token_ids: list[int]
    """Target ids; a node comes after its parent."""
    parents: list[int] | None = None
    """Index of each node's parent, -1 for the last verified token; None: a chain."""
    draft_probs: Tensor | None = None
    """[K, D] fp32, of a sampled chain: what each token was sampled from, over the draft vocabulary."""
    target_ids: Tensor | None = None
    """[D] int64: target id of each draft token."""


@dataclass(frozen=True)
class Verdict:
    path: list[int]
    """Indices of the accepted nodes, from the root on."""
    next_token: int
    """The target's own token after them: the correction of a rejected draft, or the bonus."""

    @property
    def accepted(self) -> int:
        return len(self.path)


NOTHING = Proposal([])


def verify(proposal: Proposal, logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Verdict:
    """Check a proposal of n tokens against target logits [n + 1, V]: row 0 is the last verified token's, row i + 1
    token i's. `generator` lives on the device of `logits`.
    """
    if sampling.greedy:
        return descend(proposal, _greedy_choices(logits))
    if proposal.draft_probs is not None:
        return verify_sampled_chain(proposal, logits, sampling, generator)
    # row by row: a path visits few of a tree's nodes, and a truncated distribution takes a sort
    return descend(proposal, lambda row: int(draw(sampling.probabilities(logits[row]), generator)))


def descend(proposal: Proposal, choose: Callable[[int], int]) -> Verdict:
    """Follow the target's choices through the proposal; `choose` returns its token after logits row i.

    Exact for greedy and for sampled choices: each emitted token is the target's own, drawn from its distribution there.
    """
    parents: Sequence[int] = range(-1, len(proposal.token_ids) - 1) if proposal.parents is None else proposal.parents
    nodes = {key: node for node, key in enumerate(zip(parents, proposal.token_ids, strict=True))}
    path: list[int] = []
    node = -1
    while True:
        token = choose(node + 1)
        child = nodes.get((node, token))
        if child is None:
            return Verdict(path, token)
        path.append(node := child)


def _greedy_choices(logits: Tensor) -> Callable[[int], int]:
    if logits.device.type == "cpu":
        return lambda row: int(logits[row].argmax())  # a path visits few of a tree's nodes
    return logits.argmax(-1).tolist().__getitem__  # the host waits once


def verify_sampled_chain(
    proposal: Proposal, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> Verdict:
    """Accept draft x with probability min(1, target_probs[x] / draft_probs[x]); after a rejection sample what is left,
    (target_probs - draft_probs)+ normalised, so that the emitted token is distributed as target_probs.
    """
    assert proposal.parents is None and proposal.draft_probs is not None and proposal.target_ids is not None
    device, num_drafted = logits.device, len(proposal.token_ids)
    draft_probs, target_ids = proposal.draft_probs.to(device), proposal.target_ids.to(device)
    tokens = torch.tensor(proposal.token_ids, device=device)[:, None]
    own = torch.where(target_ids == tokens, draft_probs, 0.0).sum(-1)  # what each token was drafted with
    chances = torch.rand(num_drafted, generator=generator, device=device)
    # row by row, as in `verify`: few are visited, and a truncated distribution takes a sort
    for i, (token, least) in enumerate(zip(proposal.token_ids, (chances * own).tolist(), strict=True)):
        target_probs = sampling.probabilities(logits[i])
        if least < float(target_probs[token]):  # chance < target / draft, without the division
            continue
        left = target_probs.index_add(0, target_ids, draft_probs[i], alpha=-1).clamp_(min=0.0)
        # equal distributions leave nothing but rounding; then the target's own is the answer
        return Verdict(list(range(i)), int(draw(left if float(left.sum()) > 0.0 else target_probs, generator)))
    return Verdict(list(range(num_drafted)), int(draw(sampling.probabilities(logits[-1]), generator)))
