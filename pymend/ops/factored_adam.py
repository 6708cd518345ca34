"""factored_adam: Adam on a matrix whose gradient exists only as factors, G = left^T right.

The gradient of an editor's matrix is a sum over the rows that went through it. Where the rows are
few, product, clip factor and Adam fit in one pass over the matrix and its moments: the kernel is
for CPUs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pymend import _lib
from pymend.ops.rank_update import _shape, _span

# Most rows for which the op beats torch's product and fused Adam, measured with 2 threads
# (benchmarks/bench_factored_adam.py).
FUSED_ROWS = 128
CANCELLED = 0.1  # a norm's square below this share of that of orthogonal rows has lost digits


def fused_rows(param: Tensor) -> int:
    """The most rows for which the step of ``param`` should go through the op; 0: never.

    Of a parameter's dtype, device and layout, it depends on nothing that changes during a run.
    """
    return FUSED_ROWS if _native(param) else 0


def gram_norm(left: Tensor, right: Tensor) -> Tensor:
    """``|left^T right|`` (Frobenius) without the product: sqrt(sum((A A^T) * (B B^T))).

    Where rows cancel, or their squares leave the range of float32, the Gram matrices are formed
    again in float64: a small sum of large terms has no digits left in float32.

    Args:
        left: [n, rows]; right: [n, cols].

    Returns:
        A scalar, float64, on their device.
    """

    def square(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Of the norm, as it is and as it would be with orthogonal rows."""
        grams = (a @ a.t()).double() * (b @ b.t())
        return grams.sum(), grams.diagonal().sum()

    with torch.no_grad(), torch.autocast(left.device.type, enabled=False):
        value, apart = square(left, right)
        if not CANCELLED * apart < value < math.inf:
            value, _ = square(left.double(), right.double())
        return value.clamp(min=0).sqrt()


def factored_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    step: int,
) -> None:
    """One step of Adam (Kingma & Ba 2015, Algorithm 1) for the gradient G = scale * left^T right.

    m <- m + (1 - beta1) (G - m), v <- beta2 v + (1 - beta2) G^2,
    param <- param - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps): ``torch.optim.Adam``
    to rounding. The three matrices are written in place; the op is not differentiable.

    Args:
        param, exp_avg, exp_avg_sq: [rows, cols], float32 or float64, of one dtype and device.
        left: [n, rows]; right: [n, cols]; any floating dtype and any strides, used in param's.
        scale: a scalar on the same device, so that a clip factor need not be read back.
        step: t, the number of this step, from 1.

    Raises:
        ValueError: a shape, device, setting or overlap is wrong.
        TypeError: a dtype is not supported.
        RuntimeError: a tensor requires grad while grad mode is on.
    """
    _check(param, exp_avg, exp_avg_sq, left, right, scale, beta1, beta2, eps, step)
    written = (param, exp_avg, exp_avg_sq)
    with torch.no_grad():
        left, right, scale = (t.to(param.dtype) for t in (left, right, scale))
        if all(_native(t) for t in written):
            factors = (left.contiguous(), right.contiguous(), scale)
            kernel = torch.ops.pymend.factored_adam.default
            kernel(*written, *factors, lr, beta1, beta2, eps, step)
        else:
            eager(*written, left, right, scale, lr, beta1, beta2, eps, step)
        if not torch.compiler.is_compiling():
            for tensor in written:
                if not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)


def eager(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """The same in torch ops, on any device and in any dtype; it forms the gradient."""
    with torch.autocast(param.device.type, enabled=False):
        gradient = (left.t() @ right) * scale
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))


def _native(tensor: Tensor) -> bool:
    fits = tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu"
    return fits and _lib.use_kernel("factored_adam", tensor.device)


def _check(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """Refuse what cannot be done, by the name and the value of the argument."""
    if param.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"param has dtype {param.dtype}, expected float32 or float64")
    if param.dim() != 2:
        raise ValueError(f"param has shape {_shape(param)}, expected a matrix")
    rows, cols = param.shape
    n = left.shape[0] if left.dim() else 0
    shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [
        ("param", param, (rows, cols)),
        ("exp_avg", exp_avg, (rows, cols)),
        ("exp_avg_sq", exp_avg_sq, (rows, cols)),
        ("left", left, (n, rows)),
        ("right", right, (n, cols)),
        ("scale", scale, ()),
    ]
    for name, tensor, shape in shapes:
        if tuple(tensor.shape) != shape:
            expected = f"[n, {rows}]" if name == "left" else str(list(shape))
            raise ValueError(
                f"{name} has shape {_shape(tensor)}, expected {expected} for param {_shape(param)}"
                + f" and left {_shape(left)}" * (name == "right")
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
        if name.startswith("exp") and tensor.dtype != param.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected param's {param.dtype}")
        if tensor.device != param.device:
            raise ValueError(f"{name} is on {tensor.device}, param is on {param.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires grad, and factored_adam writes in place outside of autograd: "
                "call it under torch.no_grad()"
            )
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value}, expected at least 0 and below 1")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, expected 0 or more")
    if step < 1:
        raise ValueError(f"step is {step}, expected 1 or more")
    if not torch.compiler.is_compiling():
        _check_overlap([(name, tensor) for name, tensor, _ in shapes if tensor.numel()])


def _check_overlap(operands: list[tuple[str, Tensor]]) -> None:
    """None of the written tensors may share memory with another operand."""
    spans = [(name, *_span(tensor)) for name, tensor in operands]
    for i, (name, device, begin, end) in enumerate(spans):
        if name not in ("param", "exp_avg", "exp_avg_sq"):
            continue
        for other, other_device, other_begin, other_end in spans[i + 1 :]:
            if device == other_device and begin < other_end and other_begin < end:
                raise ValueError(f"{name} and {other} share memory")


if _lib.has_kernels():

    @torch.library.register_fake("pymend::factored_adam")
    def _fake(
        param: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
    ) -> None:
        return None
