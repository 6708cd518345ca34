"""Merging edits, W -= alpha * sum_r delta_r u_r^T in place: torch's addmm_ against the op.

    python benchmarks/bench_rank_update.py      # all rivals interleaved, a table
    pytest benchmarks/bench_rank_update.py      # the same calls under pytest-benchmark

One call updates every one of several copies of a matrix, more than the caches hold, so that each
comes from memory as in a model. addmm_ takes factors in the dtype of the weight, the op takes them
in float32, checks them, and says how much of the change survived the rounding. "copy" reads and
writes as many bytes as the weights have.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import harness
import pytest
import torch
from harness import Ceiling, Rival, Settings

from pymend.ops.rank_update import rank_update

SHAPES = {"SmolLM2": (1536, 576), "GPT-2": (3072, 768), "GPT-Neo": (10240, 2560)}
QUICK = {"tiny": (40, 24)}
ROWS = (8, 32, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOTAL = 2**26  # bytes of all copies together, at least
RIVALS = ("torch addmm_", "ours", "copy")
# Wanted on a CPU, where torch's addmm_ rounds 16-bit products and reads the weight slowly. float32
# merges form the change by torch's GEMM, for the fidelity: no goal.
GOALS = {torch.bfloat16: 3.0, torch.float16: 3.0, torch.float32: 0.0}
ALPHA = 1e-6  # so that thousands of calls do not move a weight out of its usual range


def copies(shape: tuple[int, int], dtype: torch.dtype, quick: bool) -> int:
    """How many matrices one call updates."""
    return 2 if quick else math.ceil(TOTAL / (shape[0] * shape[1] * dtype.itemsize)) + 1


def rivals(shape: tuple[int, int], n: int, dtype: torch.dtype, count: int) -> dict[str, Rival]:
    """The rivals on weights of their own, ``n`` rows of factors each."""
    b, a = shape
    theirs, ours = ([(0.02 * torch.randn(b, a)).to(dtype) for _ in range(count)] for _ in range(2))
    u, delta = ([torch.randn(n, size) for _ in range(count)] for size in (a, b))
    narrow = [(d.t().to(dtype), v.to(dtype)) for d, v in zip(delta, u, strict=True)]
    alpha = torch.full((count,), ALPHA)
    source = torch.zeros(count * b * a, dtype=dtype)
    target = torch.zeros_like(source)

    def addmm() -> None:
        for weight, factors in zip(theirs, narrow, strict=True):
            weight.addmm_(*factors, alpha=-ALPHA)

    flops = 2 * n * a * b * count  # torch's counter knows neither
    return {
        "torch addmm_": Rival(addmm, flops=flops),
        "ours": Rival(lambda: rank_update(ours, u, delta, alpha), goal=GOALS[dtype], flops=flops),
        "copy": Rival(lambda: target.copy_(source), flops=0),
    }


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_rank_update(
    benchmark: Any, settings: Settings, name: str, dtype: torch.dtype, n: int, rival: str
) -> None:
    """Seconds to update all copies of a matrix."""
    shape = QUICK["tiny"] if settings.quick else SHAPES[name]
    count = copies(shape, dtype, settings.quick)
    harness.under_pytest(benchmark, rivals(shape, n, dtype, count)[rival], matrices=count)


def main(settings: Settings) -> None:
    """Print and record the table."""
    settings.apply()
    ceiling = Ceiling.measure(settings.quick)
    table = []
    shapes = QUICK if settings.quick else SHAPES
    for (name, shape), dtype, n in itertools.product(shapes.items(), DTYPES, ROWS):
        count = copies(shape, dtype, settings.quick)
        moved = 2 * count * shape[0] * shape[1] * dtype.itemsize
        about = {
            "weight": f"{name} {shape[0]}x{shape[1]}",
            "matrices": count,
            "n": n,
            "dtype": str(dtype).removeprefix("torch."),
        }
        measured = rivals(shape, n, dtype, count)
        for row in harness.compare(measured, settings.rounds, ceiling, moved):
            table.append({"rival": row.pop("rival"), **about, **row})
    where = harness.environment("random matrices", settings, ceiling)
    where.pop("dtype")
    harness.report("rank_update", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
