"""rank_update: W -= alpha * sum_r delta_r u_r^T, in place, for a list of matrices.

Sums run in float32 (float64 for float64 weights), and each element is rounded once: to nearest, or
at random, up or down so that the expected value is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymend import _lib

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEEDED = (torch.bfloat16, torch.float16)  # can be rounded at random
MASK = 2**32 - 1
BLOCK_ROWS = 64  # of a weight, updated together in eager(): the temporaries stay in the cache


def rank_update(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    alpha: Tensor,
    transposed: Sequence[bool] | None = None,
    seed: int | None = None,
) -> Tensor:
    """Write W[i] - alpha[i] * sum_r delta[i]_r u[i]_r^T into every W[i]; return the fidelities.

    The op is not differentiable: it writes into its weights and stands outside of autograd.
    Everything is checked before anything is written. Inside ``torch.compile`` only shapes, dtypes
    and devices are checked; values and overlaps cannot be.

    Args:
        weights: matrices, written in place. W[i] is [b, a] (Linear), or [a, b] where
            ``transposed[i]`` (Conv1D); float64, float32, bfloat16 or float16, mixed as you like;
            contiguous, or the transpose of a contiguous matrix.
        u: [n, a] each; delta: [n, b] each; n may differ between matrices. Any floating dtype and
            any strides, on the device of W[i]; used as float32, as float64 for a float64 W[i].
        alpha: [len(weights)], step sizes.
        transposed: one flag per matrix; all False if not given.
        seed: round bfloat16 and float16 weights at random (wider ones to nearest as ever). W[i]
            draws from ``seed + i`` and the position in memory: the same bits on every device.

    Returns:
        [len(weights)], alpha's device, float32 (float64 if alpha is): how much of the wanted change
        survived the rounding, ``<applied, wanted> / |wanted|^2``; 1 where nothing was wanted.

    Raises:
        ValueError: lengths, shapes, devices, strides or overlaps are wrong, or u, delta, alpha or
            the update they make is not finite.
        TypeError: a dtype is not supported.
        RuntimeError: a tensor requires grad while grad mode is on.
    """
    flags = [False] * len(weights) if transposed is None else [bool(t) for t in transposed]
    check_operands(weights, u, delta, alpha, flags)
    if not torch.compiler.is_compiling():
        check_overlap(weights, u, delta, alpha)
        _check_finite(weights, u, delta, alpha)
    return unchecked(weights, u, delta, alpha, flags, seed)


@torch.no_grad()
def unchecked(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    alpha: Tensor,
    transposed: Sequence[bool],
    seed: int | None = None,
) -> Tensor:
    """``rank_update`` of operands that passed its checks; reads no value, so nothing waits."""
    out = _accumulate(alpha.dtype)
    if not weights:
        return alpha.new_empty(0, dtype=out)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        groups[weight.device, weight.dtype].append(i)
    # Picked by views, not by a list of indices: that would be copied to the device.
    steps = alpha.unbind()
    fidelity = list(steps)
    for (device, dtype), members in groups.items():
        acc = _accumulate(dtype)
        # A transposed view of a contiguous matrix is that matrix, its layout flag turned over.
        plain = [weights[i].is_contiguous() for i in members]
        result = _run(
            [weights[i] if p else weights[i].t() for i, p in zip(members, plain, strict=True)],
            [u[i].to(acc).contiguous() for i in members],
            [delta[i].to(acc).contiguous() for i in members],
            torch.stack([steps[i] for i in members]).to(device, acc),
            [transposed[i] == p for i, p in zip(members, plain, strict=True)],
            [] if seed is None or dtype not in SEEDED else [seed + i for i in members],
        )
        for i, kept in zip(members, result.to(alpha.device, out).unbind(), strict=True):
            fidelity[i] = kept
    if not torch.compiler.is_compiling():
        mark_written(weights)
    return torch.stack(fidelity)


def mark_written(weights: Sequence[Tensor]) -> None:
    """Tell autograd that ``weights`` were written; it cannot see what a kernel does."""
    for weight in weights:
        if not weight.is_inference():
            torch.autograd.graph.increment_version(weight)


def eager(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    alpha: Tensor,
    transposed: Sequence[bool],
    seeds: Sequence[int] = (),
) -> Tensor:
    """The same in torch ops, on any device: fallback, yardstick, and float64's way on a CPU.

    A block of rows at a time, so that no second matrix of a weight's size appears. torch's GEMM
    forms the wanted change of the block, which both the update and the fidelity need.
    """
    fidelity = []
    operands = zip(weights, u, delta, alpha, transposed, strict=True)
    for i, (weight, u_i, delta_i, step, flag) in enumerate(operands):
        acc = _accumulate(weight.dtype)
        row, col = (u_i, delta_i) if flag else (delta_i, u_i)  # [n, rows], [n, cols]
        row, col = row.to(acc), col.to(acc)
        kept = torch.zeros(2, dtype=torch.float64, device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            for number, (block, row_block) in enumerate(
                zip(weight.split(BLOCK_ROWS), row.split(BLOCK_ROWS, dim=1), strict=True)
            ):
                wanted = (row_block.t() @ col) * -step.to(acc)  # [rows, cols]
                before = block.to(acc, copy=True)
                new = before + wanted
                if seeds:
                    first = number * BLOCK_ROWS * weight.shape[1]
                    new = _round_randomly(new, weight.dtype, seeds[i], first)
                block.copy_(new)
                applied = block.to(acc).sub(before).flatten().double()
                wanted = wanted.flatten().double()
                kept += torch.stack([applied @ wanted, wanted @ wanted])
        fidelity.append(torch.where(kept[1] > 0, kept[0] / kept[1], 1.0))
    return torch.stack(fidelity).to(alpha.dtype) if fidelity else alpha.new_empty(0)


def _round_randomly(x: Tensor, dtype: torch.dtype, seed: int, first: int) -> Tensor:
    """float32 values that ``dtype`` holds exactly; ``csrc/math/rounding.h`` has the same rule.

    Args:
        first: position of x's first element in its matrix.
    """
    position = torch.arange(first, first + x.numel(), device=x.device).view_as(x)
    low = position + (seed & MASK) * 0x9E3779B9
    high = (position >> 32) + (seed >> 32 & MASK) * 0x9E3779B9
    random = _mix_bits(_mix_bits(low & MASK) + high & MASK)
    if dtype == torch.bfloat16:
        dropped, values = 16, x
    else:
        dropped, values = 13, x.clamp(-65536.0, 65536.0)  # 65536: the next step after the largest
    word = values.view(torch.int32).long() & MASK
    kept = (word + (random >> (32 - dropped)) & MASK) >> dropped << dropped
    rounded = torch.where(kept > MASK // 2, kept - MASK - 1, kept).int().view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 steps are 2^-24 wide: count them
        steps = values.abs() * 2.0**24
        up = (random >> 8) * 2.0**-24 < steps - steps.floor()
        subnormal = ((steps.floor() + up) * 2.0**-24).copysign(values)
        rounded = torch.where(values.abs() < 2.0**-14, subnormal, rounded)
    return torch.where(x.isfinite(), rounded, x)


def _mix_bits(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


def _run(
    weights: list[Tensor],
    u: list[Tensor],
    delta: list[Tensor],
    alpha: Tensor,
    flags: list[bool],
    seeds: Sequence[int] = (),
) -> Tensor:
    """One device and one dtype. On a CPU float64, which nobody is in a hurry for, is torch's."""
    device = weights[0].device
    wide_on_cpu = weights[0].dtype == torch.float64 and device.type == "cpu"
    if wide_on_cpu or not _lib.use_kernel("rank_update", device):
        return eager(weights, u, delta, alpha, flags, seeds)
    return torch.ops.pymend.rank_update.default(weights, u, delta, alpha, flags, list(seeds))


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_operands(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    alpha: Tensor,
    flags: Sequence[bool],
) -> None:
    """Refuse what cannot be done, by the name of the argument; values are not read."""
    count = len(weights)
    for name, values in (("u", u), ("delta", delta), ("transposed", flags)):
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries for {count} weights")
    if tuple(alpha.shape) != (count,):
        raise ValueError(f"alpha has shape {_shape(alpha)}, expected [{count}]: one per weight")
    _check_factor("alpha", alpha, alpha.device)
    for i, (weight, flag) in enumerate(zip(weights, flags, strict=True)):
        name = f"weights[{i}]"
        if weight.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {weight.dtype}, expected one of {_names(DTYPES)}")
        if weight.dim() != 2:
            raise ValueError(f"{name} has shape {_shape(weight)}, expected a matrix")
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires grad, and rank_update writes in place outside of autograd: "
                "call it under torch.no_grad()"
            )
        if not (weight.is_contiguous() or weight.t().is_contiguous()):
            raise ValueError(
                f"{name} has strides {tuple(weight.stride())} for shape {_shape(weight)}; expected "
                "a contiguous matrix or its transpose: update a contiguous copy and write it back"
            )
        _check_factor(f"u[{i}]", u[i], weight.device)
        _check_factor(f"delta[{i}]", delta[i], weight.device)
        b, a = reversed(weight.shape) if flag else weight.shape
        if u[i].dim() != 2 or u[i].shape[1] != a:
            raise ValueError(
                f"u[{i}] has shape {_shape(u[i])}, expected [n, {a}] for {name} {_shape(weight)}"
                + " in Conv1D layout" * flag
            )
        n = u[i].shape[0]
        if tuple(delta[i].shape) != (n, b):
            raise ValueError(
                f"delta[{i}] has shape {_shape(delta[i])}, expected [{n}, {b}] for {name} "
                f"{_shape(weight)} and u[{i}] {_shape(u[i])}" + " in Conv1D layout" * flag
            )


def _check_factor(name: str, tensor: Tensor, device: torch.device) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, its weight is on {device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, and rank_update is not differentiable: "
            "detach it, or call under torch.no_grad()"
        )


def check_overlap(
    weights: Sequence[Tensor], u: Sequence[Tensor], delta: Sequence[Tensor], alpha: Tensor
) -> None:
    """No weight may share memory with another operand: the result would depend on the order."""
    spans = []  # device, first byte, past the last byte, name, whether written
    named = [("weights", weights, True), ("u", u, False), ("delta", delta, False)]
    for kind, tensors, written in named:
        spans += [(*_span(t), f"{kind}[{i}]", written) for i, t in enumerate(tensors) if t.numel()]
    if alpha.numel():
        spans.append((*_span(alpha), "alpha", False))
    spans.sort(key=lambda span: span[:3])
    last: tuple[Any, ...] | None = None  # the span that reaches furthest
    last_written: tuple[Any, ...] | None = None
    for span in spans:
        before = last if span[4] else last_written
        if before is not None and before[0] == span[0] and span[1] < before[2]:
            raise ValueError(f"{before[3]} and {span[3]} share memory")
        if last is None or last[0] != span[0] or span[2] > last[2]:
            last = span
        if span[4]:
            last_written = span


def _span(tensor: Tensor) -> tuple[str, int, int]:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((size - 1) * stride for size, stride in steps) + 1
    start = tensor.data_ptr()
    return str(tensor.device), start, start + reach * tensor.element_size()


def _check_finite(
    weights: Sequence[Tensor], u: Sequence[Tensor], delta: Sequence[Tensor], alpha: Tensor
) -> None:
    """Refuse non-finite operands, and updates that may leave the range of a weight's dtype.

    The bound, |alpha| * sum_r max|delta_r| max|u_r|, costs a pass over the factors only; a GPU is
    waited for once.
    """
    reach = [_reach(*pair).to(alpha.device) for pair in zip(u, delta, strict=True)]
    bounds = (alpha.abs().double() * torch.stack(reach)).tolist() if reach else []
    for i, (weight, bound) in enumerate(zip(weights, bounds, strict=True)):
        limit = torch.finfo(weight.dtype).max
        if bound <= limit:
            continue
        refuse_non_finite(i, u[i], delta[i], alpha[i])
        raise ValueError(
            f"the update of weights[{i}] may leave the range of {weight.dtype}: an element "
            f"may change by up to {bound:.3g}, the largest value is {limit:.3g}"
        )


def _reach(u: Tensor, delta: Tensor) -> Tensor:
    """sum_r max|delta_r| max|u_r|, a double."""
    if not (u.numel() and delta.numel()):
        return u.new_zeros((), dtype=torch.float64)
    return u.abs().amax(dim=1).double() @ delta.abs().amax(dim=1).double()


def refuse_non_finite(i: int, u: Tensor, delta: Tensor, alpha: Tensor) -> None:
    """Raise ValueError for the first operand of weight ``i`` that is not finite, if any is."""
    for name, tensor in ((f"u[{i}]", u), (f"delta[{i}]", delta), (f"alpha[{i}]", alpha)):
        bad = ~tensor.isfinite()
        if bad.any():
            where = bad.nonzero()[0].tolist()
            raise ValueError(
                f"{name} is not finite: {tensor[tuple(where)].item()}"
                + (f" at {where}" if where else "")
                + f"; weights[{i}] was left alone, and so were the others"
            )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


if _lib.has_kernels():

    @torch.library.register_fake("pymend::rank_update")
    def _fake(
        weights: list[Tensor],
        u: list[Tensor],
        delta: list[Tensor],
        alpha: Tensor,
        transposed: list[bool],
        seeds: list[int],
    ) -> Tensor:
        return torch.empty_like(alpha)  # [len(weights)]
