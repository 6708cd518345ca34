"""NLL, KL and argmaxes of rows of logits, and their gradient: torch's ops against the one-pass op.

    python benchmarks/bench_token_losses.py      # times, memory peaks, a table

The rival is what the losses were before: cross_entropy, two log_softmax, exp and two argmax, on
float32 copies of bfloat16 logits. ``of a copy`` is the time of a copy that moves as many bytes as
the call must: both operands once, for a gradient once more and the gradient written.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYMEND_KERNELS", "all")

import itertools
import statistics
from collections.abc import Callable

import harness
import torch
import torch.nn.functional as F
from harness import Rival, Settings
from torch import Tensor

from pymend.ops.token_losses import token_losses

VOCABULARIES = (49152, 128256)  # of SmolLM2, of Llama 3
ROWS = (2, 20, 200)
DTYPES = (torch.float32, torch.bfloat16)
RIVALS = ("torch", "ours")


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


def operands(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits, targets and a base beside the logits."""
    logits = 3 * torch.randn(rows, vocabulary)
    base = (logits + 0.1 * torch.randn_like(logits)).to(dtype)
    return logits.to(dtype), torch.randint(vocabulary, (rows,)), base


def main(settings: Settings) -> None:
    """Print and record the table, or the memory peak of one rival."""
    settings.apply()
    if settings.peak_of:
        name, rows, vocabulary, dtype = settings.peak_of.split(",")
        inputs = operands(int(rows), int(vocabulary), getattr(torch, dtype))
        harness.print_extra_peak(rival(name, *inputs, backward=True).call)
        return
    grid = list(itertools.product(VOCABULARIES, ROWS, DTYPES))
    if settings.quick:
        grid = [(500, 2, torch.float32)]
    table = []
    for vocabulary, rows, dtype in grid:
        text = str(dtype).removeprefix("torch.")
        cases = [f"{name},{rows},{vocabulary},{text}" for name in RIVALS]
        peaks = [harness.extra_peak(__file__, case, settings) for case in cases]
        inputs = operands(rows, vocabulary, dtype)
        for backward in (False, True):
            source = torch.ones((5 if backward else 2) * rows * vocabulary // 2, dtype=dtype)
            goal = torch.empty_like(source)
            rivals = {name: rival(name, *inputs, backward) for name in RIVALS}
            rivals["copy"] = Rival(lambda goal=goal, source=source: goal.copy_(source))
            seconds = harness.interleaved(rivals, settings.rounds, warmup=2)
            median = {name: statistics.median(times) for name, times in seconds.items()}
            for name, peak in zip(RIVALS, peaks, strict=True):
                table.append(
                    {
                        "rival": name,
                        "rows": rows,
                        "vocabulary": vocabulary,
                        "dtype": text,
                        "pass": "forward+backward" if backward else "forward",
                        "seconds": median[name],
                        "times faster": median["torch"] / median[name],
                        "of a copy": median["copy"] / median[name],
                        "extra MiB": peak / 2**20,
                    }
                )
    where = harness.environment("none", settings, harness.Ceiling.measure(settings.quick))
    where.pop("dtype")
    harness.report("token_losses", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
