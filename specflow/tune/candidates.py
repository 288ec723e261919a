"""Settings that the tuner chooses among, and what each is predicted to cost and to gain. Pure functions of numbers.

A candidate is a chain or an EAGLE-2 dynamic tree. One verification step of it ingests the rows verified last, drafts
level by level, and verifies all nodes at once:

    t_step = ingest(acceptance length) + tree(top_k) + (depth - 1) * step(top_k) + verify(total_token)
    predicted tokens/s = acceptance length / t_step
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specflow.results.schema import StepCosts

MARGIN = 0.2
"""Candidates predicted within this share of the best are worth measuring: predictions are of greedy steps
behind random tokens."""


@dataclass(frozen=True, order=True)
class Candidate:
    """A way to draft. Words are EAGLE's; SGLang's are num_steps, eagle_topk, num_draft_tokens."""

    depth: int
    """Most drafted tokens on a path: K of a chain, SGLang's num_steps."""
    top_k: int = 1
    """Branches kept per level; 1 is a chain."""
    total_token: int = 0
    """Tokens verified at once, the root included: SGLang's num_draft_tokens. 0: what a chain has, depth + 1."""
    draft_vocab_size: int | None = None
    """Tokens that the draft's head is cut down to; None: all that it was trained for."""

    def __post_init__(self) -> None:
        if self.total_token == 0:
            object.__setattr__(self, "total_token", self.depth + 1)
        assert self.depth >= 1 and self.top_k >= 1, self
        assert self.depth + 1 <= self.total_token <= largest_total(self.depth, self.top_k), self

    @property
    def is_chain(self) -> bool:
        return self.top_k == 1

    @property
    def name(self) -> str:
        shape = f"chain-{self.depth}" if self.is_chain else f"tree-{self.total_token}-{self.depth}-{self.top_k}"
        return shape if self.draft_vocab_size is None else f"{shape}-vocab-{self.draft_vocab_size}"

    def cut(self, draft_vocab_size: int | None) -> Candidate:
        return replace(self, draft_vocab_size=draft_vocab_size)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "steps": self.depth,
            "topk": self.top_k,
            "num_draft_tokens": self.total_token,
            "draft_vocab_size": self.draft_vocab_size,
        }


def largest_total(depth: int, top_k: int) -> int:
    """Tokens, root included, that a dynamic tree chooses from: top_k of the first level, top_k**2 of each more."""
    return 1 + top_k + (depth - 1) * top_k**2


def grid(depths: Iterable[int], top_ks: Iterable[int], totals: Iterable[int], max_nodes: int) -> list[Candidate]:
    """Every chain and tree of these settings that drafts at most `max_nodes` tokens a step.

    Trees have as many nodes as SGLang's own grid has: more than a chain of their depth, at most depth * top_k.
    """
    found = set()
    for depth in depths:
        for top_k in top_ks:
            sizes = [depth + 1] if top_k == 1 else [n for n in totals if depth + 1 < n <= depth * top_k + 1]
            found |= {Candidate(depth, top_k, size) for size in sizes if size - 1 <= max_nodes}
    return sorted(found)


@dataclass(frozen=True)
class CostModel:
    """Measured milliseconds of the parts of a step, by rows; in between they are interpolated."""

    target_ms: float
    verify_ms: Mapping[int, float]
    ingest_ms: Mapping[int, float]
    step_ms: Mapping[int, float]
    tree_ms: Mapping[int, float]
    """What a tree's proposal takes beyond its levels, by top_k."""

    @classmethod
    def of(cls, costs: StepCosts) -> CostModel:
        draft = costs.draft_ms
        return cls(costs.target_ms, costs.verify_ms, draft.ingest_by_rows, draft.step_by_rows, draft.tree_by_rows)

    def draft_ms(self, candidate: Candidate, acceptance_length: float) -> float:
        """Milliseconds of one proposal."""
        levels = (candidate.depth - 1) * interpolate(self.step_ms, candidate.top_k)
        return interpolate(self.ingest_ms, acceptance_length) + interpolate(self.tree_ms, candidate.top_k) + levels

    def step_time_ms(self, candidate: Candidate, acceptance_length: float) -> float:
        """Milliseconds of one verification step, its proposal included."""
        return self.draft_ms(candidate, acceptance_length) + interpolate(self.verify_ms, candidate.total_token)


def interpolate(table: Mapping[int, float], rows: float) -> float:
    """Value at `rows`, linear between measured ones and along the last slope beyond them, never falling there."""
    known = sorted(table)
    if rows <= known[0]:
        return table[known[0]]
    above = next((i for i, count in enumerate(known) if count >= rows), len(known) - 1)
    if above == 0:
        return table[known[0]]
    low, high = known[above - 1], known[above]
    slope = (table[high] - table[low]) / (high - low)
    if rows > high:
        return table[high] + max(slope, 0.0) * (rows - high)
    return table[low] + slope * (rows - low)


@dataclass(frozen=True)
class Prediction:
    candidate: Candidate
    acceptance_length: float
    step_ms: float
    speedup: float
    """Of decoding, over the target alone."""

    @property
    def tok_s(self) -> float:
        return 1e3 * self.acceptance_length / self.step_ms


def predict(candidate: Candidate, acceptance_length: float, costs: CostModel) -> Prediction:
    step_ms = costs.step_time_ms(candidate, acceptance_length)
    return Prediction(candidate, acceptance_length, step_ms, acceptance_length * costs.target_ms / step_ms)


def prune(predictions: Sequence[Prediction], keep: int, margin: float = MARGIN) -> list[Prediction]:
    """The predictions worth measuring, fastest first: at most `keep`, all within `margin` of the fastest one.

    The fastest chain and the fastest tree always stay, whatever they are predicted: a server may have chains only.
    Where more lie within the margin than are kept, the best of each (depth, top_k) goes first, so that not all of them
    are the same tree with a few nodes more or less.
    """
    assert keep >= 2, keep
    ranked = sorted(predictions, key=lambda p: (-p.speedup, p.candidate))
    if not ranked:
        return []
    kinds = [next((p for p in ranked if p.candidate.is_chain is chain), None) for chain in (True, False)]
    chosen = [p for p in kinds if p is not None]
    near = [p for p in ranked if p.speedup >= (1.0 - margin) * ranked[0].speedup and p not in chosen]
    shapes: set[tuple[int, int]] = {(p.candidate.depth, p.candidate.top_k) for p in chosen}
    first: list[Prediction] = []
    later: list[Prediction] = []
    for p in near:
        shape = (p.candidate.depth, p.candidate.top_k)
        (later if shape in shapes else first).append(p)
        shapes.add(shape)
    chosen += [*first, *later][: max(0, keep - len(chosen))]
    return sorted(chosen, key=lambda p: (-p.speedup, p.candidate))
