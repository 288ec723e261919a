"""Expected acceptance on held-out conversations: the draft's chain measured on the target's own continuation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specflow.drafters.eagle3 import Eagle3Draft
from specflow.kernels import argmax, matmul
from specflow.training.packing import Batch

CHUNK_ROWS = 512
"""Rows whose logits exist at a time."""


@dataclass(frozen=True)
class Expectation:
    """survival[k]: share of chains whose first k + 1 drafted tokens are all the target's greedy choice."""

    survival: list[float]

    @property
    def acceptance_length(self) -> float:
        """Tokens a verification step is expected to emit with K = len(survival), bonus included."""
        return 1.0 + sum(self.survival)


@torch.inference_mode()
def target_choices(batch: Batch, full_head: Tensor) -> Tensor:
    """Argmax over the target's full vocabulary at each teacher position [P]; states and head of one dtype."""
    states = batch.teacher_states
    chunks = [argmax(matmul(states[i : i + CHUNK_ROWS], full_head.t())) for i in range(0, len(states), CHUNK_ROWS)]
    return torch.cat(chunks)


@torch.inference_mode()
def count_survivors(draft: Eagle3Draft, batch: Batch, choices: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Surviving and started chains by position, [S] and [S] int64.

    A chain starts at every row where a server starts one. Position k counts the chains whose predicted tokens up to
    k + 1 exist, so the end of an answer censors instead of failing. A draft token survives when its target id is
    `choices` there.
    """
    steps = draft.unroll(batch.rows, embedding)
    alive = batch.served
    survived, started = [], []
    for hidden, rows, teacher_rows in zip(steps, batch.supervised, batch.teacher_rows, strict=True):
        best = torch.cat([argmax(draft.logits(part)) for part in hidden[rows].split(CHUNK_ROWS)])
        match = best + draft.d2t[best] == choices[teacher_rows]
        still = torch.zeros_like(alive)
        still[rows] = match & alive[rows]
        survived.append(still.sum())
        started.append(batch.served[rows].sum())
        alive = still
    return torch.stack(survived), torch.stack(started)


def expectation(counts: list[tuple[Tensor, Tensor]]) -> Expectation:
    survived = torch.stack([c[0] for c in counts]).sum(0)
    started = torch.stack([c[1] for c in counts]).sum(0).clamp(min=1)
    return Expectation((survived / started).tolist())
