"""The EAGLE-3 draft model (arXiv 2503.01840, section 3), in plain PyTorch.

One decoder layer whose q/k/v read `[RMS(embedding); RMS(h)]` and whose residual stream is the un-normed `h`; a pruned
output head; `fc` that fuses three residual streams of the target. The target's embedding table is not a part of it:
callers pass embeddings. Training (all rows, all training-time-test steps at once) is `unroll`; serving (rows
appended to a cache) is `decode`. Both run the same layer.

Row t reads `fc(aux_t)` and the embedding of token t + 1 and predicts token t + 2, at RoPE position t.
Shape legend: N packed rows, M rows that are supervised at some step (queries), H hidden, A aux streams, D draft
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from specflow.drafters.attention import Prefix, ttt_attention
from specflow.drafters.rotary import Rotary
from specflow.errors import UserError
from specflow.files import atomic_path, read_json, write_json
from specflow.kernels import linear, rms_norm, take_rows


class Eagle3Config(BaseModel):
    """Shape of a draft; RoPE and width follow the target so that a server can share its tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str = "silu"
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    vocab_size: int
    """Target vocabulary."""
    draft_vocab_size: int
    aux_layer_ids: list[int]
    """Residual streams read by `fc`, ascending, counted from the embeddings = 0."""
    # Variants that other trainers write; the paper's draft has none of them. Names and meaning are vLLM's
    # (model_executor/models/llama_eagle3.py).
    norm_before_residual: bool = False
    """The layer's residual is RMS(h), not h."""
    norm_before_fc: bool = False
    """One RMSNorm over all aux streams before `fc`."""
    fc_norm: bool = False
    """An RMSNorm per aux stream before `fc`."""
    norm_output: bool = False
    """The recycled state is the post-norm output."""
    own_rope: bool = False
    """RoPE and context are an earlier draft's and may differ from the target's."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A bias-free projection through `kernels.linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class DraftCache:
    """Keys and values [kv_heads, max_length, head_dim] of the rows decoded so far; set `length` lower to forget
    rows.
    """

    def __init__(
        self, config: Eagle3Config, max_length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length, self.max_length = 0, max_length


class RaggedDraftCache:
    """Keys and values [num_rows, kv_heads, max_length, head_dim] of several sequences; `lengths` [num_rows] int64 (on
    CPU) counts the rows that each holds: set an entry lower to forget rows.
    """

    def __init__(
        self,
        config: Eagle3Config,
        num_rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_rows, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)
        self.max_length = max_length

    def move_row(self, source: int, into: int) -> None:
        """Copy what sequence `source` holds over `into`."""
        length = int(self.lengths[source])
        self.keys[into, :, :length] = self.keys[source, :, :length]
        self.values[into, :, :length] = self.values[source, :, :length]
        self.lengths[into] = length


@dataclass
class PackedRows:
    """Whole documents laid end to end, with the rows that training has to compute. Built by `training.packing`."""

    tokens: Tensor
    """[S, N] int64: tokens[k, t] is the token whose embedding row t reads at step k, that is token t + 1 + k."""
    aux: Tensor
    """[N, A * target_hidden]."""
    positions: Tensor
    """[N] int64, counted from each document's start."""
    queries: Tensor
    """[M] int64 ascending: rows supervised at some step."""
    prefix: Prefix
    """Which keys of step 0 each query row attends."""


class Eagle3Draft(nn.Module):
    """The draft; `d2t` [D] int64 offsets (target id = i + d2t[i]) and `t2d` [V] bool are buffers."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = c = config
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        num_aux = len(c.aux_layer_ids)
        if c.norm_before_fc:
            self.input_norm = RMSNorm(num_aux * c.target_hidden_size, c.rms_norm_eps)
        if c.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(c.target_hidden_size, c.rms_norm_eps) for _ in range(num_aux))
        self.fc = Linear(num_aux * c.target_hidden_size, c.hidden_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.hidden_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.q_proj = Linear(2 * c.hidden_size, q_size)
        self.k_proj = Linear(2 * c.hidden_size, kv_size)
        self.v_proj = Linear(2 * c.hidden_size, kv_size)
        self.o_proj = Linear(q_size, c.hidden_size)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = Linear(c.hidden_size, c.draft_vocab_size)
        self.rotary = Rotary(c.rope_parameters, c.head_dim, c.max_position_embeddings)
        self.register_buffer("d2t", torch.zeros(c.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(c.vocab_size, dtype=torch.bool))
        self._act = _activation(c.hidden_act)

    def project(self, aux: Tensor) -> Tensor:
        """Fuse aux streams [n, A * target_hidden] into features [n, H]."""
        if self.config.norm_before_fc:
            aux = self.input_norm(aux)
        if self.config.fc_norm:
            streams = aux.chunk(len(self.fc_norm), dim=-1)
            aux = torch.cat([norm(stream) for norm, stream in zip(self.fc_norm, streams, strict=True)], dim=-1)
        return self.fc(aux)

    def head_input(self, hidden: Tensor) -> Tensor:
        """What the head reads of recycled states [n, H]."""
        return hidden if self.config.norm_output else self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft-vocabulary logits [n, D] of recycled states [n, H]."""
        return self.lm_head(self.head_input(hidden))

    def _inputs(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat((self.input_layernorm(embeddings), self.hidden_norm(hidden)), dim=-1)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.view(projected.shape[0], -1, self.config.head_dim)

    def _query_key_value(self, embeddings: Tensor, hidden: Tensor, at: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads [n, heads, head_dim] of n rows, query and key turned to positions `at` of the reserved tables."""
        x = self._inputs(embeddings, hidden)
        query, key, value = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return self.rotary(query, at), self.rotary(key, at), value

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Rest of the layer after attention [n, q_size]: residuals around o_proj and the MLP."""
        residual = self.hidden_norm(hidden) if self.config.norm_before_residual else hidden
        hidden = residual + self.o_proj(attended)
        x = self.post_attention_layernorm(hidden)
        hidden = hidden + self.down_proj(self._act(self.gate_proj(x)) * self.up_proj(x))
        return self.norm(hidden) if self.config.norm_output else hidden

    def unroll(self, rows: PackedRows, embedding: Tensor) -> list[Tensor]:
        """Training-time test: recycled states [M, H] of the query rows after steps 0..S-1, gradients through all steps.

        `embedding` [V, H] is the target's table. Step k reads embeddings shifted k further and attends the keys of
        step 0 causally within the document plus the row's own keys of steps 1..k (section 3.2); RoPE position t + k.
        """
        num_steps = rows.tokens.shape[0]
        self.rotary.reserve(int(rows.positions.max()) + num_steps + 1)
        features = self.project(rows.aux)
        at = rows.positions
        context = self._inputs(F.embedding(rows.tokens[0], embedding).to(features.dtype), features)
        keys = self.rotary(self._heads(self.k_proj(context)), at)
        values = self._heads(self.v_proj(context))

        hidden, x = take_rows(features, rows.queries), take_rows(context, rows.queries)
        at = at[rows.queries]
        own_keys: list[Tensor] = []
        own_values: list[Tensor] = []
        steps = []
        for k in range(num_steps):
            if k > 0:
                tokens = rows.tokens[k][rows.queries]
                x = self._inputs(F.embedding(tokens, embedding).to(features.dtype), hidden)
                own_keys.append(self.rotary(self._heads(self.k_proj(x)), at + k))
                own_values.append(self._heads(self.v_proj(x)))
            queries = self.rotary(self._heads(self.q_proj(x)), at + k)
            attended = ttt_attention(queries, keys, values, own_keys, own_values, rows.prefix)
            hidden = self._finish(hidden, attended.reshape(hidden.shape[0], -1))
            steps.append(hidden)
        return steps

    @torch.inference_mode()
    def decode(
        self,
        embeddings: Tensor,
        hidden: Tensor,
        cache: DraftCache,
        position: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Append n rows (embeddings and hidden [n, H]) to the cache at positions cache.length.. and return
        recycled states.

        Causal over the cache and the new rows. A level of a tree: all rows at RoPE `position`, `mask`
        [n, cache.length + n] additive. Raises UserError when the cache is full.
        """
        n, start = hidden.shape[0], cache.length
        end = start + n
        if end > cache.max_length:
            raise UserError(
                f"{end} draft rows do not fit a cache of {cache.max_length}: shorten the prompt or max_new_tokens"
            )
        self.rotary.reserve(end)
        at = slice(start, end) if position is None else slice(position, position + 1)
        query, key, value = self._query_key_value(embeddings, hidden, at)
        cache.keys[:, start:end] = key.transpose(0, 1)
        cache.values[:, start:end] = value.transpose(0, 1)
        queries = query.transpose(0, 1)
        keys, values = cache.keys[None, :, :end], cache.values[None, :, :end]
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        # fold the query heads that share a key head into rows: attention without repeating the keys
        folded = queries.reshape(1, self.config.num_key_value_heads, group * n, self.config.head_dim)
        if n > 1 and mask is None:
            visible = torch.arange(end, device=hidden.device) <= torch.arange(start, end, device=hidden.device)[:, None]
            mask = torch.zeros_like(visible, dtype=hidden.dtype).masked_fill_(~visible, float("-inf"))
        if mask is not None:
            mask = mask.repeat(group, 1)
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        attended = attended.view(self.config.num_attention_heads, n, self.config.head_dim).transpose(0, 1)
        cache.length = end
        return self._finish(hidden, attended.reshape(n, -1))

    @torch.inference_mode()
    def decode_rows(self, embeddings: Tensor, hidden: Tensor, cache: RaggedDraftCache, first: int = 0) -> Tensor:
        """`decode` for several sequences: append n rows to each of the cache's sequences `first`.. at positions of
        their own. Shapes: embeddings and hidden [b, n, H] -> recycled states [b, n, H].

        Rows behind a sequence's real ones are padding: set `cache.lengths` lower to forget them.
        """
        b, n, _ = hidden.shape
        lengths = cache.lengths[first : first + b]
        end = int(lengths.max()) + n
        if end > cache.max_length:
            raise UserError(
                f"{end} draft rows do not fit a cache of {cache.max_length}: shorten the prompt or max_new_tokens"
            )
        c, device = self.config, hidden.device
        group = c.num_attention_heads // c.num_key_value_heads
        slots = (lengths[:, None] + torch.arange(n)).to(device)
        self.rotary.reserve(end)
        flat = hidden.flatten(0, 1)
        query, key, value = self._query_key_value(embeddings.flatten(0, 1), flat, slots.flatten())
        rows = torch.arange(first, first + b, device=device)[:, None]
        cache.keys[rows, :, slots] = key.unflatten(0, (b, n))
        cache.values[rows, :, slots] = value.unflatten(0, (b, n))
        folded = query.unflatten(0, (b, n)).transpose(1, 2)
        folded = folded.reshape(b, c.num_key_value_heads, group * n, c.head_dim)
        visible = torch.arange(end, device=device) <= slots[:, :, None]
        mask = torch.zeros_like(visible, dtype=flat.dtype).masked_fill_(~visible, float("-inf"))
        keys, values = cache.keys[first : first + b, :, :end], cache.values[first : first + b, :, :end]
        attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask.repeat(1, group, 1)[:, None])
        attended = attended.view(b, c.num_attention_heads, n, c.head_dim).transpose(1, 2)
        cache.lengths[first : first + b] = lengths + n
        return self._finish(flat, attended.reshape(b * n, -1)).view(b, n, -1)


def _activation(name: str) -> Any:
    from transformers.activations import ACT2FN

    return F.silu if name == "silu" else ACT2FN[name]


def save_draft(draft: Eagle3Draft, folder: Path) -> None:
    """Write config.json and model.safetensors (fp32 as trained), atomically."""
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        write_json(temporary / "config.json", draft.config.model_dump())
        save_file({k: v.contiguous().cpu() for k, v in draft.state_dict().items()}, temporary / "model.safetensors")


def load_draft(folder: Path, device: str = "cpu") -> Eagle3Draft:
    """Read what `save_draft` wrote. Raises UserError where it is missing or incomplete."""
    config = Eagle3Config.model_validate(
        read_json(folder / "config.json", what="draft config", made_by="specflow train_offline <family>")
    )
    draft = Eagle3Draft(config)
    try:
        draft.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    except (RuntimeError, FileNotFoundError) as error:
        raise UserError(
            f"draft in {folder} does not load ({str(error).splitlines()[-1].strip()}): train it again"
        ) from None
    return draft.to(device).eval()
