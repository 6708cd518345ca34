"""The outer loop of MEND (paper, Algorithm 1): train the editor, never the model."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from pymend.capture import NonFiniteError
from pymend.config import EditRequest, TrainConfig, to_json
from pymend.files import read_json, read_tensors, replacing, writable_dir, write_json, write_tensors
from pymend.mend import Mend, load_state
from pymend.models import frozen
from pymend.replay import Replay
from pymend.tokens import Encoder
from pymend.training.episodes import EpisodeScores, Sampler, run_episodes
from pymend.training.optim import EditorOptimizer


class Trainer:
    """Trains ``mend`` on ``train_data`` for ``model``, which is the same, bit for bit, afterwards.

    ``output`` receives the best editor (by validation loss; the last one without ``eval_data``),
    ``metrics.jsonl`` and ``checkpoints/``. A run that was interrupted or killed and then resumed
    equals one that was not, bit for bit on a CPU.

    Args:
        resume: continue from the last checkpoint in ``output``, if there is one.
        progress: show a progress bar.

    Raises:
        ValueError: data that cannot be used, or a checkpoint of another run.
        PermissionError: ``output`` cannot be written.
        FileExistsError: ``output`` holds checkpoints and ``resume`` was not asked for.
    """

    def __init__(
        self,
        mend: Mend,
        model: nn.Module,
        tokenizer: Any,
        train_data: Sequence[EditRequest],
        eval_data: Sequence[EditRequest],
        config: TrainConfig,
        output: str | Path,
        resume: bool = False,
        progress: bool = True,
        chat: bool = False,
    ) -> None:
        mend.fit(model)
        self.mend, self.model, self.config, self.progress = mend, model, config, progress
        encoder = Encoder.for_model(model, tokenizer, chat)
        edits = mend.config.n_edits
        train = encoder.requests(train_data)
        self.sampler = Sampler(train, edits, config.batch_size, config.seed)
        # Validation sees the same episodes every time.
        held_out = encoder.requests(eval_data[: config.eval_records])
        whole = len(held_out) // edits * edits
        groups = [held_out[i : i + edits] for i in range(0, whole, edits)]
        draw = Sampler(held_out, 1, 1, 0).episode if held_out else None
        self.eval_episodes = [draw(g, random.Random(i)) for i, g in enumerate(groups) if draw]
        self.replay = Replay(model, mend.weights, keep=config.prefix_cache == "memory")
        self.eval_replay = Replay(model, mend.weights, keep=True)
        self.optimizer = EditorOptimizer(mend, config)

        self.output = writable_dir(output)
        self.checkpoints = self.output / "checkpoints"
        self.step = 0
        self.best_loss = math.inf
        self.best_step = 0
        self.skipped = 0
        self._stop = False
        last = self._last_checkpoint()
        if last is not None and not resume:
            raise FileExistsError(
                f"{self.output} holds the checkpoint {last.name}; pass resume to continue it, or "
                "choose another output folder"
            )
        if last is not None:
            self._load(last)
        self._start_log()
        if config.prefix_cache == "memory":
            with frozen(model):
                rows = [r for t in train for r in (t.edit, *t.rephrases, *t.locality)]
                rows += self.sampler.pool
                # One fixed order, so that a resumed run keeps the same bits.
                for i in tqdm(range(0, len(rows), 2048), "prefix", disable=not progress):
                    self.replay.load(rows[i : i + 2048])

    # -- the loop ----------------------------------------------------------------------------

    def train(self) -> Mend:
        """Run to ``config.steps``, or until validation stops improving; return the best editor."""
        config = self.config
        bar = tqdm(total=config.steps, initial=self.step, desc="train", disable=not self.progress)
        with frozen(self.model), self._finish_step_on_interrupt(), bar:
            while self.step < config.steps and not self._out_of_patience() and not self._stop:
                begin = time.perf_counter()
                scores, norm = self._update()
                self.step += 1
                if norm is None:
                    self.skipped += 1
                line = {"step": self.step, **scores, "grad_norm": norm, "skipped": self.skipped}
                line["alpha"] = float(self.mend.editor.alpha.detach().mean())
                self._log(line, seconds=time.perf_counter() - begin)
                bar.update()
                bar.set_postfix({k: f"{v:.3f}" for k, v in scores.items() if k != "loss"})

                due = self.step % config.eval_every == 0 or self.step == config.steps
                if due and self.eval_episodes:
                    self._validate()
                    bar.write(self._summary())
                if self.step % config.save_every == 0 or self.step == config.steps or self._stop:
                    self._save()
        if self._stop:
            raise KeyboardInterrupt(
                f"stopped after step {self.step}; run again with resume to continue"
            )
        if not self.best_step:  # no validation, or none with a finite loss
            self.mend.save_pretrained(self.output)
        return Mend.from_pretrained(self.output, self.mend.editor.alpha.device)

    def _update(self) -> tuple[dict[str, float], float | None]:
        """One optimiser step: its scores and gradient norm, or neither if it had to be skipped."""
        try:
            parts = self._accumulate(self.sampler.step(self.step))
        except NonFiniteError:
            self.optimizer.discard()
            return {}, None
        norm = self.optimizer.step(self.step)
        if not math.isfinite(norm):
            return {}, None
        return {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}, norm

    def _accumulate(self, episodes: Sequence[Any]) -> list[dict[str, float]]:
        """Gradients of the mean loss over ``episodes``, in ``config.accumulate`` passes."""
        size = len(episodes) // self.config.accumulate
        parts = []
        for i in range(0, len(episodes), size):
            scores = run_episodes(
                self.mend, self.replay, episodes[i : i + size], self.config.outer, merge=True
            )
            loss = self._loss(scores)
            (loss / self.config.accumulate).backward()
            parts.append(self._means(scores))
        return parts

    def _loss(self, scores: EpisodeScores) -> torch.Tensor:
        """c_e * NLL + c_loc * KL, mean over episodes (Eq. 4)."""
        return (self.config.c_edit * scores.nll + self.config.c_loc * scores.kl).mean()

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
            self.mend.save_pretrained(self.output)
        self._log({"step": self.step, "eval": self.last_eval, "best_step": self.best_step})

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Means over the held-out episodes."""
        size = max(1, self.config.batch_size // self.config.accumulate)
        parts = []
        for i in range(0, len(self.eval_episodes), size):
            chunk = self.eval_episodes[i : i + size]
            scores = run_episodes(
                self.mend, self.eval_replay, chunk, self.config.outer, merge=False
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

    def _run_id(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that resumes it."""
        return {
            "train": to_json(self.config),
            "mend": to_json(self.mend.config),
            "model_fingerprint": self.mend.model_fingerprint,
            "records": len(self.sampler.records),
        }

    def _last_checkpoint(self) -> Path | None:
        return max(self.checkpoints.glob("step-*[0-9]"), default=None)

    def _save(self) -> None:
        """Write a checkpoint as a folder that appears whole, then drop the older ones."""
        path = self.checkpoints / f"step-{self.step:08d}"
        if path.exists():
            return
        scratch = writable_dir(self.checkpoints / f"{path.name}.tmp")
        write_tensors(scratch / "editor.safetensors", self.mend.editor.state_dict())
        write_tensors(scratch / "optimizer.safetensors", self.optimizer.state())
        names = ("step", "best_step", "skipped")
        best = None if math.isinf(self.best_loss) else self.best_loss
        state = {"best_loss": best, **{n: getattr(self, n) for n in names}}
        write_json(scratch / "state.json", {**state, "run": self._run_id()})
        scratch.rename(path)
        for old in self.checkpoints.glob("step-*"):
            if old != path:
                shutil.rmtree(old)

    def _load(self, path: Path) -> None:
        state = read_json(path / "state.json")
        own = self._run_id()
        for part, value in own.items():
            if state["run"].get(part) != value:
                raise ValueError(
                    f"{path} is of another run: its {part} differ; "
                    "repeat that run's settings or choose another output folder"
                )
        editor = read_tensors(path / "editor.safetensors")
        optimizer = read_tensors(path / "optimizer.safetensors")
        load_state(self.mend.editor, editor, path / "editor.safetensors")
        self.optimizer.load(optimizer)
        self.step, self.best_step = state["step"], state["best_step"]
        self.skipped = state["skipped"]
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


def _step_of(line: str) -> float:
    """The step that a line of ``metrics.jsonl`` is about; infinity for a torn one."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
