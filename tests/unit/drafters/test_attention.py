"""Attention of training: both ways against the definition, and the block mask of a GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from specflow.drafters import attention
from specflow.drafters.attention import BLOCK, Prefix, Segment, block_mask
from tests.choices import flex_trains_on_cpu
from tests.on_device.attention import Shape, check_attention, random_prefix

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_own", [0, 3])
def test_segment_attention_and_its_gradients_equal_dense_softmax(seed: int, num_own: int) -> None:
    check_attention(CPU, torch.float64, 1e-12, Shape(num_own=num_own, head_dim=8), seed)


@pytest.mark.parametrize("num_own", [0, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)], ids=str)
def test_flex_attention_and_its_joint_gradient_equal_dense_softmax(
    as_gpu: None, dtype: torch.dtype, tolerance: float, num_own: int
) -> None:
    check_attention(CPU, dtype, tolerance, Shape(num_documents=5, longest=120, num_own=num_own))


def test_flex_attention_is_captured_whole_and_not_anew_for_each_batch(
    as_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the compiled kernel is: by the same tracing with dynamic shapes, behind which plain operations run here."""
    captured = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal captured
        captured += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=count)
    monkeypatch.setattr(attention, "_flex_attention", lambda wanted: compiled)
    for seed in range(3, 7):
        check_attention(CPU, torch.float32, 1e-5, Shape(num_documents=5, longest=120), seed)
    assert captured <= 2
    torch._dynamo.reset()


def visible_pairs(mask: BlockMask) -> torch.Tensor:
    """[M, N] bool: what a kernel takes the mask for. A whole block is seen without a look inside, one that is not
    listed never.
    """
    num_queries, num_keys = mask.seq_lengths
    q, k = torch.arange(num_queries)[:, None], torch.arange(num_keys)[None]
    inside = mask.mask_mod(torch.tensor(0), torch.tensor(0), q.expand(-1, num_keys), k.expand(num_queries, -1))

    def spread(counts: Any, indices: Any) -> torch.Tensor:
        listed = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row, (count, index) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            listed[row, index[:count].long()] = True
        return listed.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:num_queries, :num_keys]

    some = spread(mask.kv_num_blocks, mask.kv_indices)
    every = spread(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (some & every).any()
    return (some & inside) | every


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("num_documents", "longest"), [(1, 700), (4, 400), (40, 30), (2, 3)])
def test_the_block_mask_is_the_one_that_looking_at_every_pair_gives(
    num_documents: int, longest: int, seed: int
) -> None:
    """Several documents in a block, several runs in a document, rows and queries that fill no last block."""
    prefix, num_keys = random_prefix(Shape(num_documents, longest), seed)
    got = block_mask(prefix, num_keys, CPU)
    first, last = prefix.bounds()
    expected = create_block_mask(
        lambda b, h, q, k: (k >= first[q]) & (k <= last[q]), None, None, len(first), num_keys, device="cpu"
    )
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert torch.equal(got.to_dense(), expected.to_dense())
    keys = torch.arange(num_keys)
    assert torch.equal(visible_pairs(got), (keys >= first[:, None]) & (keys <= last[:, None]))


class Largest(TorchDispatchMode):
    """The largest tensor, in bytes, and the sum of all that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
                self.total += x.untyped_storage().nbytes()
        return result


def causal(num_rows: int) -> Prefix:
    return Prefix([Segment(0, num_rows, 0, 0)])


def test_the_block_masks_memory_grows_with_rows() -> None:
    """16,384 rows of one document, the densest mask there is: a mask of pairs would take 268 MB as bytes."""
    rows = 16384
    with Largest() as largest:
        block_mask(causal(rows), rows, CPU)
    assert largest.bytes <= 8 * rows  # an int64 a row, or a block's index
    assert largest.total < 400 * rows
    with Largest() as dense:
        first, last = causal(512).bounds()
        create_block_mask(lambda b, h, q, k: (k >= first[q]) & (k <= last[q]), None, None, 512, 512, device="cpu")
    assert dense.bytes >= 512 * 512, "what would be counted"


def test_torch_still_refuses_flex_attentions_gradient_on_a_cpu() -> None:
    """When it no longer does, `flex_trains_on_cpu` can go."""
    x = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        flex_attention(x, x, x)
    with flex_trains_on_cpu():
        flex_attention(x, x, x).sum().backward()
    assert x.grad is not None and x.grad[..., 0, 0] == 1.0
