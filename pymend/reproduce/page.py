"""How a table is written: a Markdown page, the same rows as CSV, what they came from as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymend.files import replacing, write_json


def write_page(
    folder: Path,
    name: str,
    title: str,
    note: str,
    command: str,
    body: Sequence[str],
    sheet: tuple[Sequence[str], Sequence[Sequence[Any]]],
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``name``.md and .csv into ``folder``, and .json if there is a ``source``.

    Args:
        note: what was done; command: makes this page again.
        body: lines of Markdown; sheet: head and rows of the CSV.

    Returns:
        The Markdown page.
    """
    page = folder / f"{name}.md"
    lines = [f"# {name}: {title}", "", note, "", f"    {command}", "", *body, ""]
    _write_text(page, "\n".join(lines))
    head, rows = sheet
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    _write_text(folder / f"{name}.csv", text.getvalue())
    if source is not None:
        write_json(folder / f"{name}.json", {"command": command, **source})
    return page


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
