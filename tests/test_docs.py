"""What the pages promise is there: sections, commands, snippets, links."""

from __future__ import annotations

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
import tiny

from pymend.commands import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPS = sorted(p.stem for p in (ROOT / "pymend/ops").glob("*.py") if p.stem != "__init__")
SCRIPT = re.compile(r"^    (?:\.venv/bin/)?(pymend|make|python) ((?:.*\\\n)*.*)", re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """The words of every indented line of a page that calls ``program``, comments left out."""
    found = []
    for page in PAGES:
        for match in SCRIPT.finditer(page.read_text(encoding="utf-8")):
            words = shlex.split(match[2].replace("\\\n", " "), comments=True)
            found += [words] if match[1] == program else []
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


def test_readme_example_runs(tmp_path, monkeypatch):
    """In a folder with a tiny model and an editor for it, in place of downloads and training."""
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(snippets) == 1
    model = tiny.llama()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.seasoned_mend(model).save_pretrained(tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    names: dict = {"folder": "model"}
    exec(compile(snippets[0], "README.md", "exec"), names)
    tiny.assert_same_bits(names["model"], tiny.snapshot(model))
    assert (tmp_path / "rome").is_dir() and names["edit"].outcomes[0].target == "Rome"


def test_commands_and_their_flags_exist(capsys):
    found = commands("pymend")
    called = {words[0] for words in found}
    assert called == {"train", "eval", "edit", "import", "demo", "data", "models", "reproduce"}
    for words in found:
        assert main([*takewhile(lambda word: word[0] not in "-[", words), "--help"]) == 0
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        given = {flag for word in words for flag in re.findall(r"^\[?(--[\w-]+)", word)}
        assert given <= known, f"pymend {' '.join(words)}"


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
