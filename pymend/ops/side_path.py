"""side_path: alpha (x u~^T) d~, the low-rank change of a layer's output. No m x n tensor.

A plain autograd function over thin GEMMs; a fused kernel would gain under 1 % end to end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SidePath(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
        s = x @ u.mT  # [..., t, n]
        product = s @ delta  # [..., t, b]
        ctx.save_for_backward(x, u, delta, alpha, s)
        return alpha * product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, delta, alpha, s = ctx.saved_tensors
        need_x, need_u, need_delta, need_alpha = ctx.needs_input_grad
        p = grad @ delta.mT  # [..., t, n]
        return (
            alpha * (p @ u) if need_x else None,
            alpha * (p.mT @ x) if need_u else None,
            alpha * (s.mT @ grad) if need_delta else None,
            (s * p).sum() if need_alpha else None,
        )


def side_path(x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """The amount an edit takes off a layer's output (paper, Eq. 1 and section 3).

    Args:
        x: layer inputs, [t, a] or [episodes, t, a].
        u: [n, a] or [episodes, n, a]; padded rows are zero.
        delta: [n, b] or [episodes, n, b].
        alpha: step size, a scalar tensor.

    Returns:
        [t, b] or [episodes, t, b], differentiable once in every argument.
    """
    return _SidePath.apply(x, u, delta, alpha)
