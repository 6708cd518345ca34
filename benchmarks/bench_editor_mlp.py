"""One layer of the editor's network: weight by weight, all weights together in torch, and our op.

    python benchmarks/bench_editor_mlp.py      # all rivals interleaved, a table
    pytest benchmarks/bench_editor_mlp.py      # both passes of a layer under pytest-benchmark

Widths of SmolLM2-135M (576 + 1536, six weights of that shape) and GPT-2 (768 + 3072, three), and
rows of few tokens up to a batch of long edits. The rivals of a layer are the same layer in torch
ops; those of what follows its products are torch ops, and a copy of as many bytes as it must move.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from harness import Ceiling, Rival, Settings
from torch import Tensor, nn

from pymend.ops import editor_mlp as op

WIDTHS = {2112: 6, 3840: 3}  # d -> weights of that shape
ROWS = (20, 120, 800)
QUICK_WIDTHS, QUICK_ROWS = {24: 2}, (5,)
LAYERS = ("per weight, eager", "grouped, eager", "grouped, ours")


class Network:
    """A trained-looking layer of ``modes`` weights, and rows for it, weight after weight."""

    def __init__(self, rows: int, d: int, rank: int, modes: int) -> None:
        self.x, self.grad = torch.randn(rows, d, requires_grad=True), torch.randn(rows, d)
        shapes = [(rank, d), (d, rank), (d,), (modes, d), (modes, d)]
        self.parameters = [nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5) for shape in shapes]
        self.layers = [op.Layer(*self.parameters, residual=True)]
        self.mode = torch.arange(rows) * modes // rows
        self.counts = self.mode.bincount(minlength=modes).tolist()
        self.weights = 4 * 2 * d * rank  # bytes of u and v
        self.elements = rows * d

    def per_weight(self) -> list[Tensor]:
        pieces = zip(self.x.split(self.counts), self.mode.split(self.counts), strict=True)
        return [op.eager(x, self.layers, mode) for x, mode in pieces]

    def grouped(self) -> list[Tensor]:
        return [op.eager(self.x, self.layers, self.mode)]

    def ours(self) -> list[Tensor]:
        return [op.editor_mlp(self.x, self.layers, self.mode)]

    def layer_rivals(self, backward: bool) -> dict[str, Rival]:
        def rival(layer: Callable[[], list[Tensor]]) -> Rival:
            def forward() -> object:
                with torch.no_grad():
                    return layer()

            def both() -> None:
                y = layer()
                torch.autograd.backward(y, self.grad.split([len(part) for part in y]))

            return Rival(both if backward else forward, self.forget)

        ways = (self.per_weight, self.grouped, self.ours)
        return {name: rival(way) for name, way in zip(LAYERS, ways, strict=True)}

    def forget(self) -> None:
        for tensor in (self.x, *self.parameters):
            tensor.grad = None

    def epilogue_rivals(self, backward: bool) -> dict[str, Rival]:
        """Both passes read two matrices [rows, d] and write one."""
        layer = self.layers[0].map(Tensor.detach)
        x = self.x.detach()
        p = x @ layer.v.t() @ layer.u.t()
        source = torch.zeros(3 * self.elements // 2)
        target = torch.zeros_like(source)
        operands = (self.grad if backward else x, p, layer, self.mode)
        in_torch = op._torch_epilogue_backward if backward else op._torch_epilogue
        native = op._epilogue_backward if backward else op._epilogue
        return {
            "epilogue, copy of its bytes": Rival(lambda: target.copy_(source)),
            "epilogue, eager": Rival(lambda: in_torch(*operands)),
            "epilogue, ours": Rival(lambda: native(*operands)),
        }


@pytest.mark.parametrize("rival", LAYERS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("d", WIDTHS)
def test_editor_mlp(benchmark: Any, settings: Settings, d: int, rows: int, rival: str) -> None:
    """Seconds of a layer, forward and backward."""
    widths = WIDTHS
    if settings.quick:
        widths, d, rows = QUICK_WIDTHS, *QUICK_WIDTHS, *QUICK_ROWS
    layer = Network(rows, d, settings.rank, widths[d])
    harness.under_pytest(benchmark, layer.layer_rivals(backward=True)[rival])


def main(settings: Settings) -> None:
    """Print and record the table."""
    settings.apply()
    ceiling = Ceiling.measure(settings.quick)
    table: list[dict[str, Any]] = []
    for d, modes in (QUICK_WIDTHS if settings.quick else WIDTHS).items():
        for rows in QUICK_ROWS if settings.quick else ROWS:
            layer = Network(rows, d, settings.rank, modes)
            for backward in (False, True):
                # The backward pass reads both factors once more and writes their gradients.
                weights = layer.weights * (3 if backward else 1)
                rivals = layer.layer_rivals(backward)
                measured = harness.compare(rivals, settings.rounds, ceiling, weights)
                rivals = layer.epilogue_rivals(backward)
                moved = 4 * 3 * layer.elements
                measured += harness.compare(rivals, settings.rounds, ceiling, moved)
                about = {"d": d, "rows": rows, "pass": "backward" if backward else "forward"}
                table += [{"rival": row.pop("rival"), **about, **row} for row in measured]
    where = harness.environment("random layers", settings, ceiling)
    harness.report("editor_mlp", table, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__.splitlines()[0]))
