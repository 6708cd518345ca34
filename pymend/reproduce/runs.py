"""Carries out runs: trains, finds Cache's threshold, evaluates; what is done is not done again."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as quiet

from pymend.algorithm import Algorithm
from pymend.algorithms.cache import Cache, find_eps
from pymend.algorithms.finetune import FineTune
from pymend.algorithms.registry import TRAINABLE, load_editor
from pymend.config import (
    CacheConfig,
    EditorConfig,
    EditRequest,
    FineTuneConfig,
    TrainConfig,
    to_json,
)
from pymend.data.facts import Split
from pymend.evaluation import evaluate
from pymend.files import read_json, writable_dir, write_json
from pymend.models.load import load_model
from pymend.reproduce import data
from pymend.reproduce.plan import Run, Scale, Settings, Setup
from pymend.training.trainer import Trainer

TUNING = 100  # validation records on which Cache's threshold is found


@dataclass(frozen=True)
class Place:
    """Where a reproduction reads and writes.

    Args:
        output: receives ``data/`` and ``runs/``.
        files: folder of the data files that setups name.
        dtype: of the models; ``device``: theirs, by default the GPU if there is one.
        matmul: precision of float32 products on a CPU, "ieee" or "bf16".
        seed: of every training.
    """

    output: Path
    files: Path | None = None
    dtype: str = "auto"
    device: str | None = None
    matmul: str = "ieee"
    seed: int = 0

    @property
    def sets(self) -> Path:
        """The folder of the data sets that are built here."""
        return self.output / "data"

    def folder(self, run: Run) -> Path:
        """The folder of ``run``."""
        return self.output / "runs" / run.name


def start(threads: int, matmul: str) -> None:
    """Set up a process: torch, and no word about every file that is read."""
    logging.getLogger("pymend").setLevel(logging.WARNING)
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = matmul  # type: ignore[attr-defined]


@cache
def loaded(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer, kept for the runs that follow."""
    return load_model(name, dtype, device)


def perform(scale: Scale, run: Run, place: Place, progress: bool = True) -> dict[str, Any]:
    """The result of ``run``, from its folder if it is there; an interrupted training goes on.

    Raises:
        ValueError: the folder holds a result of other settings.
    """
    folder, settings = place.folder(run), scale.settings(run)
    spec, file = _spec(scale.setups[run.setup], run, settings, place), folder / "result.json"
    if file.is_file():
        result = read_json(file)
        if result["spec"] != spec:
            raise ValueError(
                f"{file} is of other settings; choose another output folder, or delete {folder}"
            )
        return result
    result = {"spec": spec, **_Bench(scale.setups[run.setup], run, place, progress).run(settings)}
    writable_dir(folder)
    write_json(file, result)
    return result


class _Bench:
    """A model and its records, on which a run is carried out."""

    def __init__(self, setup: Setup, run: Run, place: Place, progress: bool) -> None:
        self.setup, self.of, self.place, self.progress = setup, run, place, progress
        self.model, self.tokenizer = loaded(setup.model, place.dtype, place.device)
        self.splits = data.records(setup, place.sets, place.files)

    def run(self, settings: Settings) -> dict[str, Any]:
        """Scores; or why there are none: an ablation may well diverge."""
        config = settings.editor
        test = self._part("test", settings.records)
        if isinstance(config, CacheConfig):
            return self._thresholds(settings.factors, test)
        if isinstance(config, FineTuneConfig):
            train = self.splits["train"]
            algorithm: Algorithm = FineTune.from_config(self.model, config, self.tokenizer, train)
        else:
            assert settings.train is not None
            try:
                algorithm = self._trained(config, settings.train)
            except RuntimeError as error:
                return {"failed": str(error)}
        return {"metrics": self._scores(algorithm, test)}

    def _trained(self, config: EditorConfig, train: TrainConfig) -> Algorithm:
        torch.manual_seed(self.place.seed)
        trainer = Trainer(
            TRAINABLE[self.of.algorithm].from_config(self.model, config),
            self.model,
            self.tokenizer,
            self.splits["train"],
            self.splits["validation"],
            replace(train, seed=self.place.seed),
            self.place.folder(self.of) / "editor",
            resume=True,
            progress=self.progress,
        )
        return trainer.train()

    def _thresholds(self, factors: Sequence[float], test: Sequence[EditRequest]) -> dict[str, Any]:
        """Cache at multiples of eps*, where its drawdown on validation records is MEND's."""
        tuning = self._part("validation", TUNING)
        mend = load_editor(self.place.folder(Run(self.of.setup, "mend")) / "editor")

        def cached(eps: float) -> Cache:
            return Cache(CacheConfig(eps))

        with tqdm(desc="eps*", disable=not self.progress) as bar:

            def drawdown(algorithm: Algorithm) -> float:
                bar.update()
                return float(self._scores(algorithm, tuning, False)[self.setup.drawdown])

            wanted = drawdown(mend)
            best = find_eps(lambda eps: drawdown(cached(eps)), wanted, tolerance=0.05)
        looks = [(f, f * best) for f in factors]
        return {
            "mend_drawdown": wanted,
            "thresholds": [
                {"factor": f, "eps": eps, "metrics": self._scores(cached(eps), test)}
                for f, eps in looks
            ],
        }

    def _part(self, split: Split, limit: int) -> list[EditRequest]:
        return data.groups(self.splits[split], self.setup.draws, self.of.n_edits, limit)

    def _scores(
        self, algorithm: Algorithm, records: Sequence[EditRequest], shown: bool = True
    ) -> dict[str, Any]:
        """The means of an evaluation; the scores of single records are not kept."""
        metrics = evaluate(
            algorithm,
            self.model,
            self.tokenizer,
            records,
            progress=self.progress and shown,
            n_edits=self.of.n_edits,
        )
        return {name: value for name, value in metrics.to_dict().items() if name != "records"}


def _spec(setup: Setup, run: Run, settings: Settings, place: Place) -> dict[str, Any]:
    """What a result depends on, as JSON gives it back."""
    return {
        "setup": to_json(setup),
        "run": to_json(run),
        "settings": to_json(settings),
        "dtype": place.dtype,
        "matmul": place.matmul,
        "seed": place.seed,
    }


# -- many runs -------------------------------------------------------------------------------


def perform_all(
    scale: Scale, runs: Sequence[Run], place: Place, jobs: int = 1
) -> dict[Run, dict[str, Any]]:
    """The results of ``runs``, each in a process of its own if there are several ``jobs``.

    Ctrl-C loses nothing: trainings leave a checkpoint, and the same call goes on from there.
    """
    for setup in dict.fromkeys(run.setup for run in runs):
        data.prepare(scale.setups[setup], place.sets)
        loaded(scale.setups[setup].model, place.dtype, place.device)
    # Cache's threshold is found from MEND's drawdown.
    first = [run for run in runs if run.algorithm != "cache"]
    needed = [Run(run.setup, "mend") for run in runs if run.algorithm == "cache"]
    first = list(dict.fromkeys([*first, *needed]))
    last = [run for run in runs if run.algorithm == "cache"]
    results: dict[Run, dict[str, Any]] = {}
    bar = tqdm(total=len(first) + len(last), desc="runs", disable=None)
    with bar:
        for part in (first, last):
            for run, result in _carried_out(scale, part, place, jobs):
                results[run] = result
                bar.set_postfix_str(run.name)
                bar.update()
    return results


def _carried_out(
    scale: Scale, runs: Sequence[Run], place: Place, jobs: int
) -> Iterator[tuple[Run, dict[str, Any]]]:
    if jobs == 1:
        for run in runs:
            yield run, perform(scale, run, place)
        return
    setting = max(1, torch.get_num_threads() // jobs), place.matmul
    # A fork would inherit locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, start, setting) as pool:
        waiting = {pool.submit(perform, scale, run, place, False): run for run in runs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
