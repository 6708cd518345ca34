"""Running mean and variance of the rows an editor network has been trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-7  # added to the standard deviation, not under the root
CONSTANT = 1e-6  # relative spread below which a dimension counts as constant


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

    def _inverse(self) -> Tensor:
        """1 / (sigma + EPS) per dimension; 0 for a constant one."""
        k = self.count.to(self.m2.dtype)
        sigma = (self.m2 / (k - 1).clamp(min=1)).sqrt()
        inverse = 1 / (sigma + EPS)
        if self.official:
            return inverse
        return torch.where(self.m2 <= k * (CONSTANT * self.mean).square(), 0.0, inverse)

    def normalise(self, x: Tensor) -> Tensor:
        """(x - mean) / (sigma + EPS) for rows x [n, d], in x's dtype."""
        if not self.count:
            raise RuntimeError("the editor has seen no training example; train it before editing")
        return ((x.to(self.mean.dtype) - self.mean) * self._inverse()).to(x.dtype)

    @torch.no_grad()
    def merge_and_normalise(self, x: Tensor, counts: list[int]) -> Tensor:
        """Merge segments of ``counts`` rows one after the other, as in training.

        Each segment is normalised with the moments that already include it: the order of work of
        the paper's loop over examples and weights.
        """
        out = torch.empty_like(x)
        for segment, normalised in zip(x.split(counts), out.split(counts), strict=True):
            if len(segment):
                rows = segment.to(self.mean.dtype)
                mean = rows.mean(0)
                self._merge(len(rows), mean, (rows - mean).square().sum(0))
                normalised.copy_((rows - self.mean) * self._inverse())
        return out

    def _merge(self, n: int, mean: Tensor, m2: Tensor) -> None:
        """Chan, Golub, LeVeque: moments of the union of two sets from the moments of each."""
        difference = mean - self.mean
        k = self.count.to(self.mean.dtype)  # a quotient of integers would be float32
        self.m2 += m2 + difference.square() * (k * n / (k + n))
        self.mean += difference * (n / (k + n))
        self.count += n
