"""Rotary position embedding of the draft: tables of the target's own angles, and the rotation with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specflow.errors import UserError


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return rotate(x, cos, signed_sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        return rotate(grad, cos, -signed_sin), None, None


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn x [n, heads, head_dim] by cos, signed_sin [n, head_dim] (half-split layout; the first half of the sine is
    negative).
    """
    turned = torch.addcmul(x * cos[:, None], x.roll(x.shape[-1] // 2, -1), signed_sin[:, None])
    return turned.to(x.dtype)  # the tables are fp32, also under bf16 autocast


class Rotary(nn.Module):
    """Tables of cos and signed sin by position, from the target's own RoPE parameters (transformers computes them)."""

    def __init__(self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        kind = rope_parameters.get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise UserError(
                f"target uses RoPE type {kind!r}, whose angles change with the length: not supported by the draft"
            )
        llama = LlamaConfig(
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rope_parameters=dict(rope_parameters),
        )
        with torch.device("cpu"):  # also when the draft itself is built on the meta device
            self._source = [LlamaRotaryEmbedding(llama)]  # in a list: its buffers are no part of the state
        self.register_buffer("cos", torch.empty(0, head_dim), persistent=False)
        self.register_buffer("signed_sin", torch.empty(0, head_dim), persistent=False)

    def reserve(self, length: int) -> None:
        """Fill the tables up to `length` positions."""
        if self.cos.shape[0] < length:
            positions = torch.arange(max(length, 2 * self.cos.shape[0]))[None]
            cos, sin = self._source[0](torch.zeros(1, dtype=torch.float32), positions)
            half = sin.shape[-1] // 2
            sin[..., :half].neg_()
            self.cos, self.signed_sin = cos[0].to(self.cos), sin[0].to(self.signed_sin)

    def forward(self, x: Tensor, at: slice | Tensor) -> Tensor:
        """Turn x [n, heads, head_dim] to the reserved positions `at`, differentiable in x."""
        return _Rotate.apply(x, self.cos[at], self.signed_sin[at])
