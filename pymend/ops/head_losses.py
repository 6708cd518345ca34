"""head_losses: ``token_losses`` of what a frozen linear head makes of its rows, some at a time.

The logits of all rows are never there at once, nor is their gradient: a chunk of rows goes through
the head, its losses are taken, and all that is kept of it are rows as wide as the head's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pymend.ops import token_losses as op
from pymend.ops.products import frozen_linear, product, spare_rows
from pymend.ops.token_losses import IGNORE, TokenLosses

# Logits of a chunk. Every chunk reads the head's weight again, so it should have many rows: this
# leaves 128 of them for a vocabulary of 128k in float16, more than most steps have. Three tensors
# of this size are alive at most (logits, those of the base, a gradient), which is as much as 384
# of the weight's own columns take.
CHUNK_BYTES = 2**25
# Row gradients are formed for this gradient of a loss. float16 needs it: differences of two
# probabilities of a large vocabulary lie below its smallest number. A power of two, undone exactly.
UNIT = {torch.float16: 2.0**10}


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    base_hidden: Tensor | None = None,
) -> TokenLosses:
    """``token_losses`` of logits = hidden weight^T + bias and of base = the same of base_hidden.

    Differentiable once in ``hidden``, for a gradient of nll and of kl each; the head is frozen and
    ``base_hidden`` a constant. The gradients are formed in the forward pass, while the logits are
    there: two products if both a target and a base are given, else one.

    Args:
        hidden: [k, d]; float64, float32, bfloat16 or float16.
        weight: [V, d], dtype and device of ``hidden``.
        bias: [V].
        target: [k] int64, or IGNORE; as in ``token_losses``.
        base_hidden: [k, d], dtype and device of ``hidden``.

    Returns:
        As ``token_losses``. Logits have the dtype that the head gives them.

    Raises:
        ValueError: shapes, devices or a target do not fit, or the head requires a gradient.
        TypeError: a dtype is not supported, or differs.
    """
    _check(hidden, weight, bias, target, base_hidden)
    k, spare = len(hidden), spare_rows(hidden, weight)
    if spare:
        hidden = F.pad(hidden, (0, 0, 0, spare))
        target = None if target is None else F.pad(target, (0, spare), value=IGNORE)
        base_hidden = None if base_hidden is None else F.pad(base_hidden, (0, 0, 0, spare))
    if hidden.requires_grad and torch.is_grad_enabled():
        losses = TokenLosses(*_HeadLosses.apply(hidden, weight, bias, target, base_hidden))
    else:
        losses, *_ = _in_chunks(hidden, weight, bias, target, base_hidden, differentiate=False)
    return TokenLosses(*(x[:k] for x in losses)) if spare else losses


def eager(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    target: Tensor | None = None,
    base_hidden: Tensor | None = None,
) -> TokenLosses:
    """The same in torch ops, from the logits of all rows at once: the yardstick."""
    base = None if base_hidden is None else F.linear(base_hidden.detach(), weight, bias)
    return op.eager(F.linear(hidden, weight, bias), target, base)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | None,
        base_hidden: Tensor | None,
    ) -> TokenLosses:
        losses, *grads = _in_chunks(hidden, weight, bias, target, base_hidden, differentiate=True)
        ctx.mark_non_differentiable(losses.best, losses.base_best)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads)
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total: Tensor | None = None
        for grad, rows in zip(grads, ctx.saved_tensors, strict=False):
            # Of an operand that was not given, nll or kl is empty, and so is its gradient.
            if grad is not None and rows is not None:
                term = (grad / UNIT.get(rows.dtype, 1.0))[:, None] * rows
                total = term if total is None else total + term
        grad_hidden = None if total is None else total.to(ctx.dtype)
        return grad_hidden, None, None, None, None  # weight, bias, target, base_hidden


@torch.no_grad()
def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    base_hidden: Tensor | None,
    differentiate: bool,
) -> tuple[TokenLosses, Tensor | None, Tensor | None]:
    """The losses and, if ``differentiate``, UNIT d nll / d hidden and UNIT d kl / d hidden."""
    rows = max(1, CHUNK_BYTES // (len(weight) * hidden.element_size()))
    # Equal chunks: a short last one would read the whole weight for a few rows.
    count = max(1, -(-len(hidden) // rows))
    chunks = zip(
        hidden.tensor_split(count),
        [None] * count if target is None else target.tensor_split(count),
        [None] * count if base_hidden is None else base_hidden.tensor_split(count),
        strict=True,
    )
    done = [_chunk(h, weight, bias, t, b, differentiate) for h, t, b in chunks]
    joined: Sequence[Any] = done[0]
    if count > 1:
        joined = [None if x[0] is None else torch.cat(x) for x in zip(*done, strict=True)]
    return TokenLosses(*joined[:4]), joined[4], joined[5]


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    base_hidden: Tensor | None,
    differentiate: bool,
) -> tuple[Any, ...]:
    """:func:`_in_chunks` for rows that are few enough, as one tuple; its logits end with it."""
    logits = frozen_linear(hidden, weight, bias).requires_grad_(differentiate)
    base = None if base_hidden is None else frozen_linear(base_hidden, weight, bias)
    with torch.set_grad_enabled(differentiate):
        losses = op.token_losses(logits, target, base)

    def towards_hidden(loss: Tensor) -> Tensor:
        unit = torch.full_like(loss, UNIT.get(logits.dtype, 1.0))
        (grad,) = torch.autograd.grad(loss, logits, unit, retain_graph=True)
        return product(grad, weight.t())

    grads = (
        towards_hidden(loss) if differentiate and operand is not None else None
        for loss, operand in zip(losses, (target, base), strict=False)
    )
    return (*(x.detach() for x in losses), *grads)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    base_hidden: Tensor | None,
) -> None:
    """Refuse what cannot be done, by the name and the value of the argument."""
    op.check_dtype("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, expected [k, d]")
    k, d = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != d or len(weight) == 0:
        raise ValueError(
            f"weight has shape {list(weight.shape)}, expected [V, {d}] with V above 0 for hidden "
            f"{[k, d]}"
        )
    vocabulary = len(weight)
    for name, tensor, shape in (
        ("weight", weight, [vocabulary, d]),
        ("bias", bias, [vocabulary]),
        ("base_hidden", base_hidden, [k, d]),
    ):
        if tensor is None:
            continue
        op.check_beside(name, tensor, shape, "hidden", hidden)
        # Under autocast the head casts whatever it is given.
        if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"{name} has dtype {tensor.dtype}, hidden has {hidden.dtype}")
        if tensor is not base_hidden and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which it would not get; freeze it")
    if target is not None:
        op.check_target(target, vocabulary, "hidden", hidden)
