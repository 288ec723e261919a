"""First weights in closed form: the draft starts as the best linear guess of the target's next state.

A draft has to turn (features of token t, embedding of token t + 1) into the target's last state at t + 1. Ridge
regression
over a sample of the training rows solves the linear part of that exactly, in seconds: its feature half becomes
`fc`; its
embedding half, cut to the rank that the value heads can carry, becomes v_proj and o_proj, with q_proj and k_proj such
that a row attends its own token. The MLP starts silent. Gradient descent goes on from there instead of from noise.

Features are scaled to unit RMS per channel while training and the scale is folded into `fc` afterwards: residual
streams differ a hundredfold between layers and channels, which Adam's equal steps would turn into noise.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from specflow.drafters.eagle3 import Eagle3Draft
from specflow.errors import UserError
from specflow.kernels import matmul
from specflow.training.packing import Batch

SINK_ROWS = 4
"""First rows of a document left out of the scale: attention sinks have states a hundred times the usual."""
SELF_ATTENTION = 3.0
"""Variance of the shared query/key projection: large enough that a row's own token outweighs its context."""
RIDGE = 1e-3
"""Ridge penalty, relative to unit-variance inputs."""


def feature_scale(batches: Iterable[Batch]) -> Tensor:
    """RMS of each aux channel [A * target_hidden] over the rows of `batches`."""
    total, count = 0.0, 0
    for batch in batches:
        aux = batch.rows.aux[batch.rows.positions >= SINK_ROWS]
        total, count = total + aux.double().pow(2).sum(0), count + len(aux)
    return (total / max(count, 1)).sqrt().clamp(min=1e-6).float()


@torch.no_grad()
def fit_linear(draft: Eagle3Draft, batches: Iterable[Batch], embedding: Tensor) -> float:
    """Set fc and the attention of `draft` in place from a ridge fit; returns the fit's R^2.

    The regression reads [aux_t; RMS(embedding of token t + 1)] of the rows where chains start, and predicts the
    target's
    post-norm state at t + 1 over the final norm's weight, so that `norm` and the head turn it into the target's logits.
    """
    if draft.config.hidden_size != draft.config.target_hidden_size:
        widths = f"{draft.config.hidden_size} and {draft.config.target_hidden_size}"
        raise UserError(
            f"train.fit_tokens needs draft and target of one width, got {widths}: set train.fit_tokens to 0"
        )
    gram = cross = None
    power = 0.0
    for batch in batches:
        rows, teacher = batch.rows.queries[batch.supervised[0]], batch.teacher_rows[0]
        tokens = F.embedding(batch.rows.tokens[0][rows], embedding).float()
        x = torch.cat([batch.rows.aux[rows], F.rms_norm(tokens, (tokens.shape[1],), eps=draft.config.rms_norm_eps)], 1)
        y = batch.teacher_states[teacher].float() / draft.norm.weight
        if gram is None:
            gram, cross = x.new_zeros(x.shape[1], x.shape[1]).double(), x.new_zeros(x.shape[1], y.shape[1]).double()
        gram += matmul(x.t(), x).double()
        cross += matmul(x.t(), y).double()
        power += y.double().pow(2).sum().item()
    assert gram is not None and cross is not None, "no batch to fit on"
    size = gram.diagonal().sqrt().clamp(min=1e-9)
    penalised = gram / size[:, None] / size + RIDGE * torch.eye(len(size), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(penalised, cross / size[:, None]) / size[:, None]
    _install(draft, weight.t())
    return 1 - (power - 2 * (weight * cross).sum().item() + (weight * (gram @ weight)).sum().item()) / power


def _install(draft: Eagle3Draft, weight: Tensor) -> None:
    """Put the regression weight [H, A * target_hidden + H] into the layer."""
    c = draft.config
    width, kv, group = c.hidden_size, c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads
    features, embeddings = weight[:, :-width].float(), weight[:, -width:].float()
    draft.fc.weight.copy_(features)
    u, s, v = torch.linalg.svd(embeddings)
    rank = min(kv * c.head_dim, width)
    for projection in (draft.q_proj, draft.k_proj, draft.v_proj, draft.o_proj):
        projection.weight.mul_(0.1)  # what the fit does not use stays small but random
    draft.v_proj.weight[:rank, :width] = s[:rank, None].sqrt() * v[:rank]
    # each value head is read by `group` query heads, whose outputs o_proj adds up
    shared = (u[:, :rank] * s[:rank].sqrt()).view(width, -1, 1, c.head_dim) / group
    draft.o_proj.weight[:, : rank * group] = shared.expand(-1, -1, group, -1).reshape(width, -1)
    own = torch.randn(kv, 1, c.head_dim, width, device=weight.device) * (SELF_ATTENTION / width) ** 0.5
    draft.k_proj.weight[:, :width] = own.flatten(0, 2)
    draft.q_proj.weight[:, :width] = own.expand(-1, group, -1, -1).flatten(0, 2)
    draft.down_proj.weight.zero_()
