"""Which room of pymend imports which: the table of docs/design.md, held against the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pymend"


def table() -> dict[str, tuple[int, set[str]]]:
    """Of every room its floor and the rooms that it may import from."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    section = text.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    rooms: dict[str, tuple[int, set[str]]] = {}
    for line in re.findall(r"^\| (\d.*) \|$", section, re.M):
        floor, names, may, _duty = (part.strip() for part in line.split("|"))
        listed = set(re.findall(r"`([^`]+)`", may))
        if may.startswith("everything above"):  # "but" some
            listed = set(rooms) - listed
        else:
            assert bool(listed) != (may == "nothing"), line
        rooms |= {name: (int(floor), listed) for name in re.findall(r"`([^`]+)`", names)}
    return rooms


ROOMS = table()
FILES = sorted(PACKAGE.rglob("*.py"))


def room(parts: list[str]) -> str:
    """The room of a module, given by its path below the package."""
    return next(("/".join(parts[:n]) for n in (2, 1) if "/".join(parts[:n]) in ROOMS), parts[0])


def room_of(path: Path) -> str:
    return room([*path.relative_to(PACKAGE).with_suffix("").parts])


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file imports from, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    own = [name.split(".")[1:] for name in found if name.startswith("pymend.")]
    return {room(parts) for parts in own} - {room_of(path)}


def test_the_table_lists_every_room_and_no_other() -> None:
    # A package that is split into rooms has nothing beside them but its docstring.
    split = {name.partition("/")[0] for name in ROOMS if "/" in name}
    there = {room_of(path) for path in FILES} - split
    assert there == set(ROOMS) - split
    for name in split:
        body = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")).body
        assert len(body) == 1


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_may_import_only_what_stands_on_lower_floors(name: str) -> None:
    floor, may = ROOMS[name]
    assert all(ROOMS[other][0] < floor for other in may - {"_C"})


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_just_what_the_table_says(name: str) -> None:
    imported = set().union(*(imported_rooms(p) for p in FILES if room_of(p) == name))
    top = {n for n, (floor, _) in ROOMS.items() if floor >= ROOMS["reproduce"][0]}
    if name in top:
        assert imported <= ROOMS[name][1]
    else:
        assert imported == ROOMS[name][1]


def test_modules_of_one_room_form_no_circle() -> None:
    """Within a room, too, no module needs one that needs it."""
    needs: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        body = ast.parse(path.read_text(encoding="utf-8")).body  # at import, not inside functions
        of = [n for n in body if isinstance(n, ast.ImportFrom) and n.module]
        pairs = [(n.module or "", f"{n.module}.{a.name}") for n in of for a in n.names]
        needs[name] = {x for pair in pairs for x in pair if x.startswith("pymend.")} - {name}
    while done := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in done:
            del needs[name]
    assert not needs


def test_datasets_and_matplotlib_are_not_imported_with_the_package() -> None:
    top_level = [
        node
        for path in FILES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {getattr(n, "module", None) or n.names[0].name for n in top_level}
    assert not {n.split(".")[0] for n in names} & {"datasets", "matplotlib"}
