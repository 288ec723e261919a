"""Acceptance of every tree and chain from one pass of the draft over known answers of the target.

At each position of an answer the draft's largest tree is grown once. The known continuation runs along a path of it;
what matters of that path is each node's rank among all candidates by cumulative probability. A dynamic tree keeps the
total_token - 1 best candidates, so a smaller one keeps the nodes whose rank is below its own size. Walking over the
answer from step to step then yields the very steps that decoding with this tree takes under greedy decoding (and, as a
tree accepts what the target itself drew, steps of the same distribution under sampling).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specflow.tune.candidates import Candidate


@dataclass(frozen=True)
class Walkable:
    """An answer, and the ranks of its continuation at every position, for one top_k."""

    num_tokens: int
    """Tokens of the answer; the first comes from the prompt's forward."""
    ranks: NDArray[np.int64]
    """[positions, D, D]: at [t, d - 1, i] the rank (from 1) of the answer's token t + 1 + i in a tree of depth d; 0 if
    that token is no candidate. Position t has the answer's token t as its last known one."""


def path_ranks(
    tokens: Sequence[int], parents: Sequence[int], scores: Sequence[float], continuation: Sequence[int], depth: int
) -> NDArray[np.int64]:
    """Ranks [depth, depth] of the path along `continuation` through a tree's candidates, as `Walkable.ranks` has them.

    `parents` are indices into the candidates, -1 for the root, each before its children; `scores` are cumulative
    log-probabilities, which never rise along a path. Ties go to the earlier candidate.
    """
    levels = np.empty(len(tokens), dtype=np.int64)
    for i, parent in enumerate(parents):
        levels[i] = 1 if parent < 0 else levels[parent] + 1
    path: list[int] = []
    at = -1
    for token in continuation[:depth]:
        found = next((i for i, parent in enumerate(parents) if parent == at and tokens[i] == token), None)
        if found is None:
            break
        path.append(found)
        at = found
    ranks = np.zeros((depth, depth), dtype=np.int64)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    for d in range(1, depth + 1):
        place = np.cumsum(levels[order] <= d)
        rank_of = np.empty(len(tokens), dtype=np.int64)
        rank_of[order] = place
        for i, node in enumerate(path[:d]):
            ranks[d - 1, i] = rank_of[node]
    return ranks


def accepted_by_position(ranks: NDArray[np.int64], candidate: Candidate) -> NDArray[np.int64]:
    """Drafted tokens [positions] that a step from each position accepts."""
    depth = candidate.depth
    assert depth <= ranks.shape[1], f"{candidate.name} is deeper than the {ranks.shape[1]} levels recorded"
    path = ranks[:, depth - 1, :depth]
    kept = (path > 0) & (path < candidate.total_token)
    accepted: NDArray[np.int64] = np.cumprod(kept, axis=1).sum(axis=1)
    return accepted


def walk(answer: Walkable, candidate: Candidate) -> tuple[int, int]:
    """(steps, accepted drafts) of decoding this answer with `candidate`."""
    accepted = accepted_by_position(answer.ranks, candidate)
    emitted, steps, total = 1, 0, 0
    while emitted < answer.num_tokens:
        count = int(accepted[emitted - 1])
        emitted, steps, total = emitted + count + 1, steps + 1, total + count
    return steps, total


def acceptance_length(answers: Sequence[Walkable], candidate: Candidate) -> float:
    """Pooled acceptance length, bonus included; 1 where no answer has a step."""
    steps, accepted = np.array([walk(answer, candidate) for answer in answers]).reshape(-1, 2).sum(axis=0)
    return 1.0 + float(accepted / steps) if steps else 1.0


def chain_length(survival: Sequence[float], num_speculative_tokens: int) -> float:
    """Acceptance length of a chain of K tokens from the survival curve of a longer one: 1 + the first K rates."""
    assert num_speculative_tokens <= len(survival), "the curve is shorter than the chain"
    return 1.0 + sum(survival[:num_speculative_tokens])
