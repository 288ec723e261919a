"""Incremental forward of a transformers model over a preallocated key/value cache.

One code path serves the batched sampler (many rows, one token each), the baseline decoder (one row, one token) and the
verifier (one row, K + 1 tokens or a tree of them), so that a comparison between them compares decoding and not
implementations. Rows are ragged: each has its own length, no padding tokens, positions counted from its own start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from specflow.errors import UserError
from specflow.model_time import MODEL_TIME
from specflow.targets.attention import GROUPED, grouped_mask
from specflow.targets.model import attention_of, decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Window:
    """What the layers need to know of one forward: which rows, where their new tokens go, how far to read."""

    rows: Tensor | None = None  # [b] rows of the cache, None = the first b in order
    slots: Tensor  # [b, m] place of each new token in its row
    positions: Tensor  # [b, m] what it counts as: its place, in a tree by its depth
    start: int | None = None  # the same for a single row as a plain slice, no index kernels
    end: int = 0  # keys read: max length after the forward


class _Store:
    """Room for keys and values: `at_once` tensors of a shape in one, so that tokens move in all layers at once."""

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.tensors: list[Tensor] = []
        self._free: dict[tuple[int, ...], list[Tensor]] = {}

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        free = self._free.setdefault(shape, [])
        if not free:
            self.tensors.append(like.new_zeros((self.at_once, *shape)))
            free.extend(self.tensors[-1].unbind())
        return free.pop()


class _PreallocatedLayer(CacheLayerMixin):
    """Keys and values [rows, kv_heads, max_length, head_dim], written in place, read as a slice."""

    def __init__(self, num_rows: int, max_length: int, window: _Window, store: _Store) -> None:
        super().__init__()
        self.num_rows, self.max_length, self.window, self.store = num_rows, max_length, window, store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.num_rows, key_states.shape[1], self.max_length)
        self.keys = self.store.take((*shape, key_states.shape[3]), key_states)
        self.values = self.store.take((*shape, value_states.shape[3]), value_states)
        self.is_initialized = True

    def grow(self, max_length: int, store: _Store) -> None:
        self.max_length, self.store = max_length, store
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

    `lengths` counts the tokens each row holds; set an entry to forget what lies beyond it.
    """

    def __init__(
        self, model: PreTrainedModel, *, num_rows: int, max_length: int, aux_layer_ids: Sequence[int] = ()
    ) -> None:
        self.model, self.decoder, self.head = model, decoder_of(model), model.get_output_embeddings()
        self.device = next(model.parameters()).device
        self.num_rows, self.max_length = num_rows, max_length
        self.lengths = [0] * num_rows
        self._window = _Window()
        self._store = self._new_store()
        layers = [_PreallocatedLayer(num_rows, max_length, self._window, self._store) for _ in self.decoder.layers]
        self._cache = Cache(layers=layers)
        self.aux_layer_ids = list(aux_layer_ids)
        self._captured: dict[int, Tensor] = {}  # by whatever ran the model last: other targets may share it
        self._hooks = capture_hooks(self.decoder, self.aux_layer_ids, self._captured)
        self._aux: list[Tensor] = []  # of this target's last forward
        config = model.config.get_text_config()
        self._num_groups = config.num_attention_heads // config.num_key_value_heads
        self._sliding_window, self._layer_types = attention_of(config)
        self._mask_dtype = model.dtype if model.config._attn_implementation == GROUPED else torch.bool

    def _new_store(self) -> _Store:
        # only a single row keeps paths of trees; many rows would have to be allocated twice over to grow
        return _Store(2 * len(self.decoder.layers) if self.num_rows == 1 else 1)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        rows: Sequence[int] | None = None,
        counts: Sequence[int] | None = None,
        parents: Sequence[int] | None = None,
    ) -> Tensor:
        """Append `token_ids` [b, m] to `rows` (default: the first b) and return the post-norm states [b, m, hidden].

        `counts` [b] says how many of the m tokens are real where rows differ (right padding); the padding is written
        beyond the row's new length, is never attended by real tokens and is overwritten by the next call.
        `parents` [m - 1], for a target of one row: the tokens behind the first are nodes of a tree on it, each after
        its parent (an index among them, -1 for the first token); a node sees what it hangs on. `keep` has to follow.
        Afterwards `aux()` holds the captured residual streams of the same tokens.
        """
        b, m = token_ids.shape
        index = range(b) if rows is None else rows
        lengths = [self.lengths[row] for row in index]
        w = self._window
        w.end = max(lengths) + m
        if w.end > self.max_length:
            raise UserError(
                f"{w.end} tokens do not fit the cache of {self.max_length}: shorten the prompt or max_new_tokens"
            )
        w.start = lengths[0] if self.num_rows == 1 else None
        w.slots = torch.tensor([range(length, length + m) for length in lengths], device=self.device)
        w.rows = None if rows is None else torch.tensor(rows, device=self.device)
        w.positions = w.slots
        tree = None if parents is None else tuple(parents)
        if tree is not None:
            assert self.num_rows == 1 and len(tree) == m - 1
            w.positions = (tree_layout(tree)[0].to(self.device) + w.start)[None]
        token_ids, mask = token_ids.to(self.device), self._mask(tree)
        with MODEL_TIME.call(self.device):
            output = self.decoder(
                input_ids=token_ids,
                position_ids=w.positions,
                attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
            )
        self._aux = [self._captured[layer] for layer in self.aux_layer_ids]
        for row, length, count in zip(index, lengths, [m] * b if counts is None else counts, strict=True):
            self.lengths[row] = length + count
        return output.last_hidden_state

    def _mask(self, tree: tuple[int, ...] | None) -> Any:
        """Masks [b, 1, m, end] by layer type, in the form the attention takes; None where a query sees everything."""
        w, window, m = self._window, self._sliding_window, self._window.slots.shape[1]
        if window is None and w.start is not None:
            if m == 1 or (tree is None and w.start == 0):
                return None  # one token, or a fresh prompt: sdpa's own causal path
            among_new = new_tokens_mask(m if tree is None else tree, self._num_groups, self._mask_dtype)
            return F.pad(among_new.to(self.device), (w.start, 0), value=self._mask_dtype == torch.bool)
        keys = torch.arange(w.end, device=self.device)
        if tree is None:
            full = keys <= w.slots[:, :, None]
        else:
            full = (keys < w.start).repeat(1, m, 1)
            full[0, :, w.start :] = tree_layout(tree)[1].to(self.device)
            keys = torch.cat((keys[: w.start], w.positions[0]))
        if window is None:
            return self._attention_mask(full[:, None])
        near = full & (keys > w.positions[:, :, None] - window)
        if not self._layer_types:
            return self._attention_mask(near[:, None])
        return {
            "full_attention": self._attention_mask(full[:, None]),
            "sliding_attention": self._attention_mask(near[:, None]),
        }

    def _attention_mask(self, allowed: Tensor) -> Tensor:
        return grouped_mask(allowed, self._num_groups, self._mask_dtype)

    @torch.inference_mode()
    def reserve(self, max_length: int) -> None:
        """Make room for rows of `max_length` tokens; what they hold stays."""
        if max_length > self.max_length:
            self.max_length = max_length
            self._store = self._new_store()
            for layer in self._cache.layers:
                layer.grow(max_length, self._store)

    @torch.inference_mode()
    def move_row(self, source: int, into: int) -> None:
        """Copy what row `source` holds over row `into`, so that the rows in use can be kept at the front."""
        length = self.lengths[source]
        for layer in self._cache.layers:
            layer.keys[into, :, :length] = layer.keys[source, :, :length]
            layer.values[into, :, :length] = layer.values[source, :, :length]
        self.lengths[into] = length

    @torch.inference_mode()
    def keep(self, path: Sequence[int]) -> None:
        """After a forward of one row: keep its first token and the nodes `path` (their indices behind it, from the root
        on), forget the others. Keys and values of the path move behind the first token's; `aux()` follows.
        """
        w = self._window
        assert w.start is not None, "only a target of one row keeps paths"
        in_place = 1  # tokens that are where they belong
        while in_place <= len(path) and path[in_place - 1] == in_place - 1:
            in_place += 1
        end = 1 + len(path)
        kept: Any = slice(end)
        if in_place < end:
            kept = torch.tensor([0, *(node + 1 for node in path)], device=self.device)
            source = kept[in_place:] + w.start
            for tensor in self._store.tensors:
                tensor[..., w.start + in_place : w.start + end, :] = tensor.index_select(-2, source)
        self.lengths[0] = w.start + end
        self._aux = [states[:, kept] for states in self._aux]

    def aux(self) -> Tensor:
        """Residual streams [b, m, len(aux_layer_ids) * hidden] of the last forward, in ascending layer order; after
        `keep` of what it kept.
        """
        return torch.cat([states.to(self.device) for states in self._aux], dim=-1)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab_size] of post-norm states: the head alone, as `fetch` refuses targets that do more."""
        with MODEL_TIME.call(self.device):
            return self.head(hidden).to(self.device)  # a target over several GPUs ends on the last of them

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@lru_cache(maxsize=256)
def tree_layout(parents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Depths [n + 1] int64 of the root and its n nodes, and who sees whom [n + 1, n + 1] bool: a node itself and what
    it hangs on. `parents` as in `CachedTarget.forward`.
    """
    size = len(parents) + 1
    depths, ancestors = np.zeros(size, np.int64), np.eye(size, dtype=bool)
    for node, parent in enumerate(parents, start=1):
        assert parent + 1 < node, "a node comes after its parent"
        depths[node] = depths[parent + 1] + 1
        ancestors[node] |= ancestors[parent + 1]
    return torch.from_numpy(depths), torch.from_numpy(ancestors)


@lru_cache(maxsize=256)
def new_tokens_mask(tokens: int | tuple[int, ...], num_groups: int, dtype: torch.dtype) -> Tensor:
    """`grouped_mask` of new tokens among themselves: so many in a row, or the root and the nodes of a tree of these
    parents.
    """
    sees = torch.ones(tokens, tokens, dtype=torch.bool).tril_() if isinstance(tokens, int) else tree_layout(tokens)[1]
    return grouped_mask(sees[None, None], num_groups, dtype)


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
