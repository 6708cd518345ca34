"""The outer loop (paper, Algorithm 1): train an algorithm's editor, never the model."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from pymend.algorithms.trained import Trainable, load_state
from pymend.config import EditRequest, TrainConfig, to_json
from pymend.edit import fingerprint
from pymend.engine.generate import followed
from pymend.engine.hooks import frozen
from pymend.engine.tokens import Chat, EncodedRequest, Encoder
from pymend.errors import NonFiniteError
from pymend.files import (
    digest,
    read_json,
    read_tensors,
    replacing,
    writable_dir,
    write_json,
    write_tensors,
)
from pymend.models.structure import unwrapped
from pymend.progress import tqdm
from pymend.training.episodes import EpisodeScores, Sampler, run_episodes
from pymend.training.optim import EditorOptimizer

ELSEWHERE = 8  # locality prompts that an editor remembers, to be asked beside an edit
FOLLOWED = 1  # rephrases of a record behind which the model is heard
MAX_SKIPPED = 20  # steps in a row without a finite gradient before a run gives up
PROGRESS = ("step", "best_step", "skipped", "skipped_in_row")  # counters that a checkpoint keeps

A = TypeVar("A", bound="Trainable[Any]")


class DivergedError(RuntimeError):
    """``MAX_SKIPPED`` steps in a row had no finite gradient."""


class Trainer(Generic[A]):
    """Trains ``algorithm`` on ``train_data`` for ``model``, which is the same bits afterwards.

    A run that was interrupted or killed and then resumed equals one that was not, bit for bit on a
    CPU.

    Args:
        output: folder that receives the best editor (by validation loss; the last one without
            ``eval_data``), ``metrics.jsonl`` and ``checkpoints/``.
        resume: continue from the last checkpoint in ``output``, if there is one.
        progress: show a progress bar.
        chat: put prompts through the tokenizer's chat template; a mapping has options of it. It
            becomes part of the editor.

    Raises:
        ValueError: data that cannot be used, ``chat`` with a tokenizer that has no chat template,
            or a checkpoint that is damaged or of another run; ``algorithm`` is as it was.
        PermissionError: ``output`` cannot be written.
        FileExistsError: ``output`` holds checkpoints and ``resume`` was not asked for, or an editor
            without checkpoints.
    """

    def __init__(
        self,
        algorithm: A,
        model: nn.Module,
        tokenizer: Any,
        train_data: Sequence[EditRequest],
        eval_data: Sequence[EditRequest],
        *,
        config: TrainConfig,
        output: str | Path,
        resume: bool = False,
        progress: bool = True,
        chat: Chat = None,
    ) -> None:
        model = unwrapped(model)
        algorithm.prepare(model)
        self.algorithm, self.model = algorithm, model
        self.config, self.progress = config, progress
        chat = algorithm.chat_for(chat)
        encoder = Encoder.for_model(model, tokenizer, chat)
        edits = algorithm.n_edits
        train = encoder.requests(train_data)
        held_out = encoder.requests(eval_data[: config.eval_records])
        self.output = writable_dir(output)
        if config.after:
            train = self._followed(encoder, train)
            held_out = self._followed(encoder, held_out)
        kept = config.locality_rows
        self.sampler = Sampler(train, edits, config.batch_size, config.seed, kept)
        # Validation sees the same episodes every time.
        whole = len(held_out) // edits * edits
        groups = [held_out[i : i + edits] for i in range(0, whole, edits)]
        draw = Sampler(held_out, edits, 1, 0, kept).episode if groups else None
        self.eval_episodes = [draw(g, random.Random(i)) for i, g in enumerate(groups) if draw]
        # What must agree between a checkpoint and the run that resumes it.
        self.run_id: dict[str, Any] = {
            "train": to_json(config),
            algorithm.kind: to_json(algorithm.config),
            "model_fingerprint": algorithm.model_fingerprint,
            "records": len(train),
            "data": _data_digest(train),
            "eval_data": _data_digest(held_out),
            "chat": chat,
        }
        self.replay = algorithm.replay(model, keep=config.prefix_cache == "memory")
        self.eval_replay = algorithm.replay(model, keep=True)
        self.optimizer = EditorOptimizer(algorithm, config)

        self.checkpoints = self.output / "checkpoints"
        self.step = 0
        self.best_loss = math.inf
        self.best_step = 0
        self.skipped = 0
        self.skipped_in_row = 0
        self._stop = False
        last = self._last_checkpoint()
        if last is not None and not resume:
            raise FileExistsError(
                f"{self.output} holds the checkpoint {last.name}; pass resume to continue it, or "
                "choose another output folder"
            )
        if last is None and (self.output / "editor.json").exists():
            raise FileExistsError(
                f"{self.output} holds an editor, and no checkpoint to continue it from; move it "
                "away or choose another output folder"
            )
        if last is not None:
            self._load(last)
        algorithm.chat = chat
        probes = (p.prompt for r in train_data for p in r.locality)
        algorithm.elsewhere = tuple(islice(dict.fromkeys(probes), ELSEWHERE))
        self._start_log()
        if config.prefix_cache == "memory":
            with frozen(model):
                rows = [r for t in train for r in (t.edit, *t.rephrases, *t.locality, *t.after)]
                rows += self.sampler.pool
                # One fixed order, so that a resumed run keeps the same bits.
                for i in tqdm(range(0, len(rows), 2048), "prefix", disable=not progress):
                    self.replay.load(rows[i : i + 2048])

    def _followed(self, encoder: Encoder, records: list[EncodedRequest]) -> list[EncodedRequest]:
        """``records`` with what the model says behind their targets; kept in a file beside.

        Raises:
            ValueError: the model does not go on from a text.
        """
        if not encoder.continues_text:
            raise ValueError(
                f"nothing follows a target of {type(self.model).__name__}; leave out after"
            )
        parts = [(r.edit, *r.rephrases[:FOLLOWED]) for r in records]
        rows = [row for part in parts for row in part]
        key = digest({"rows": repr(rows), "model": fingerprint(self.model, self.algorithm.weights)})
        file = self.output / "after" / f"{key}-{self.config.after}.json"
        if not file.exists():
            made = followed(self.model, encoder, rows, self.config.after, self.progress)
            writable_dir(file.parent)
            write_json(
                file, {"ids": [x.ids[len(r.ids) :] for x, r in zip(made, rows, strict=True)]}
            )
        found = iter(r.followed(ids) for r, ids in zip(rows, read_json(file)["ids"], strict=True))
        after = [tuple(next(found) for _ in part) for part in parts]
        # A text that ends with its target has nothing behind it.
        return [
            replace(r, after=tuple(x for x in rows if len(x.ids) > x.first + 1))
            for r, rows in zip(records, after, strict=True)
        ]

    # -- the loop ----------------------------------------------------------------------------

    def train(self) -> A:
        """Run to ``config.steps``, or until validation stops improving; return the best editor.

        A step whose gradients are not finite changes nothing; it is counted, and a warning names
        the reason.

        Raises:
            DivergedError: ``MAX_SKIPPED`` such steps in a row.
            KeyboardInterrupt: Ctrl-C; the running step was finished, and a checkpoint written.
        """
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, desc="train", disable=not self.progress)
        with frozen(self.model), self._finish_step_on_interrupt(), bar:
            while self.step < config.steps and not self._out_of_patience() and not self._stop:
                begin = time.perf_counter()
                scores: dict[str, float] = {}
                norm = reason = None
                try:
                    scores, norm = self._update()
                    self.skipped_in_row = 0
                except NonFiniteError as error:
                    reason = error
                    self.skipped += 1
                    self.skipped_in_row += 1
                self.step += 1
                line = {"step": self.step, **scores, "grad_norm": norm, "skipped": self.skipped}
                if self.algorithm.step_sizes is not None:
                    line["alpha"] = float(self.algorithm.step_sizes.detach().mean())
                self._log(line, seconds=time.perf_counter() - begin)
                shown = {k: f"{v:.3f}" for k, v in scores.items() if k != "loss"}
                bar.set_postfix({**shown, "skipped": self.skipped}, refresh=False)
                bar.update()
                if reason:
                    self._warn_of_skip(reason)

                due = self.step % config.eval_every == 0 or self.step == config.steps
                if due and self.eval_episodes:
                    self._validate()
                    if self.progress:
                        bar.write(self._summary())
                # The first editor has a checkpoint beside it, or its run could not be resumed.
                first = self.best_step and self._last_checkpoint() is None
                if self.step % config.save_every == 0 or self.step == config.steps or first:
                    self._save()
            if self._stop:
                self._save()
        if self._stop:
            raise KeyboardInterrupt(
                f"stopped after step {self.step}; run again with resume to continue"
            )
        # Without validation, or without one of a finite loss, the last editor is all there is.
        if config.keep == "last" or not self.best_step:
            self.algorithm.save_pretrained(self.output)
        return self.algorithm.from_pretrained(self.output, self.replay.device)

    def _update(self) -> tuple[dict[str, float], float]:
        """One optimiser step: its scores and gradient norm.

        Raises:
            NonFiniteError: it has to be skipped; parameters and running moments are as before.
        """
        moments = [buffer.clone() for buffer in self.algorithm.editor.buffers()]
        try:
            parts = self._accumulate(self.sampler.step(self.step))
            norm = self.optimizer.step(self.step)
            if not math.isfinite(norm):
                raise NonFiniteError(f"the norm of the editor's gradient is {norm}")
        except NonFiniteError:
            self.optimizer.discard()
            for buffer, before in zip(self.algorithm.editor.buffers(), moments, strict=True):
                buffer.copy_(before)
            raise
        return {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}, norm

    def _warn_of_skip(self, reason: NonFiniteError) -> None:
        warnings.warn(f"step {self.step} was skipped: {reason}", stacklevel=3)
        if self.skipped_in_row >= MAX_SKIPPED:
            raise DivergedError(
                f"{self.skipped_in_row} steps in a row were skipped, the last because {reason}; "
                "lower lr, or load the model in float32"
            ) from reason

    def _accumulate(self, episodes: Sequence[Any]) -> list[dict[str, float]]:
        """Gradients of the mean loss over ``episodes``, in ``config.accumulate`` passes."""
        size = len(episodes) // self.config.accumulate
        parts = []
        for i in range(0, len(episodes), size):
            scores = run_episodes(
                self.algorithm, self.replay, episodes[i : i + size], self.config.outer, merge=True
            )
            loss = self._loss(scores)
            (loss / self.config.accumulate).backward()
            parts.append(self._means(scores))
        return parts

    def _loss(self, scores: EpisodeScores) -> torch.Tensor:
        """c_e * NLL + c_loc * KL, mean over episodes (Eq. 4), and what the paper does not have.

        That is the KL on what follows the target, and the algorithm's own part.
        """
        loss = self.config.c_edit * scores.nll + self.config.c_loc * scores.kl
        if scores.after is not None:
            loss = loss + self.config.c_after * scores.after
        return (loss if scores.penalty is None else loss + scores.penalty).mean()

    def _means(self, scores: EpisodeScores) -> dict[str, float]:
        values = {f.name: getattr(scores, f.name) for f in fields(scores)}
        means = {k: float(v.detach().mean()) for k, v in values.items() if v is not None}
        return {"loss": float(self._loss(scores).detach()), **means}

    # -- validation --------------------------------------------------------------------------

    def _validate(self) -> None:
        """Score the held-out episodes and keep the editor if its loss is the best so far."""
        try:
            self.last_eval = self._evaluate()
        except NonFiniteError:
            self.last_eval = {}
        if self.last_eval.get("loss", math.inf) < self.best_loss:
            self.best_loss, self.best_step = self.last_eval["loss"], self.step
            self.algorithm.save_pretrained(self.output)
        scores = {k: v if math.isfinite(v) else None for k, v in self.last_eval.items()}
        self._log({"step": self.step, "eval": scores, "best_step": self.best_step})

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Means over the held-out episodes."""
        size = max(1, self.config.batch_size // self.config.accumulate)
        parts = []
        for i in range(0, len(self.eval_episodes), size):
            chunk = self.eval_episodes[i : i + size]
            scores = run_episodes(
                self.algorithm, self.eval_replay, chunk, self.config.outer, merge=False
            )
            parts += [{k: v * len(chunk) for k, v in self._means(scores).items()}]
        count = len(self.eval_episodes)
        return {k: sum(p[k] for p in parts) / count for k in parts[0]}

    def _summary(self) -> str:
        scores = "  ".join(f"{k} {v:.3f}" for k, v in self.last_eval.items()) or "not finite"
        return f"step {self.step}: {scores}{'  (best)' if self.best_step == self.step else ''}"

    def _out_of_patience(self) -> bool:
        waited = (self.step - self.best_step) / self.config.eval_every
        return bool(self.config.patience and self.best_step and waited >= self.config.patience)

    # -- state -------------------------------------------------------------------------------

    def _last_checkpoint(self) -> Path | None:
        return max(self.checkpoints.glob("step-*[0-9]"), default=None)

    def _save(self) -> None:
        """Write a checkpoint as a folder that appears whole, then drop the older ones."""
        path = self.checkpoints / f"step-{self.step:08d}"
        if path.exists():
            return
        scratch = self.checkpoints / f"{path.name}.tmp"
        shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
        writable_dir(scratch)
        state = self._state()
        tie = digest(state)
        write_json(scratch / "state.json", state)
        write_tensors(scratch / "editor.safetensors", self.algorithm.editor.state_dict(), tie)
        write_tensors(scratch / "optimizer.safetensors", self.optimizer.state(), tie)
        scratch.rename(path)
        for old in self.checkpoints.glob("step-*"):
            if old != path:
                shutil.rmtree(old)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint's ``state.json`` holds."""
        best = None if math.isinf(self.best_loss) else self.best_loss
        counters = {name: getattr(self, name) for name in PROGRESS}
        return {"best_loss": best, **counters, "run": self.run_id}

    def _load(self, path: Path) -> None:
        """Restore a checkpoint; the editor changes last, when all files have proved sound."""
        files = [path / f"{name}.safetensors" for name in ("editor", "optimizer")]
        state = read_json(path / "state.json")
        for name in sorted(self._state().keys() ^ state.keys()):
            kind = "has the foreign key" if name in state else "lacks"
            raise ValueError(f"{path / 'state.json'} {kind} {name}; choose another output folder")
        editor, optimizer = (read_tensors(file, digest(state)) for file in files)
        known = state["run"]
        if known["train"]["steps"] < self.config.steps:  # a run may go on for longer
            known = {**known, "train": {**known["train"], "steps": self.config.steps}}
        if known != self.run_id:
            parts, settings = _differences(known, self.run_id)
            raise ValueError(
                f"{path} is of another run: its {parts} differ ({settings}); "
                "repeat that run's settings or choose another output folder"
            )
        self.optimizer.load(optimizer, files[1], stepped=state["step"] > state["skipped"])
        load_state(self.algorithm.editor, editor, files[0])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]

    def _start_log(self) -> None:
        """Begin ``metrics.jsonl``, or cut it back to the checkpoint that is resumed."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if self.step and path.is_file() else []
        with replacing(path) as temporary:
            kept = [line for line in lines if _step_of(line) <= self.step]
            temporary.write_text("".join(f"{line}\n" for line in kept))

    def _log(self, values: dict[str, Any], **extra: Any) -> None:
        with open(self.output / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({**values, **extra}) + "\n")

    @contextmanager
    def _finish_step_on_interrupt(self) -> Iterator[None]:
        """Ctrl-C ends the loop after the running step, with a checkpoint; a second one at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, former)

        former = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, former)


def _data_digest(records: Sequence[EncodedRequest]) -> str:
    """A short name of what training draws from ``records``."""
    state = hashlib.sha256()
    for r in records:
        state.update(repr((r.edit, r.rephrases, r.locality, r.old)).encode())
    return state.hexdigest()[:16]


def _differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    """Which parts of two runs differ, and which settings in them: ``train``, ``train.lr``."""
    parts = [part for part in {**a, **b} if a.get(part) != b.get(part)]
    settings = []
    for part in parts:
        x, y = a.get(part), b.get(part)
        if isinstance(x, dict) and isinstance(y, dict):
            settings += [f"{part}.{k}" for k in {**x, **y} if x.get(k) != y.get(k)]
        else:
            settings.append(part)
    return ", ".join(parts), ", ".join(settings)


def _step_of(line: str) -> float:
    """The step that a line of ``metrics.jsonl`` is about; infinity for a torn one."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf
