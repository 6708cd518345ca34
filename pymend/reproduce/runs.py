"""Carries out runs: trains, finds Cache's threshold, evaluates; what is done is not done again."""

from __future__ import annotations

import logging
import multiprocessing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.utils import logging as quiet

from pymend.algorithms.base import Algorithm
from pymend.algorithms.cache import Cache, find_eps
from pymend.algorithms.registry import METHODS, load_editor, trainable
from pymend.algorithms.trained import Trainable
from pymend.config import (
    CacheConfig,
    EditorConfig,
    EditRequest,
    TrainConfig,
    to_json,
)
from pymend.data.facts import Split
from pymend.errors import NonFiniteError, meant_for_user
from pymend.evaluation import evaluate
from pymend.files import read_json, writable_dir, write_json
from pymend.progress import tqdm
from pymend.reproduce import data
from pymend.reproduce.plan import Run, Scale, Settings
from pymend.training.trainer import DivergedError, Trainer
from pymend.zoo.load import is_to_be_made, load, locate
from pymend.zoo.mini import edition

SCORES = "scores*.jsonl"  # of records, in the folder of a run that is not finished
TUNING = 100  # validation records on which Cache's threshold is found

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class RunContext:
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

    def editor(self, run: Run) -> Trainable[Any]:
        """The editor that ``run`` trained.

        Raises:
            FileNotFoundError: only its result is there.
        """
        folder = self.folder(run)
        try:
            return load_editor(folder / "editor")
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds no editor, which is needed here; delete it to train one again"
            ) from error


def start(threads: int, matmul: str) -> None:
    """Set up a process: torch, and no word about every file that is read."""
    logging.getLogger("pymend").setLevel(logging.WARNING)
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = matmul  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def loaded(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    """A model and its tokenizer, kept while the runs that follow are on the same one."""
    return load(name, dtype=dtype, device=device)


def perform(scale: Scale, run: Run, place: RunContext, progress: bool = True) -> dict[str, Any]:
    """The result of ``run``, from its folder if it is there; an interrupted training goes on.

    Raises:
        ValueError: the folder holds a result of other settings.
    """
    folder, settings = place.folder(run), scale.settings(run)
    bench = _Bench(scale, run, place, progress)
    spec, file = bench.spec(settings), folder / "result.json"
    begun = folder / "spec.json"  # what was interrupted depends on
    part = (folder / "editor").is_dir() or any(folder.glob(SCORES))
    for written in (file, begun) if part else (file,):
        if written.is_file() and read_json(written)["spec"] != spec:
            raise ValueError(
                f"{written} is of other settings; choose another output folder, or delete {folder}"
            )
    if file.is_file():
        return _finished(folder)
    writable_dir(folder)
    write_json(begun, {"spec": spec})
    try:
        after = scale.after(run)
        if after and "failed" in read_json(place.folder(after) / "result.json"):
            raise DivergedError(f"{after.name} failed, which it builds on")
        result = {"spec": spec, **bench.run(settings)}
    except (DivergedError, NonFiniteError) as error:  # as an ablation may
        result = {"spec": spec, "failed": str(error)}
    write_json(file, result)
    return _finished(folder)


def _finished(folder: Path) -> dict[str, Any]:
    """The result in ``folder``; what was kept on the way to it goes."""
    result = read_json(folder / "result.json")
    for kept in folder.glob(SCORES):
        kept.unlink()
    return result


class _Bench:
    """A model and its records, on which a run is carried out."""

    def __init__(self, scale: Scale, run: Run, place: RunContext, progress: bool) -> None:
        self.scale, self.of, self.place, self.progress = scale, run, place, progress
        self.setup = scale.setups[run.setup]
        self.splits = data.records(self.setup, place.sets, place.files)

    def spec(self, settings: Settings) -> dict[str, Any]:
        """What the result depends on, as JSON gives it back."""
        spec = {
            "setup": to_json(self.setup),
            "run": to_json(self.of),
            "settings": to_json(settings),
            "records": data.digest(self.splits),
            "dtype": self.place.dtype,
            "matmul": self.place.matmul,
            "seed": self.place.seed,
        }
        made = edition(self.setup.model)
        if made:
            spec["edition"] = made
        before = self.scale.before(self.of)
        if before:
            spec["before"] = [to_json(self.scale.settings(run)) for run in before]
        return spec

    def run(self, settings: Settings) -> dict[str, Any]:
        """Scores of what ``settings`` say."""
        place = self.place
        self.model, self.tokenizer = loaded(self.setup.model, place.dtype, place.device)
        config = settings.editor
        test = self._part("test", settings.records)
        if not test or len(test) == self.of.n_edits > 1:
            raise ValueError(
                f"{self.of.name}: {len(self.splits['test'])} test records, at most "
                f"{settings.records}, make no two groups of {self.of.n_edits}; give more records"
            )
        if isinstance(config, CacheConfig):
            return self._thresholds(settings.factors, test)
        algorithm: Algorithm[Any]
        if settings.train is None:
            algorithm = (
                METHODS[self.of.algorithm]
                .load()
                .from_config(
                    self.model, config, tokenizer=self.tokenizer, train_data=self.splits["train"]
                )
            )
        else:
            assert isinstance(config, EditorConfig)
            algorithm = self._trained(config, settings.train)
        return {"metrics": self._scores(algorithm, test, "scores.jsonl")}

    def _trained(self, config: EditorConfig, train: TrainConfig) -> Algorithm[Any]:
        torch.manual_seed(self.place.seed)
        algorithm = trainable(self.of.algorithm).from_config(self.model, config)
        if self.of.n_edits > 1:
            fewer = self._editor_before()
            algorithm.editor.load_state_dict(fewer.editor.state_dict())
        trainer = Trainer(
            algorithm,
            self.model,
            self.tokenizer,
            self.splits["train"],
            self.splits["validation"],
            config=replace(train, seed=self.place.seed),
            output=self.place.folder(self.of) / "editor",
            resume=True,
            progress=self.progress,
        )
        return trainer.train()

    def _editor_before(self) -> Trainable[Any]:
        after = self.scale.after(self.of)
        assert after
        return self.place.editor(after)

    def _thresholds(self, factors: Sequence[float], test: Sequence[EditRequest]) -> dict[str, Any]:
        """Cache at multiples of eps*, where its drawdown on validation records is MEND's."""
        tuning = self._part("validation", TUNING)
        mend = self._editor_before()

        def cached(eps: float) -> Cache:
            return Cache(CacheConfig(eps))

        with tqdm(desc="eps*", disable=not self.progress) as bar:

            def drawdown(algorithm: Algorithm[Any]) -> float:
                bar.update()
                return float(self._scores(algorithm, tuning, None)[self.setup.drawdown])

            wanted = max(0.0, drawdown(mend))  # an accuracy that rose by chance is no bound
            best = find_eps(lambda eps: drawdown(cached(eps)), wanted, tolerance=0.05)
        looks = [(f, f * best) for f in factors]
        return {
            "mend_drawdown": wanted,
            "thresholds": [
                {
                    "factor": f,
                    "eps": eps,
                    "metrics": self._scores(cached(eps), test, f"scores-{eps}.jsonl"),
                }
                for f, eps in looks
            ],
        }

    def _part(self, split: Split, limit: int) -> list[EditRequest]:
        return data.groups(self.splits[split], self.setup.draws, self.of.n_edits, limit)

    def _scores(
        self, algorithm: Algorithm[Any], records: Sequence[EditRequest], kept: str | None
    ) -> dict[str, Any]:
        """The means of an evaluation; with a file ``kept`` it shows a bar, and can go on."""
        metrics = evaluate(
            algorithm,
            self.model,
            self.tokenizer,
            records,
            progress=self.progress and kept is not None,
            n_edits=self.of.n_edits,
            kept=None if kept is None else self.place.folder(self.of) / kept,
        )
        return {name: value for name, value in metrics.to_dict().items() if name != "records"}


# -- many runs -------------------------------------------------------------------------------


def make_models(scale: Scale, setups: Iterable[str], jobs: int = 1) -> None:
    """Make the models of ``setups`` that this package makes and has not made yet.

    In processes of their own, also a single one: ``start`` has set this one up for the runs.
    """
    names = dict.fromkeys(scale.setups[setup].model for setup in setups)
    missing = [name for name in names if is_to_be_made(name)]
    if missing:
        jobs = min(jobs, len(missing))
        asked = {name: (name, jobs == 1) for name in missing}
        with tqdm(total=len(missing), desc="models", disable=None) as bar:
            for _ in in_processes(locate, asked, jobs, "ieee"):
                bar.update()


def perform_all(
    scale: Scale, runs: Sequence[Run], place: RunContext, jobs: int = 1
) -> dict[Run, dict[str, Any]]:
    """The results of ``runs``, each in a process of its own if there are several ``jobs``.

    Ctrl-C loses nothing: trainings leave a checkpoint, and the same call goes on from there.
    """
    for setup in dict.fromkeys(run.setup for run in runs):
        data.prepare(scale.setups[setup], place.sets)
    needed = {other for run in runs for other in (*scale.before(run), run)}
    rounds: dict[int, list[Run]] = defaultdict(list)
    # One model after the other: they may not fit side by side.
    for run in sorted(needed, key=lambda run: (scale.setups[run.setup].model, run)):
        rounds[len(scale.before(run))].append(run)
    results: dict[Run, dict[str, Any]] = {}
    with tqdm(total=len(needed), desc="runs", disable=None) as bar:
        for _, part in sorted(rounds.items()):
            for run, result in _carried_out(scale, part, place, jobs):
                results[run] = result
                bar.set_postfix_str(run.name)
                bar.update()
    return results


def _carried_out(
    scale: Scale, runs: Sequence[Run], place: RunContext, jobs: int
) -> Iterator[tuple[Run, dict[str, Any]]]:
    if jobs == 1:
        for run in runs:
            yield run, perform(scale, run, place)
    else:
        asked = {run: (scale, run, place, False) for run in runs}
        yield from in_processes(perform, asked, jobs, place.matmul)


def in_processes(
    work: Callable[..., T], asked: Mapping[K, tuple[Any, ...]], jobs: int, matmul: str
) -> Iterator[tuple[K, T]]:
    """What ``work`` gives for the arguments of each key, ``jobs`` at a time, as they get done."""
    setting = max(1, torch.get_num_threads() // jobs), matmul
    # A fork would inherit locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    left = iter(asked)
    with ProcessPoolExecutor(jobs, context, start, setting) as pool:
        waiting: dict[Future[T | Exception], K] = {}
        while True:
            # No more than can run at once: what waits in the pool cannot be called back.
            for key in islice(left, jobs - len(waiting)):
                waiting[pool.submit(_answer, work, asked[key])] = key
            if not waiting:
                return
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                key, result = waiting.pop(done), done.result()
                if isinstance(result, Exception):
                    raise result
                yield key, result


def _answer(work: Callable[..., T], arguments: tuple[Any, ...]) -> T | Exception:
    """What ``work`` gives; errors about what the user gave are handed over, to be told here."""
    try:
        return work(*arguments)
    except (OSError, ValueError, RuntimeError) as error:
        if meant_for_user(error):
            return error
        raise
