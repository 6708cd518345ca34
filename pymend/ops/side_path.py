"""side_path: alpha (x u~^T) d~, the low-rank change of a layer's output. No m x n tensor.

A plain autograd function over GEMMs; a fused kernel would gain under 1 % end to end. Many rows at
once, as of a hundred simultaneous edits on a small model, cost less as x (u~^T d~), which is then
streamed through one part of the output's columns after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PARTS = 4  # of the output's columns, when they are streamed


def side_path(x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """The amount an edit takes off a layer's output (paper, Eq. 1 and section 3).

    Args:
        x: layer inputs, [t, a] or [episodes, t, a]; any floating dtype and any strides.
        u: [n, a] or [episodes, n, a], x's dtype and device; padded rows are zero.
        delta: [n, b] or [episodes, n, b], likewise.
        alpha: step size, a scalar tensor; any floating dtype, x's device.

    Returns:
        [t, b] or [episodes, t, b] in x's dtype, differentiable once in every argument.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: a dtype is not x's, or not floating.
    """
    _check(x, u, delta, alpha)
    return _SidePath.apply(x, u, delta, alpha)


def routed_side_path(x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor, same: Tensor) -> Tensor:
    """The same where a row of x is changed by some rows of u and delta only.

    Args:
        x, u, delta, alpha: as for :func:`side_path`; differentiable.
        same: [t, n] or [episodes, t, n], which rows belong together: those of the same expert.
    """
    return alpha * ((x @ u.mT).masked_fill(~same, 0) @ delta)


def eager(x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """The same under torch's own autograd: the yardstick."""
    return alpha * ((x @ u.mT) @ delta)


class _SidePath(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
        ctx.streamed = _streamed(x, u, delta)
        s = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.streamed:
                product = torch.cat([x @ (u.mT @ d) for d in delta.chunk(PARTS, -1)], -1)
            else:
                s = x @ u.mT  # [..., t, n]
                product = s @ delta  # [..., t, b]
        ctx.save_for_backward(x, u, delta, alpha, s)
        return alpha * product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, delta, alpha, s = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            if ctx.streamed:
                return _backward_streamed(ctx.needs_input_grad, x, u, delta, alpha, grad)
            need_x, need_u, need_delta, need_alpha = ctx.needs_input_grad
            p = grad @ delta.mT  # [..., t, n]
            return (
                alpha * (p @ u) if need_x else None,
                alpha * (p.mT @ x) if need_u else None,
                alpha * (s.mT @ grad) if need_delta else None,
                (s * p).sum() if need_alpha else None,
            )


def _streamed(x: Tensor, u: Tensor, delta: Tensor) -> bool:
    """Whether u~^T d~ comes first: it takes t + n times a x b products, not t n times a + b.

    Of half as many at least, since parts of a product are slower than the whole.
    Never in half precision, where a sum over the parts would be rounded at each of them.
    """
    (t, a), (n, b) = x.shape[-2:], delta.shape[-2:]
    return x.dtype.itemsize >= 4 and 2 * (t + n) * a * b < t * n * (a + b)


def _backward_streamed(
    need: Sequence[bool], x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients, some of the output's columns at a time."""
    need_x, need_u, need_delta, need_alpha = need
    of_x, of_u, of_alpha = torch.zeros_like(x), torch.zeros_like(u), x.new_zeros(())
    of_delta = []
    add = Tensor.addmm_ if x.dim() == 2 else Tensor.baddbmm_
    for d, g in zip(delta.chunk(PARTS, -1), grad.chunk(PARTS, -1), strict=True):
        if need_x or need_alpha:
            change = u.mT @ d  # [..., a, columns]
        if need_u or need_delta or need_alpha:
            wanted = x.mT @ g
        if need_x:
            add(of_x, g, change.mT)
        if need_u:
            add(of_u, d, wanted.mT)
        if need_delta:
            of_delta.append(u @ wanted)
        if need_alpha:
            of_alpha += (change * wanted).sum()
    return (
        alpha * of_x if need_x else None,
        alpha * of_u if need_u else None,
        alpha * torch.cat(of_delta, -1) if need_delta else None,
        of_alpha if need_alpha else None,
    )


def _check(x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor) -> None:
    """Refuse what cannot be done, by the name and the value of the argument."""
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {list(x.shape)}, expected [t, a] or [episodes, t, a]")
    *episodes, _, a = x.shape
    n, b = (t.shape[i] if t.dim() == x.dim() else 0 for t, i in ((u, -2), (delta, -1)))
    for name, tensor, shape in (
        ("x", x, list(x.shape)),
        ("u", u, [*episodes, n, a]),
        ("delta", delta, [*episodes, n, b]),
        ("alpha", alpha, []),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, expected {shape} for x {list(x.shape)}"
                + f" and u {list(u.shape)}" * (name == "delta")
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
        if tensor.dtype != x.dtype and name != "alpha":
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected x's {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
