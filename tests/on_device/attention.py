"""Attention of training-time test: its output and its joint gradient against the definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specflow.drafters.attention import Prefix, Segment, ttt_attention


@dataclass(frozen=True)
class Shape:
    num_documents: int = 3
    longest: int = 40
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    num_own: int = 2


@dataclass(frozen=True)
class Case:
    prefix: Prefix
    num_keys: int
    tensors: list[Tensor]
    """Queries, keys, values, own keys, own values."""
    grad: Tensor


def random_prefix(shape: Shape, seed: int) -> tuple[Prefix, int]:
    """Documents end to end, each with up to three runs of query rows; the first of two touches its beginning, some
    have none. Returns the number of rows too.
    """
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    segments: list[Segment] = []
    offset = count = 0
    for document in range(shape.num_documents):
        length = number(2, shape.longest)
        edges = sorted({0 if document == 0 else number(0, length), *(number(0, length) for _ in range(5)), length})
        runs = list(zip(edges[::2], edges[1::2], strict=False))[: number(0, 3) or (document == 0)]
        for start, stop in runs:
            segments.append(Segment(count, count + stop - start, offset, offset + start))
            count += stop - start
        offset += length
    return Prefix(segments), offset


def make_case(shape: Shape, seed: int = 3) -> Case:
    """On the CPU, in float64."""
    prefix, num_keys = random_prefix(shape, seed)
    g = torch.Generator().manual_seed(seed)
    num_queries = prefix.segments[-1].last

    def make(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, shape.head_dim, generator=g, dtype=torch.float64, requires_grad=True)

    own = [make(num_queries, shape.kv_heads) for _ in range(2 * shape.num_own)]
    shared = [make(num_keys, shape.kv_heads) for _ in range(2)]
    tensors = [make(num_queries, shape.heads), *shared, *own]
    return Case(prefix, num_keys, tensors, torch.randn(tensors[0].shape, generator=g, dtype=torch.float64))


def dense_attention(case: Case) -> Tensor:
    """The definition: one softmax over the visible keys and the row's own ones."""
    q, k, v, *own = case.tensors
    group, num_own = q.shape[1] // k.shape[1], len(own) // 2
    first, last = case.prefix.bounds()
    visible = (torch.arange(len(k)) >= first[:, None]) & (torch.arange(len(k)) <= last[:, None])
    k, v, *own = (x.repeat_interleave(group, 1) for x in (k, v, *own))
    scores = torch.einsum("mhd,nhd->mhn", q, k).masked_fill(~visible[:, None], -torch.inf)
    diagonal = [(q * key).sum(-1, keepdim=True) for key in own[:num_own]]
    weights = (torch.cat([scores, *diagonal], -1) * q.shape[-1] ** -0.5).softmax(-1)
    out = torch.einsum("mhn,nhd->mhd", weights[..., : len(k)], v)
    for i, value in enumerate(own[num_own:]):
        out = out + weights[..., len(k) + i, None] * value
    return out


def check_attention(device: torch.device, dtype: torch.dtype, tolerance: float, shape: Shape, seed: int = 3) -> None:
    """Output and all gradients, by relative error over each tensor."""
    case = make_case(shape, seed)
    expected = dense_attention(case)
    wanted = torch.autograd.grad(expected, case.tensors, case.grad)
    moved = [x.detach().to(device, dtype).requires_grad_() for x in case.tensors]
    q, k, v, *own = moved
    got = ttt_attention(q, k, v, own[: shape.num_own], own[shape.num_own :], case.prefix)
    found = torch.autograd.grad(got, moved, case.grad.to(device, dtype))
    assert got.dtype == dtype
    for a, b in zip((got.detach(), *found), (expected.detach(), *wanted), strict=True):
        assert float((a.cpu().double() - b).norm() / b.norm()) < tolerance
