"""Losses and scores of label rows, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import assert_close
from torch import Tensor, nn

from pymend.engine.losses import LabelRows, class_logits, hits_rows, mean_of_seen, mean_per_row
from pymend.engine.tokens import IGNORE

f64 = torch.float64
ROW = torch.tensor([0, 0, 0, 2, 2])  # of three rows the middle one has no position
VALUES = torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0], dtype=f64)


def test_means_of_rows() -> None:
    assert mean_per_row(VALUES, ROW, 3).tolist() == pytest.approx([3, math.nan, 15], nan_ok=True)
    assert mean_per_row(VALUES, ROW // 2, 2).tolist() == [3, 15]


def test_an_ignored_position_counts_for_nothing() -> None:
    target = torch.tensor([7, IGNORE, 8, IGNORE, 9])
    assert mean_of_seen(VALUES, target, ROW, 3).tolist() == pytest.approx(
        [3.5, math.nan, 20], nan_ok=True
    )
    nothing = torch.full_like(target, IGNORE)
    assert mean_of_seen(VALUES, nothing, ROW, 3).isnan().all()


def test_hits_are_shares_of_what_is_asked() -> None:
    target = torch.tensor([7, IGNORE, 8, 9, 9])
    best = torch.tensor([7, IGNORE, 1, 9, 9])  # what is ignored cannot be right
    assert hits_rows(best, target, ROW, 3).tolist() == pytest.approx(
        [0.5, math.nan, 1], nan_ok=True
    )


def test_one_logit_is_that_of_true() -> None:
    z = torch.tensor([[2.0], [-3.0]])
    assert class_logits(z).tolist() == [[0, 2], [0, -3]]
    assert class_logits(torch.ones(2, 3)).shape == (2, 3)


LOGITS = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]], dtype=f64)
BASE = torch.tensor([[0.0, 0.0], [0.0, math.log(9)]], dtype=f64)
TARGET = torch.tensor([1, IGNORE])


def rows(logits: Tensor, head: bool) -> LabelRows:
    """Label rows of these logits: as they are, or as inputs of a head that hands them on."""
    if not head:
        return LabelRows(logits, None)
    linear = nn.Linear(2, 2, dtype=f64)
    linear.weight = nn.Parameter(torch.eye(2, dtype=f64).flip(1), requires_grad=False)
    linear.bias = nn.Parameter(torch.ones(2, dtype=f64), requires_grad=False)
    return LabelRows((logits - 1).flip(1), linear)


@pytest.mark.parametrize(("head", "second_order"), [(False, False), (True, False), (False, True)])
def test_losses_by_hand(head: bool, second_order: bool) -> None:
    """Probabilities (1/4, 3/4) and (4/5, 1/5); the base has (1/2, 1/2) and (1/10, 9/10)."""
    look = rows(LOGITS, head).losses(TARGET, rows(BASE, head), second_order)
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    second = 0.1 * math.log(1 / 8) + 0.9 * math.log(4.5)
    assert_close(look.kl, torch.tensor([first, second], dtype=f64), "KL from the base", 1e-12)
    assert look.nll[0].item() == pytest.approx(-math.log(0.75), rel=1e-12)
    assert look.best.tolist() == [1, 0] and look.base_best.tolist()[1] == 1
    # A model that is its own base has moved nowhere.
    again = rows(LOGITS, head).losses(TARGET, rows(LOGITS, head))
    assert again.kl.abs().max() < 1e-15 and torch.equal(again.best, again.base_best)


def test_losses_against_targets_alone() -> None:
    for head in (False, True):
        look = rows(LOGITS, head).losses(TARGET)
        assert look.nll[0].item() == pytest.approx(-math.log(0.75), rel=1e-12)
        assert look.best.tolist() == [1, 0]
