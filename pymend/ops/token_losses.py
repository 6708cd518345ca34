"""token_losses: the NLL of a target, KL(base || edited) and the argmax, for every row of logits.

Sums run in float32 (float64 for float64 logits); no copy of the logits is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pymend import _lib

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
IGNORE = -100  # a target that does not count, as in torch


class TokenLosses(NamedTuple):
    """Per row of logits, [k] each; empty, [0], where its target or base was not given."""

    nll: Tensor
    kl: Tensor
    best: Tensor
    base_best: Tensor


def token_losses(
    logits: Tensor, target: Tensor | None = None, base: Tensor | None = None
) -> TokenLosses:
    """Losses of edit and locality (paper, Eq. 4), and what their scores need, in one pass.

    With q = softmax(logits) and p = softmax(base), row by row: nll = -log q[target] and
    kl = sum_j p_j (log p_j - log q_j). A term whose p is 0 is 0: a masked vocabulary, -inf in both,
    does no harm. Differentiable once in ``logits``; ``base`` is a constant.

    Args:
        logits: [k, V]; float64, float32, bfloat16 or float16; any strides, but rows that are not
            contiguous are copied.
        target: [k] int64, or IGNORE: that row's nll is 0 and has no gradient. On a GPU, and inside
            ``torch.compile``, a target outside of the vocabulary is not refused: on a GPU its nll
            is NaN.
        base: [k, V], dtype and device of ``logits``.

    Returns:
        nll and kl [k], float32 (float64 for float64 logits); best and base_best [k] int64, the
        lowest index of the largest logit; a NaN counts as largest, as in ``torch.argmax``.

    Raises:
        ValueError: shapes, devices or a target do not fit.
        TypeError: a dtype is not supported.
    """
    _check(logits, target, base)
    base = None if base is None else base.detach()
    if not _lib.use_kernel("token_losses", logits.device):
        return eager(logits, target, base)
    *losses, _ = torch.ops.pymend.token_losses.default(
        _rows(logits),
        None if target is None else target.contiguous(),
        None if base is None else _rows(base),
    )
    return TokenLosses(*losses)


def eager(logits: Tensor, target: Tensor | None = None, base: Tensor | None = None) -> TokenLosses:
    """The same in torch ops, on any device: fallback and yardstick."""
    acc = _accumulate(logits.dtype)
    log_q = logits.to(acc).log_softmax(-1)
    nll = kl = log_q.new_empty(0)
    best = logits.argmax(-1)
    base_best = best.new_empty(0)
    if target is not None:
        nll = F.nll_loss(log_q, target, reduction="none", ignore_index=IGNORE)
    if base is not None:
        log_p = base.to(acc).log_softmax(-1)
        p = log_p.exp()
        kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
        base_best = base.argmax(-1)
    return TokenLosses(nll, kl, best, base_best)


def _rows(x: Tensor) -> Tensor:
    """``x`` with contiguous rows, at any distance from each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(logits: Tensor, target: Tensor | None, base: Tensor | None) -> None:
    """Refuse what cannot be done, by the name and the value of the argument."""
    check_dtype("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [k, V] with V above 0")
    if target is not None:
        check_target(target, logits.shape[1], "logits", logits)
    if base is not None:
        if base.dtype != logits.dtype:
            raise TypeError(f"base has dtype {base.dtype}, logits has {logits.dtype}")
        check_beside("base", base, list(logits.shape), "logits", logits)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Refuse a dtype that losses cannot be taken in."""
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {names}")


def check_target(target: Tensor, vocabulary: int, name: str, rows: Tensor) -> None:
    """Refuse a target that does not fit the rows of ``rows``, the argument called ``name``."""
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}, expected int64")
    check_beside("target", target, [len(rows)], name, rows)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (target != IGNORE) & ((target < 0) | (target >= vocabulary))
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(
                f"target[{i}] is {int(target[i])}, expected 0 to {vocabulary - 1}, or {IGNORE}"
            )


def check_beside(name: str, tensor: Tensor, shape: list[int], other: str, rows: Tensor) -> None:
    """Refuse a tensor of another shape than ``shape``, or on another device than ``rows``."""
    if list(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, expected {shape} for {other} "
            f"{list(rows.shape)}"
        )
    if tensor.device != rows.device:
        raise ValueError(f"{name} is on {tensor.device}, {other} is on {rows.device}")


if _lib.has_kernels():

    @torch.library.register_fake("pymend::token_losses")
    def _fake(
        logits: Tensor, target: Tensor | None, base: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        k, acc = logits.shape[0], _accumulate(logits.dtype)
        with_target, with_base = 0 if target is None else k, 0 if base is None else k
        return (
            logits.new_empty(with_target, dtype=acc),
            logits.new_empty(with_base, dtype=acc),
            logits.new_empty(k, dtype=torch.int64),
            logits.new_empty(with_base, dtype=torch.int64),
            logits.new_empty(k, 4, dtype=acc),
        )

    @torch.library.register_fake("pymend::token_losses_backward")
    def _fake_backward(
        grad_nll: Tensor | None,
        grad_kl: Tensor | None,
        logits: Tensor,
        target: Tensor | None,
        base: Tensor | None,
        stats: Tensor,
    ) -> Tensor:
        return logits.new_empty(logits.shape)

    def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[4])

    @once_differentiable
    def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, base, stats = ctx.saved_tensors
        # Of an operand that was not given, nll or kl is empty, and so is its gradient.
        wanted = (
            None if g is None or operand is None else g.contiguous()
            for g, operand in zip(grads[:2], (target, base), strict=True)
        )
        grad = torch.ops.pymend.token_losses_backward.default(*wanted, logits, target, base, stats)
        return grad, None, None  # target, base: constants

    torch.library.register_autograd("pymend::token_losses", _backward, setup_context=_setup)
