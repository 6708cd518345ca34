"""One optimiser step: ten independent episodes in one pass against the official ten micro-steps.

    python benchmarks/bench_train_step.py      # all rivals interleaved, and a summary table
    pytest benchmarks/bench_train_step.py      # the same calls under pytest-benchmark

An episode is an edit, a rephrase and a locality row. Rows marked "rephrase" take the outer loss on
the rephrase alone, as the rival does; "both" is this package's default and does more work. "cached"
keeps the states below the edited blocks in memory (``prefix_cache: memory``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import harness
import pytest
from harness import Ceiling, Rival, Settings
from official_order import OfficialOrder

from pymend.algorithms.mend.mend import Mend
from pymend.config import MendConfig, TrainConfig
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.training.episodes import Sampler, run_episodes
from pymend.training.optim import EditorOptimizer

EPISODES = 10  # of one step, and micro-steps of the rival
RECORDS = 40
OURS = {  # outer loss, cached, goal
    "ours, rephrase": ("rephrase", False, 6.0),
    "ours, rephrase, cached": ("rephrase", True, 10.0),
    "ours, both": ("both", False, 0.0),
    "ours, both, cached": ("both", True, 0.0),
    "ours, rephrase, no kernels": ("rephrase", False, 0.0),
    "ours, rephrase, cached, no kernels": ("rephrase", True, 0.0),
}
NO_KERNELS = ", no kernels"
RIVAL = "official order"


class Bench:
    """The rivals on one model and one data set."""

    def __init__(self, settings: Settings) -> None:
        settings.apply()
        self.model, self.model_name = harness.load(settings.quick)
        self.records = harness.random_records(self.model, RECORDS, settings.tokens)
        self.mend = Mend.from_config(self.model, MendConfig(rank=settings.rank))
        self.optimizer = EditorOptimizer(self.mend, TrainConfig(batch_size=EPISODES))
        names = [w.name for w in self.mend.weights]
        self.dense = OfficialOrder(self.model, names, settings.rank, accumulate=EPISODES)
        self.sampler = Sampler(self.records, 1, EPISODES, seed=0)
        self.rivals = {RIVAL: Rival(self.dense_step)}
        for name, (outer, cached, goal) in OURS.items():
            step = self.our_step(outer, cached)
            self.rivals[name] = Rival(
                without_kernels(step) if NO_KERNELS in name else step, goal=goal
            )

    def dense_step(self) -> None:
        """Ten micro-steps and the optimiser step."""
        for record in self.records[:EPISODES]:
            rows = (record.edit, record.rephrases[0], record.locality[0])
            self.dense.micro_step(*map(harness.dense_batch, rows))
        self.dense.optimiser_step()

    def our_step(self, outer: str, cached: bool) -> Callable[[], None]:
        """A call that does one step as ``Trainer`` does, each time on other episodes."""
        config = self.optimizer.config
        replay = Replay(self.model, self.mend.weights, keep=cached)
        step = 0
        if cached:
            with frozen(self.model):
                replay.load([x for r in self.records for x in (r.edit, *r.rephrases, *r.locality)])

        def call() -> None:
            nonlocal step
            with frozen(self.model):
                episodes = self.sampler.step(step)
                scores = run_episodes(self.mend, replay, episodes, outer, merge=True)
                (config.c_edit * scores.nll + config.c_loc * scores.kl).mean().backward()
                self.optimizer.step(step)
            step += 1

        return call


def without_kernels(call: Callable[[], None]) -> Callable[[], None]:
    """``call`` in plain torch."""

    def off() -> None:
        with mock.patch.dict(os.environ, PYMEND_KERNELS="off"):
            call()

    return off


@pytest.fixture(scope="module")
def bench(settings: Settings) -> Bench:
    return Bench(settings)


@pytest.mark.parametrize("rival", [RIVAL, *OURS])
def test_train_step(benchmark: Any, bench: Bench, rival: str) -> None:
    """Seconds of one optimiser step over ten episodes."""
    about = {"model": bench.model_name, "episodes": EPISODES}
    harness.under_pytest(benchmark, bench.rivals[rival], rounds=5, **about)


def main(settings: Settings) -> None:
    """Print and record the summary table."""
    bench = Bench(settings)
    ceiling = Ceiling.measure(settings.quick)
    rows = harness.compare(bench.rivals, settings.rounds, ceiling, episodes=EPISODES)
    seconds = {row["rival"]: row["seconds"] for row in rows}
    for row in rows:
        plain = seconds.get(f"{row['rival']}{NO_KERNELS}")
        row["over no kernels"] = None if plain is None else plain / row["seconds"]
    where = harness.environment(bench.model_name, settings, ceiling)
    harness.report("train_step", rows, where, settings.output)


if __name__ == "__main__":
    main(harness.settings(__doc__))
