"""Products of float32 matrices on a CPU, through oneDNN where it beats torch's default GEMM.

torch gives float32 products on a CPU to MKL, which was 1.1 (190 rows) to 2 times (20 rows) slower
than the oneDNN that comes with the same torch on an AMD machine (``benchmarks/bench_products.py``).
Edits have few rows, so both the frozen model and the editor gain. Everything that is not a large
float32 product on a CPU, ``torch.compile`` and ``PYMEND_KERNELS=off`` go the usual way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pymend import _lib

# Elements of a matrix below which a call loses: oneDNN prepares each new number of rows, half a
# millisecond, and gains little where MKL's operands stay in the cache.
SMALL = 2**18
FEW = 4  # rows that MKL multiplies faster than two or three
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [..., k] times w [m, k] transposed -> [..., m]; not differentiable."""
    return _through_onednn(x, w, None) if _wins(x, w) else F.linear(x, w)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose parameters get no gradient: x [..., a] -> [..., b], for weight [b, a].

    Differentiable once in ``x``. Parameters that do require a gradient go the usual way.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if (trained and torch.is_grad_enabled()) or not _wins(x, weight):
        return F.linear(x, weight, bias)
    if x.requires_grad and torch.is_grad_enabled():
        return _FrozenLinear.apply(x, weight, bias)
    return _through_onednn(x, weight, bias)


def spare_rows(x: Tensor, w: Tensor) -> int:
    """How many zero rows below x [k, n] make its product with ``w`` faster.

    MKL is slower at two and three rows than at four; oneDNN is not, and neither are the halves.
    """
    mkl = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return FEW - len(x) if mkl and 1 < len(x) < FEW and not _wins(x, w) else 0


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _through_onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None, None  # x, weight, bias


def _wins(x: Tensor, w: Tensor) -> bool:
    """Whether oneDNN is there, does the same arithmetic, and is worth its longer call."""
    return (
        not torch.compiler.is_compiling()  # compilers choose their products themselves
        and x.dtype == w.dtype == torch.float32
        and x.device.type == w.device.type == "cpu"
        and w.numel() >= SMALL
        and x.shape[-1] == w.shape[-1]  # if not, torch's own call says so better
        and _onednn is not None
        and bool(torch.backends.mkldnn.enabled)
        # A reduced precision, asked for by --matmul, is honoured by torch's own call only.
        and torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
        and _lib.gate() != "off"
    )


def _through_onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    assert _onednn is not None
    return _onednn(x, w, bias, "none", [], "")
