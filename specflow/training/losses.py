"""The training-time-test loss: soft cross-entropy of every step to the target's distribution over the draft vocabulary.

Fused with the output head and computed in chunks of teacher positions: the teacher's probabilities of a chunk are
formed once and serve all steps, and no [tokens, vocabulary] array ever exists, neither for the target nor for the
draft. Gradients are formed in the forward pass, while a chunk's logits are at hand. The reduction is a sum over
supervised rows divided by counts that the caller gives, so packing, padding and accumulation cannot change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specflow.kernels import matmul

CHUNK_ROWS = 512


@dataclass(frozen=True)
class Teacher:
    """The frozen target as the loss sees it."""

    states: Tensor
    """[P, target_hidden] post-norm last states, one per supervised token, in token order."""
    head: Tensor
    """[D, target_hidden] the target head's rows of the draft vocabulary."""
    full_head: Tensor | None = None
    """[V, target_hidden]; needed by lk_hybrid alone, whose acceptance is measured against the full vocabulary."""
    labels: Tensor | None = None
    """[P] int64 draft ids of the tokens that the target really produced, -1 outside the draft vocabulary."""


@dataclass(frozen=True)
class StepSums:
    """Sums over the supervised rows of each step, [S] float64 each: add them up over micro-batches, then divide."""

    loss: Tensor
    match: Tensor
    """Rows whose draft argmax is the token that the target produced."""
    count: Tensor


def ttt_loss(
    hidden: list[Tensor],
    teacher_rows: list[Tensor],
    head: Tensor,
    teacher: Teacher,
    weights: list[float],
    *,
    loss: Literal["kl", "lk_hybrid"] = "kl",
    eta: float = 3.0,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, StepSums]:
    """Weighted sum of per-row losses over all steps, differentiable in `hidden` and `head`, and its unweighted parts.

    hidden[k] [R_k, H]: normed states of the rows supervised at step k; teacher_rows[k] [R_k] int64 ascending: the
    teacher position each of them predicts; head [D, H]; weights[k]: decay**k / number of supervised rows of the whole
    optimizer step. Per row, with draft_probs = softmax(draft logits) over D:
    kl: -sum teacher_probs * log draft_probs, teacher_probs renormalised over the draft vocabulary (EAGLE-3,
    section 3.2);
    lk_hybrid (arXiv 2602.23881): w * kl + (1 - w) * (1 - alpha), alpha = sum min(target_probs, draft_probs) with
    full-vocabulary target_probs, w = exp(-eta * alpha) held constant.
    """
    sums = torch.zeros(3, len(hidden), dtype=torch.float64, device=head.device)
    total: Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        head, teacher, teacher_rows, (weights, loss, eta, chunk_rows), sums, *hidden
    )
    return total, StepSums(*sums)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head: Tensor,
        teacher: Teacher,
        teacher_rows: list[Tensor],
        settings: tuple[list[float], str, float, int],
        sums: Tensor,
        *hidden: Tensor,
    ) -> Tensor:
        weights, loss, eta, chunk_rows = settings
        num_positions = teacher.states.shape[0]
        edges = torch.tensor([*range(0, num_positions, chunk_rows), num_positions], device=head.device)
        bounds = [torch.searchsorted(rows, edges).tolist() for rows in teacher_rows]
        grad_head = torch.zeros_like(head)
        grad_hidden = [torch.empty_like(h) for h in hidden]
        compute_head = head.to(hidden[0].dtype)  # bf16 products under autocast, gradients of the head summed in fp32
        for chunk, start in enumerate(range(0, num_positions, chunk_rows)):
            stop = min(start + chunk_rows, num_positions)
            probs, full_probs = _teacher_probs(teacher, start, stop, full=loss == "lk_hybrid")
            for k, (states, rows) in enumerate(zip(hidden, teacher_rows, strict=True)):
                first, last = bounds[k][chunk : chunk + 2]
                if first == last:
                    continue
                local = slice(None) if last - first == stop - start else rows[first:last] - start
                logits = matmul(states[first:last], compute_head.t()).float()
                full = None if full_probs is None else full_probs[local]
                row_loss, grad, best = _rows_loss(logits, probs[local], full, eta)
                grad = grad.mul_(weights[k]).to(states.dtype)
                grad_hidden[k][first:last] = matmul(grad, compute_head)
                grad_head += matmul(grad.t(), states[first:last])
                sums[0, k] += row_loss
                if teacher.labels is not None:
                    sums[1, k] += (best == teacher.labels[rows[first:last]]).sum()
                sums[2, k] += last - first
        ctx.save_for_backward(grad_head, *grad_hidden)
        return (sums[0] * torch.tensor(weights, device=sums.device)).sum().to(head.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_head, *grad_hidden = ctx.saved_tensors
        return grad_head * grad, None, None, None, None, *(g * grad.to(g.dtype) for g in grad_hidden)


def _teacher_probs(teacher: Teacher, start: int, stop: int, *, full: bool) -> tuple[Tensor, Tensor | None]:
    """Target probabilities [c, D] of a chunk: renormalised over the draft vocabulary, and as shares of the full one."""
    states = teacher.states[start:stop]
    logits = matmul(states, teacher.head.t()).float()
    if not full:
        return logits.softmax(-1), None
    if teacher.full_head is None:
        raise ValueError("lk_hybrid needs the target's full head")
    log_total = matmul(states, teacher.full_head.t()).float().logsumexp(-1, keepdim=True)
    return logits.softmax(-1), (logits - log_total).exp()


def _rows_loss(logits: Tensor, probs: Tensor, full_probs: Tensor | None, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss (float64 scalar), its gradient in the logits [c, D] (written over `logits`), and the argmax [c]."""
    peak, best = logits.max(-1, keepdim=True)
    logits -= peak
    cross = -torch.linalg.vecdot(probs, logits)
    exp = logits.exp_()
    mass = exp.sum(-1, keepdim=True)
    kl = cross + mass.log().squeeze(-1)
    draft_probs = exp.div_(mass)
    if full_probs is None:
        return kl.sum(dtype=torch.float64), draft_probs.sub_(probs), best.squeeze(-1)
    alpha = torch.minimum(full_probs, draft_probs).sum(-1)
    w = torch.exp(-eta * alpha)
    value = w * kl + (1 - w) * (1 - alpha)
    # d(1 - alpha)/d logits = -draft_probs * (below - sum(draft_probs * below)), below = [draft_probs < full_probs]
    below = (draft_probs < full_probs).to(logits.dtype)
    tv_grad = -draft_probs * (below - (draft_probs * below).sum(-1, keepdim=True))
    grad = w[:, None] * (draft_probs - probs) + (1 - w)[:, None] * tv_grad
    return value.sum(dtype=torch.float64), grad, best.squeeze(-1)
