"""The draft as it decodes fastest on a CPU: fused products, prepacked weights in bfloat16, fewer calls.

Rounding the draft's weights cannot change what the target emits: verification runs in the target's own dtype. It can
only cost acceptance. Owns no decoding of its own: `PreparedDraft` replaces the parts that `Eagle3Draft.decode` calls.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specflow.device import execution
from specflow.drafters.eagle3 import Eagle3Draft, Linear
from specflow.drafters.rotary import rotate
from specflow.kernels import PrepackedLinear, fast_bf16, packable


def prepare(draft: Eagle3Draft, dtype: torch.dtype | None = None) -> Eagle3Draft:
    """The draft for inference only: on a CPU a prepared form whose products run in `dtype`, by default the draft's own;
    anywhere else, and where it is prepared already, the draft itself.
    """
    draft.eval().requires_grad_(False)
    if isinstance(draft, PreparedDraft) or not packable(draft.lm_head.weight, dtype):
        return draft
    return PreparedDraft(draft, dtype or draft.lm_head.weight.dtype)


def decoding_dtype(setting: str, target: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of the draft's products by `bench.draft_dtype`. `auto`: the target's on a GPU; on a CPU what decodes
    fastest, half the bytes of float32 where the processor multiplies them.
    """
    if setting != "auto":
        return torch.float32 if setting == "float32" else torch.bfloat16
    if not execution(device).own_kernels:
        return target
    return torch.bfloat16 if fast_bf16() else torch.float32


def place(draft: Eagle3Draft, dtype: torch.dtype, device: torch.device) -> Eagle3Draft:
    """The draft on `device` for inference only, in `dtype`: all of it, or where the prepared form serves its products
    alone, the rest in float32. Takes `draft` over.
    """
    draft = draft.to(device, torch.float32)
    return prepare(draft if packable(draft.lm_head.weight, dtype) else draft.to(dtype), dtype)


class PreparedDraft(Eagle3Draft):
    """A draft whose q/k/v and whose gate/up are one product each, with the scales of the norms before them multiplied
    into the weights. Its products are packed: it cannot train or be saved.
    """

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.config, self._act = draft.config, draft._act
        products = {name for name, child in draft.named_children() if isinstance(child, Linear)}
        for name, child in draft.named_children():
            if name not in products:
                setattr(self, name, child)
        for name, buffer in draft.named_buffers(recurse=False):
            self.register_buffer(name, buffer)

        def pack(*names: str, scale: Tensor | None = None) -> PrepackedLinear:
            weight = torch.cat([getattr(draft, name).weight for name in names])
            return PrepackedLinear(weight if scale is None else weight * scale, None, dtype)

        both = torch.cat((draft.input_layernorm.weight, draft.hidden_norm.weight))
        self.qkv_proj = pack("q_proj", "k_proj", "v_proj", scale=both)
        self.gate_up_proj = pack("gate_proj", "up_proj", scale=draft.post_attention_layernorm.weight)
        self.lm_head = pack("lm_head", scale=None if self.config.norm_output else draft.norm.weight)
        self.o_proj, self.down_proj, self.fc = pack("o_proj"), pack("down_proj"), pack("fc")

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden if self.config.norm_output else self._scaled(hidden))

    def _scaled(self, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension; its weights are in the product that follows."""
        return F.rms_norm(x, x.shape[-1:], None, self.config.rms_norm_eps)

    def _query_key_value(self, embeddings: Tensor, hidden: Tensor, at: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c, n = self.config, hidden.shape[0]
        x = self._scaled(torch.cat((embeddings, hidden), dim=-1).view(n, 2, -1)).view(n, -1)
        heads = self.qkv_proj(x).view(n, -1, c.head_dim)
        rotated = c.num_attention_heads + c.num_key_value_heads
        query_key = rotate(heads[:, :rotated], self.rotary.cos[at], self.rotary.signed_sin[at])
        return query_key[:, : c.num_attention_heads], query_key[:, c.num_attention_heads :], heads[:, rotated:]

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        residual = self.hidden_norm(hidden) if self.config.norm_before_residual else hidden
        hidden = residual + self.o_proj(attended)
        # between the MLP's two products nothing leaves their dtype
        gate, up = self.gate_up_proj(self._scaled(hidden).to(self.gate_up_proj.dtype)).chunk(2, dim=-1)
        hidden = hidden + self.down_proj(self._act(gate) * up)
        return self.norm(hidden) if self.config.norm_output else hidden
