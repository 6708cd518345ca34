"""What a person reads: greedy answers before and after an edit, and what is wrong with them.

A target that is predicted teacher-forced may still be said over and over again, and a neighbour
whose next token stays may go on in other words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pymend.algorithms.base import Algorithm
from pymend.config import EditRequest
from pymend.engine.generate import spoken
from pymend.engine.hooks import frozen
from pymend.engine.tokens import Chat, EncodedRequest, Encoder, Row
from pymend.evaluation.metrics import interval, mean
from pymend.models.structure import unwrapped
from pymend.progress import tqdm

TOKENS = 20  # of an answer
KEPT = 12  # of a neighbour's answer, which are to stay word for word
LOOP = 3  # times that a target is said in a loop
GRAMS = ((2, 2 / 3), (3, 4 / 3))  # of words, and their weights (ROME's fluency)
KINDS = ("prompt", "rephrase", "neighbour")
EXAMPLES = 8


@dataclass(frozen=True)
class Said:
    """The answer to one prompt without and with the edit, and its scores.

    ``begins``: it begins with the target; ``loops``: it says the target three times or more, as
    ``looped`` already before; ``kept``: the first tokens are as before. ``entropy`` is of its word
    2- and 3-grams, in bits.
    """

    kind: str
    prompt: str
    target: str
    before: str
    after: str
    begins: float
    loops: float
    looped: float
    kept: float
    entropy: float
    entropy_before: float


@dataclass(frozen=True)
class Reads:
    """Results of :func:`read`; ``to_dict`` is what ``metrics.json`` holds as ``reads``."""

    said: list[Said]
    records: int

    def share(self, score: str, *kinds: str) -> dict[str, Any]:
        """Mean of a score over the answers of some kinds, with its 95 % interval."""
        values = [getattr(s, score) for s in self.said if s.kind in kinds]
        return {"value": mean(values), "interval_95": interval(values)}

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        asked = ("prompt", "rephrase")
        return {
            "protocol": f"greedy answers of {TOKENS} tokens, without and with the edit",
            "records": self.records,
            "begins_with_target": {kind: self.share("begins", kind) for kind in asked},
            "loops": {kind: self.share("loops", kind) for kind in asked},
            "loops_before": {kind: self.share("looped", kind) for kind in asked},
            "entropy": self.share("entropy", *asked),
            "entropy_before": self.share("entropy_before", *asked),
            "neighbours_kept": {**self.share("kept", "neighbour"), "tokens": KEPT},
            "examples": [asdict(s) for s in self.said[: EXAMPLES * len(KINDS)]],
        }


def read(
    algorithm: Algorithm[Any],
    model: nn.Module,
    tokenizer: Any,
    data: Sequence[EditRequest],
    *,
    batch_size: int = 8,
    chat: Chat = None,
    progress: bool = True,
) -> Reads:
    """Edit ``model`` with each record alone, and hear what it says to a person.

    Each record is asked its prompt, its first rephrase and its first locality prompt.

    Args:
        data: records.
        batch_size: independent edits that are computed and heard together.
        chat: as in :func:`pymend.evaluate`.

    Raises:
        ValueError: a classifier, which says nothing; and as :func:`pymend.evaluate`.
    """
    inner: Any = unwrapped(model)
    encoder = Encoder.for_model(inner, tokenizer, algorithm.chat_for(chat))
    algorithm.prepare(inner)
    encoded = encoder.requests(data)
    if encoded and encoded[0].edit.label is not None:
        raise ValueError(f"{type(inner).__name__} says nothing that could be read; leave out read")
    said: list[Said] = []
    bar = tqdm(total=len(encoded), desc="read", disable=not progress)
    with frozen(inner), bar:
        for i in range(0, len(encoded), batch_size):
            chunk, requests = encoded[i : i + batch_size], data[i : i + batch_size]
            replay = algorithm.replay(inner)
            edits = [r.edit for r in chunk]
            replay.load(edits)
            with torch.no_grad():
                edit = algorithm.compute(replay, edits)
            rows = [row for r in chunk for row in _asked(encoder, r)]
            before = spoken(inner, encoder, rows, TOKENS)
            with edit.applied(inner):
                after = spoken(inner, encoder, rows, TOKENS)
            for j, request in enumerate(requests):
                said += _said(encoder, request, *(x[3 * j : 3 * j + 3] for x in (before, after)))
            bar.update(len(chunk))
    return Reads(said, len(encoded))


def _asked(encoder: Encoder, record: EncodedRequest) -> list[Row]:
    """The prompts of a record; where one lacks, the edit's stands in its place."""
    rows = [record.edit, *record.rephrases[:1]]
    rows += [record.edit] * (2 - len(rows)) + [*record.locality[:1]]
    rows += [record.edit] * (len(KINDS) - len(rows))
    return [_prompt(row) for row in rows]


def _prompt(row: Row) -> Row:
    """The prompt alone: all that a model goes on from."""
    return Row(row.ids[:1] if row.source else row.prompt, 0, False, row.source)


def _said(
    encoder: Encoder, request: EditRequest, before: list[list[int]], after: list[list[int]]
) -> list[Said]:
    """The answers of one record."""
    tokenizer = encoder.tokenizer
    prompts = [request.prompt, *request.rephrases[:1], *(p.prompt for p in request.locality[:1])]
    there = [True, bool(request.rephrases), bool(request.locality)]
    texts = iter(prompts)
    found = []
    for kind, asked, old, new in zip(KINDS, there, before, after, strict=True):
        if not asked:
            continue
        was, now = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (old, new))
        target = request.target.strip().lower()
        found.append(
            Said(
                kind=kind,
                prompt=next(texts),
                target=request.target,
                before=was,
                after=now,
                begins=float(now.strip().lower().startswith(target)),
                loops=float(now.lower().count(target) >= LOOP),
                looped=float(was.lower().count(target) >= LOOP),
                kept=float(old[:KEPT] == new[:KEPT]),
                entropy=entropy(now),
                entropy_before=entropy(was),
            )
        )
    return found


def entropy(text: str) -> float:
    """Weighted mean entropy of the word 2- and 3-grams of a text, in bits (ROME, fluency)."""
    words = re.findall(r"\w+|[^\w\s]", text)
    total = 0.0
    for n, weight in GRAMS:
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        count = sum(grams.values())
        bits = -sum(c / count * math.log2(c / count) for c in grams.values())
        total += weight * bits / len(GRAMS)
    return total
