"""Edit and locality losses and their teacher-forced scores, on label rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymend.tokens import IGNORE


def mean_per_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean of ``values`` [k] over each of ``rows`` rows; NaN for a row without values."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / values.new_zeros(rows).index_add(0, row, torch.ones_like(values))


def nll_rows(logits: Tensor, target: Tensor, row: Tensor, rows: int) -> Tensor:
    """Token mean of -log p(target) of each row [rows], from logits [k, vocabulary], float32 up.

    Positions whose target is IGNORE do not count.
    """
    seen = target != IGNORE
    nll = F.cross_entropy(_wide(logits[seen]), target[seen], reduction="none")
    return mean_per_row(nll, row[seen], rows)


def kl_rows(base: Tensor, edited: Tensor, row: Tensor, rows: int) -> Tensor:
    """Token mean of KL(base || edited) of each row [rows]; base [k, vocabulary] is a constant."""
    p = F.log_softmax(_wide(base.detach()), -1)
    q = F.log_softmax(_wide(edited), -1)
    return mean_per_row((p.exp() * (p - q)).sum(-1), row, rows)


def hits_rows(logits: Tensor, target: Tensor, row: Tensor, rows: int) -> Tensor:
    """Share of positions of each row [rows] whose argmax is the target (1.0: exact match)."""
    seen = target != IGNORE
    hits = (logits[seen].argmax(-1) == target[seen]).double()
    return mean_per_row(hits, row[seen], rows)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
