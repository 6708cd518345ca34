"""Table 8 and Table 10: what edits look like, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pymend.config import EditRequest
from pymend.engine.generate import greedy
from pymend.engine.tokens import Encoder
from pymend.reproduce import data
from pymend.reproduce.page import markdown, write_page
from pymend.reproduce.plan import Run, Scale
from pymend.reproduce.runs import RunContext, loaded

EDITS = 10  # shown
OTHERS = 2  # paraphrases and neighbours of each
TOKENS = 12  # of an answer, at most
HEAD = ("kind", "prompt", "before", "after", "mark")

TITLES = {"table8": "Generation edits", "table10": "Edits, paraphrases, neighbours"}


def write(scale: Scale, name: str, folder: Path, command: str, place: RunContext) -> Path:
    """Write ``name``.md, .csv and .json: MEND's edits of the first test records; return the first.

    Raises:
        FileNotFoundError: of a run of MEND only the result is there.
    """
    parts: list[str] = []
    shown: dict[str, list[tuple[str, ...]]] = {}
    for setup in scale.tables[name]:
        model, tokenizer = loaded(scale.setups[setup].model, place.dtype, place.device)
        editor = place.editor(Run(setup, "mend"))
        records = data.records(scale.setups[setup], place.sets, place.files)["test"][:EDITS]
        encoder = Encoder.for_model(model, tokenizer)

        def answers(prompts: Sequence[str]) -> list[str]:
            return greedy(model, encoder, prompts, TOKENS)  # noqa: B023

        lines: list[tuple[str, ...]] = []
        for request in records:
            edit = editor.edit(model, tokenizer, request)
            lines += _table(request, answers, lambda: edit.applied(model))  # noqa: B023
        marks = Counter(f"{line[0]} {line[4]}" for line in lines)
        parts += [f"## {Path(scale.setups[setup].model).name}, {setup}", ""]
        parts += [", ".join(f"{mark}: {n}" for mark, n in sorted(marks.items())), ""]
        parts += markdown(("", *HEAD[1:]), [[_plain(text) for text in line] for line in lines])
        parts.append("")
        shown[setup] = lines
    rows = [(setup, *line) for setup, lines in shown.items() for line in lines]
    looks = {s: [dict(zip(HEAD, line, strict=True)) for line in shown[s]] for s in shown}
    sheet, source = (("setup", *HEAD), rows), {"examples": looks}
    return write_page(folder, name, TITLES[name], scale.note, command, parts[:-1], sheet, source)


def _table(
    request: EditRequest, answers: Callable[[Sequence[str]], list[str]], applied: Callable[[], Any]
) -> list[tuple[str, ...]]:
    """The answers around one edit; an answer counts if it begins with the target."""
    prompts = [request.prompt, *request.rephrases[:OTHERS]]
    prompts += [p.prompt for p in request.locality[:OTHERS]]
    kinds = ["edit"] + ["paraphrase"] * len(request.rephrases[:OTHERS])
    kinds += ["neighbour"] * (len(prompts) - len(kinds))
    before = answers(prompts)
    with applied():
        after = answers(prompts)
    lines: list[tuple[str, ...]] = []
    for kind, prompt, old, new in zip(kinds, prompts, before, after, strict=True):
        if kind == "neighbour":
            wrong = new.startswith(request.target) and not old.startswith(request.target)
            mark = "over-generalised" if wrong else "kept" if old == new else "changed"
        elif new.startswith(request.target):
            mark = "took"
        else:
            mark = "did not take" if kind == "edit" else "under-generalised"
        shown = f"{prompt} → {request.target}" if kind == "edit" else prompt
        lines.append((kind, shown, old, new, mark))
    return lines


def _plain(text: str) -> str:
    """Text that does not break a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " / ")
