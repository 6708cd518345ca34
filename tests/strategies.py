"""What the op tests draw from: sizes that hurt, odd strides, scales, zero rows, block sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = (0, 1, 31, 32, 33)

sizes = st.sampled_from(SIZES)
seeds = st.integers(0, 2**31 - 1)
scales = st.sampled_from((1e-12, 1e-3, 1.0, 1e3))
dtypes = st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))

# For the schedules of an emulated kernel; other tests hold the results of other blocks to 64's.
blocks = pytest.mark.parametrize(
    "block", [pytest.param(b, marks=() if b == 64 else pytest.mark.slow) for b in (32, 64, 256)]
)


@st.composite
def factors(draw: st.DrawFn, n: int, width: int) -> Tensor:
    """[n, width] float32 of some scale, at times with zero rows, at times not contiguous."""
    generator = torch.Generator().manual_seed(draw(seeds))
    values = torch.randn(n, width, generator=generator) * draw(scales)
    if n and draw(st.booleans()):
        values[draw(st.integers(0, n - 1))] = 0
    return draw(st.sampled_from((values, with_strides(values), values.t().contiguous().t())))


def with_strides(values: Tensor) -> Tensor:
    """The same values in every second column of a wider tensor, at an odd offset."""
    rows, cols = values.shape
    wide = torch.full((rows, 2 * cols + 1), float("nan"), dtype=values.dtype)
    wide[:, 1::2] = values
    return wide[:, 1::2]
