"""Files as rows: the objects of a JSON array, a JSONL file or a Parquet table, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pymend.config import check_text
from pymend.files import cache_dir


@dataclass(frozen=True)
class RawRow:
    """One object of a file. ``where`` names the file and the place in it, for errors.

    ``verbatim``: white space around its texts stays. ``seen``: the fields that were asked for;
    ``left_out``: what of the object is not used, and why, in words.
    """

    where: str
    values: dict[str, Any]
    verbatim: bool = False
    seen: set[str] = field(default_factory=set, compare=False)
    left_out: list[str] = field(default_factory=list, compare=False)

    def get(self, name: str) -> Any:
        """A field as it is; None when it is absent."""
        self.seen.add(name)
        return self.values.get(name)

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
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: field {name!r} must be a text, got {value!r}")
        check_text(value, f"{self.where}: field {name!r}")
        return (value if self.verbatim else value.strip()) if value.strip() else None

    def answer(self, name: str) -> str | None:
        """An optional text that may be wrapped in lists of alternatives; the first one counts."""
        value = self.get(name)
        while isinstance(value, list):
            value = value[0] if value else None
        return self._of(name, value).optional(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; empty when the field is absent."""
        items = [(f"{name}[{i}]", v) for i, v in enumerate(self._list(name))]
        return tuple(self._of(place, v).text(place) for place, v in items)

    def each(self, name: str) -> list[RawRow]:
        """A row for every value of a list, under the same name."""
        return [self._of(name, value) for value in self._list(name)]

    def several(self, name: str) -> tuple[str, ...]:
        """A field that must hold a text, or a list of texts, of which blank ones do not count."""
        return self.filled(name) if isinstance(self.get(name), list) else (self.text(name),)

    def filled(self, name: str) -> tuple[str, ...]:
        """The texts of a list that models wrote, who may have left some blank: those are not."""
        items = [(f"{name}[{i}]", v) for i, v in enumerate(self._list(name))]
        texts = (self._of(place, v).optional(place) for place, v in items)
        return tuple(text for text in texts if text)

    def rows(self, name: str) -> list[RawRow]:
        """A list of JSON objects; empty when the field is absent."""
        items = enumerate(self._list(name))
        return [_row(f"{self.where}, {name}[{i}]", value, self.verbatim) for i, value in items]

    def inner(self, name: str) -> RawRow:
        """A JSON object; one without fields when the field is absent."""
        value = self.get(name)
        return _row(f"{self.where}, field {name!r}", {} if value is None else value)

    def groups(self, name: str) -> list[RawRow]:
        """The objects of an object of named lists, one list after the other."""
        groups = self.inner(name)
        return [row for group in groups.values for row in groups.rows(group)]

    def _of(self, name: str, value: Any) -> RawRow:
        """A row with this one value."""
        return replace(self, values={name: value})

    def _list(self, name: str) -> list[Any]:
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise ValueError(f"{self.where}: field {name!r} must be a list, got {value!r}")
        return value


def _row(where: str, value: Any, verbatim: bool = False) -> RawRow:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {value!r}")
    return RawRow(where, value, verbatim)


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


def cached_tables() -> str:
    """Where ``datasets`` keeps what it has read."""
    return str(cache_dir() / "datasets")


def _read_table(path: Path) -> Iterator[RawRow]:
    """The rows of a Parquet table, the form that data sets have on the hub."""
    import datasets

    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    try:
        table = datasets.Dataset.from_parquet(str(path), cache_dir=cached_tables())
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{path}: is no Parquet table ({error})") from error
    for index, values in enumerate(table):
        yield RawRow(f"{path}, record index {index}", values)
