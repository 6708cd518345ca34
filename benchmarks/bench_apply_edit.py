"""The whole edit of captured rows, GPT-2's six matrices: apply_edit against dense and plain torch.

    python benchmarks/bench_apply_edit.py      # all rivals interleaved, a summary table
    pytest benchmarks/bench_apply_edit.py      # the same calls under pytest-benchmark

"official order" is dense, in the order of work of the paper's code, with the six statistics a
matrix that it logs; "lean dense" is the same without them. "factored" goes matrix by matrix through
thin products and ``addmm_``, "grouped" takes all rows of a shape together. The editor is float32;
the weights are float32 or bfloat16, and the dense rivals are spared the rounding to bfloat16. Every
rival is held against float64 before it is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import harness
import pytest
import torch
from gpu import edit as gpu_edit
from gpu.measure import Device, error
from harness import Ceiling, Rival, Settings
from torch import Tensor

from pymend.ops.apply_edit import apply_edit

MODEL = "GPT-2 small"
CASES = {f"{n} rows": (n, torch.float32) for n in (8, 32, 128)}
CASES["32 rows, bfloat16"] = (32, torch.bfloat16)
WAYS = ("official order", "lean dense", "factored", "grouped", "ours")
OVER_OFFICIAL, OVER_LEAN, UP_TO = 12.0, 3.0, 32  # the goals of "ours", and their most rows


@dataclass(frozen=True)
class Edit:
    """One case: its rivals write ``subject.W`` or return new weights."""

    subject: gpu_edit.Subject

    @classmethod
    def random(cls, name: str, quick: bool) -> Edit:
        rows, dtype = CASES[name]
        return cls(gpu_edit.Subject(MODEL, rows, dtype, Device(dry=True), quick, 0, torch.float32))

    @property
    def bytes(self) -> int:
        """The weights read and written, the networks read."""
        moved = 2 * sum(w.nbytes for w in self.subject.W)
        return moved + sum(p.nbytes for p in self.subject.editor.nets.parameters())

    def ours(self) -> list[Tensor]:
        s = self.subject
        flags = [w.transposed for w in s.weights]
        apply_edit(s.W, s.u, s.delta, s.alpha, s.plain, flags)
        return s.W

    def rivals(self, name: str) -> dict[str, Rival]:
        """By name; the first is what the others are compared with."""
        s, before = self.subject, [w.clone() for w in self.subject.W]
        calls = (s.dense(log=True), s.dense(log=False), s.factored, s.grouped, self.ours)

        def undo() -> None:
            for weight, value in zip(s.W, before, strict=True):
                weight.copy_(value)

        truth = s.dense(log=False, dtype=torch.float64)()
        tolerance = gpu_edit.TOLERANCE[str(s.dtype).removeprefix("torch.")]
        found = {}
        for way, call in zip(WAYS, calls, strict=True):
            wrong = error(call(), truth)
            undo()
            if not wrong <= tolerance:
                raise ArithmeticError(f"{name}, {way}: error {wrong:.2g}, allowed {tolerance:g}")
            goal = OVER_OFFICIAL if way == "ours" and s.rows <= UP_TO else 0.0
            found[f"{name}, {way}"] = Rival(call, undo, goal)
        return found


@pytest.fixture(scope="module")
def rivals(settings: Settings) -> dict[str, Rival]:
    edits = {name: Edit.random(name, settings.quick) for name in CASES}
    return {k: rival for name, edit in edits.items() for k, rival in edit.rivals(name).items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_apply_edit(benchmark: Any, rivals: dict[str, Rival], name: str, way: str) -> None:
    """Seconds of one edit."""
    about = {"model": MODEL, "dtype": str(CASES[name][1])}
    harness.under_pytest(benchmark, rivals[f"{name}, {way}"], **about)


def main(settings: Settings) -> None:
    """Print and record the summary table."""
    settings.apply()
    ceiling = Ceiling.measure(settings.quick)
    table: list[dict[str, Any]] = []
    for name, (_, dtype) in CASES.items():
        edit = Edit.random(name, settings.quick)
        rows = harness.compare(edit.rivals(name), settings.rounds, ceiling, edit.bytes)
        lean = next(r["seconds"] for r in rows if r["rival"].endswith(WAYS[1]))
        for row in rows:
            row["dtype"] = str(dtype).removeprefix("torch.")
            row["over lean"] = lean / row["seconds"]
            row["goal over lean"] = OVER_LEAN if row["goal"] else 0.0
        table += rows
    where = harness.environment(MODEL, settings, ceiling)
    del where["dtype"]  # each row has its own: that of the weights
    harness.report("apply_edit", table, {**where, "rank": gpu_edit.RANK}, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
