"""Edit requests from files and data sets.

A file is a JSON array of objects, JSONL (one object per line), or a Parquet table; a data set, a
folder of such files or one on the hub (``pymend.data.hub``). The format is recognised by the fields
of the first record (``pymend.data.formats``) and written to the log. White
space around texts is removed; our own JSONL is taken as it is, like a request in Python.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pymend.config import EditRequest
from pymend.data.facts import Split, load_facts
from pymend.data.formats import recognise
from pymend.data.hub import names_a_set, read_set
from pymend.data.rows import RawRow, read_rows
from pymend.files import replacing

logger = logging.getLogger("pymend")


def load_records(source: str | Path, split: Split = "train") -> list[EditRequest]:
    """The edit requests of the built-in fact set, of a file, or of a data set.

    Args:
        source: ``"facts"``; a file in one of the formats of ``pymend.data.formats``; or a data set
            of such records, NAME[:CONFIG][:SPLIT], where NAME is a local folder or a name on the
            hub. What was fetched is kept in the cache.
        split: the part of the built-in set, and of a data set that names none, if it has it. A file
            is one part and is read whole.

    Raises:
        ValueError: no such data set, or several splits and none named; a file that is missing,
            empty, malformed or of no known format, or a record with a missing, blank or wrong-typed
            field. The message names the file, the line (JSONL) or the record index from 0 (JSON
            array, table), and the remedy.
    """
    if str(source) == "facts":
        records = load_facts(split)
        logger.info("built-in facts, %s split: %d records", split, len(records))
        return records
    path = Path(source)
    if names_a_set(str(source)):
        place, rows = read_set(str(source), split)
        return _requests(place, list(rows))
    if not path.exists():
        raise ValueError(f"{path}: no such file; check the path, or use 'facts', which is built in")
    return _requests(str(path), list(read_rows(path)))


def _requests(place: str, rows: Sequence[RawRow]) -> list[EditRequest]:
    """The requests of all objects of a file; logs its form, and what of it is not used."""
    if not rows:
        raise ValueError(f"{place}: holds no records; write at least one")
    format_ = recognise(rows[0])
    records: list[EditRequest] = []
    for row in rows:
        made = format_.read(row)
        records += made if isinstance(made, list) else [made] if made else []
    left_out = Counter(reason for row in rows for reason in row.left_out)
    told = [f"{count} {reason}" for reason, count in left_out.items()]
    if not records:
        raise ValueError(f"{place}: holds no record to edit, but {', '.join(told)}")
    logger.info("%s: format %s, %d records", place, format_.name, len(records))
    for said in told:
        logger.warning("%s: left out %s", place, said)
    known = {*format_.aside, *(name for row in rows for name in row.seen)}
    # A table has a column for every field of any row: what is empty is not there.
    there = {n: None for row in rows for n, v in row.values.items() if v not in (None, "", [], {})}
    if unread := [name for name in there if name not in known]:
        logger.warning("%s: fields that are not used: %s", place, ", ".join(unread))
    if literal := next((r.prompt for r in records if "{}" in r.prompt), None):
        logger.warning("%s: {} is taken as it stands, with no subject: %r", place, literal)
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
