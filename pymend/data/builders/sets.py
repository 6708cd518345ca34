"""What every builder shares: splits, order, and the files and card of a finished set."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pymend.config import EditRequest
from pymend.data.choices import hashed
from pymend.data.facts import Split, split_of
from pymend.data.readers import write_jsonl
from pymend.files import replacing, writable_dir, write_json

SPLITS: tuple[Split, ...] = get_args(Split)
LOCALITY = 4  # locality prompts of a record: as many as the paper's evaluation takes
EXAMPLES = 20  # in a card

Splits = dict[Split, list[EditRequest]]

T = TypeVar("T")

DEFINITIONS = {
    "zsre": "Questions of zsRE with the alternative answer as target (of several, one drawn by a "
    "hash of the question) and the back-translated question as rephrase. Locality prompts are NQ "
    "questions with their shortest answer, written with a capital and a question mark; without an "
    "NQ file, the one that the raw record carries, or else other questions of the set with their "
    "true answers. Split by subject (in KnowledgeEditor's files the title of the page with the "
    "answer, or else the question); training and validation records that share a prompt or "
    "locality prompt with a later split are dropped.",
    "zsre-hard": "Ours: the paper names a zsRE-hard but does not define it, so numbers on this set "
    "are not the paper's. Its purpose is that of the paper's appendix G, inputs that confuse a "
    "cache keyed by mean hidden states. Such a cache answers whatever is near in words. Locality "
    "prompts here are the edit prompt's own wording with another subject, which has another "
    "answer: near the key, and not to be answered by it. Rephrases share at most half of their "
    "words with the edit prompt (Jaccard index of the sets of words): far from the key, and to be "
    "answered by it. A distance that accepts the second tends to accept the first. Records without "
    "such a rephrase or locality prompt are left out. Split by subject.",
    "fever": "Claims with the other label as target (true for false and false for true; NOT ENOUGH "
    "INFO is left out). The paper's no-op edits, the model's own prediction half of the time, "
    "need a model and are not made. Rephrases are the raw record's; if it has none, the claim in "
    "fixed frames that keep its truth. Locality prompts are other claims with their labels. A "
    "claim given several times has the label of its first record: in FEVER-Symmetric the one with "
    "the original evidence. Split by that evidence (in KnowledgeEditor's files by the title of its "
    "page), so that a claim and its counterpart stay together.",
    "claims": "Built-in facts as claims, half of them with a wrong object of the same type; the "
    "target is the other truth value. Rephrases are the relation's other wordings of the same "
    "claim. Locality prompts are claims about other subjects with their truth values, two of them "
    "of the same relation (in `pymend reproduce` none on purpose). Split by subject.",
    "qa": "Built-in facts as closed-book questions; the target is a wrong object of the same type. "
    "Rephrases are the relation's other questions. Locality prompts are other questions with their "
    "true answers: two of the same relation about other subjects, two of other relations (in "
    "`pymend reproduce` all of any). Split by subject.",
    "wikitext": "Passages cut at the end of a word; the target is a continuation sampled from the "
    "named language model, each token one of the 50 likeliest, which starts a new word and reads "
    "back as the same tokens. Rephrases are the prompt without a random number of its first "
    "tokens, at most half of them (the paper's rule; 0 occurs). Locality prompts are other "
    "passages without an answer: every position counts. The paper does not give the length of its "
    "prompts; ours is a setting. Split by passage, or by subject for the passages made from "
    "built-in facts.",
}


def partition(items: Iterable[T], key: Callable[[T], str]) -> dict[Split, list[T]]:
    """The items by the split of their key (:func:`~pymend.data.split_of`)."""
    parts: dict[Split, list[T]] = {split: [] for split in SPLITS}
    for item in items:
        parts[split_of(key(item))].append(item)
    return parts


def ordered(records: Iterable[EditRequest], seed: int) -> list[EditRequest]:
    """In mixed order, so that the first n records are a fair sample."""
    return sorted(records, key=lambda r: hashed("order", seed, r.prompt, r.target))


def write_set(
    output: str | Path,
    name: str,
    splits: Mapping[Split, Sequence[EditRequest]],
    *,
    seed: int,
    sources: Sequence[Path] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Write ``{train,validation,test}.jsonl``, ``card.json`` and ``card.md``; return the last.

    ``card.json`` is written last: a folder that has one is whole. Sources are named in it without
    their folders, so that the bytes do not depend on where the raw files lie.

    Args:
        output: a folder; files of these names in it are replaced.
        name: a key of ``DEFINITIONS``.
        sources: the raw files.
        settings: what else the set depends on, for the card.

    Raises:
        ValueError: a split without records, or a record without locality prompt or rephrase;
            nothing was written.
        OSError: the folder cannot be written.
    """
    for split in SPLITS:
        if not splits[split]:
            raise ValueError(f"{name}: no record for the {split} split; give more raw records")
        for record in splits[split]:
            if not record.locality or not record.rephrases:
                raise ValueError(
                    f"{name}: {record.prompt[:60]!r} of the {split} split has no rephrase or no "
                    "locality prompt; give more raw records"
                )
    card: dict[str, Any] = {
        "name": name,
        "definition": DEFINITIONS[name],
        "seed": seed,
        "settings": dict(settings or {}),
        "sources": [{"file": path.name, "sha256": _sha256(path)} for path in sources],
        "splits": {},
    }
    folder = writable_dir(output)
    (folder / "card.json").unlink(missing_ok=True)
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        write_jsonl(path, splits[split])
        card["splits"][split] = {
            "file": path.name,
            "sha256": _sha256(path),
            **_counts(splits[split]),
        }
    text = _page(card, splits["train"])
    with replacing(folder / "card.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(folder / "card.json", card)
    return text


def describe(records: Sequence[EditRequest], examples: int = EXAMPLES) -> str:
    """Counts, lengths and the first ``examples`` of a data set, as Markdown."""
    return "\n".join([*_table({"records": _counts(records)}), "", *_examples(records[:examples])])


def _counts(records: Sequence[EditRequest]) -> dict[str, Any]:
    """How many records, rephrases and probes there are, and how many words their texts have."""
    probes = [p for r in records for p in r.locality]
    texts = {
        "prompt": [r.prompt for r in records],
        "target": [r.target for r in records],
        "rephrase": [text for r in records for text in r.rephrases],
        "locality": [p.prompt for p in probes],
    }
    return {
        "records": len(records),
        "subjects": len({r.subject for r in records if r.subject is not None}),
        "rephrases": len(texts["rephrase"]),
        "locality": len(probes),
        "locality_answers": sum(p.answer is not None for p in probes),
        "words": {name: _lengths(values) for name, values in texts.items()},
    }


def _lengths(texts: Sequence[str]) -> dict[str, float] | None:
    """Words of the shortest, the median and the longest text."""
    words = [len(text.split()) for text in texts]
    if not words:
        return None
    return {"min": min(words), "median": statistics.median(words), "max": max(words)}


def _page(card: Mapping[str, Any], records: Sequence[EditRequest]) -> str:
    settings = {"seed": card["seed"], **card["settings"]}
    lines = [f"# {card['name']}", "", card["definition"], ""]
    lines += [f"Settings: {', '.join(f'{k} {v}' for k, v in settings.items())}.", ""]
    if card["sources"]:
        lines += ["| source | SHA-256 |", "|---|---|"]
        lines += [f"| {s['file']} | {s['sha256']} |" for s in card["sources"]]
        lines.append("")
    lines += _table(card["splits"])
    lines += ["", f"Training records, {min(EXAMPLES, len(records))} of {len(records)}:", ""]
    lines += _examples(records[:EXAMPLES])
    return "\n".join(lines) + "\n"


def _table(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Counts and word lengths (min / median / max), a row for each part."""
    lines = [
        "| part | records | subjects | rephrases | locality (with answer) | words: prompt | target "
        "| rephrase | locality |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        cells = [name, part["records"], part["subjects"], part["rephrases"]]
        cells.append(f"{part['locality']} ({part['locality_answers']})")
        for lengths in part["words"].values():
            cells.append(" / ".join(f"{x:g}" for x in lengths.values()) if lengths else "-")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _examples(records: Sequence[EditRequest]) -> list[str]:
    """A numbered list; texts are quoted as in JSON, so that line breaks show."""
    lines = []
    for number, record in enumerate(records, start=1):
        old = f" (was {_quoted(record.ground_truth)})" if record.ground_truth else ""
        lines.append(f"{number}. {_quoted(record.prompt)} -> {_quoted(record.target)}{old}")
        lines += [f"   - rephrase: {_quoted(text)}" for text in record.rephrases]
        for kind in ("locality", "portability"):
            for probe in getattr(record, kind):
                answer = f" -> {_quoted(probe.answer)}" if probe.answer else ""
                lines.append(f"   - {kind}: {_quoted(probe.prompt)}{answer}")
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
