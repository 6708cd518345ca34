"""What every editing algorithm offers: the same calls to edit, whatever computes the change.

An algorithm turns rows into an edit of a model; the trainer, the evaluator and users see only that.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from pymend.config import EditRequest
from pymend.edit import Outcome
from pymend.losses import hits_rows, mean_of_seen
from pymend.models import EditedWeight, frozen
from pymend.replay import Replay
from pymend.tokens import Batch, Encoder, Row


class AnyEdit(Protocol):
    """One edit, or several independent ones side by side; ``pymend.Edit`` is the low-rank kind."""

    outcomes: tuple[Outcome, ...]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """One of several independent edits."""

    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """``model`` acts edited inside the block, and is as before after it."""


class Algorithm(ABC):
    """Computes edits for the facts it is asked to change. The model is never changed or kept.

    ``weights``: the matrices it edits; whatever lies below them is the same before and after an
    edit. ``n_edits``: the simultaneous edits it was trained for; None if it was not.
    """

    weights: tuple[EditedWeight, ...]
    n_edits: int | None = None

    @abstractmethod
    def fit(self, model: nn.Module) -> str:
        """Get ready for ``model``, on its device; its fingerprint.

        Raises:
            ValueError: the model is none that this algorithm can edit.
        """

    @abstractmethod
    def independent(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> AnyEdit:
        """One edit for each of ``rows``, or one for all of them if ``joint``.

        Args:
            replay: made by :meth:`replay`; has loaded ``rows``.

        Raises:
            ValueError: something in the edits is not finite.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that its edits depend on besides the model and the request; plain JSON."""

    def expect(self, count: int) -> None:
        """Warn if this was not trained for ``count`` simultaneous edits."""
        if self.n_edits not in (None, count):
            warnings.warn(
                f"this editor was trained for n_edits={self.n_edits} at once, not for {count}: "
                "the size of an edit grows with their number",
                stacklevel=4,
            )

    def replay(self, model: nn.Module, keep: bool = False) -> Replay:
        """The model as this algorithm runs it."""
        return Replay(model, self.weights, keep)

    def edit(
        self,
        model: nn.Module,
        tokenizer: Any,
        requests: EditRequest | Sequence[EditRequest],
        chat: bool = False,
    ) -> Any:
        """One edit for one or several facts at once.

        Sequential editing is the same call on a model that already has edits applied or merged.

        Args:
            model: it is not changed.
            tokenizer: the model's own.
            requests: only ``prompt`` and ``target`` of each are used.
            chat: put prompts through the tokenizer's chat template.

        Returns:
            The edit. ``edit.outcomes`` tells, request by request, whether it took.

        Raises:
            ValueError: no request, one that cannot be tokenised, or a model that does not fit.
        """
        requests = [requests] if isinstance(requests, EditRequest) else list(requests)
        return self._edit(model, tokenizer, requests, joint=True, chat=chat)

    def edit_many(
        self,
        model: nn.Module,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        chat: bool = False,
    ) -> Any:
        """Independent edits of ``model``, one for each request, computed in one pass.

        Returns:
            An edit that holds them side by side: ``edit[i]`` is the one of ``requests[i]``.

        Raises:
            ValueError: as :meth:`edit`.
        """
        return self._edit(model, tokenizer, list(requests), joint=False, chat=chat)

    def _edit(
        self, model: nn.Module, tokenizer: Any, requests: list[EditRequest], joint: bool, chat: bool
    ) -> AnyEdit:
        if not requests:
            raise ValueError("no request to edit; give at least one")
        if joint:
            self.expect(len(requests))
        encoder = Encoder.for_model(model, tokenizer, chat)
        rows = [encoder.row(r.prompt, r.target) for r in requests]
        known = self.fit(model)
        with frozen(model):
            replay = self.replay(model)
            replay.load(rows)
            edit = self.independent(replay, rows, joint)
            edit.outcomes = _outcomes(replay, edit, requests, rows, encoder)
        edit.fingerprint = known
        return edit


def _outcomes(
    replay: Replay, edit: AnyEdit, requests: list[EditRequest], rows: list[Row], encoder: Encoder
) -> tuple[Outcome, ...]:
    """Look at every request before and after the edit."""
    batch = Batch.of(rows, replay.device)
    n = len(rows)
    looks = []
    with torch.no_grad():
        before = replay.label_rows(batch).losses(batch.target)
        with edit.applied(replay.model):
            after = replay.label_rows(batch).losses(batch.target)
    for look in (before, after):
        probability = (-mean_of_seen(look.nll, batch.target, batch.row, n)).exp().tolist()
        hits = hits_rows(look.best, batch.target, batch.row, n).tolist()
        best = look.best.cpu()
        answers = [encoder.text(best[batch.row.cpu() == i]) for i in range(n)]
        looks.append(list(zip(probability, answers, hits, strict=True)))
    return tuple(
        Outcome(r.prompt, r.target, p0, p1, a0, a1, hit == 1.0)
        for r, (p0, a0, _), (p1, a1, hit) in zip(requests, *looks, strict=True)
    )
