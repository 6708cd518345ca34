"""Which module of pymend imports which: the table of docs/design.md, kept true."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pymend"

CORE = {
    "algorithm",
    "capture",
    "config",
    "edit",
    "editor",
    "files",
    "losses",
    "mend",
    "models",
    "ops",
    "replay",
    "tokens",
    "trainable",
}
ROOMS = {
    "_lib": {"_C"},
    "config": set(),
    "reference": set(),
    "errors": set(),
    "files": {"config"},
    "ops": {"_lib"},
    "models": {"config", "data", "files", "ops", "tokens"},
    "tokens": {"config"},
    "losses": {"ops", "tokens"},
    "capture": {"models"},
    "replay": {"losses", "models", "tokens"},
    "editor": {"config", "models", "ops"},
    "edit": {"capture", "files", "interop", "models", "ops"},
    "algorithm": {"config", "edit", "losses", "models", "replay", "tokens"},
    "trainable": CORE - {"editor", "mend", "ops", "trainable"},
    "mend": CORE - {"mend"},
    "algorithms": CORE,
    "interop": CORE,
    "training": CORE | {"ops"},
    "evaluation": CORE,
    "data": {"config", "files"},
    "plots": {"files"},
    "report": {"losses", "models", "tokens"},
    "sampling": {"models", "tokens"},
}
# These may import everything, and are imported by no room.
TOP = {"__init__", "__main__", "cli", "cli_data", "cli_reproduce", "demo", "reproduce"}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("pymend.")}
    return found - {room(path)}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path):
    if room(path) not in TOP:
        assert imported_rooms(path) <= ROOMS[room(path)]


def test_datasets_and_matplotlib_are_not_imported_with_the_package():
    top_level = [
        node
        for path in ROOT.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {getattr(n, "module", None) or n.names[0].name for n in top_level}
    assert not {n.split(".")[0] for n in names} & {"datasets", "matplotlib"}
