"""Running mean and variance of the rows an editor network has been trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pymend.ops.moments import EPS, joined, moments


class RunningMoments(nn.Module):
    """Mean and M2 per dimension by Chan's merge, equal to Welford's row-by-row rule up to rounding.

    Buffers: ``mean`` and ``m2`` [d] float64 (``official``: float32), ``count`` int64; all saved.
    ``official`` divides a constant dimension by EPS as the paper's code does; otherwise it gives 0.
    """

    mean: Tensor
    m2: Tensor
    count: Tensor

    def __init__(self, d: int, official: bool = False) -> None:
        super().__init__()
        dtype = torch.float32 if official else torch.float64
        self.official = official
        self.register_buffer("mean", torch.zeros(d, dtype=dtype))
        self.register_buffer("m2", torch.zeros(d, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMoments:
        """Follow the module to another device, and keep the precision whatever it is cast to."""
        self.count = fn(self.count)
        self.mean, self.m2 = self.mean.to(self.count.device), self.m2.to(self.count.device)
        return self

    def forward(
        self,
        u: Sequence[Tensor],
        delta: Sequence[Tensor],
        counts: Sequence[int],
        merge: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Rows of several weights, normalised: z [sum of counts, a + b] in ``dtype``.

        With ``merge`` each segment is taken in first and normalised with the moments that already
        include it: the order of work of the paper's loop over examples and weights.

        Args:
            u, delta, counts: as in ``pymend.ops.moments``.
        """
        if not merge and not self.count and any(counts):  # no row where there never was a gradient
            raise RuntimeError("the editor has seen no training example; train it before editing")
        if not self.official:
            return moments(u, delta, counts, self.mean, self.m2, self.count, merge, dtype)[0]
        x = joined(u, delta, counts).to(dtype)
        return self._merge_official(x, counts) if merge else self._normalise_official(x)

    def _normalise_official(self, x: Tensor) -> Tensor:
        sigma = (self.m2 / (self.count.float() - 1).clamp(min=1)).sqrt()
        return ((x.float() - self.mean) * (1 / (sigma + EPS))).to(x.dtype)

    @torch.no_grad()
    def _merge_official(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        out = torch.empty_like(x)
        for segment, normalised in zip(x.split(counts), out.split(counts), strict=True):
            n = len(segment)
            if n:
                rows = segment.float()
                mean = rows.mean(0)
                m2 = (rows - mean).square().sum(0)
                difference = mean - self.mean
                k = self.count.float()  # a quotient of integers would be float32
                self.m2 += m2 + difference.square() * (k * n / (k + n))
                self.mean += difference * (n / (k + n))
                self.count += n
                normalised.copy_(self._normalise_official(rows))
        return out
