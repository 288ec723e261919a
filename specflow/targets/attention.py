"""Faster inference of Llama-like decoders on CPU: fused products, and attention that never repeats keys.

Owns what `CachedTarget` computes with, on either side of every comparison: the baseline decodes with it, the verifier
verifies with it. Leaves models on other devices, other dtypes or of other architectures as transformers made them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specflow.kernels import PrepackedLinear, keep_freed_memory, packable, prepack
from specflow.targets.model import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUPED = "specflow_grouped"
"""Name of the attention implementation that takes masks from `grouped_mask`."""

# Attention modules that are exactly q, k, v products, rotary embedding, attention, output product.
_PLAIN_ATTENTION = {"LlamaAttention", "MistralAttention", "Qwen2Attention"}
_GATED_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_MAX_FOLDED_ROWS = 64  # beyond this the folded mask costs more than repeated keys


def grouped_mask(allowed: Tensor, num_groups: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [b, 1, m, T] (0 or -inf) of a boolean one; repeated to [b, 1, num_groups * m, T] for few rows. With
    dtype bool, for other attention, the mask itself.
    """
    if dtype == torch.bool:
        return allowed
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
    m = allowed.shape[2]
    return mask.repeat(1, 1, num_groups, 1) if m > 1 and m * num_groups <= _MAX_FOLDED_ROWS else mask


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of few new tokens with the query heads of one key/value head folded into rows.

    Shapes: query [b, heads, m, d]; key, value [b, kv_heads, T, d]; mask of `grouped_mask` or None -> [b, m, heads, d].
    Keys are read where they lie, where transformers' path copies them once per query head. Other shapes and options
    (long prompts, soft caps) go transformers' way.
    """
    b, heads, m, d = query.shape
    kv_heads = key.shape[1]
    rows = heads // kv_heads * m
    folded = m == 1 if attention_mask is None else attention_mask.shape[2] in (rows, 1)
    if not folded or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    output = F.scaled_dot_product_attention(
        query.reshape(b, kv_heads, rows, d), key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.view(b, heads, m, d).transpose(1, 2), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class FusedAttention(nn.Module):
    """q, k and v as one prepacked product, one rotation for both; takes the place of a plain attention module."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.layer_idx, self.scaling, self.head_dim = attention.layer_idx, attention.scaling, attention.head_dim
        self.num_key_value_groups, self.is_causal = attention.num_key_value_groups, True
        self.qkv_proj = _fuse(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = _fuse(attention.o_proj)
        self.num_heads = attention.q_proj.out_features // self.head_dim
        self.num_kv_heads = attention.k_proj.out_features // self.head_dim

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cos, signed_sin = position_embeddings
        b, m, _ = hidden_states.shape
        rotated = self.num_heads + self.num_kv_heads
        heads = self.qkv_proj(hidden_states).view(b, m, -1, self.head_dim)
        query_key = heads[:, :, :rotated]
        query_key = torch.addcmul(query_key * cos, query_key.roll(self.head_dim // 2, -1), signed_sin).transpose(1, 2)
        query, key = query_key[:, : self.num_heads], query_key[:, self.num_heads :]
        value = heads[:, :, rotated:].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, _ = grouped_attention(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.o_proj(output.reshape(b, m, -1)), None


class SignedRotary(nn.Module):
    """A rotary embedding whose sine carries rotate_half's sign, shaped [b, m, 1, d], computed once per forward."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(*args, **kwargs)
        half = sin.shape[-1] // 2
        signed_sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
        return cos.unsqueeze(2), signed_sin.unsqueeze(2)


class FusedMLP(nn.Module):
    """A gated MLP with gate and up as one prepacked product."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = _fuse(mlp.gate_proj, mlp.up_proj), _fuse(mlp.down_proj)
        self.act_fn = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def _fuse(*linears: nn.Linear) -> PrepackedLinear:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    assert len(biases) in (0, len(linears)), "linears with and without bias cannot be fused"
    return PrepackedLinear(torch.cat([linear.weight for linear in linears]), torch.cat(biases) if biases else None)


def _same_bias(*linears: nn.Linear) -> bool:
    return len({linear.bias is None for linear in linears}) == 1


def optimise_for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Make `model` as fast as it gets for few new tokens, in place, inference only; numerically the same function.

    On CPU in fp32 or bf16: prepacked products, q/k/v and gate/up fused where the architecture is plain, grouped
    attention, and the process keeps the memory it frees. Anywhere else the model is returned as it is.
    """
    decoder = decoder_of(model)
    first = next(decoder.parameters())
    if not packable(first):
        return model
    keep_freed_memory()
    layers = list(decoder.layers)
    if all(type(layer.self_attn).__name__ in _PLAIN_ATTENTION for layer in layers):
        for layer in layers:
            layer.self_attn = FusedAttention(layer.self_attn)
        decoder.rotary_emb = SignedRotary(decoder.rotary_emb)
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        gated = mlp is not None and {name for name, _ in mlp.named_children()} == _GATED_MLP
        if gated and _same_bias(mlp.gate_proj, mlp.up_proj):
            layer.mlp = FusedMLP(mlp)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(GROUPED)
    prepack(model)
    return model
