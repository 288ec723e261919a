"""Matrix products on CPU through oneDNN, for inference (prepacked weights) and for training (autograd), and the few
operations whose gradients torch makes slow.

The fp32 GEMM that torch picks on x86 (MKL) is slow for the few rows of a verification step on every CPU, and on AMD
CPUs it also leaves AVX-512 unused: measured here, 190 GFLOP/s against oneDNN's 440. On any other device, dtype or build
these functions are torch's own; callers need not know.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specflow.device import execution

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_PACKS_BF16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not without AVX-512
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
# read at the first product: training meets some thousand shapes, of which oneDNN by itself remembers 1024
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return _ONEDNN and a.dtype == b.dtype == torch.float32 and execution(a.device).own_kernels


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b[n, k].T by oneDNN; operands of any stride."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = _product(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] @ weight[out, in].T -> [rows, out], differentiable."""
    if _by_onednn(x, weight) and not torch.is_autocast_enabled("cpu"):
        return _OneDnnLinear.apply(x, weight)
    return F.linear(x, weight)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] @ b [k, n], no gradient: for hand-written backward passes."""
    if _by_onednn(a, b):
        return _product(a, b.t())
    return a @ b


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        along = torch.mv(product, weight).div_(weight.numel())[:, None]
        return (grad * weight).addcmul_(normed, along, value=-1).mul_(scale), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, n] / RMS(x) * weight [n]. While training on a CPU with half the passes of torch's own, which has no
    kernel for the gradient there.
    """
    if x.dtype == weight.dtype and torch.is_grad_enabled() and execution(x.device).own_kernels:
        return _RmsNorm.apply(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)  # torch's fused kernel takes one dtype


def argmax(x: Tensor) -> Tensor:
    """Place [...] of the largest value of x [..., n], the first among equals."""
    if execution(x.device).host_memory:  # numpy's takes a tenth of torch's time
        return torch.from_numpy(np.asarray(x.detach().float().numpy().argmax(-1)))
    return x.argmax(-1)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, rows, grad), None


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] for `rows` that are all different: the gradient is copied, where that of an index adds row by row."""
    return _TakeRows.apply(x, rows)


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where the C library is glibc: temporaries of megabytes are otherwise given
    back and their pages faulted in anew, which is a tenth of a training step of the demo and a fifth of a prefill.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the highest it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


class PrepackedLinear(nn.Module):
    """nn.Linear for inference with its weight in oneDNN's blocked layout; the plain weight is not kept.

    With a `dtype` the product runs in it; what comes in and what comes out keep the dtype of `x`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype or weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype).contiguous())
        self.bias = None if bias is None else bias.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.dtype:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "").to(x.dtype)


def packable(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a weight on this device and in `dtype`, by default its own, gains from oneDNN's blocked layout."""
    dtype = dtype or weight.dtype
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and _PACKS_BF16)
    return _ONEDNN and known and execution(weight.device).own_kernels


def fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively; elsewhere it is converted at every use."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def prepack(model: nn.Module) -> nn.Module:
    """Replace every linear layer below `model` by its prepacked form, in place, where this CPU gains from it.

    For inference only. Exact types: a subclass with a forward of its own stays. Leaves anything but fp32 or bf16 on CPU
    untouched, so a GPU path stays plain torch.
    """
    for name, child in model.named_children():
        if type(child) is nn.Linear and packable(child.weight):
            setattr(model, name, PrepackedLinear(child.weight, child.bias))
        else:
            prepack(child)
    return model
