"""Which records an optimiser step trains on, and the losses of an edit on them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymend.algorithms.trained import Trainable
from pymend.engine.losses import hits_rows, mean_of_seen, mean_per_row
from pymend.engine.replay import Replay
from pymend.engine.tokens import Batch, EncodedRequest, Row


@dataclass(frozen=True)
class Episode:
    """One edit (``n_edits`` facts at once), what it must also change, and what it must not."""

    edits: tuple[Row, ...]
    rephrases: tuple[Row, ...]
    locality: tuple[Row, ...]  # as many for each edit
    after: tuple[Row, ...] = ()  # what follows the target; one for each edit, or none

    def rows(self) -> tuple[Row, ...]:
        """Everything the model will be run on."""
        return (*self.edits, *self.rephrases, *self.locality, *self.after)


class Sampler:
    """Episodes by step. What step s draws depends on the seed and s alone, so it needs no state.

    Args:
        locality: rows for each edit.

    Raises:
        ValueError: fewer records than one step needs, or no locality prompt for some of them.
    """

    def __init__(
        self,
        records: Sequence[EncodedRequest],
        edits: int,
        episodes: int,
        seed: int,
        locality: int = 1,
    ) -> None:
        self.records, self.edits, self.seed, self.kept = records, edits, seed, locality
        self.per_step = edits * episodes
        if len(records) < self.per_step:
            raise ValueError(
                f"one step needs {self.per_step} records, the data set has {len(records)}; "
                "give more data or a smaller batch_size"
            )
        # A record without locality prompts borrows another's, or another's own prompt.
        shared = [row for r in records for row in r.locality]
        self.pool = shared or [r.old or r.edit.without_answer() for r in records]
        self.followed = [row for r in records for row in r.after]
        borrowed = {row.prompt for row in self.pool}
        may_borrow = edits > 1 or not all(len(r.locality) >= locality for r in records)
        short = may_borrow and len(borrowed) <= edits
        if short and borrowed <= {r.edit.prompt for r in records}:
            raise ValueError(
                "a record without locality prompts has none to borrow: all are its own or those of "
                "the facts edited with it; give locality prompts or more records"
            )
        self._epoch = -1
        self._order: list[int] = []

    def step(self, step: int) -> list[Episode]:
        """The episodes of one optimiser step; an epoch sees every record at most once."""
        steps_per_epoch = len(self.records) // self.per_step
        epoch, position = divmod(step, steps_per_epoch)
        if epoch != self._epoch:
            rng = random.Random(f"{self.seed} epoch {epoch}")
            self._order = list(range(len(self.records)))
            rng.shuffle(self._order)
            self._order = self._spread(self._order, rng)
            self._epoch = epoch
        chosen = self._order[position * self.per_step :][: self.per_step]
        rng = random.Random(f"{self.seed} step {step}")
        groups = [chosen[i : i + self.edits] for i in range(0, len(chosen), self.edits)]
        return [self.episode([self.records[i] for i in group], rng) for group in groups]

    def _spread(self, order: list[int], rng: random.Random) -> list[int]:
        """``order`` with the records of a fact at equal distances, so that no edit has two of them.

        A data set may have a fact several times, with other targets: no edit can do them all.
        """
        if self.edits == 1:
            return order
        facts = {i: self._fact(self.records[i]) for i in order}
        times = Counter(facts.values())
        first = {fact: rng.random() for fact in times}
        turns: Counter[tuple[int, ...]] = Counter()
        place = {}
        for i in order:
            fact = facts[i]
            place[i] = (turns[fact] + first[fact]) / times[fact]
            turns[fact] += 1
        return sorted(order, key=place.__getitem__)

    @staticmethod
    def _fact(record: EncodedRequest) -> tuple[int, ...]:
        """What the wordings of a fact have in common, whichever is the prompt."""
        return min(row.prompt for row in (record.edit, *record.rephrases))

    def episode(self, records: Sequence[EncodedRequest], rng: random.Random) -> Episode:
        """Draw a rephrase and a locality prompt for every record, none that is edited."""
        rephrases = [rng.choice(r.rephrases) if r.rephrases else r.edit for r in records]
        taken: set[tuple[int, ...]] = set()
        if len(records) > 1:  # one's neighbour may be edited with it
            taken = {row.prompt for r in records for row in (r.edit, *r.rephrases)}
        edited = {r.edit.prompt for r in records}
        locality = [row for r in records for row in self._locality(r, taken, edited, rng)]
        after = [rng.choice(r.after or self.followed) for r in records if self.followed]
        return Episode(
            tuple(r.edit for r in records), tuple(rephrases), tuple(locality), tuple(after)
        )

    def _locality(
        self,
        record: EncodedRequest,
        taken: set[tuple[int, ...]],
        edited: set[tuple[int, ...]],
        rng: random.Random,
    ) -> list[Row]:
        """Locality prompts of ``record`` that are not ``taken``, and borrowed ones."""
        own = [row for row in record.locality if row.prompt not in taken]
        rows = [rng.choice(own)] if own and self.kept == 1 else rng.sample(own, len(own))
        while len(rows) < self.kept:
            borrowed = rng.choice(self.pool)
            if borrowed.prompt not in edited:
                rows.append(borrowed)
        return rows[: self.kept]


@dataclass(frozen=True)
class EpisodeScores:
    """Per episode [episodes]: losses that gradients flow through, and teacher-forced scores.

    A score is None for a kind of row that was not looked at.
    """

    nll: Tensor
    kl: Tensor
    edit_success: Tensor | None
    generality: Tensor | None
    locality: Tensor
    penalty: Tensor | None  # the algorithm's own part of the loss
    after: Tensor | None = None  # KL on what follows the target


def run_episodes(
    algorithm: Trainable[Any], replay: Replay, episodes: Sequence[Episode], outer: str, merge: bool
) -> EpisodeScores:
    """Edit once per episode, all in one pass, and look at the edited model.

    For MEND, ``train_step`` of ``pymend/reference.py`` for each episode (paper, Algorithm 1).

    Args:
        outer: the edit loss is taken on the "rephrase", the "prompt", or the mean over "both".
        merge: training: take the captured rows into the running moments, and look only at the kinds
            of rows that the loss needs.
    """
    n = len(episodes)
    replay.load([row for e in episodes for row in e.rows()])
    edits, rephrases, locality = (
        replay.batch([row for e in episodes for row in getattr(e, part)])
        for part in ("edits", "rephrases", "locality")
    )
    rows = [row for e in episodes for row in e.after]
    after = replay.batch(rows) if rows else None
    with torch.no_grad():
        base = replay.label_rows(locality)
        base_after = None if after is None else replay.label_rows(after)
    edit = algorithm.differentiable(replay, edits.rows, n, merge)
    # One pass for each kind of row: their lengths differ, and padding would cost more.
    with edit.applied(replay.model):
        looks = {
            kind: _outer(replay, batch, n)
            for kind, batch in (("prompt", edits), ("rephrase", rephrases))
            if outer in (kind, "both") or not merge
        }
        kept = replay.label_rows(locality).losses(base=base)
        follows = None if after is None else replay.label_rows(after).losses(base=base_after)
    nll = [look[0] for kind, look in looks.items() if outer in (kind, "both")]
    hits = {kind: look[1] for kind, look in looks.items()}
    same = (kept.best == kept.base_best).double()
    episode = locality.row // (len(locality.rows) // n)
    return EpisodeScores(
        nll=torch.stack(nll).mean(0),
        kl=mean_per_row(kept.kl, episode, n),
        edit_success=hits.get("prompt"),
        generality=hits.get("rephrase"),
        locality=mean_per_row(same, episode, n),
        penalty=algorithm.penalty(replay, locality, base, n),
        after=None
        if after is None or follows is None
        else mean_per_row(follows.kl, after.row // (len(after.rows) // n), n),
    )


def _outer(replay: Replay, batch: Batch, episodes: int) -> tuple[Tensor, Tensor]:
    """NLL (token mean) and share of exact matches [episodes] of the edited model on ``batch``."""
    look, rows = replay.label_rows(batch).losses(batch.target), len(batch.rows)
    nll = mean_of_seen(look.nll, batch.target, batch.row // (rows // episodes), episodes)
    exact = (hits_rows(look.best, batch.target, batch.row, rows) == 1).double()
    return nll, exact.view(episodes, -1).mean(1)
