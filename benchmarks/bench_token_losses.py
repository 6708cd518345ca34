"""NLL, KL and argmaxes of rows of logits, and their gradient: torch's ops against the one-pass op.

    python benchmarks/bench_token_losses.py      # times, memory peaks, a table
    pytest benchmarks/bench_token_losses.py      # both passes under pytest-benchmark

The rival is what the losses were before: cross_entropy, two log_softmax, exp and two argmax, on
float32 copies of bfloat16 logits. "copy" moves as many bytes as the call must: both operands once,
for a gradient once more and the gradient written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Ceiling, Rival, Settings
from torch import Tensor

from pymend.ops.token_losses import token_losses

VOCABULARIES = (49152, 128256)  # of SmolLM2, of Llama 3
ROWS = (2, 20, 200)
DTYPES = (torch.float32, torch.bfloat16)
GRID = tuple(itertools.product(VOCABULARIES, ROWS, DTYPES))
QUICK = ((500, 2, torch.float32),)
RIVALS = ("torch", "ours")
PASSES = {False: "forward", True: "forward+backward"}


def torch_losses(logits: Tensor, target: Tensor, base: Tensor) -> tuple[Tensor, ...]:
    """The losses and scores in torch's own ops."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    nll = F.cross_entropy(logits.to(wide), target, reduction="none")
    p, q = F.log_softmax(base.to(wide), -1), F.log_softmax(logits.to(wide), -1)
    kl = (p.exp() * (p - q)).sum(-1)
    return nll, kl, logits.argmax(-1), base.argmax(-1)


def rival(name: str, logits: Tensor, target: Tensor, base: Tensor, backward: bool) -> Rival:
    """One call of ``name``; with ``backward``, the gradient of the sum of both losses too."""
    losses: Callable[..., tuple[Tensor, ...]] = torch_losses if name == "torch" else token_losses
    logits = logits.clone().requires_grad_(backward)

    def call() -> object:
        nll, kl, *scores = losses(logits, target, base)
        return torch.autograd.grad((nll + kl).sum(), logits) if backward else scores

    return Rival(call)


def copy(logits: Tensor, backward: bool) -> tuple[Rival, int]:
    """A copy that moves as many bytes as the call must, and how many these are."""
    source = torch.ones((5 if backward else 2) * logits.numel() // 2, dtype=logits.dtype)
    target = torch.empty_like(source)
    return Rival(lambda: target.copy_(source)), 2 * source.numel() * source.element_size()


def operands(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits, targets and a base beside the logits."""
    logits = 3 * torch.randn(rows, vocabulary)
    base = (logits + 0.1 * torch.randn_like(logits)).to(dtype)
    return logits.to(dtype), torch.randint(vocabulary, (rows,)), base


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(("vocabulary", "rows", "dtype"), GRID)
def test_token_losses(
    benchmark: Any, settings: Settings, vocabulary: int, rows: int, dtype: torch.dtype, name: str
) -> None:
    """Seconds of the losses and their gradient."""
    if settings.quick:
        vocabulary, rows, dtype = QUICK[0]
    inputs = operands(rows, vocabulary, dtype)
    harness.under_pytest(benchmark, rival(name, *inputs, backward=True))


def main(settings: Settings) -> None:
    """Print and record the table, or the memory peak of one rival."""
    settings.apply()
    if settings.peak_of:
        name, rows, vocabulary, dtype = settings.peak_of.split(",")
        inputs = operands(int(rows), int(vocabulary), getattr(torch, dtype))
        harness.print_extra_peak(rival(name, *inputs, backward=True).call)
        return
    grid = QUICK if settings.quick else GRID
    cases = [(v, rows, str(dtype).removeprefix("torch."), dtype) for v, rows, dtype in grid]
    # First, while this process is small: a child's recorded peak begins at its parent's.
    peaks = {
        (name, v, rows, text): harness.extra_peak(__file__, f"{name},{rows},{v},{text}", settings)
        for v, rows, text, _ in cases
        for name in RIVALS
    }
    ceiling = Ceiling.measure(settings.quick)
    table = []
    for vocabulary, rows, text, dtype in cases:
        inputs = operands(rows, vocabulary, dtype)
        for backward, passes in PASSES.items():
            rivals = {name: rival(name, *inputs, backward) for name in RIVALS}
            rivals["copy"], moved = copy(inputs[0], backward)
            about = {"vocabulary": vocabulary, "rows": rows, "dtype": text, "pass": passes}
            for row in harness.compare(rivals, settings.rounds, ceiling, moved):
                peak = peaks.get((row["rival"], vocabulary, rows, text))
                extra = peak / 2**20 if peak is not None and backward else None
                table.append({"rival": row.pop("rival"), **about, **row, "extra MiB": extra})
    where = harness.environment("random logits", settings, ceiling)
    where.pop("dtype")
    harness.report("token_losses", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
