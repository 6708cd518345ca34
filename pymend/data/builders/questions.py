"""Questions: zsRE with locality from NQ, zsRE-hard (ours), and the built-in facts as questions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pymend.config import EditRequest, Probe
from pymend.data.builders.kilt import kilt_row
from pymend.data.builders.sets import LOCALITY, SPLITS, Splits, ordered, partition
from pymend.data.choices import draw, pick
from pymend.data.facts import Relation, Split, fact_requests, load_relations, split_of
from pymend.data.formats import as_question, zsre_request
from pymend.data.readers import without_overlap
from pymend.data.rows import RawRow, read_rows

SHARED = 0.5  # share of words that a rephrase of zsRE-hard may have in common with its prompt
HARD_REPHRASES = 3
NEAR = 2  # of the locality questions about built-in facts, how many are of the same relation


def read_zsre(path: Path) -> list[EditRequest]:
    """The rows in MEND's or KnowledgeEditor's fields with an alternative answer and a rephrase.

    Raises:
        ValueError: a malformed row, or no row with both.
    """
    requests = map(_request, read_rows(path))
    records = [r for r in requests if r is not None]
    if not records:
        raise ValueError(
            f"{path}: no row has an alternative answer and a rephrase; fill in the fields 'alt' "
            "and 'rephrase', or 'alternatives' and 'filtered_rephrases'"
        )
    return records


def _request(row: RawRow) -> EditRequest | None:
    """None for a row that MEND leaves out too."""
    kilt = kilt_row(row)
    if kilt is None:
        return zsre_request(row)
    # The alternatives are what a model nearly said, so that a true answer may be among them.
    targets = pick({*kilt.alternatives} - {*kilt.answers}, 1, "target", kilt.text)
    if not targets or not kilt.rephrases:
        return None
    return EditRequest(
        prompt=kilt.text,
        target=targets[0],
        ground_truth=kilt.answers[0],
        subject=kilt.page,
        rephrases=kilt.rephrases,
    )


def read_questions(path: Path) -> list[Probe]:
    """The questions of an NQ-open file (``question``, ``answer``: texts), each once.

    Raises:
        ValueError: a malformed row.
    """
    return list({p.prompt: p for p in map(_nq, read_rows(path))}.values())


def _nq(row: RawRow) -> Probe:
    answers = row.texts("answer")
    if not answers:
        raise ValueError(f"{row.where}: field 'answer' holds no answer; add one")
    return Probe(as_question(row.text("question")), min(answers, key=len))


def zsre(records: Sequence[EditRequest], questions: Sequence[Probe] = (), seed: int = 0) -> Splits:
    """zsRE as MEND uses it.

    Args:
        records: from :func:`read_zsre`.
        questions: locality prompts in place of the records' own. Records that have none get the
            other records' questions.
    """
    parts = partition(records, _subject)
    asked = partition(questions, lambda probe: probe.prompt)
    for split, part in parts.items():
        pool = asked[split] if questions else [Probe(r.prompt, r.ground_truth) for r in part]
        parts[split] = [
            replace(r, locality=_probes(pool, r, seed, "zsre"))
            if questions or not r.locality
            else r
            for r in part
        ]
    train = without_overlap(parts["train"], parts["validation"] + parts["test"])
    validation = without_overlap(parts["validation"], parts["test"])
    return {
        "train": ordered(train, seed),
        "validation": ordered(validation, seed),
        "test": ordered(parts["test"], seed),
    }


def zsre_hard(records: Sequence[EditRequest], seed: int = 0) -> Splits:
    """zsRE-hard from zsRE: the records whose wording also asks about another subject.

    Args:
        records: from :func:`read_zsre`.
    """
    splits: Splits = {}
    for split, part in partition(records, _subject).items():
        asked: dict[str, list[Probe]] = defaultdict(list)
        for r in part:
            asked[_wording(r)].append(Probe(r.prompt, r.ground_truth))
        hard = [_hard(r, asked[_wording(r)], seed) for r in part]
        splits[split] = ordered((r for r in hard if r.rephrases and r.locality), seed)
    return splits


def zsre_hard_facts(seed: int = 0) -> Splits:
    """zsRE-hard from the built-in facts: questions and sentences to complete."""
    asked: dict[Split, dict[str, list[Probe]]] = {s: defaultdict(list) for s in SPLITS}
    for relation in load_relations():
        for subject, truth in relation.facts.items():
            for pattern in relation.patterns:
                probe = Probe(pattern.format(subject), truth)
                asked[split_of(subject)][pattern].append(probe)

    def hard(split: Split, relation: Relation, record: EditRequest) -> EditRequest:
        subject = _subject(record)
        pattern = next(p for p in relation.patterns if p.format(subject) == record.prompt)
        return _hard(record, asked[split][pattern], seed)

    splits: Splits = {}
    for split in SPLITS:
        facts = fact_requests(split, near=0, far=0, seed=seed)
        records = [hard(split, relation, record) for relation, record in facts]
        splits[split] = ordered((r for r in records if r.rephrases and r.locality), seed)
    return splits


def _hard(record: EditRequest, asked: Sequence[Probe], seed: int) -> EditRequest:
    """Only rephrases far from the prompt; locality from ``asked``, which shares its wording."""
    far = [text for text in record.rephrases if _shared(text, record.prompt) <= SHARED]
    far.sort(key=lambda text: _shared(text, record.prompt))
    return replace(
        record,
        rephrases=tuple(far[:HARD_REPHRASES]),
        locality=_probes(asked, record, seed, "hard"),
    )


def _probes(pool: Sequence[Probe], record: EditRequest, seed: int, name: str) -> tuple[Probe, ...]:
    """Questions other than the record's own, whose answer is neither its target nor its truth."""

    def other(probe: Probe) -> bool:
        return probe.prompt != record.prompt and probe.answer not in (
            record.target,
            record.ground_truth,
            None,
        )

    return tuple(draw(pool, LOCALITY, other, name, seed, record.prompt))


def _subject(record: EditRequest) -> str:
    return record.subject or record.prompt


def _wording(record: EditRequest) -> str:
    """The question without its subject; a question without one is like no other."""
    return record.prompt.replace(record.subject, "{}") if record.subject else record.prompt


def _shared(a: str, b: str) -> float:
    """Jaccard index of the words of two texts."""
    first, second = (set(re.findall(r"\w+", text.lower())) for text in (a, b))
    return len(first & second) / len(first | second)


# -- built-in facts --------------------------------------------------------------------------


def question_wordings(relation: Relation) -> tuple[str, ...]:
    """The relation's question patterns up to the question mark, each once."""
    asked = (p.partition("?")[0] for p in relation.question)
    return tuple(dict.fromkeys(re.sub(r"^(Question|Q): ", "", text) + "?" for text in asked))


def fact_questions(seed: int = 0, near: int = NEAR) -> Splits:
    """Closed-book questions over the built-in facts.

    Args:
        near: of the locality questions, how many are of the same relation.
    """
    counts = {"near": near, "far": LOCALITY - near}
    return {
        split: [r for _, r in fact_requests(split, **counts, seed=seed, patterns=question_wordings)]
        for split in SPLITS
    }
