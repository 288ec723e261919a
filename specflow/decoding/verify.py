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

from specflow.decoding.sampling import Dense, Few, Sampling
from specflow.device import execution
from specflow.kernels import argmax


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens: a chain, or the nodes of a tree. Without probabilities each token is a certainty."""

    token_ids: list[int]
    """Target ids; a node comes after its parent."""
    parents: list[int] | None = None
    """Index of each node's parent, -1 for the last verified token; None: a chain."""
    draws: Sequence[Dense | Few] = ()
    """Of a sampled chain: what each token was drawn from."""


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
    if proposal.draws:
        return verify_sampled_chain(proposal, logits, sampling, generator)
    # row by row: a path visits few of a tree's nodes
    return descend(proposal, lambda row: sampling.distribution(logits[row]).draw(generator))


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
    if execution(logits.device).host_memory:
        return lambda row: int(argmax(logits[row]))  # a path visits few of a tree's nodes
    return logits.argmax(-1).tolist().__getitem__  # the host waits once


def verify_sampled_chain(
    proposal: Proposal, logits: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> Verdict:
    """Accept draft x with probability min(1, target_probs[x] / draft_probs[x]); after a rejection sample what is left,
    (target_probs - draft_probs)+ normalised, so that the emitted token is distributed as target_probs.
    """
    assert proposal.parents is None
    num_drafted = len(proposal.token_ids)
    chances = torch.rand(num_drafted, generator=generator, device=logits.device).tolist()
    # row by row: few are visited
    for i, (token, chance, draft) in enumerate(zip(proposal.token_ids, chances, proposal.draws, strict=True)):
        target = sampling.distribution(logits[i])
        if chance * draft.of(token) < target.of(token):  # chance < target / draft, without the division
            continue
        left = target.minus(draft)
        # equal distributions leave nothing but rounding; then the target's own is the answer
        return Verdict(list(range(i)), (left if left.total() > 0.0 else target).draw(generator))
    return Verdict(list(range(num_drafted)), sampling.distribution(logits[-1]).draw(generator))
