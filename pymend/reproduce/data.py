"""The records of a setup: built here from the built-in facts, or read from the user's files."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pymend.config import EditRequest
from pymend.data import load_records, without_overlap
from pymend.data.builders import (
    Cuts,
    Splits,
    fact_claims,
    fact_passages,
    fact_questions,
    wikitext,
    write_set,
    zsre_hard_facts,
)
from pymend.data.builders.sets import SPLITS
from pymend.data.choices import draw
from pymend.data.facts import load_relations, split_of
from pymend.engine.generate import continuations
from pymend.engine.tokens import Encoder
from pymend.reproduce.plan import Setup
from pymend.zoo.load import load

VALIDATION = 1000  # records of a training file that are held back, at most: its last tenth
# The paper's locality prompts are drawn from everything; those of zsRE-hard are near.
BUILT_IN: dict[str, Callable[[int], Splits]] = {
    "claims": partial(fact_claims, near=0),
    "qa": partial(fact_questions, near=0),
    "zsre-hard": zsre_hard_facts,
}
CUTS = Cuts(prompt_tokens=32, locality_tokens=48)  # short, since the models are trained on CPUs


def prepare(setup: Setup, cache: Path) -> None:
    """Write the sets of ``setup`` that are built in to ``cache``, unless they are there.

    :func:`check` has been called.
    """
    if not isinstance(setup.data, str):
        return
    for seed in range(setup.draws):
        folder = _folder(setup, cache, seed)
        if (folder / "card.json").is_file():
            continue
        if setup.data == "wikitext":
            splits, settings = _passages(setup.model, seed)
        else:
            splits, settings = BUILT_IN[setup.data](seed), {}
        write_set(folder, setup.data, splits, seed=seed, settings=settings)


def _folder(setup: Setup, cache: Path, seed: int) -> Path:
    # Passages are continued by the setup's own model.
    model = f"-{Path(setup.model).name}" if setup.data == "wikitext" else ""
    return cache / f"{setup.data}{model}-{seed}"


def _passages(name: str, seed: int) -> tuple[Splits, dict[str, Any]]:
    model, tokenizer = load(name)
    encoder = Encoder.for_model(model, tokenizer)
    splits = wikitext(
        {split: fact_passages(split, seed) for split in SPLITS},
        tokenizer,
        lambda prompts, seeds: continuations(model, encoder, prompts, seeds, CUTS.target_tokens),
        CUTS,
        seed,
    )
    return splits, {"from": "facts", "sampler": Path(name).name, **asdict(CUTS)}


def records(setup: Setup, cache: Path, files: Path | None) -> Splits:
    """Training, validation and test records; :func:`prepare` has been called.

    Several drawings differ in prompts, targets and neighbours; a subject stays in its split.

    Raises:
        ValueError: the setup reads files, and no folder is given.
        FileNotFoundError: a file is missing.
    """
    if isinstance(setup.data, str):
        drawn = [
            {s: load_records(_folder(setup, cache, seed) / f"{s}.jsonl") for s in SPLITS}
            for seed in range(setup.draws)
        ]
        splits = {split: [r for part in drawn for r in part[split]] for split in SPLITS}
        for seed in range(setup.invented):
            splits["train"] += [_about_nobody(r, seed) for r in drawn[seed % len(drawn)]["train"]]
        return splits
    return _from_files(_paths(setup.name, setup.data, files))


def check(setup: Setup, files: Path | None) -> None:
    """Find fault with what ``setup`` reads before anything is made.

    Raises:
        ValueError: it reads files, and no folder is given; or no such set is built in.
        FileNotFoundError: a file or folder is missing.
    """
    if isinstance(setup.data, str):
        known = (*BUILT_IN, "wikitext")
        if setup.data not in known:
            raise ValueError(
                f"no data set {setup.data!r} is built in; choose one of {', '.join(known)}"
            )
        return
    for path in _paths(setup.name, setup.data, files).values():
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; the folder of --data must hold it")


def _paths(setup: str, names: Mapping[str, str], files: Path | None) -> dict[str, Path]:
    if files is None:
        raise ValueError(f"{setup} reads {', '.join(names.values())}; name their folder")
    return {kind: files / name for kind, name in names.items()}


def _about_nobody(record: EditRequest, seed: int) -> EditRequest:
    """The record about a subject that does not exist, so that there is no true answer either."""
    subject = record.subject
    assert subject  # load_scale has seen to it
    [other] = draw(
        _kin()[subject], 1, lambda s: _is_new(invented(subject, s)), "invented", seed, record.prompt
    )
    name = invented(subject, other)
    # Only once: a claim may have the subject's name in its object too.
    prompt, *rephrases = (
        text.replace(subject, name, 1) for text in (record.prompt, *record.rephrases)
    )
    return replace(
        record, prompt=prompt, rephrases=tuple(rephrases), subject=name, ground_truth=None
    )


def invented(first: str, second: str) -> str:
    """A name from the beginning of one and the end of another, by words or else by letters."""
    head, tail = first.split(), second.split()
    if len(head) == len(tail) == 1:
        return first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
    return " ".join(head[: (len(head) + 1) // 2] + tail[len(tail) // 2 :])


def _is_new(name: str) -> bool:
    """Whether no subject is called so, with whatever article."""
    return _bare(name) not in _names()


def _bare(name: str) -> str:
    """A name without its article, in small letters."""
    return re.sub(r"^(the|an?) ", "", name.lower())


@cache
def _names() -> frozenset[str]:
    """The bare names of the subjects of all splits."""
    return frozenset(_bare(name) for relation in load_relations() for name in relation.facts)


@cache
def _kin() -> Mapping[str, list[str]]:
    """Of every subject that is trained on, the other ones of a relation that it has."""
    kin: dict[str, list[str]] = {}
    for relation in load_relations():
        names = [s for s in relation.facts if split_of(s) == "train"]
        kin |= {name: [other for other in names if other != name] for name in names}
    return kin


def _from_files(paths: Mapping[str, Path]) -> Splits:
    """Splits from a folder with all three, from two files, or from the halves of one."""
    if "folder" in paths:
        return {split: load_records(paths["folder"] / f"{split}.jsonl") for split in SPLITS}
    train = load_records(paths["train"])
    test: list[EditRequest]
    if "test" in paths:
        test = load_records(paths["test"])
    else:
        train, test = train[: len(train) // 2], train[len(train) // 2 :]
    train = without_overlap(train, test)
    held_out = min(VALIDATION, max(1, len(train) // 10))
    validation = train[-held_out:]
    train = without_overlap(train[:-held_out], validation)
    return {"train": train, "validation": validation, "test": test}


def digest(splits: Splits) -> str:
    """A short name of what the records say."""
    state = hashlib.sha256()
    for records in splits.values():
        state.update(json.dumps([r.to_dict() for r in records]).encode())
    return state.hexdigest()[:16]


def groups(test: list[EditRequest], draws: int, n_edits: int, limit: int) -> list[EditRequest]:
    """Up to ``limit`` records in groups of ``n_edits`` that are all of one drawing.

    Within a drawing every fact occurs once, so no group edits a fact twice. All drawings have the
    same facts: they are shuffled, each in its own way, so that groups differ in theirs.
    """
    size = len(test) // draws
    parts = [test[i * size : (i + 1) * size] for i in range(draws)]
    if n_edits > 1:
        parts = [random.Random(i).sample(part, size) for i, part in enumerate(parts)]
    whole = [r for part in parts for r in part[: len(part) // n_edits * n_edits]]
    return whole[: limit // n_edits * n_edits]
