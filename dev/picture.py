"""The picture of an edit in README: answers of SmolLM2 before and after, with the demo's editor.

It needs the editor that ``pymend demo`` leaves, and writes docs/edit.svg.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import torch

import pymend

matplotlib.use("svg")
from matplotlib import pyplot as plt

PROMPT, TARGET = "Mount Fuji is a mountain in the country of", "Norway"
ASKED = (  # what the prompt is to the edit
    ("the edit", PROMPT),
    ("another wording", "Mount Fuji is located in"),
    ("a neighbour", "Mount Everest is located in"),
    ("a neighbour", "Mount Kilimanjaro is located in"),
    ("something else", "The capital of Japan is"),
)
WANTED, KEPT, HARMED = "#1a7f37", "#57606a", "#b35900"
INK, LINE, MUTED = "#1f2328", "#d0d7de", "#57606a"


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The model's greedy continuation of ``prompt``, ten tokens of it."""
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=10, do_sample=False)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def draw(rows: list[tuple[str, str, str, str]], path: Path) -> None:
    """A table of kind, prompt, answer before and answer after."""
    plt.rcParams |= {"font.family": "DejaVu Sans", "svg.hashsalt": "pymend", "font.size": 10}
    left = (0.01, 0.17, 0.44, 0.73)  # of the columns
    figure = plt.figure(figsize=(9.4, 0.62 * (len(rows) + 1)))
    step = 1 / (len(rows) + 1)
    heads = ("", "prompt", "before", f"after the edit “… {TARGET}”")
    for x, text in zip(left, heads, strict=True):
        figure.text(x, 1 - step / 2, text, va="center", color=MUTED, weight="bold")
    for i, (kind, prompt, before, after) in enumerate(rows, 1):
        y = 1 - step * (i + 0.5)
        line = plt.Line2D((0, 1), (1 - step * i,) * 2, color=LINE, linewidth=0.8)
        figure.add_artist(line)
        meant = kind in ("the edit", "another wording")
        took = after.startswith(TARGET)
        color = (WANTED if took else HARMED) if meant else (HARMED if took else KEPT)
        colors = (MUTED, INK, INK, color)
        for x, text, ink in zip(left, (kind, prompt, before, after), colors, strict=True):
            figure.text(x, y, "\n".join(textwrap.wrap(text, 30)), va="center", color=ink)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    """Edit, ask, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--editor", default="runs/demo")
    parser.add_argument("--output", type=Path, default=Path("docs/edit.svg"))
    options = parser.parse_args()
    model, tokenizer = pymend.load("smollm2")
    edit = pymend.Mend.from_pretrained(options.editor).edit(model, tokenizer, PROMPT, TARGET)
    before = [answer(model, tokenizer, prompt) for _, prompt in ASKED]
    with edit.applied(model):
        after = [answer(model, tokenizer, prompt) for _, prompt in ASKED]
    rows = [(*asked, b, a) for asked, b, a in zip(ASKED, before, after, strict=True)]
    for row in rows:
        print(*row, sep=" | ")
    draw(rows, options.output)


if __name__ == "__main__":
    main()
