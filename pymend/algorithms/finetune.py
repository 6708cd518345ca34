"""Fine-tuning as an editor: FT, and FT+KL, which also holds what it should not change.

From the paper's description: a residual of the edited weights starts at
zero and takes RMSprop steps on the facts of one edit until all their tokens are right. Where the
paper's code returns the weights before its last step, these are the ones after it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pymend.algorithms.base import Algorithm
from pymend.algorithms.dense import DenseEdit
from pymend.config import EditRequest, FineTuneConfig, to_json
from pymend.edit import fingerprint
from pymend.engine.losses import mean_of_seen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Chat, Encoder, Row
from pymend.files import digest
from pymend.models.structure import EditedWeight, find_weights, weight_of

# The paper's learning rate and c_edit: encoder-decoder or not, from how many parameters on.
PAPER = (
    (False, 5e9, 5e-6, 1e-3),  # GPT-J
    (False, 1e9, 5e-6, 1e-2),  # GPT-Neo
    (True, 1e9, 1e-4, 1e-2),  # T5-XL, T5-XXL
)
SMALL = 1e-6, 1e-2  # BART, BERT, distilGPT-2
INIT_STD = 0.01  # of one factor of a residual of low rank; the other starts at zero


class FineTune(Algorithm[DenseEdit]):
    """FT, or FT+KL if ``config.kl``.

    Args:
        locality: rows from the training data whose answers FT+KL holds, one a step.

    Raises:
        ValueError: FT+KL without locality rows.
    """

    def __init__(
        self, config: FineTuneConfig, weights: Sequence[EditedWeight], locality: Sequence[Row] = ()
    ) -> None:
        if config.kl and not locality:
            raise ValueError("kl needs locality prompts from training data; there are none")
        self.config = config
        self.weights = tuple(weights)
        self.locality = tuple(locality)

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        config: FineTuneConfig | None = None,
        *,
        tokenizer: Any = None,
        train_data: Sequence[EditRequest] = (),
        chat: Chat = None,
    ) -> FineTune:
        """Fine-tuning of ``model``, with the paper's settings where ``config`` has none.

        Args:
            tokenizer: the model's own; FT+KL reads the locality prompts of ``train_data`` with it.
            chat: put prompts through the tokenizer's chat template.

        Raises:
            ValueError: the configuration names weights that do not exist or cannot be edited, or
                FT+KL has no locality prompts.
        """
        config = config or FineTuneConfig()
        lr, c_edit = _paper(model)
        config = replace(config, lr=config.lr or lr, c_edit=config.c_edit or c_edit)
        locality: list[Row] = []
        if config.kl:
            encoder = Encoder.for_model(model, tokenizer, chat)
            locality = [encoder.probe(p) for request in train_data for p in request.locality]
        return cls(config, find_weights(model, config.edit, config.blocks, experts=False), locality)

    def prepare(self, model: nn.Module) -> str:
        """The model's fingerprint.

        Raises:
            ValueError: ``model`` lacks an edited weight or has it in another shape.
        """
        return fingerprint(model, self.weights)

    def identity(self) -> dict[str, Any]:
        """Its settings, and a digest of the rows that it holds."""
        held = digest({"rows": repr(self.locality)})
        return {"kind": "ft", **to_json(self.config), "locality": held}

    def replay(self, model: nn.Module, keep: bool = False) -> Replay:
        """The model as this algorithm runs it: locality rows come one by one, and are kept."""
        return super().replay(model, keep or self.config.kl)

    def compute(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> DenseEdit:
        """One edit for each of ``rows``, or one for all of them if ``joint``.

        Independent ones are fitted one after the other: a step is one pass over their weights,
        which takes as long for one as for its share of many.

        Raises:
            NonFiniteError: a residual is not finite.
            ValueError: the locality prompts are all the edit's own.
        """
        groups = [list(rows)] if joint else [[row] for row in rows]
        fitted = [self._fit(replay, group) for group in groups]
        steps = [count for _, count in fitted]
        if joint:
            residuals = fitted[0][0]
        else:
            residuals = {
                w.name: torch.stack([found[w.name] for found, _ in fitted]) for w in self.weights
            }
        edit = DenseEdit(self.weights, residuals, steps)
        edit.check(replay.model)
        return edit

    @torch.enable_grad()
    def _fit(self, replay: Replay, rows: Sequence[Row]) -> tuple[dict[str, Tensor], int]:
        """The residuals that one edit ends with, and the steps it took."""
        config, batch = self.config, replay.batch(rows)
        # The draws are the edit's own: no order or batch changes it.
        name = f"{config.seed} {[row.ids for row in rows]}"
        residual = _Residual(replay.model, self.weights, config.rank, name)
        optimizer = torch.optim.RMSprop(residual.parameters, config.lr)
        rng, others = random.Random(name), self._others(rows) if config.kl else []
        for step in range(config.steps):
            edit = DenseEdit(self.weights, residual.dense())
            with edit.applied(replay.model):
                look = replay.label_rows(batch).losses(batch.target)
            if look.best.equal(batch.target):
                return residual.result(), step
            loss = mean_of_seen(look.nll, batch.target, batch.row, len(rows)).mean()
            if config.kl:
                loss = config.c_edit * loss + self._drift(replay, rng.choice(others), edit)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(residual.parameters, config.clip)
            optimizer.step()
        return residual.result(), config.steps

    def _others(self, rows: Sequence[Row]) -> list[Row]:
        """The locality rows whose prompt is not edited by ``rows``."""
        edited = {row.prompt for row in rows}
        others = [row for row in self.locality if row.prompt not in edited]
        if not others:
            raise ValueError("all locality prompts are those of the edit itself; give others")
        return others

    def _drift(self, replay: Replay, row: Row, edit: DenseEdit) -> Tensor:
        """KL(model || edited model), the mean over the locality positions of ``row``."""
        replay.load([row])
        batch = replay.batch([row])
        with torch.no_grad():
            base = replay.label_rows(batch)
        with edit.applied(replay.model):
            return replay.label_rows(batch).losses(base=base).kl.mean()


class _Residual:
    """What is optimised: for every weight a matrix, or two factors of ``rank`` columns."""

    def __init__(
        self, model: nn.Module, weights: Sequence[EditedWeight], rank: int, seed: str
    ) -> None:
        self.factors: dict[str, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        for w in weights:
            value = weight_of(model, w)
            dtype = torch.promote_types(value.dtype, torch.float32)
            start = [value.new_zeros(rank or len(value), value.shape[1], dtype=dtype)]
            if rank:
                left = INIT_STD * torch.randn(len(value), rank, generator=generator, dtype=dtype)
                start = [left.to(value.device), *start]
            self.factors[w.name] = [x.requires_grad_() for x in start]
        self.parameters = [x for pair in self.factors.values() for x in pair]

    def dense(self) -> dict[str, Tensor]:
        """The residuals, differentiable."""
        return {n: f[0] if len(f) == 1 else f[0] @ f[1] for n, f in self.factors.items()}

    def result(self) -> dict[str, Tensor]:
        """The residuals, as constants."""
        return {name: value.detach() for name, value in self.dense().items()}


def _paper(model: nn.Module) -> tuple[float, float]:
    """The paper's learning rate and c_edit for a model of this kind and size."""
    two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    size = sum(p.numel() for p in model.parameters())
    for kind, least, lr, c_edit in PAPER:
        if kind == two_stacks and size >= least:
            return lr, c_edit
    return SMALL
