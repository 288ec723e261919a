"""Attention of training-time test over packed documents, without a mask of tokens by tokens.

A query row at step k attends the keys of step 0 causally within its document (the prefix) and its own keys of steps
1..k (the diagonal). Query rows come as segments, contiguous runs of supervised rows. On CPU each segment is two
calls of the flash kernel (earlier rows of the document in full, the segment itself causally), merged with the
diagonal by
log-sum-exp, with the exact joint gradient; memory grows with tokens, not with their square. On GPU the prefix is one
flex-attention call over a block mask. Which of the two runs is `Execution.attention`'s choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specflow.device import execution

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
BLOCK = 128
"""Queries and keys in a block of the mask: what flex attention's kernels take by default."""


@dataclass(frozen=True)
class Segment:
    """Query rows [first, last) (numbers among the queries) that sit at packed rows [start, start + last - first)."""

    first: int
    last: int
    document: int
    """Packed row where the document begins."""
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.last - self.first


@dataclass
class Prefix:
    """What each query row sees of the step-0 keys: rows document..own row."""

    segments: list[Segment]
    _block_mask: Any = field(default=None, repr=False)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """First and last visible packed row of each query, [M] and [M] int64 on CPU."""
        first = torch.cat([torch.full((s.last - s.first,), s.document) for s in self.segments])
        last = torch.cat([torch.arange(s.start, s.stop) for s in self.segments])
        return first, last


def ttt_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
    prefix: Prefix,
) -> Tensor:
    """Joint softmax attention over prefix and diagonal, differentiable in every tensor.

    Shapes: queries [M, heads, d]; keys, values [N, kv_heads, d]; own_keys, own_values lists of [M, kv_heads, d] ->
    [M, heads, d].
    """
    if execution(queries.device).attention == "flash":
        return _CpuAttention.apply(queries, keys, values, prefix, len(own_keys), *own_keys, *own_values)
    return flex_ttt_attention(queries, keys, values, own_keys, own_values, prefix)


class _CpuAttention(torch.autograd.Function):
    """The backward hands the *joint* output and log-sum-exp to the flash kernel's backward, which recomputes each
    part's probabilities as exp(score - lse): those are the joint ones, so the parts' gradients add up exactly."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, prefix: Prefix, num_own: int, *own: Tensor
    ) -> Tensor:
        group = queries.shape[1] // keys.shape[1]
        all_keys, all_values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scale = queries.shape[-1] ** -0.5
        # all earlier rows of the document, the segment itself, then one own key after another
        outputs = queries.new_zeros(2, *queries.shape)
        scores = queries.new_full((2 + num_own, *queries.shape[:2]), -torch.inf)
        for s in prefix.segments:
            rows = slice(s.first, s.last)
            for first, last, causal in _parts(s):
                part = _run(queries[rows], all_keys, all_values, first, last, causal, scale)
                outputs[int(causal), rows], scores[int(causal), rows] = part
        for score, key in zip(scores[2:], own[:num_own], strict=True):
            score.copy_(_diagonal_scores(queries, key, scale))
        lse = scores.logsumexp(0)
        weights = (scores - lse).exp_()[..., None]
        output = (weights[0] * outputs[0]).addcmul_(weights[1], outputs[1])
        grouped = (queries.shape[0], keys.shape[1], group, -1)
        for w, value in zip(weights[2:], own[num_own:], strict=True):
            output.view(grouped).addcmul_(w.view(grouped), value[:, :, None])
        ctx.save_for_backward(queries, keys, values, output, lse, *own)
        ctx.prefix, ctx.num_own = prefix, num_own
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, output, lse, *own = ctx.saved_tensors
        group, scale = queries.shape[1] // keys.shape[1], queries.shape[-1] ** -0.5
        all_keys, all_values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        grad = grad.contiguous()
        grad_queries = torch.zeros_like(queries)
        grad_keys, grad_values = torch.zeros_like(all_keys), torch.zeros_like(all_values)
        for s in ctx.prefix.segments:
            rows = slice(s.first, s.last)
            for first, last, causal in _parts(s):
                arguments = [
                    _batched(x) for x in (grad[rows], queries[rows], all_keys[first:last], all_values[first:last])
                ]
                gq, gk, gv = _flash_backward(
                    *arguments,
                    _batched(output[rows]),
                    lse[rows].t()[None].contiguous(),
                    0.0,
                    causal,
                    scale=scale,
                )
                grad_queries[rows] += gq[0].transpose(0, 1)
                grad_keys[first:last] += gk[0].transpose(0, 1)
                grad_values[first:last] += gv[0].transpose(0, 1)
        delta = (grad * output).sum(-1)
        grouped = (queries.shape[0], keys.shape[1], group, -1)
        own_gradients = []
        for key, value in zip(own[: ctx.num_own], own[ctx.num_own :], strict=True):
            share = (_diagonal_scores(queries, key, scale) - lse).exp()  # [M, heads]
            along = (grad.view(grouped) * value[:, :, None]).sum(-1).flatten(1)
            slope = (share * (along - delta) * scale)[..., None]
            grad_queries += slope * key.repeat_interleave(group, 1)
            own_gradients.append(
                ((slope * queries).view(grouped).sum(2), (share[..., None] * grad).view(grouped).sum(2))
            )
        grad_own = [g[0] for g in own_gradients] + [g[1] for g in own_gradients]
        fold = (keys.shape[0], keys.shape[1], group, -1)
        return grad_queries, grad_keys.view(fold).sum(2), grad_values.view(fold).sum(2), None, None, *grad_own


def _parts(s: Segment) -> list[tuple[int, int, bool]]:
    """Key ranges of a segment: (first, last, causal)."""
    earlier = [(s.document, s.start, False)] if s.start > s.document else []
    return [*earlier, (s.start, s.stop, True)]


def _batched(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # [n, heads, d] -> [1, heads, n, d]


def _run(
    queries: Tensor, keys: Tensor, values: Tensor, first: int, last: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _flash(
        _batched(queries), _batched(keys[first:last]), _batched(values[first:last]), 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].t()


def _diagonal_scores(queries: Tensor, key: Tensor, scale: float) -> Tensor:
    """Score of each query with its own row's key: [M, heads]."""
    grouped = queries.view(queries.shape[0], key.shape[1], -1, queries.shape[-1])
    return (grouped * key[:, :, None]).sum(-1).flatten(1) * scale


def flex_ttt_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: list[Tensor],
    own_values: list[Tensor],
    prefix: Prefix,
) -> Tensor:
    """The same by flex attention with a block-sparse mask, merged with the diagonal by log-sum-exp in autograd."""
    from torch.nn.attention.flex_attention import AuxRequest

    if prefix._block_mask is None:
        prefix._block_mask = block_mask(prefix, keys.shape[0], queries.device)
    run = _flex_attention(execution(queries.device).compiler)
    out, aux = run(
        _batched(queries),
        _batched(keys),
        _batched(values),
        block_mask=prefix._block_mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    out, lse = out[0].transpose(0, 1), aux.lse[0].t()
    if not own_keys:
        return out
    scale = queries.shape[-1] ** -0.5
    scores = torch.stack([lse, *(_diagonal_scores(queries, key, scale) for key in own_keys)])
    weights = scores.softmax(0).to(queries.dtype)
    grouped = (queries.shape[0], keys.shape[1], queries.shape[1] // keys.shape[1], -1)
    merged = (weights[0][..., None] * out).view(grouped)
    for w, value in zip(weights[1:], own_values, strict=True):
        merged = merged + w.view(grouped) * value[:, :, None]
    return merged.flatten(1, 2)


@cache
def _flex_attention(compiler: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=compiler)


def block_mask(prefix: Prefix, num_keys: int, device: torch.device) -> BlockMask:
    """What each query sees of `num_keys` keys, as flex attention takes it: for each block of BLOCK queries, which
    blocks of keys are visible to all of them, and which to some, where the kernel looks at each pair.

    Made from the queries' bounds: memory grows with rows, and by 16 bytes a pair of blocks, a thousandth of a byte a
    pair of rows.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first, last = prefix.bounds()
    blocks = -(-len(first) // BLOCK), -(-num_keys // BLOCK)
    some = _count(blocks, first // BLOCK, last // BLOCK + 1) > 0
    every = _count(blocks, -(-first // BLOCK), (last + 1) // BLOCK) == BLOCK
    parts = [x.to(device)[None, None] for blocks in (some & ~every, every) for x in _listed(blocks)]
    first, last = first.to(device), last.to(device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= first[q]) & (k <= last[q])

    return BlockMask.from_kv_blocks(*parts, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(len(first), num_keys))


def _count(blocks: tuple[int, int], begin: Tensor, end: Tensor) -> Tensor:
    """How many queries of each block have each block of keys in their range [begin, end): `blocks` int32."""
    edges = torch.zeros(blocks[0], blocks[1] + 1, dtype=torch.int32)
    own, one = torch.arange(len(begin)) // BLOCK, torch.ones(len(begin), dtype=torch.int32)
    edges.index_put_((own, begin), one, accumulate=True)
    edges.index_put_((own, end.maximum(begin)), -one, accumulate=True)
    return edges.cumsum(1, dtype=torch.int32)[:, :-1]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of set blocks in each row, and all blocks, the set ones first: int32."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
