"""Edit and locality losses and their teacher-forced scores, on label rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pymend.ops.token_losses import token_losses
from pymend.tokens import IGNORE


def mean_per_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean of ``values`` [k] over each of ``rows`` rows; NaN for a row without values."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / values.new_zeros(rows).index_add(0, row, torch.ones_like(values))


def mean_of_seen(values: Tensor, target: Tensor, row: Tensor, rows: int) -> Tensor:
    """:func:`mean_per_row` over the positions whose target is not IGNORE."""
    seen = target != IGNORE
    return mean_per_row(values[seen], row[seen], rows)


def nll_rows(logits: Tensor, target: Tensor, row: Tensor, rows: int) -> Tensor:
    """Token mean of -log p(target) of each row [rows], from logits [k, vocabulary], float32 up.

    Positions whose target is IGNORE do not count.
    """
    return mean_of_seen(token_losses(logits, target).nll, target, row, rows)


def kl_rows(base: Tensor, edited: Tensor, row: Tensor, rows: int) -> Tensor:
    """Token mean of KL(base || edited) of each row [rows]; base [k, vocabulary] is a constant."""
    return mean_per_row(token_losses(edited, base=base).kl, row, rows)


def hits_rows(best: Tensor, target: Tensor, row: Tensor, rows: int) -> Tensor:
    """Share of positions of each row [rows] whose ``best`` [k] is the target (1.0: exact match)."""
    return mean_of_seen((best == target).double(), target, row, rows)
