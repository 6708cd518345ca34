"""One edit that leaves a usable model: factors, beside the model or merged, against a dense copy.

    python benchmarks/bench_edit.py      # all rivals interleaved, memory peaks, a summary table
    pytest benchmarks/bench_edit.py      # the same calls under pytest-benchmark

The rival returns a copy of the model with edited weights. "ours, side path" computes the factors
and applies them through hooks; "ours, merged" writes them into the weights and keeps a backup;
"Mend.edit" is the public call, with its report on the request before and after the edit.

The extra peak memory of a call is measured in a fresh process, on top of what the process holds
with the model (random weights: reading a file would raise the peak before) and the editor loaded.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import harness
import pytest
import torch
from harness import Ceiling, Rival, Settings
from official_order import OfficialOrder

from pymend.algorithms.mend.mend import Mend
from pymend.config import EditRequest, MendConfig
from pymend.edit import Edit
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.models.structure import find_weights

RIVAL = "official order"
OURS = ("ours, side path", "ours, merged", "ours, Mend.edit")
SEEN = 1000  # rows that the moments claim to have seen


class Numbers:
    """A tokenizer whose texts are token ids, so that a request has as many tokens as it shall."""

    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[int(word) for word in text.split() if word.isdigit()])

    def decode(self, ids: torch.Tensor) -> str:
        """The text of ``ids``."""
        return " ".join(map(str, ids.tolist()))


class Bench:
    """The named rivals on one model and one request."""

    def __init__(self, settings: Settings, *names: str, random_weights: bool = False) -> None:
        settings.apply()
        self.model, self.model_name = harness.load(settings.quick, random_weights)
        self.row = harness.random_records(self.model, 1, settings.tokens)[0].edit
        self.rank = settings.rank
        self.applied = ExitStack()
        self.merged: list[Edit] = []
        self.rivals: dict[str, Rival] = {}
        if RIVAL in names:
            self.rivals[RIVAL] = self.official()
        if set(OURS) & set(names):
            self.rivals |= {k: v for k, v in self.ours().items() if k in names}
        parameters = list(self.model.parameters())
        self.weights = sum(p.numel() * p.element_size() for p in parameters)

    def official(self) -> Rival:
        """The dense edit; its moments are set, for a training step would raise the memory peak."""
        names = [w.name for w in find_weights(self.model)]
        dense = OfficialOrder(self.model, names, self.rank)
        for moments in dense.moments.values():
            moments.k.fill_(SEEN)
            moments.u_s.fill_(SEEN)
            moments.delta_s.fill_(SEEN)
        batch = harness.dense_batch(self.row)
        return Rival(lambda: dense.edit(batch))

    def ours(self) -> dict[str, Rival]:
        """Our ways to the same."""
        mend = Mend.from_config(self.model, MendConfig(rank=self.rank))
        for net in mend.editor.nets.values():
            net.moments.count.fill_(SEEN)
            net.moments.m2.fill_(SEEN)
        words = [str(i) for i in self.row.ids]
        first = self.row.first + 1
        request = EditRequest(" ".join(words[:first]), " ".join(words[first:]))
        tokenizer = Numbers()

        def edit() -> Edit:
            with frozen(self.model):
                replay = Replay(self.model, mend.weights)
                replay.load([self.row])
                return mend.compute(replay, [self.row], joint=True)

        def merge() -> None:
            self.merged.append(edit())
            self.merged[-1].merge_(self.model)

        return {
            "ours, side path": Rival(
                lambda: self.applied.enter_context(edit().applied(self.model)),
                self.applied.close,
                goal=4.0,
            ),
            "ours, merged": Rival(merge, lambda: self.merged.pop().unmerge_(self.model), goal=4.0),
            "ours, Mend.edit": Rival(lambda: mend.edit(self.model, tokenizer, request)),
        }


@pytest.fixture(scope="module")
def bench(settings: Settings) -> Bench:
    return Bench(settings, RIVAL, *OURS)


@pytest.mark.parametrize("rival", [RIVAL, *OURS])
def test_edit(benchmark: Any, bench: Bench, rival: str) -> None:
    """Seconds from a request to a usable model."""
    harness.under_pytest(benchmark, bench.rivals[rival], model=bench.model_name)


def main(settings: Settings) -> None:
    """Print and record the summary table, or the memory peak of one rival."""
    if settings.peak_of:
        # Only this rival's editor may lie in memory.
        bench = Bench(settings, settings.peak_of, random_weights=True)
        harness.print_extra_peak(bench.rivals[settings.peak_of].call)
        return
    # First, while this process is small: a child's recorded peak begins at its parent's.
    peaks = {name: harness.extra_peak(__file__, name, settings) for name in (RIVAL, *OURS)}
    bench = Bench(settings, RIVAL, *OURS)
    ceiling = Ceiling.measure(settings.quick)
    rows = harness.compare(bench.rivals, 4 * settings.rounds, ceiling, bench.weights)
    for row in rows:
        peak = peaks[row["rival"]]
        row["extra MiB"] = peak / 2**20
        row["memory ratio"] = peak / max(1, peaks[RIVAL])
    where = harness.environment(bench.model_name, settings, ceiling)
    harness.report("edit", rows, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
