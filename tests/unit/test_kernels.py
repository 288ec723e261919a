"""Hand-written gradients against autograd on the plain expressions, in fp64."""

import pytest
import torch
from torch.nn import functional as F

from specflow.drafters.rotary import _Rotate
from specflow.kernels import linear, rms_norm, take_rows


def inputs(*shapes):
    g = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]


def check(got, expected, tensors, tolerance=1e-12):
    assert torch.allclose(got, expected, atol=tolerance)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(8), dtype=got.dtype)
    found, wanted = torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=tolerance)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm(eps):
    x, weight = inputs((6, 10), (10,))
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    check(rms_norm(x, weight, eps), expected, [x, weight])
    assert torch.allclose(rms_norm(x.detach(), weight, eps), expected, atol=1e-12)  # its weight alone has a gradient


def test_rows_are_taken_once_each_and_their_gradient_goes_back():
    (x,) = inputs((7, 3))
    rows = torch.tensor([5, 0, 3])
    check(take_rows(x, rows), x[rows], [x])


def test_the_gradient_of_a_rotation_is_the_rotation_back():
    (x,) = inputs((5, 2, 8))
    angles = torch.linspace(0.1, 2.9, 20, dtype=torch.float64).view(5, 4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    left, right = x.chunk(2, -1)
    expected = x * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]
    signed = sin * torch.tensor([-1.0] * 4 + [1.0] * 4)
    check(_Rotate.apply(x, cos, signed), expected, [x])


def test_products_through_onednn_equal_torchs():
    """fp32, the dtype that takes the other way; rounding depends on the order of summation."""
    x, weight = (t.detach().float().requires_grad_() for t in inputs((40, 24), (56, 24)))
    check(linear(x, weight), F.linear(x, weight), [x, weight], tolerance=1e-4)
