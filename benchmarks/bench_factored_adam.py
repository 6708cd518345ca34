"""One optimiser step of an editor's matrix from the factors of its gradient: norm, clip, Adam.

    python benchmarks/bench_factored_adam.py      # all rivals interleaved, a table
    pytest benchmarks/bench_factored_adam.py      # the same calls under pytest-benchmark

Every rival takes the same factors (left [R, rows], right [R, cols]) and clips, for R rows.
"official" writes a fresh gradient, looks for NaN and Inf as the paper's code does, and runs Adam
unfused. "lean torch" is what autograd and torch's fused Adam do. "dense" is the optimiser's way
for many rows, "fused" the op with the Gram norm, its way for few. FUSED_ROWS of
pymend.ops.factored_adam is where the last two meet. The ceiling is a copy of 24 bytes an element
(matrix and moments, read and written), or the product's arithmetic if that is longer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from harness import Ceiling, Rival, Settings
from torch import Tensor, nn
from torch.optim.adam import adam

from pymend.ops.factored_adam import factored_adam, gram_norm

ROWS = (8, 24, 120, 240, 400, 800)
SHAPE = (2112, 1920)  # u of a network for SmolLM2's MLP matrices
QUICK = (66, 60)
RIVALS = ("official", "lean torch", "ours, dense", "ours, fused")
CLIP = 100.0
LEARNING_RATE = 1e-6


def rivals(shape: tuple[int, int], rows: int) -> dict[str, Rival]:
    """The rivals, each on a matrix of its own."""
    left, right = 0.1 * torch.randn(rows, shape[0]), 0.1 * torch.randn(rows, shape[1])

    def matrix() -> nn.Parameter:
        return nn.Parameter(torch.randn(shape))

    def torch_step(fused: bool) -> Callable[[], object]:
        p = matrix()
        optimizer = torch.optim.Adam([p], lr=LEARNING_RATE, fused=fused, foreach=False)

        def call() -> None:
            gradient = left.t() @ right
            if not fused:
                bool(gradient.isnan().any().item() or gradient.isinf().any().item())
            p.grad = gradient
            nn.utils.clip_grad_norm_([p], CLIP, foreach=False)
            optimizer.step()
            optimizer.zero_grad()

        return call

    def moments(p: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(p), torch.zeros_like(p)

    def dense() -> Callable[[], object]:
        p = matrix().detach()
        (first, second), buffer, step = moments(p), torch.empty_like(p), torch.zeros(())
        options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

        def call() -> None:
            torch.mm(left.t(), right, out=buffer)
            norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(buffer, dim=1)))
            if norm > CLIP:
                buffer.mul_(CLIP / norm)
            state = ([p], [buffer], [first], [second], [], [step])
            adam(*state, **options, lr=LEARNING_RATE, fused=True, amsgrad=False, maximize=False)

        return call

    def fused() -> Callable[[], object]:
        p = matrix().detach()
        first, second = moments(p)
        step = 0

        def call() -> None:
            nonlocal step
            step += 1
            norm = float(gram_norm(left, right))
            scale = torch.tensor(min(1.0, CLIP / norm))
            factored_adam(p, first, second, left, right, scale, lr=LEARNING_RATE, step=step)

        return call

    calls = (torch_step(fused=False), torch_step(fused=True), dense(), fused())
    # Of the product alone, for every rival alike: torch's counter does not know the op.
    flops = 2 * rows * shape[0] * shape[1]
    return {k: Rival(call, flops=flops) for k, call in zip(RIVALS, calls, strict=True)}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("rows", ROWS)
def test_factored_adam(benchmark: Any, settings: Settings, rows: int, rival: str) -> None:
    """Seconds of one step of one matrix."""
    shape = QUICK if settings.quick else SHAPE
    harness.under_pytest(benchmark, rivals(shape, rows)[rival])


def main(settings: Settings) -> None:
    """Print and record the table."""
    settings.apply()
    ceiling = Ceiling.measure(settings.quick)
    shape = QUICK if settings.quick else SHAPE
    moved = 24 * shape[0] * shape[1]
    table = []
    for rows in ROWS:
        for row in harness.compare(rivals(shape, rows), settings.rounds, ceiling, moved):
            table.append({**row, "rival": f"{row['rival']}, {rows} rows"})
    where = harness.environment(f"matrix {shape[0]} x {shape[1]}", settings, ceiling)
    harness.report("factored_adam", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__ or ""))
