"""The built-in fact set: true facts in ``facts.json``, turned into edit requests.

``facts.json`` holds one object for each relation: ``object_type`` (what the answers are),
``cloze`` and ``question`` (patterns with one ``{}`` for the subject, continued by a space and the
answer), and ``facts`` (subject -> true object, one per line).

A split is a function of the subject's text alone, so a subject stays in its split whatever the
relation and whatever is added to the file. All choices (pattern, wrong object, locality) are made
by hashes and are the same on every machine and Python version.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, get_args

from pymend.config import EditRequest, Probe
from pymend.data.choices import hashed, pick

Split = Literal["train", "validation", "test"]

SPLIT_SALT = 531  # leaves every relation at least four subjects in each split


@dataclass(frozen=True)
class Relation:
    """One relation of the fact set; ``facts`` maps each subject to its true object."""

    name: str
    object_type: str
    cloze: tuple[str, ...]
    question: tuple[str, ...]
    facts: dict[str, str]

    @property
    def patterns(self) -> tuple[str, ...]:
        """Both forms, cloze first."""
        return self.cloze + self.question


@cache
def load_relations() -> tuple[Relation, ...]:
    """All relations of ``facts.json``, in file order."""
    text = resources.files("pymend.data").joinpath("facts.json").read_text(encoding="utf-8")
    return tuple(
        Relation(name, r["object_type"], tuple(r["cloze"]), tuple(r["question"]), dict(r["facts"]))
        for name, r in json.loads(text).items()
    )


def split_of(subject: str) -> Split:
    """The split of a subject: 80 % train, 10 % validation, 10 % test."""
    bucket = hashed("split", SPLIT_SALT, subject) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


@cache
def _truths() -> Mapping[str, set[str]]:
    """All true objects of every subject, whatever the relation."""
    truths: dict[str, set[str]] = defaultdict(set)
    for relation in load_relations():
        for subject, truth in relation.facts.items():
            truths[subject].add(truth)
    return truths


def wrong_objects(relation: Relation, subject: str) -> set[str]:
    """The relation's objects without the true ones of ``subject``, its other relations' too."""
    return set(relation.facts.values()) - _truths()[subject]


def load_facts(
    split: Split = "train", *, near: int = 2, far: int = 2, seed: int = 0
) -> list[EditRequest]:
    """One edit request for each fact of a split, as :func:`fact_requests` makes them."""
    return [request for _, request in fact_requests(split, near=near, far=far, seed=seed)]


def fact_requests(
    split: Split = "train",
    *,
    near: int = 2,
    far: int = 2,
    seed: int = 0,
    patterns: Callable[[Relation], Sequence[str]] = lambda relation: relation.patterns,
) -> list[tuple[Relation, EditRequest]]:
    """One edit request for each fact of a split, with its relation.

    Of the relation's patterns one gives the prompt, all others give the rephrases. The target is
    a wrong object of the same relation, never a true object of the subject. Locality prompts carry
    their true answers and come from other subjects of the same split: up to ``near`` of the same
    relation, then ``far`` of other relations; no answer equals the target. The order is mixed, so
    the first n requests are a fair sample.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        near: locality prompts of the same relation.
        far: locality prompts of other relations, each of a different one.
        seed: another seed picks other patterns, targets and locality prompts. The split stays.
        patterns: the wordings of a relation, each with one ``{}`` for the subject.

    Raises:
        ValueError: an unknown split, or a negative count.
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(get_args(Split))}")
    if near < 0 or far < 0:
        raise ValueError(f"near is {near} and far is {far}; neither may be negative")

    relations = {r.name: r for r in load_relations()}
    members = {
        name: [s for s in relation.facts if split_of(s) == split]
        for name, relation in relations.items()
    }

    def request(relation: Relation, subject: str) -> EditRequest:
        key = (seed, relation.name, subject)
        [target] = pick(wrong_objects(relation, subject), 1, "target", *key)
        [pattern] = pick(patterns(relation), 1, "pattern", *key)

        def probes(other: Relation, count: int) -> list[Probe]:
            allowed = [s for s in members[other.name] if s != subject and other.facts[s] != target]
            return [
                Probe(pattern.format(s), other.facts[s])
                for s in pick(allowed, count, "locality", *key)
                for pattern in pick(patterns(other), 1, "locality", *key, s)
            ]

        locality = probes(relation, near)
        for name in pick(relations.keys() - {relation.name}, far, "far", *key):
            locality += probes(relations[name], 1)
        return EditRequest(
            prompt=pattern.format(subject),
            target=target,
            ground_truth=relation.facts[subject],
            subject=subject,
            rephrases=tuple(p.format(subject) for p in patterns(relation) if p != pattern),
            locality=tuple(locality),
        )

    facts = [(name, subject) for name, subjects in members.items() for subject in subjects]
    facts.sort(key=lambda fact: hashed("order", *fact))
    return [(relations[name], request(relations[name], subject)) for name, subject in facts]
