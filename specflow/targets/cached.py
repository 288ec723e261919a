"""Incremental forward of a transformers model over a preallocated key/value cache.

One code path serves the batched sampler (many rows, one token each), the baseline decoder (one row, one token) and the
verifier (one row, K + 1 tokens), so that a comparison between them compares decoding and not implementations.
Rows are ragged: each has its own length, no padding tokens, positions counted from its own start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specflow.errors import UserError
from specflow.targets.attention import GROUPED, grouped_mask
from specflow.targets.model import attention_of, decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Window:
    """What the layers need to know of one forward: which rows, where their new tokens go, how far to read."""

    rows: Tensor | None = None  # [b] rows of the cache, None = the first b in order
    slots: Tensor  # [b, m] position of each new token in its row
    start: int | None = None  # the same for a single row as a plain slice, no index kernels
    end: int = 0  # keys read: max length after the forward


class _PreallocatedLayer(CacheLayerMixin):
    """Keys and values [rows, kv_heads, max_length, head_dim], written in place, read as a slice."""

    def __init__(self, num_rows: int, max_length: int, window: _Window) -> None:
        super().__init__()
        self.num_rows, self.max_length, self.window = num_rows, max_length, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.num_rows, key_states.shape[1], self.max_length)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def grow(self, max_length: int) -> None:
        self.max_length = max_length
        if self.is_initialized:
            keys, values = self.keys, self.values
            self.lazy_initialization(keys, values)
            self.keys[:, :, : keys.shape[2]] = keys
            self.values[:, :, : values.shape[2]] = values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        w = self.window
        if w.start is not None:
            self.keys[:, :, w.start : w.end] = key_states
            self.values[:, :, w.start : w.end] = value_states
            return self.keys[:, :, : w.end], self.values[:, :, : w.end]
        b = key_states.shape[0]
        rows = torch.arange(b, device=key_states.device) if w.rows is None else w.rows
        # advanced indices around the head slice: the target is [b, m, heads, head_dim]
        self.keys[rows[:, None], :, w.slots] = key_states.transpose(1, 2)
        self.values[rows[:, None], :, w.slots] = value_states.transpose(1, 2)
        if w.rows is None:  # a view: no row of the cache is copied
            return self.keys[:b, :, : w.end], self.values[:b, :, : w.end]
        return self.keys[rows, :, : w.end], self.values[rows, :, : w.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.end, 0

    def get_seq_length(self) -> int:
        return self.window.end

    def get_max_length(self) -> int:
        return self.max_length


class CachedTarget:
    """A target with a ragged key/value cache for `num_rows` sequences of at most `max_length` tokens.

    `lengths` [num_rows] int64 (on CPU) counts the tokens each row holds; set an entry to forget what lies beyond it.
    """

    def __init__(
        self, model: PreTrainedModel, *, num_rows: int, max_length: int, aux_layer_ids: Sequence[int] = ()
    ) -> None:
        self.model, self.decoder, self.head = model, decoder_of(model), model.get_output_embeddings()
        self.device = next(model.parameters()).device
        self.num_rows, self.max_length = num_rows, max_length
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)
        self._window = _Window()
        layers = [_PreallocatedLayer(num_rows, max_length, self._window) for _ in self.decoder.layers]
        self._cache = Cache(layers=layers)
        self._aux: dict[int, Tensor] = {}
        self.aux_layer_ids = list(aux_layer_ids)
        self._hooks = capture_hooks(self.decoder, self.aux_layer_ids, self._aux)
        config = model.config.get_text_config()
        self._num_groups = config.num_attention_heads // config.num_key_value_heads
        self._sliding_window, self._layer_types = attention_of(config)

    @torch.inference_mode()
    def forward(
        self, token_ids: Tensor, rows: Sequence[int] | None = None, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Append `token_ids` [b, m] to `rows` (default: the first b) and return the post-norm states [b, m, hidden].

        `counts` [b] says how many of the m tokens are real where rows differ (right padding); the padding is written
        beyond the row's new length, is never attended by real tokens and is overwritten by the next call.
        Afterwards `aux()` holds the captured residual streams of the same tokens.
        """
        b, m = token_ids.shape
        index = torch.arange(b) if rows is None else torch.tensor(list(rows))
        lengths = self.lengths[index]
        w = self._window
        w.end = int(lengths.max()) + m
        if w.end > self.max_length:
            raise UserError(
                f"{w.end} tokens do not fit the cache of {self.max_length}: shorten the prompt or max_new_tokens"
            )
        slots = lengths[:, None] + torch.arange(m)
        w.start = int(lengths[0]) if self.num_rows == 1 else None
        w.slots, w.rows = slots.to(self.device), None if rows is None else index.to(self.device)
        ragged = self.num_rows > 1 or m > 1
        output = self.decoder(
            input_ids=token_ids.to(self.device),
            position_ids=w.slots,
            attention_mask=self._mask(w.slots, w.end, ragged),
            past_key_values=self._cache,
            use_cache=True,
        )
        self.lengths[index] = lengths + (m if counts is None else torch.tensor(list(counts)))
        return output.last_hidden_state

    def _mask(self, slots: Tensor, end: int, ragged: bool) -> Any:
        """Masks [b, 1, m, end] by layer type, in the form the attention takes; None where a query sees everything."""
        sliding = self._sliding_window is not None
        if not sliding and (not ragged or (self.num_rows == 1 and int(slots[0, 0]) == 0)):
            return None  # one token of one row, or a fresh prompt: sdpa's own causal path
        keys = torch.arange(end, device=self.device)
        full = (keys <= slots[:, :, None])[:, None]
        if not sliding:
            return self._attention_mask(full)
        near = full & (keys > slots[:, :, None] - self._sliding_window)[:, None]
        if not self._layer_types:
            return self._attention_mask(near)
        return {"full_attention": self._attention_mask(full), "sliding_attention": self._attention_mask(near)}

    def _attention_mask(self, allowed: Tensor) -> Tensor:
        grouped = self.model.config._attn_implementation == GROUPED
        return grouped_mask(allowed, self._num_groups, self.model.dtype) if grouped else allowed

    @torch.inference_mode()
    def reserve(self, max_length: int) -> None:
        """Make room for rows of `max_length` tokens; what they hold stays."""
        if max_length > self.max_length:
            self.max_length = max_length
            for layer in self._cache.layers:
                layer.grow(max_length)

    @torch.inference_mode()
    def move_row(self, source: int, into: int) -> None:
        """Copy what row `source` holds over row `into`, so that the rows in use can be kept at the front."""
        length = int(self.lengths[source])
        for layer in self._cache.layers:
            layer.keys[into, :, :length] = layer.keys[source, :, :length]
            layer.values[into, :, :length] = layer.values[source, :, :length]
        self.lengths[into] = length

    def aux(self) -> Tensor:
        """Residual streams [b, m, len(aux_layer_ids) * hidden] of the last forward, in ascending layer order."""
        return torch.cat([self._aux[layer] for layer in self.aux_layer_ids], dim=-1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of post-norm states: the head alone, as `fetch` refuses targets that do more."""
        return self.head(hidden)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def capture_hooks(decoder: torch.nn.Module, layer_ids: Sequence[int], into: dict[int, Tensor]) -> list[Any]:
    """Hooks that leave the residual stream after k layers in `into[k]` at each forward of `decoder`. Returns
    handles.
    """
    hooks = []
    for k in layer_ids:
        if not 0 <= k <= len(decoder.layers):
            raise UserError(
                f"aux layer id {k} is outside 0..{len(decoder.layers)}: ids count layers run, 0 = embeddings"
            )
        if k == 0:

            def before(module: Any, args: Any, kwargs: Any) -> None:
                into[0] = args[0] if args else kwargs["hidden_states"]

            hooks.append(decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True))
        else:

            def after(module: Any, args: Any, output: Any, k: int = k) -> None:
                into[k] = output[0] if isinstance(output, tuple) else output

            hooks.append(decoder.layers[k - 1].register_forward_hook(after))
    return hooks
