"""Edit and locality losses and their teacher-forced scores, on label rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymend.engine.tokens import IGNORE
from pymend.ops.head_losses import head_losses
from pymend.ops.token_losses import TokenLosses, eager, token_losses


@dataclass(frozen=True)
class LabelRows:
    """What a model makes of the label positions of a batch.

    ``values`` are the inputs [k, d] of ``head``, whose output is the model's; where the model has
    no such head, ``head`` is None and ``values`` are logits [k, vocabulary].
    """

    values: Tensor
    head: nn.Linear | None

    def losses(
        self,
        target: Tensor | None = None,
        base: LabelRows | None = None,
        second_order: bool = False,
    ) -> TokenLosses:
        """``token_losses`` of the logits, against targets [k] and the rows of the base model.

        Args:
            second_order: in plain torch, which can be differentiated twice.
        """
        constant = None if base is None else base.values
        if second_order:
            logits = self.values if self.head is None else self.head(self.values)
            return eager(logits, target, constant)
        if self.head is None:
            return token_losses(self.values, target, constant)
        return head_losses(self.values, self.head.weight, self.head.bias, target, constant)


def class_logits(values: Tensor) -> Tensor:
    """A classifier's output as logits [rows, classes]; one logit z is the two classes (0, z)."""
    return values if values.shape[1] > 1 else F.pad(values, (1, 0))


def mean_per_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean of ``values`` [k] over each of ``rows`` rows; NaN for a row without values."""
    total = values.new_zeros(rows).index_add(0, row, values)
    return total / values.new_zeros(rows).index_add(0, row, torch.ones_like(values))


def mean_of_seen(values: Tensor, target: Tensor, row: Tensor, rows: int) -> Tensor:
    """:func:`mean_per_row` over the positions whose target is not IGNORE."""
    seen = target != IGNORE
    # Picking them by a mask would make the host wait for a GPU.
    total = values.new_zeros(rows).index_add(0, row, values.where(seen, 0))
    return total / values.new_zeros(rows).index_add(0, row, seen.to(values.dtype))


def hits_rows(best: Tensor, target: Tensor, row: Tensor, rows: int) -> Tensor:
    """Share of positions of each row [rows] whose ``best`` [k] is the target (1.0: exact match)."""
    return mean_of_seen((best == target).double(), target, row, rows)
