"""Products of few rows with a frozen matrix: oneDNN against torch's own choice, in float32.

    python benchmarks/bench_products.py      # a table
    pytest benchmarks/bench_products.py      # the same calls under pytest-benchmark

Shapes are those of SmolLM2-135M: its MLP, its head, the editor's network (rank 1920). Weights are
rotated, so that they come from memory as they do in a model.
"""

from __future__ import annotations

from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Ceiling, Rival, Settings
from torch import Tensor

from pymend.ops.products import product

SHAPES = {
    "MLP": (1536, 576, 27),
    "head": (49152, 576, 1),
    "editor": (1920, 2112, 4),
}  # m, k, copies
QUICK = (128, 32, 2)
ROWS = (1, 4, 20, 190)
RIVAL = "torch"


def pair(m: int, k: int, copies: int, rows: int) -> dict[str, Rival]:
    """Both ways to multiply ``rows`` rows with each of ``copies`` matrices."""
    weights = [torch.randn(m, k) for _ in range(copies)]
    x = torch.randn(rows, k)

    def each(multiply: Any) -> list[Tensor]:
        return [multiply(x, w) for w in weights]

    return {RIVAL: Rival(lambda: each(F.linear)), "oneDNN": Rival(lambda: each(product))}


@pytest.mark.parametrize("rival", [RIVAL, "oneDNN"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product(benchmark: Any, settings: Settings, shape: str, rows: int, rival: str) -> None:
    """Seconds of one product with each of the weights."""
    sizes = QUICK if settings.quick else SHAPES[shape]
    harness.under_pytest(benchmark, pair(*sizes, rows)[rival])


def main(settings: Settings) -> None:
    """Print and record the table."""
    settings.apply()
    ceiling = Ceiling.measure(settings.quick)
    table = []
    for name, (m, k, copies) in SHAPES.items():
        for rows in ROWS:
            m, k, copies = QUICK if settings.quick else (m, k, copies)
            size = 4 * m * k * copies
            with torch.no_grad():
                lines = harness.compare(
                    pair(m, k, copies, rows), 4 * settings.rounds, ceiling, size
                )
            table += [{"weight": f"{name} {m}x{k}", "rows": rows, **line} for line in lines]
    where = harness.environment("random matrices", settings, ceiling)
    harness.report("products", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
