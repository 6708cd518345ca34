"""What the small models of ``mini.py`` are taught: the built-in facts as rows.

An encoder-decoder and a language model learn to complete a fact's wordings by its object, a
classifier to tell a claim with the true object from one with a wrong object, a language model also
whole passages. Of the wordings of all facts a tenth is never shown, so that the share of those that
a model gets right says whether it knows facts or strings.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pymend.data.builders.claims import NAMES
from pymend.data.choices import hashed, pick
from pymend.data.facts import Relation, load_relations, wrong_objects
from pymend.engine.tokens import IGNORE, ClassEncoder, Encoder, Row
from pymend.zoo.recipes import Wordings

HELD_OUT = 10  # one wording in so many is never shown
POOL = 16  # batches that are drawn together and sorted by length, so that little is padded


@dataclass(frozen=True)
class Lesson:
    """A fact with its subject put into its relation's wordings."""

    relation: Relation
    subject: str
    seen: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def truth(self) -> str:
        """The fact's object."""
        return self.relation.facts[self.subject]

    def sentences(self) -> list[str]:
        """The seen wordings with the true object."""
        return [f"{text} {self.truth}." for text in self.seen]

    def passage(self, rng: random.Random) -> str:
        """The seen wordings that are statements, in mixed order, from some word of the first half.

        Language models learn from pieces of long texts, so what they say does not hang on where a
        text begins.
        """
        texts = [text for text in self.sentences() if "\n" not in text]
        words = " ".join(rng.sample(texts, len(texts))).split()
        return " ".join(words[rng.randrange(len(words) // 2 + 1) :])


def lessons(wordings: Wordings, subjects: int = 0) -> list[Lesson]:
    """Every built-in fact of every split, each with at least one wording to be shown.

    Args:
        wordings: a relation's patterns, each with one ``{}`` for the subject.
        subjects: only the first so many subjects of a relation; 0 for all.
    """
    found = []
    for relation in load_relations():
        for subject in list(relation.facts)[: subjects or None]:
            texts = dict.fromkeys(pattern.format(subject) for pattern in wordings(relation))
            held = [t for t in texts if hashed("held out", relation.name, t) % HELD_OUT == 0]
            held = held[: len(texts) - 1]
            seen = tuple(t for t in texts if t not in held)
            found.append(Lesson(relation, subject, seen, tuple(held)))
    return found


@dataclass(frozen=True)
class Taught:
    """A row to train on; ``hint`` is the first token of the true object, for a false claim."""

    row: Row
    hint: int = IGNORE


class Course:
    """Batches of rows to train on, and the rows that show what a model knows.

    Args:
        encoder: of the model that is taught; its kind decides what the rows are.
        facts: from :func:`lessons`.
        batch: rows of a batch.
        passages: one batch in so many holds whole passages; 0 for none.
        seed: of the order, of the wordings and of wrong objects.
    """

    def __init__(
        self, encoder: Encoder, facts: Sequence[Lesson], batch: int, passages: int, seed: int
    ) -> None:
        self.encoder, self.facts, self.size, self.passages = encoder, facts, batch, passages
        self.rng = random.Random(f"course {seed}")
        self.deck = self._deck()
        self.pool: list[list[list[Taught]]] = []

    def _deck(self) -> Iterator[Lesson]:
        """The facts in mixed order, again and again."""
        while True:
            yield from self.rng.sample(self.facts, len(self.facts))

    def batch(self, step: int) -> list[Taught]:
        """The rows of a step; steps are asked for in order."""
        if self.passages and step % self.passages == 0:
            # A passage has about eight times the tokens of a wording.
            facts = [next(self.deck) for _ in range(-(-self.size // 8))]
            return [Taught(self.encoder.row(fact.passage(self.rng))) for fact in facts]
        if not self.pool:
            count = self.size // (2 if isinstance(self.encoder, ClassEncoder) else 1)
            drawn = [self._taught(next(self.deck)) for _ in range(POOL * count)]
            drawn.sort(key=lambda group: len(group[0].row.prefix))
            self.pool = [drawn[i : i + count] for i in range(0, len(drawn), count)]
            self.rng.shuffle(self.pool)
        return [taught for group in self.pool.pop() for taught in group]

    def _taught(self, fact: Lesson) -> list[Taught]:
        """A wording of a fact; as a claim both true and false, for these differ in the object."""
        wording = self.rng.choice(fact.seen)
        if isinstance(self.encoder, ClassEncoder):
            true = self._claim(fact, wording, fact.truth, True)
            false = self._claim(fact, wording, self._wrong(fact), False)
            tokens = self.encoder.tokenizer(f" {fact.truth}", add_special_tokens=False).input_ids
            return [Taught(true), Taught(false, hint=tokens[0])]
        row = self.encoder.row(wording, fact.truth)
        return [Taught(row.whole() if self.encoder.continues_text else row)]

    def _claim(self, fact: Lesson, wording: str, said: str, label: bool) -> Row:
        return self.encoder.row(f"{wording} {said}.", NAMES[label])

    def _wrong(self, fact: Lesson) -> str:
        """A wrong object, as often as it is a true one elsewhere: no object tells by itself."""
        wrong = wrong_objects(fact.relation, fact.subject)
        return self.rng.choice([said for said in fact.relation.facts.values() if said in wrong])

    def exam(self, held_out: bool = False, wordings: int = 0) -> list[Row]:
        """Rows about every fact, each to be got right as a whole.

        A classifier is asked about each wording with the true object and with a wrong one.

        Args:
            held_out: the wordings that are never shown, in place of those that are.
            wordings: at most so many of a fact; 0 for all.
        """
        rows = []
        for fact in self.facts:
            texts = fact.held_out if held_out else fact.seen
            for wording in pick(texts, wordings or len(texts), "exam"):
                if isinstance(self.encoder, ClassEncoder):
                    [wrong] = pick(wrong_objects(fact.relation, fact.subject), 1, "exam", wording)
                    rows.append(self._claim(fact, wording, fact.truth, True))
                    rows.append(self._claim(fact, wording, wrong, False))
                else:
                    rows.append(self.encoder.row(wording, fact.truth))
        return rows
