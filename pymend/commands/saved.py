"""``pymend show`` and ``pymend list``: saved edits, read without a model and without torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from pymend.commands.asking import HOME, answers_table, facts_table
from pymend.commands.settings import Flag
from pymend.files import expect_kind, kind_of_folder, read_json


def show(
    edit: Annotated[str, Flag("a saved edit", "EDIT", positional=True)],
) -> None:
    """What a saved edit changes, and what came of it."""
    from pymend.report.tables import blockwise, memory, number, table

    folder = Path(edit)
    about = _read(folder)
    print(f"{facts_table(about['outcomes'])}\n")
    if about.get("answers"):
        print(f"{answers_table(SimpleNamespace(**a) for a in about['answers'])}\n")
    origin = about.get("origin", {})
    names = [w["name"] for w in about["weights"]]
    size = sum(path.stat().st_size for path in folder.iterdir())
    fidelity = about.get("fidelity")
    rows = [
        ("model", origin.get("name") or "unknown"),
        ("prompts", "chat template" if origin.get("chat") else "plain"),
        ("made by", origin.get("editor") or "unknown"),
        ("weights", ", ".join(blockwise(names))),
        ("size on disk", memory(size)),
        ("kept when merged", "not tried" if fidelity is None else f"{fidelity:.1%}"),
    ]
    print(f"{table(('', ''), rows)}\n")
    if "norms" in about:
        parts = zip(names, about["ranks"], about["norms"], strict=True)
        print(table(("weight", "rank", "norm"), [(n, str(r), number(x)) for n, r, x in parts]))


def listed(
    folder: Annotated[str, Flag("holds edits", "DIR", positional=True)] = HOME,
) -> None:
    """The edits in a folder."""
    from pymend.report.tables import memory, table

    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; pymend edit saves into {HOME}")
    rows = []
    for path in sorted(p for p in (place, *place.iterdir()) if kind_of_folder(p) == "edit"):
        try:
            about = _read(path)
        except ValueError as error:
            rows.append((path.resolve().name, f"cannot be read: {error}", "", "", ""))
            continue
        took = sum(o["success"] for o in about["outcomes"])
        facts = [f"{o['prompt']} {o['target']}" for o in about["outcomes"]]
        more = f" (and {len(facts) - 1} more)" if len(facts) > 1 else ""
        size = memory(sum(file.stat().st_size for file in path.iterdir()))
        model = about.get("origin", {}).get("name") or "unknown"
        said = f"{facts[0]}{more}" if facts else "unknown"
        rows.append((path.resolve().name, said, f"{took}/{len(facts)}", size, Path(model).name))
    print(
        table(("edit", "fact", "took", "size", "model"), rows) if rows else f"no edits in {place}"
    )


def _read(folder: Path) -> dict[str, Any]:
    """What ``edit.json`` says.

    Raises:
        ValueError: the folder holds something else, or the file lacks a part.
    """
    expect_kind(folder, "edit")
    about = read_json(folder / "edit.json")
    for key in ("weights", "outcomes"):
        if not isinstance(about.get(key), list):
            raise ValueError(f"{folder / 'edit.json'} lacks {key}; it is no edit")
    return about
