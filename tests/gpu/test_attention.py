"""What only a GPU shows: the flex-attention path and its gradients. Skipped without one."""

import pytest
import torch

from specflow.drafters.attention import ttt_attention
from tests.unit.drafters.test_eagle3 import attention_case, dense_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: flex attention has no CPU backward"),
]


def test_flex_attention_and_its_gradients_equal_dense_softmax():
    tensors, prefix, grad = attention_case(torch.float32)
    expected = dense_attention(tensors, prefix)
    wanted = torch.autograd.grad(expected, tensors, grad)
    # flex attention wants head sizes of at least 16: pad the heads with zeros and keep the scale of the small ones
    pad = 16 - tensors[0].shape[-1]
    moved = [torch.nn.functional.pad(t.detach(), (0, pad)).cuda().requires_grad_() for t in tensors]
    q, k, v, *own = moved
    scaled = q * (16 / (16 - pad)) ** 0.5
    got = ttt_attention(scaled, k, v, own[:2], own[2:], prefix)
    assert torch.allclose(got[..., :-pad].cpu(), expected, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(got, moved, torch.nn.functional.pad(grad, (0, pad)).cuda()), wanted, strict=True
    ):
        assert torch.allclose(a[..., :-pad].cpu(), b, atol=1e-4)
