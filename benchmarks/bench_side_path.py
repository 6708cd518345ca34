"""Differentiating through an edited layer: the side path against a dense edited weight.

    python benchmarks/bench_side_path.py      # all rivals interleaved, a table
    pytest benchmarks/bench_side_path.py      # the same calls under pytest-benchmark

Every rival runs a layer of GPT-2's shape forward and backward, on T tokens and an edit of N rows,
down to the gradients of the input, both factors and the step size. "dense" forms W - alpha *
delta^T u, and so a gradient of the weight's size; "ours" adds a low-rank term to the output. "no
edit" is the layer alone, with the gradient of its input: what neither can save.
"""

from __future__ import annotations

import itertools
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Ceiling, Rival, Settings
from torch import Tensor

from pymend.ops.side_path import side_path

SHAPE = (3072, 768)  # b, a
QUICK = (40, 24)
ROWS, TOKENS = (8, 32), (32, 64, 256)
RIVALS = ("dense", "ours", "no edit")
GOAL = 2.0


def rivals(shape: tuple[int, int], n: int, tokens: int) -> dict[str, Rival]:
    """The rivals on one layer, one input and one edit."""
    b, a = shape
    weight, grad = torch.randn(b, a) / a**0.5, torch.randn(tokens, b)
    x, u, delta = (torch.randn(size) for size in ((tokens, a), (n, a), (n, b)))
    alpha = torch.tensor(1e-3)
    operands = [t.requires_grad_() for t in (x, u, delta, alpha)]

    def dense() -> tuple[Tensor, ...]:
        y = F.linear(x, weight - alpha * (delta.t() @ u))
        return torch.autograd.grad(y, operands, grad)

    def ours() -> tuple[Tensor, ...]:
        y = F.linear(x, weight) - side_path(x, u, delta, alpha)
        return torch.autograd.grad(y, operands, grad)

    def no_edit() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.linear(x, weight), x, grad)

    return {"dense": Rival(dense), "ours": Rival(ours, goal=GOAL), "no edit": Rival(no_edit)}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("n", ROWS)
def test_side_path(benchmark: Any, settings: Settings, n: int, tokens: int, rival: str) -> None:
    """Seconds forward and backward."""
    shape = QUICK if settings.quick else SHAPE
    harness.under_pytest(benchmark, rivals(shape, n, tokens)[rival], rounds=20)


def main(settings: Settings) -> None:
    """Print and record the table."""
    settings.apply()
    ceiling = Ceiling.measure(settings.quick)
    b, a = QUICK if settings.quick else SHAPE
    table = []
    for n, tokens in itertools.product(ROWS, TOKENS):
        # Both passes of every rival read the weight.
        measured = harness.compare(
            rivals((b, a), n, tokens), 4 * settings.rounds, ceiling, 2 * 4 * a * b
        )
        # In place of the environment's tokens, which are those of whole models.
        table += [{"rival": row.pop("rival"), "N": n, "T": tokens, **row} for row in measured]
    where = harness.environment(f"layer {b} x {a}", settings, ceiling)
    where.pop("tokens")
    harness.report("side_path", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
