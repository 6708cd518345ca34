"""Claims and their truth values, for classifiers: FEVER, and the built-in facts as claims."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pymend.config import EditRequest, Probe
from pymend.data.builders.kilt import kilt_row
from pymend.data.builders.sets import LOCALITY, SPLITS, Splits, ordered, partition
from pymend.data.choices import draw, hashed
from pymend.data.facts import (
    Relation,
    fact_requests,
)
from pymend.data.rows import RawRow, read_rows

NAMES = {False: "false", True: "true"}  # of the classes
LABELS = {"SUPPORTS": True, "REFUTES": False, "NOT ENOUGH INFO": None}
FRAMES = (
    "It is true that {}.",
    "Is it the case that {}?",
    "In fact, {}.",
    "{}, and that is a fact.",
)
NEAR = 2  # of the locality claims, how many are of the same topic


@dataclass(frozen=True)
class Claim:
    """A claim, its truth value, and other wordings of it.

    ``group`` is what a split keeps together: claims of one group are never each other's locality.
    ``topic`` holds claims that are near each other in words.
    """

    text: str
    label: bool
    group: str
    topic: str = ""
    rephrases: tuple[str, ...] = ()
    subject: str | None = None


def read_claims(path: Path) -> list[Claim]:
    """The claims of a FEVER file that are true or false.

    Its rows have the fields ``claim``, ``label`` and ``evidence``, or KnowledgeEditor's.

    Raises:
        ValueError: a malformed row, an unknown label, or no claim with a truth value.
    """
    found: dict[str, Claim] = {}
    for claim in map(_labelled, read_rows(path)):
        if claim is not None:
            found.setdefault(claim.text, claim)
    if not found:
        raise ValueError(f"{path}: no claim is labelled SUPPORTS or REFUTES; check the file")
    return list(found.values())


def _labelled(row: RawRow) -> Claim | None:
    """None for a claim that is neither true nor false."""
    kilt = kilt_row(row)
    if kilt is None:
        text, name, evidence = row.text("claim"), row.text("label"), row.values.get("evidence")
    else:
        text, name, evidence = kilt.text, kilt.answers[0], kilt.page
    if name not in LABELS:
        raise ValueError(f"{row.where}: label is {name!r}; use one of {', '.join(LABELS)}")
    label, text = LABELS[name], _tidy(text)
    if label is None:
        return None
    own = tuple(map(_tidy, kilt.rephrases)) if kilt else ()
    return Claim(text, label, json.dumps(evidence or text), rephrases=own or _framed(text))


def _tidy(text: str) -> str:
    """Text as it is written, from FEVER's tokens."""
    for mark, written in (("-LRB- ", "("), (" -RRB-", ")"), ("`` ", '"'), (" ''", '"')):
        text = text.replace(mark, written)
    return re.sub(r" ([.,;:?!]|'s\b)", r"\1", text)


def _framed(text: str) -> tuple[str, ...]:
    bare = text.rstrip(".")
    inside = re.sub(r"^(The|There|A|An|In)\b", lambda word: word[0].lower(), bare)
    return tuple(f.format(bare if f.startswith("{}") else inside) for f in FRAMES)


def fever(claims: Sequence[Claim], seed: int = 0) -> Splits:
    """Claims whose label is turned over.

    Args:
        claims: from :func:`read_claims`.
    """
    parts = partition(claims, lambda claim: claim.group)
    return {split: _edits(part, seed, NEAR) for split, part in parts.items()}


def _edits(claims: Sequence[Claim], seed: int, count: int) -> list[EditRequest]:
    topics: dict[str, list[Claim]] = defaultdict(list)
    for claim in claims:
        topics[claim.topic].append(claim)

    def edit(claim: Claim) -> EditRequest:
        key = ("claims", seed, claim.text)
        near = draw(topics[claim.topic], count, lambda c: c.group != claim.group, "near", *key)
        taken = {claim.group, *(c.group for c in near)}
        others = draw(claims, LOCALITY - len(near), lambda c: c.group not in taken, *key)
        return EditRequest(
            prompt=claim.text,
            target=NAMES[not claim.label],
            ground_truth=NAMES[claim.label],
            subject=claim.subject,
            rephrases=claim.rephrases,
            locality=tuple(Probe(c.text, NAMES[c.label]) for c in [*near, *others]),
        )

    return ordered(map(edit, claims), seed)


# -- built-in facts --------------------------------------------------------------------------


def statements(relation: Relation) -> tuple[str, ...]:
    """The relation's patterns that are a statement once their object stands behind them."""
    return tuple(p for p in relation.patterns if "\n" not in p)


def fact_claims(seed: int = 0, near: int = NEAR) -> Splits:
    """Built-in facts as claims, true ones and false ones.

    Args:
        near: of the locality claims, how many are of the same relation.
    """
    splits: Splits = {}
    for split in SPLITS:
        facts = fact_requests(split, near=0, far=0, seed=seed, patterns=statements)
        claims = [_claim(relation, fact, seed) for relation, fact in facts]
        splits[split] = _edits(claims, seed, near)
    return splits


def _claim(relation: Relation, fact: EditRequest, seed: int) -> Claim:
    """A fact as a claim with its true object, or with the request's target, which is wrong."""
    label = bool(hashed("label", seed, relation.name, fact.subject) % 2)
    said = fact.ground_truth if label else fact.target
    first, *others = (f"{text} {said}." for text in (fact.prompt, *fact.rephrases))
    return Claim(first, label, str(fact.subject), relation.name, tuple(others), fact.subject)
