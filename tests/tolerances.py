"""How far a result may be from the truth: one rule and one table for every op."""

from __future__ import annotations

import torch
from torch import Tensor

# Half a unit in the last place, relative: what a single rounding may do.
ROUNDING = {
    dtype: torch.finfo(dtype).eps / 2
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

# How many floors plain torch may be off: it rounds after each of its operations.
EAGER = 16


def floor(dtype: torch.dtype, length: int) -> float:
    """Relative error granted to anyone: one rounding to ``dtype``, and a sum of ``length`` terms.

    Sums run in float32, in float64 for float64, so a low-precision result is mostly its rounding.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return ROUNDING[dtype] + max(length, 1) * ROUNDING[wide]


def largest(exact: Tensor) -> float:
    """What errors are relative to: the largest value of the truth."""
    return (exact.abs().max().item() if exact.numel() else 0.0) or 1.0


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest error against a float64 truth, relative to the largest value of the truth."""
    assert exact.dtype == torch.float64, "the truth is float64"
    assert actual.shape == exact.shape, f"{actual.shape} against {exact.shape}"
    if exact.numel() == 0:
        return 0.0
    return (actual.double().cpu() - exact).abs().max().item() / largest(exact)


def assert_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    length: int,
    size: float = 0.0,
    through: torch.dtype | None = None,
) -> None:
    """Plain torch within EAGER floors of the truth, ours at most twice as far, plus a floor.

    The first keeps a wrong ``eager`` from widening what the second allows.

    Args:
        actual, eager: results of one dtype; exact: the truth, float64.
        length: number of terms of the longest sum behind an element.
        size: of the terms, where the largest result is small because they cancel.
        through: the dtype of what came before the result, if it rounds more than the result's.
    """
    assert actual.dtype == eager.dtype, f"{actual.dtype} against {eager.dtype}"
    ours, theirs = error(actual, exact), error(eager, exact)
    bound = EAGER * floor(through or eager.dtype, length) * max(1.0, size / largest(exact))
    assert theirs <= bound, f"eager: error {theirs:.3g}, allowed {bound:.3g}"
    allowed = 2 * theirs + floor(actual.dtype, length)
    assert ours <= allowed, f"error {ours:.3g}, allowed {allowed:.3g} (eager {theirs:.3g})"
