"""Edit requests from files: CounterFact, zsRE, KnowEdit and our own JSONL.

A file is a JSON array of objects, JSONL (one object per line), or a Parquet table. Its format is
recognised by the fields of its first record and written to the log. White space around texts is
removed; our own JSONL is taken as it is, like a request in Python.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pymend.config import EditRequest, Probe
from pymend.data.facts import Split, load_facts
from pymend.files import cache_dir, replacing

logger = logging.getLogger("pymend")


@dataclass(frozen=True)
class RawRow:
    """One object of a file. ``where`` names the file and the place in it, for errors.

    ``verbatim``: white space around its texts stays.
    """

    where: str
    values: dict[str, Any]
    verbatim: bool = False

    def text(self, name: str) -> str:
        """A field that must hold a text."""
        if name not in self.values:
            raise ValueError(f"{self.where}: field {name!r} is missing; add it")
        text = self.optional(name)
        if text is None:
            raise ValueError(f"{self.where}: field {name!r} is blank; fill it in")
        return text

    def optional(self, name: str) -> str | None:
        """A text, or None when the field is absent, null or blank."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: field {name!r} must be a text, got {value!r}")
        return (value if self.verbatim else value.strip()) if value.strip() else None

    def answer(self, name: str) -> str | None:
        """An optional text that may be wrapped in lists of alternatives; the first one counts."""
        value = self.values.get(name)
        while isinstance(value, list):
            value = value[0] if value else None
        return self._of(name, value).optional(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty when the field is absent."""
        items = [(f"{name}[{i}]", v) for i, v in enumerate(self._list(name))]
        return tuple(self._of(place, v).text(place) for place, v in items)

    def filled(self, name: str) -> tuple[str, ...]:
        """The texts of a list that models wrote, who may have left some blank: those are not."""
        items = [(f"{name}[{i}]", v) for i, v in enumerate(self._list(name))]
        texts = (self._of(place, v).optional(place) for place, v in items)
        return tuple(text for text in texts if text)

    def rows(self, name: str) -> list[RawRow]:
        """A list of JSON objects; empty when the field is absent."""
        items = enumerate(self._list(name))
        return [_row(f"{self.where}, {name}[{i}]", value, self.verbatim) for i, value in items]

    def groups(self, name: str) -> list[RawRow]:
        """The objects of an object of named lists, one list after the other."""
        value = self.values.get(name)
        if value is None:
            return []
        groups = _row(f"{self.where}, field {name!r}", value)
        return [row for group in groups.values for row in groups.rows(group)]

    def _of(self, name: str, value: Any) -> RawRow:
        """A row with this one value."""
        return replace(self, values={name: value})

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise ValueError(f"{self.where}: field {name!r} must be a list, got {value!r}")
        return value


def _row(where: str, value: Any, verbatim: bool = False) -> RawRow:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {value!r}")
    return RawRow(where, value, verbatim)


def _only(row: RawRow, cls: type) -> None:
    """Refuse fields that ``cls`` does not have: a misspelt one would be lost silently."""
    known = [f.name for f in fields(cls)]
    for name in row.values:
        if name not in known:
            raise ValueError(
                f"{row.where}: unknown field {name!r}; rename or remove it (known: "
                f"{', '.join(known)})"
            )


def _own(row: RawRow) -> EditRequest:
    def probes(name: str) -> tuple[Probe, ...]:
        rows = row.rows(name)
        for r in rows:
            _only(r, Probe)
        return tuple(Probe(r.text("prompt"), r.optional("answer")) for r in rows)

    _only(row, EditRequest)
    row = replace(row, verbatim=True)
    joint = row.values.get("joint")
    if not isinstance(joint, str | None):
        raise ValueError(f"{row.where}: field 'joint' must be a text, got {joint!r}")
    return EditRequest(
        prompt=row.text("prompt"),
        target=row.text("target"),
        ground_truth=row.optional("ground_truth"),
        subject=row.optional("subject"),
        rephrases=row.texts("rephrases"),
        locality=probes("locality"),
        portability=probes("portability"),
        joint=joint,
    )


def _counterfact(row: RawRow) -> EditRequest:
    return EditRequest(
        prompt=row.text("prompt"),
        target=row.text("target_new"),
        ground_truth=row.text("ground_truth"),
        subject=row.text("subject"),
        rephrases=(row.text("rephrase_prompt"),),
        locality=(Probe(row.text("locality_prompt"), row.text("locality_ground_truth")),),
    )


def as_question(text: str) -> str:
    """A question as NQ has it, written like one: a capital in front, a question mark behind."""
    text = text.removeprefix("nq question: ")
    return text[:1].upper() + text[1:].rstrip("?") + "?"


def zsre_request(row: RawRow) -> EditRequest | None:
    """None for a row without an alternative answer, which MEND leaves out too."""
    target = row.optional("alt")
    if target is None:
        return None
    return EditRequest(
        prompt=row.text("src"),
        target=target,
        ground_truth=row.answer("answers"),
        subject=row.text("subject"),
        rephrases=(row.text("rephrase"),),
        locality=(Probe(as_question(row.text("loc")), row.text("loc_ans")),),
    )


def _knowedit(row: RawRow) -> EditRequest:
    """Probes without an answer are kept in locality and mean nothing in portability."""

    def probes(name: str) -> tuple[Probe, ...]:
        return tuple(Probe(r.text("prompt"), r.answer("ground_truth")) for r in row.groups(name))

    rephrase = row.answer("rephrase_prompt") or row.answer("rephrase")
    return EditRequest(
        prompt=row.text("prompt"),
        target=row.text("target_new"),
        ground_truth=row.answer("ground_truth"),
        subject=row.text("subject"),
        rephrases=(rephrase,) if rephrase else (),
        locality=probes("locality"),
        portability=tuple(p for p in probes("portability") if p.answer),
    )


@dataclass(frozen=True)
class _Format:
    name: str
    marks: tuple[str, ...]  # the fields it is recognised by
    read: Callable[[RawRow], EditRequest | None]


_FORMATS = (
    _Format("pymend JSONL", ("prompt", "target"), _own),
    _Format("CounterFact (EasyEdit)", ("prompt", "target_new", "locality_prompt"), _counterfact),
    _Format("zsRE (MEND)", ("src", "alt", "loc"), zsre_request),
    _Format("KnowEdit", ("prompt", "target_new", "locality"), _knowedit),
)


def _recognise(row: RawRow) -> _Format:
    for format_ in _FORMATS:
        if all(mark in row.values for mark in format_.marks):
            return format_
    known = "; ".join(f"{f.name}: {', '.join(f.marks)}" for f in _FORMATS)
    raise ValueError(
        f"{row.where}: no known format has the fields {', '.join(row.values) or '(none)'}; "
        f"convert the file to one of these ({known})"
    )


def read_text(path: Path) -> str:
    """What a file says.

    Raises:
        ValueError: no such file, a folder, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name a file in it") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}); convert it") from None


def read_rows(path: Path) -> Iterator[RawRow]:
    """The objects of a JSON array, a JSONL file or a Parquet table.

    Raises:
        ValueError: a file that cannot be read; the message names it and the line, if there is one.
    """
    if path.suffix == ".parquet":
        yield from _read_table(path)
        return
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno}: malformed JSON ({error.msg}); repair it"
            ) from None
        for index, value in enumerate(values):
            yield _row(f"{path}, record index {index}", value)
        return
    # Not splitlines(): JSON texts may hold other line separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: malformed JSON ({error.msg}); "
                "write one JSON object per line, or one JSON array"
            ) from None
        yield _row(f"{path}, line {number}", value)


def _read_table(path: Path) -> Iterator[RawRow]:
    """The rows of a Parquet table, the form that data sets have on the hub."""
    import datasets

    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    try:
        table = datasets.Dataset.from_parquet(str(path), cache_dir=str(cache_dir() / "datasets"))
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{path}: is no Parquet table ({error})") from error
    for index, values in enumerate(table):
        yield RawRow(f"{path}, record index {index}", values)


def load_records(source: str | Path, split: Split = "train") -> list[EditRequest]:
    """The edit requests of the built-in fact set or of a file.

    Args:
        source: ``"facts"``, or a file in one of the formats of this module.
        split: the part of the built-in set. A file is one part and is read whole.

    Raises:
        ValueError: a file that is missing, empty, malformed or of no known format, or a record
            with a missing, blank or wrong-typed field. The message names the file, the line
            (JSONL) or the record index from 0 (JSON array), and the remedy.
    """
    if str(source) == "facts":
        records = load_facts(split)
        logger.info("built-in facts, %s split: %d records", split, len(records))
        return records
    path = Path(source)
    if not path.exists():
        raise ValueError(f"{path}: no such file; check the path, or use 'facts', which is built in")
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path}: holds no records; write at least one")
    format_ = _recognise(rows[0])
    read = [format_.read(row) for row in rows]
    records = [r for r in read if r is not None]
    if not records:
        raise ValueError(f"{path}: no record has an alternative answer; fill in the field 'alt'")
    logger.info("%s: format %s, %d records", path, format_.name, len(records))
    if len(records) < len(read):
        logger.info("%s: left out %d without alternative", path, len(read) - len(records))
    return records


def without_overlap(
    train: Sequence[EditRequest], validation: Iterable[EditRequest]
) -> list[EditRequest]:
    """The training requests that share no prompt, subject or locality prompt with validation.

    Like is compared with like: prompts with prompts, and so on. Logs how many are dropped.
    """
    held_out = list(validation)
    prompts = {r.prompt for r in held_out}
    subjects = {r.subject for r in held_out if r.subject is not None}
    probes = {p.prompt for r in held_out for p in r.locality}
    kept = [
        r
        for r in train
        if r.prompt not in prompts
        and r.subject not in subjects
        and not any(p.prompt in probes for p in r.locality)
    ]
    logger.info(
        "dropped %d of %d training records that share a prompt, subject or locality prompt with "
        "held-out ones",
        len(train) - len(kept),
        len(train),
    )
    return kept


def write_jsonl(path: str | Path, records: Iterable[EditRequest]) -> None:
    """Write records in our own JSONL format.

    The file appears at once or not at all: it is written under a temporary name beside ``path``.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    with replacing(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_dict(), ensure_ascii=False) + "\n")
