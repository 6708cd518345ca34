"""What every editing algorithm offers: the same calls to edit, whatever computes the change.

An algorithm turns rows into an edit of a model; the trainer, the evaluator and users see only that.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from pymend.config import EditRequest
from pymend.edit import BaseEdit, Edit, Outcome
from pymend.engine.hooks import frozen
from pymend.engine.losses import hits_rows, mean_of_seen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Chat, Encoder, Row, settled
from pymend.models.structure import EditedWeight, unwrapped

E = TypeVar("E", bound=BaseEdit)
A = TypeVar("A", bound="Algorithm[Any]")


class Algorithm(ABC, Generic[E]):
    """Computes edits of the kind ``E`` for the facts it is asked to change.

    The model is never changed or kept.

    ``weights``: the matrices it edits; whatever lies below them is the same before and after an
    edit. ``n_edits``: the simultaneous edits it was trained for; None if it was not. ``chat``: how
    it was trained to be asked; None if it was not, or if nobody knows.
    """

    weights: tuple[EditedWeight, ...]
    n_edits: int | None = None
    chat: Chat = None
    source: str = ""

    @classmethod
    @abstractmethod
    def from_config(
        cls: type[A],
        model: nn.Module,
        config: Any = None,
        *,
        tokenizer: Any = None,
        train_data: Sequence[EditRequest] = (),
        chat: Chat = None,
    ) -> A:
        """This algorithm for ``model``, with settings of its own kind; untrained.

        Args:
            tokenizer, train_data, chat: for what draws rows from training data, as FT+KL does.

        Raises:
            ValueError: the settings do not fit the model, or lack what they need.
        """

    @abstractmethod
    def prepare(self, model: nn.Module) -> str:
        """Get ready for ``model``, on its device; its fingerprint.

        Raises:
            ValueError: the model is none that this algorithm can edit.
        """

    @abstractmethod
    def compute(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> E:
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

    def chat_for(self, asked: Chat) -> bool | dict[str, Any]:
        """How prompts are put: as ``asked``, or as this was trained where nobody says.

        Raises:
            ValueError: it was trained to be asked in another way.
        """
        if self.chat is None or asked is None:
            return settled(self.chat if asked is None else asked)
        own = settled(self.chat)
        if settled(asked) != own:
            how = f"the chat template{f' with {own}' if own is not True else ''}"
            raise ValueError(
                f"this editor was trained on {how if own else 'plain prompts'}, and is not used so "
                "here; leave out chat to use it as it was trained, or train one for this"
            )
        return own

    def replay(self, model: nn.Module, keep: bool = False) -> Replay:
        """The model as this algorithm runs it."""
        return Replay(model, self.weights, keep)

    def edit(
        self,
        model: nn.Module,
        tokenizer: Any,
        requests: str | EditRequest | Sequence[EditRequest],
        target: str | None = None,
        *,
        chat: Chat = None,
    ) -> E:
        """One edit for one or several facts at once.

        Sequential editing is the same call on a model that already has edits applied or merged.

        Args:
            model: it is not changed.
            tokenizer: the model's own.
            requests: a prompt, whose new answer is ``target``; or requests, of which only
                ``prompt``, ``target`` and ``joint`` are used.
            chat: put prompts through the tokenizer's chat template; a mapping has options of it.
                None: as this was trained.

        Returns:
            The edit. ``edit.outcomes`` tells, request by request, whether it took.

        Raises:
            ValueError: no request, one that cannot be tokenised, a model that does not fit, or
                another ``chat`` than in training.
            TypeError: a prompt without a target, or a target beside requests.
        """
        return self._edit(model, tokenizer, _listed(requests, target), joint=True, chat=chat)

    def edit_many(
        self,
        model: nn.Module,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        chat: Chat = None,
    ) -> E:
        """Independent edits of ``model``, one for each request, computed in one pass.

        Returns:
            An edit that holds them side by side: ``edit[i]`` is the one of ``requests[i]``.

        Raises:
            ValueError, TypeError: as :meth:`edit`.
        """
        return self._edit(model, tokenizer, _listed(requests, None), joint=False, chat=chat)

    def _edit(
        self, model: nn.Module, tokenizer: Any, requests: list[EditRequest], joint: bool, chat: Chat
    ) -> E:
        if not requests:
            raise ValueError("no request to edit; give at least one")
        if joint:
            self.expect(len(requests))
        model, asked = unwrapped(model), self.chat_for(chat)
        encoder = Encoder.for_model(model, tokenizer, asked)
        rows = [encoder.row(r.prompt, r.target, r.joint) for r in requests]
        known = self.prepare(model)
        with frozen(model):
            replay = self.replay(model)
            replay.load(rows)
            edit = self.compute(replay, rows, joint)
            edit.outcomes = _outcomes(replay, edit, requests, rows, encoder)
        edit.fingerprint = known
        if isinstance(edit, Edit):
            edit.origin = replace(edit.origin, chat=asked, editor=self.source)
        return edit


def _listed(
    requests: str | EditRequest | Sequence[EditRequest], target: str | None
) -> list[EditRequest]:
    """The requests of a call, however they were given.

    Raises:
        TypeError: what :meth:`Algorithm.edit` says.
    """
    if isinstance(requests, str) and isinstance(target, str):
        return [EditRequest(requests, target)]
    if isinstance(requests, str) or target is not None:
        raise TypeError('name a fact as edit(model, tokenizer, "prompt", "target"), or by requests')
    listed = [requests] if isinstance(requests, EditRequest) else list(requests)
    for request in listed:
        if not isinstance(request, EditRequest):
            raise TypeError(f"{request!r} is no EditRequest; give EditRequest(prompt, target)")
    return listed


def _outcomes(
    replay: Replay, edit: BaseEdit, requests: list[EditRequest], rows: list[Row], encoder: Encoder
) -> tuple[Outcome, ...]:
    """Look at every request before and after the edit."""
    batch = replay.batch(rows)
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
