"""The training-time-test loss: soft cross-entropy of every step to the target's distribution over the draft vocabulary.

Fused with the output head and computed in chunks of teacher positions: the teacher's probabilities of a chunk are
formed once and serve all steps, and no [tokens, vocabulary] array ever exists, neither for the target nor for the
draft. Gradients are formed in the forward pass, while a chunk's logits are at hand. The reduction is a sum over
supervised rows divided by counts that the caller gives, so packing, padding and accumulation cannot change it.

Rows whose target argmax lies outside the draft vocabulary count like any other, where EAGLE's and SpecForge's code
leaves them out: there the draft learns which of the tokens that it knows the target likes best, and that is what it
drafts there where the target samples. Greedy verification accepts nothing at such a place. What either does to
acceptance has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specflow.device import execution
from specflow.kernels import argmax, matmul
from specflow.training.packing import ROUND_ROWS


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
    """Rows whose draft argmax, the first among equals, is the token that the target produced."""
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
    chunk_rows: int | None = None,
) -> tuple[Tensor, StepSums]:
    """Weighted sum of per-row losses over all steps, differentiable in `hidden` and `head`, and its unweighted parts.

    `chunk_rows`: rows of all steps computed at a time; None: as `Execution.loss_logits` allows.

    hidden[k] [R_k, H]: normed states of the rows supervised at step k; teacher_rows[k] [R_k] int64 ascending: the
    teacher position each of them predicts; head [D, H]; weights[k]: decay**k / number of supervised rows of the whole
    optimizer step. Per row, with draft_probs = softmax(draft logits) over D:
    kl: -sum teacher_probs * log draft_probs, teacher_probs renormalised over the draft vocabulary (EAGLE-3,
    section 3.2);
    lk_hybrid (arXiv 2602.23881): w * kl + (1 - w) * (1 - alpha), alpha = sum min(target_probs, draft_probs) with
    full-vocabulary target_probs, w = exp(-eta * alpha) held constant.
    """
    if chunk_rows is None:
        chunk_rows = execution(head.device).loss_logits // len(head)
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
        num_positions, num_steps = teacher.states.shape[0], len(hidden)
        # rows of all steps share their products; a position has at most one row a step
        stride = max(1, chunk_rows // num_steps)
        edges = torch.tensor([*range(0, num_positions, stride), num_positions], device=head.device)
        bounds = torch.stack([torch.searchsorted(rows, edges) for rows in teacher_rows]).tolist()
        grad_head: Tensor | None = None  # [H, D]
        grad_hidden = [torch.empty_like(h) for h in hidden]
        compute_head = head.to(hidden[0].dtype)  # bf16 products under autocast, gradients of the head summed in fp32
        for chunk, start in enumerate(range(0, num_positions, stride)):
            stop = min(start + stride, num_positions)
            spans = [slice(*bound[chunk : chunk + 2]) for bound in bounds]
            sizes = [span.stop - span.start for span in spans]
            if not (num_rows := sum(sizes)):
                continue
            states = _filled([h[span] for h, span in zip(hidden, spans, strict=True)])
            positions = torch.cat([rows[span] for rows, span in zip(teacher_rows, spans, strict=True)])
            logits = matmul(states, compute_head.t()).float()
            labels = None if teacher.labels is None else teacher.labels[positions]
            probs = _teacher_probs(teacher, start, stop, loss)
            row_loss, match = _rows_loss(logits[:num_rows], probs, positions - start, labels, eta)
            grad = logits.to(states.dtype)  # by now the unweighted gradient: the weights go to the narrow operands
            grad_states = torch.split(matmul(grad, compute_head)[:num_rows], sizes)
            for into, span, part, weight in zip(grad_hidden, spans, grad_states, weights, strict=True):
                torch.mul(part, weight, out=into[span])
            for part, weight in zip(torch.split(states[:num_rows], sizes), weights, strict=True):
                part *= weight
            product = matmul(states.t(), grad)  # its left operand, which is copied, is the narrow one
            grad_head = product.to(head.dtype) if grad_head is None else grad_head.add_(product)
            for k, parts in enumerate(zip(torch.split(row_loss, sizes), torch.split(match, sizes), strict=True)):
                sums[0, k] += parts[0].sum(dtype=torch.float64)
                sums[1, k] += parts[1].sum()
                sums[2, k] += sizes[k]
        grad_head = torch.zeros_like(head) if grad_head is None else grad_head.t().contiguous()
        ctx.save_for_backward(grad_head, *grad_hidden)
        return (sums[0] * torch.tensor(weights, device=sums.device)).sum().to(head.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_head, *grad_hidden = ctx.saved_tensors
        return grad_head * grad, None, None, None, None, *(g * grad.to(g.dtype) for g in grad_hidden)


def _filled(parts: list[Tensor]) -> Tensor:
    """Rows of `parts` [n, H] in one, and rows of zeros up to a multiple of ROUND_ROWS: they weigh nothing."""
    return torch.cat([*parts, parts[0].new_zeros(-sum(map(len, parts)) % ROUND_ROWS, parts[0].shape[1])])


def _teacher_probs(teacher: Teacher, start: int, stop: int, loss: str) -> tuple[Tensor, Tensor | None]:
    """Target probabilities [c, D] of a chunk and of filler behind it: renormalised over the draft vocabulary, and for
    lk_hybrid as shares of the full one.
    """
    states = _filled([teacher.states[start:stop]])
    logits = matmul(states, teacher.head.t()).float()
    if loss == "kl":
        return logits.softmax(-1), None
    if teacher.full_head is None:
        raise ValueError("lk_hybrid needs the target's full head")
    log_total = matmul(states, teacher.full_head.t()).float().logsumexp(-1, keepdim=True)
    return logits.softmax(-1), (logits - log_total).exp()


def _rows_loss(
    logits: Tensor, teacher_probs: tuple[Tensor, Tensor | None], positions: Tensor, labels: Tensor | None, eta: float
) -> tuple[Tensor, Tensor]:
    """Loss [R] of each row and whether its likeliest token is its label [R]; writes the loss's gradient in the logits
    [R, D] over them.

    `positions` [R]: row of `teacher_probs` that each row predicts. Rows go in blocks of `Execution.loss_block`,
    which stay in a CPU's cache: there are a dozen passes over them.
    """
    num_rows, width = logits.shape
    block = max(1, (execution(logits.device).loss_block or logits.numel()) // width)
    losses, match = logits.new_empty(num_rows), torch.zeros(num_rows, dtype=torch.bool, device=logits.device)
    for rows in (slice(i, i + block) for i in range(0, num_rows, block)):
        part = logits[rows]
        if labels is not None:
            match[rows] = argmax(part) == labels[rows]
        probs, full_probs = teacher_probs
        at = positions[rows]
        losses[rows] = _loss_of(part, part.amax(-1), probs[at], None if full_probs is None else full_probs[at], eta)
    return losses, match


def _loss_of(logits: Tensor, highest: Tensor, probs: Tensor, full_probs: Tensor | None, eta: float) -> Tensor:
    """Loss [c] of logits [c, D], the `highest` [c] of each row known; its gradient is written over them."""
    draft_probs = logits.softmax(-1)
    # the largest probability is exp(highest) / the sum of exponentials
    kl: Tensor = highest - draft_probs.amax(-1).log() - torch.linalg.vecdot(probs, logits)
    if full_probs is None:
        torch.sub(draft_probs, probs, out=logits)
        return kl
    alpha = torch.minimum(full_probs, draft_probs).sum(-1)
    w = torch.exp(-eta * alpha)
    # d(1 - alpha)/d logits = -draft_probs * (below - sum(draft_probs * below)), below = [draft_probs < full_probs]
    below = (draft_probs < full_probs).to(logits.dtype)
    tv_grad = -draft_probs * (below - (draft_probs * below).sum(-1, keepdim=True))
    torch.add(w[:, None] * (draft_probs - probs), (1 - w)[:, None] * tv_grad, out=logits)
    value: Tensor = w * kl + (1 - w) * (1 - alpha)
    return value
