"""Running moments of one shape's rows: merged, normalised and joined, against a loop over rows.

    python benchmarks/bench_moments.py      # all rivals interleaved, two shapes, a summary table
    pytest benchmarks/bench_moments.py      # the same calls under pytest-benchmark

The rival follows the official code: dead rows are dropped, then Welford's rule row by row, about 15
small tensor operations each, and the rows of a weight are normalised. "eager" is Chan's rule in
torch, a segment at a time. "copy" moves the bytes that the op has to read and write at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import pytest
import torch
from harness import Ceiling, Rival, Settings

from pymend import reference as ref
from pymend.ops import moments as op

SHAPES = {"SmolLM2": (576, 1536), "GPT-2": (768, 3072)}
WEIGHTS = 9
GOAL = 20.0  # times faster than row by row, on a CPU of two threads


@dataclass(frozen=True)
class Subject:
    """``tokens`` rows of each weight, as captured."""

    a: int
    b: int
    u: list[torch.Tensor]
    delta: list[torch.Tensor]

    @classmethod
    def random(cls, a: int, b: int, tokens: int) -> Subject:
        u = [torch.randn(tokens, a) for _ in range(WEIGHTS)]
        return cls(a, b, u, [1e-3 * torch.randn(tokens, b) for _ in range(WEIGHTS)])

    @property
    def bytes(self) -> int:
        """Read and written once."""
        return 2 * 4 * sum(part.numel() for part in (*self.u, *self.delta))

    def row_by_row(self) -> Callable[[], object]:
        moments = ref.Moments(self.a, self.b, official=True)

        def call() -> list[torch.Tensor]:
            z = []
            for pair in zip(self.u, self.delta, strict=True):
                rows = ref.kept_rows(*pair)
                moments.update(*rows)
                z.append(torch.cat(moments.normalise(*rows), 1))
            return z

        return call

    def ours(self, function: Callable[..., object]) -> Callable[[], object]:
        d = self.a + self.b
        mean, m2 = torch.zeros(d).double(), torch.zeros(d).double()
        count = torch.zeros((), dtype=torch.int64)
        counts = [len(part) for part in self.u]
        state = (mean, m2, count, True, torch.float32)
        return lambda: function(self.u, self.delta, counts, *state)

    def copy(self) -> Callable[[], object]:
        source = op.joined(self.u, self.delta, [len(part) for part in self.u])
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def rivals(self, name: str) -> dict[str, Rival]:
        """By name; the first is what the others are compared with."""
        return {
            f"{name}, row by row": Rival(self.row_by_row()),
            f"{name}, eager": Rival(self.ours(op.eager)),
            f"{name}, ours": Rival(self.ours(op.moments), goal=GOAL),
            f"{name}, copy": Rival(self.copy()),
        }


def subjects(quick: bool, tokens: int) -> dict[str, Subject]:
    return {
        name: Subject.random(*((24, 40) if quick else shape), tokens)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(scope="module")
def rivals(settings: Settings) -> dict[str, Rival]:
    found = subjects(settings.quick, settings.tokens).items()
    return {k: rival for name, subject in found for k, rival in subject.rivals(name).items()}


@pytest.mark.parametrize("kind", ["row by row", "eager", "ours", "copy"])
@pytest.mark.parametrize("name", SHAPES)
def test_moments(benchmark: Any, rivals: dict[str, Rival], name: str, kind: str) -> None:
    """Seconds to merge and normalise the rows of one step."""
    harness.under_pytest(benchmark, rivals[f"{name}, {kind}"], rounds=20, model=name)


def main(settings: Settings) -> None:
    """Print and record the summary table."""
    settings.apply()
    ceiling = Ceiling.measure(settings.quick)
    rows = []
    for name, subject in subjects(settings.quick, settings.tokens).items():
        rounds = 4 * settings.rounds
        rows += harness.compare(subject.rivals(name), rounds, ceiling, subject.bytes)
    model = ", ".join(f"{WEIGHTS} x {a} x {b}" for a, b in SHAPES.values())
    where = harness.environment(model, settings, ceiling)
    harness.report("moments", rows, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
