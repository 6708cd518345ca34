"""Merging edits, W -= alpha * sum_r delta_r u_r^T in place: torch's addmm_ against the op.

    python benchmarks/bench_rank_update.py      # all rivals interleaved, a table
    pytest benchmarks/bench_rank_update.py      # the same calls under pytest-benchmark

One call updates every one of several copies of a matrix, more than the caches hold, so that each
comes from memory as in a model. addmm_ takes factors in the dtype of the weight, the op takes them
in float32, checks them, and says how much of the change survived the rounding. "copy" reads and
writes as many bytes as the weights have.

float32 weights are also edited as the paper's code does it: "official order" forms the change,
logs its six statistics a matrix beside the true gradient, which is there already, and returns new
weights; "lean dense" does the same without the log.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import harness
import pytest
import torch
from harness import Ceiling, Rival, Settings
from official_order import OfficialOrder
from torch import Tensor

from pymend.ops.rank_update import rank_update

SHAPES = {"SmolLM2": (1536, 576), "GPT-2": (3072, 768), "GPT-Neo": (10240, 2560)}
QUICK = {"tiny": (40, 24)}
ROWS = (8, 32, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOTAL = 2**26  # bytes of all copies together, at least
DENSE = ("official order", "lean dense")  # of float32 only
RIVALS = (*DENSE, "torch addmm_", "ours", "copy")
# Wanted on a CPU, over the first rival of the dtype: addmm_, or the official order of work.
GOALS = {torch.bfloat16: 3.0, torch.float16: 3.0, torch.float32: 12.0}
OVER_LEAN, UP_TO = 3.0, 32  # the goal over lean dense; the goals of float32 hold up to this n
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

    def dense(log: bool) -> list[Tensor]:
        edited = []
        for weight, true, d, v in zip(theirs, gradients, delta, u, strict=True):
            change = torch.einsum("ta,tb->ba", v, d)
            if log:
                OfficialOrder._diagnostics("", true, change)
            edited.append(weight + -ALPHA * change)
        return edited

    goal = GOALS[dtype] if n <= UP_TO or dtype != torch.float32 else 0.0
    flops = 2 * n * a * b * count  # torch's counter knows not all of them
    found = {}
    if dtype == torch.float32:
        gradients = [torch.randn(b, a) for _ in range(count)]
        found = {
            name: Rival(partial(dense, log), flops=flops)
            for name, log in zip(DENSE, (True, False), strict=True)
        }
    return found | {
        "torch addmm_": Rival(addmm, flops=flops),
        "ours": Rival(lambda: rank_update(ours, u, delta, alpha), goal=goal, flops=flops),
        "copy": Rival(lambda: target.copy_(source), flops=0),
    }


@pytest.mark.parametrize(
    ("dtype", "rival"),
    [(d, r) for d in DTYPES for r in RIVALS if d == torch.float32 or r not in DENSE],
)
@pytest.mark.parametrize("n", ROWS)
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
        rows = harness.compare(measured, settings.rounds, ceiling, moved)
        seconds = {row["rival"]: row["seconds"] for row in rows}
        for row in rows:
            lean = seconds.get(DENSE[1])
            row["over lean"] = None if lean is None else lean / row["seconds"]
            row["goal over lean"] = OVER_LEAN if lean and row["goal"] else 0.0
            table.append({"rival": row.pop("rival"), **about, **row})
    where = harness.environment("random matrices", settings, ceiling)
    where.pop("dtype")
    harness.report("rank_update", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
