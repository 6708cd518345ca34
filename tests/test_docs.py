"""What the pages promise is there: sections, commands, snippets, links."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest
import tiny

import pymend
from pymend.data import write_jsonl
from pymend.files import write_json
from pymend.zoo import smollm2

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "dev").glob("*.md")])
SCRIPT = re.search(r'^pymend = "(.*):(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
main = getattr(import_module(SCRIPT[1]), SCRIPT[2])  # what the command pymend runs
# Of these every block is run.
READ = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "start", "concepts")),
    *sorted((ROOT / "docs/guides").glob("*.md")),
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = ["--steps=2", "--batch-size=2", "--rank=5", "--eval-records=2", "--eval-every=2"]
OPS = sorted(p.stem for p in (ROOT / "pymend/ops").glob("*.py") if p.stem != "__init__")
INDENTED = re.compile(r"^    (?:pymend|make|python) (?:.*\\\n)*.*", re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """The words of every line of a page that calls ``program``, comments left out."""
    found = []
    for page in PAGES:
        if page.parent.name == "dev":  # notes say what was typed then
            continue
        text = page.read_text(encoding="utf-8")
        typed = [m[0].replace("\\\n", " ") for m in INDENTED.finditer(text)]
        for language, block in BLOCK.findall(text):
            typed += lines_of(language, block)
        split = [shlex.split(line, comments=True) for line in typed]
        found += [words[1:] for words in split if words[:1] == [program]]
    return found


def headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_section(op):
    text = (ROOT / "docs/math.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {op}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    for part in ("### Definition", "### Derivation", "### Cost"):
        assert part in section[1], part


def test_every_section_is_an_op():
    text = (ROOT / "docs/math.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^## (.*)", text, re.MULTILINE)) == OPS


# -- what README and the guides show is run ------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as the pages have it: smollm2 is a tiny model, runs/demo an editor for it."""
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = tiny.llama()
    model.save_pretrained(smollm2.folder())
    tiny.tokenizer().save_pretrained(smollm2.folder())
    write_json(smollm2.folder() / "complete.json", {})
    tiny.seasoned_mend(model).save_pretrained("runs/demo")
    records = tiny.facts(24)
    write_jsonl("facts.jsonl", records[:12])
    write_jsonl("counterfact-val.json", records[12:])
    return tmp_path


@pytest.mark.parametrize("page", READ, ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run(page, folder, capsys):
    """In their order and in one namespace: Python as it stands, commands as a shell splits them.

    Of a command that would take minutes even here only the flags are looked at.
    """
    names: dict = {}
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "json":
            json.loads(text)
        elif language in ("shell", "console"):
            for line in lines_of(language, text):
                words = shlex.split(line, comments=True)
                if words and words[0] == "pymend":
                    run_command(words[1:])
        else:
            assert language == "text", f"{page.name}: a block of {language} that nothing checks"
    capsys.readouterr()


def lines_of(language: str, text: str) -> list[str]:
    """The lines of a block that are typed; in a console they stand behind a dollar sign."""
    lines = text.replace("\\\n", " ").splitlines()
    if language == "console":
        return [line[2:] for line in lines if line.startswith("$ ")]
    return lines if language == "shell" else []


def run_command(words: list[str]) -> None:
    """Run ``pymend words`` if that takes seconds; else look at the flags only."""
    quick = ("edit", "apply", "show", "list", "eval", "train")
    talks = words[0] == "apply" and "--chat" in words
    if talks or (words[0] not in quick and words[:2] != ["models", "list"]):
        check_flags(words)
        return
    small = SMALL if words[0] == "train" else []
    if small and "--config" not in words:
        small = [*small, "--data=facts.jsonl"]
    assert call([*words, *small]) == 0, f"pymend {shlex.join(words)}"


def call(words: list[str]) -> int:
    """The exit status of the command line."""
    try:
        return main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


def check_flags(words: list[str]) -> None:
    """The command and every flag of it, which may stand in brackets, are in its help."""
    command = [*takewhile(lambda word: word[0] not in "-[", words)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        while call([*command, "--help"]):  # the last words may be names, not commands
            command.pop()
    assert command, words
    known = set(re.findall(r"--[\w-]+", printed.getvalue()))
    given = {flag for word in words for flag in re.findall(r"^\[?(--[\w-]+)", word)}
    assert given <= known, f"pymend {shlex.join(words)}"


@pytest.mark.parametrize(
    ("script", "words", "wanted"),
    [
        ("edit_and_check", ["runs/demo", "Fuji is in", "Norway", "--ask", "Rome is"], "  after: "),
        ("train_your_own", ["facts.jsonl", "new", "--steps=2", "--rank=5"], "edit_success: "),
    ],
)
def test_an_example_runs(script, words, wanted, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(ROOT / f"examples/{script}.py"), run_name="__main__")
    assert wanted in capsys.readouterr().out


def test_every_example_is_run_here():
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert names == {"edit_and_check", "train_your_own"}


def test_the_pages_show_something():
    blocks = [x for page in READ for x, _ in BLOCK.findall(page.read_text(encoding="utf-8"))]
    assert blocks.count("python") > 10 and blocks.count("shell") > 10


@pytest.mark.parametrize(("page", "most"), [("README.md", 700), ("docs/performance.md", 1500)])
def test_a_page_stays_short(page, most):
    """Words besides those of tables."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert sum(len(line.split()) for line in lines if not line.startswith("|")) <= most


# -- the site ------------------------------------------------------------------------------------


def test_the_site(tmp_path):
    """It builds without a warning, has an entry for every public name, and no page is lost."""
    line = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*line, "docs", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = (tmp_path / "api/index.html").read_text(encoding="utf-8")
    assert not [name for name in pymend.__all__ if f'id="pymend.{name}"' not in entries]
    menu = (tmp_path / "index.html").read_text(encoding="utf-8")
    results = (tmp_path / "results/README.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        if re.fullmatch(r"results/[^/]+/[^/]+", name):  # a single table
            assert f'href="{name.removeprefix("results/")}"' in results, name
        elif name != "index.html":
            assert f'href="{name}"' in menu, name


@pytest.mark.parametrize("name", pymend.__all__)
def test_what_a_public_class_offers_is_described(name):
    value = getattr(pymend, name)
    if isinstance(value, type):
        assert not inspect.getdoc(value).startswith(f"{name}("), "what dataclass writes"
        for part, member in inspect.getmembers(value, callable):
            if not part.startswith("_") and str(member.__module__).startswith("pymend"):
                assert inspect.getdoc(member), part


# -- commands, sections, links -------------------------------------------------------------------


def test_commands_and_their_flags_exist(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    found = commands("pymend")
    for words in found:
        check_flags(words)
    called = {words[0] for words in found}
    assert called >= {"train", "eval", "edit", "import", "demo", "data", "models", "reproduce"}


def test_make_targets_and_scripts_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[0] for words in commands("make")}
    for page in PAGES:
        named |= set(re.findall(r"`make ([\w-]+)", page.read_text(encoding="utf-8")))
    assert {"test", "demo"} <= named <= targets
    scripts = [words[0] for words in commands("python")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            kept = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings(path)]
            assert anchor in kept, target
