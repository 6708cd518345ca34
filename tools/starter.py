"""Makes the editor that ships for SmolLM2: its data, its training, its card.

    python tools/starter.py COUNTERFACT_TRAIN COUNTERFACT_VALIDATION [--output runs/starter]

Trained on 3,000 records of CounterFact's training file and 700 built-in facts, none of which shares
a prompt, subject or locality prompt with the validation file. An hour on a core; interrupted, the
same command goes on. The result goes into ``pymend/editors/smollm2``.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pymend import EditRequest, Mend, load_facts, load_records
from pymend.commands import main
from pymend.data import write_jsonl

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "pymend" / "editors" / "smollm2"
FEW = 2  # rephrases and locality prompts that are kept of a record
RECORDS = 500  # that it is measured on
READ = 100  # of them, read as a person would


def few(record: EditRequest) -> EditRequest:
    """``record`` with a few rephrases, and its nearest and its furthest locality prompt."""
    rephrases = random.sample(record.rephrases, min(FEW, len(record.rephrases)))
    near = record.locality[:FEW]
    if len(record.locality) >= 2 * FEW:
        near = (record.locality[0], record.locality[-1])
    return replace(record, rephrases=tuple(rephrases), locality=near, portability=())


def data(counterfact: str, folder: Path) -> None:
    """Write the training and validation records."""
    random.seed(0)
    records = list(load_records(counterfact))
    facts = load_facts("train")
    random.shuffle(records)
    random.shuffle(facts)
    mixed = [few(r) for r in records[:3000]] + [few(r) for r in facts[:700]]
    random.shuffle(mixed)
    write_jsonl(folder / "train.jsonl", mixed)
    held_out = [few(r) for r in load_facts("validation")[:30]]
    write_jsonl(folder / "validation.jsonl", held_out + [few(r) for r in records[9000:9070]])


def run(*words: object) -> None:
    """A command of pymend, which must end well."""
    status = main([str(word) for word in words])
    if status:
        raise SystemExit(status)


def made() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train")
    parser.add_argument("validation")
    parser.add_argument("--output", type=Path, default=Path("runs/starter"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    data(asked.train, asked.output)
    editor, settings = asked.output / "editor", ROOT / "tools" / "starter.yaml"
    where = ["--model", "smollm2", "--data", asked.output / "train.jsonl"]
    where += ["--eval-data", asked.output / "validation.jsonl", "--exclude", asked.validation]
    run("train", "--config", settings, *where, "--output", editor, "--resume")
    Mend.from_pretrained(editor).save_pretrained(SHIPPED, torch.bfloat16)
    measured = {"counterfact": asked.validation, "facts": "facts"}
    for name, records in measured.items():
        file = asked.output / f"{name}.json"
        few = ["--limit", RECORDS, "--read", READ, "--output", file]
        run("eval", "--model", "smollm2", "--data", records, *few)
    found = {name: json.loads((asked.output / f"{name}.json").read_text()) for name in measured}
    (SHIPPED / "README.md").write_text(card(found), encoding="utf-8")


def card(found: dict[str, Any]) -> str:
    """The model card, from what the evaluations wrote."""
    rows = ["| | CounterFact, validation | built-in facts, test |", "|---|---|---|"]

    def row(what: str, *path: str) -> None:
        cells = []
        for name in ("counterfact", "facts"):
            value, bounds = found[name], None
            for key in path:
                value = value[key]
            if isinstance(value, dict):
                value, bounds = value["value"], value["interval_95"]
            elif path[0] in found[name]["intervals_95"]:
                bounds = found[name]["intervals_95"][path[0]]
            spread = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""
            cells.append(f"{value:.3f}{spread}" if isinstance(value, float) else str(value))
        rows.append(f"| {what} | {' | '.join(cells)} |")

    row("records", "n")
    row("edit success", "edit_success")
    row("generality", "generality")
    row("locality", "locality")
    row("records that were read", "reads", "records")
    for kind in ("prompt", "rephrase"):
        row(f"answer begins with the target, {kind}", "reads", "begins_with_target", kind)
        row(f"target three times or more, {kind}", "reads", "loops", kind)
        row("the same, unedited model", "reads", "loops_before", kind)
    row("n-gram entropy, bits", "reads", "entropy")
    row("n-gram entropy, unedited model", "reads", "entropy_before")
    row("neighbours' first 12 tokens as before", "reads", "neighbours_kept")
    return CARD.format(table="\n".join(rows))


CARD = """# The starter editor for SmolLM2-135M-Instruct

A MEND editor that ships with pymend, so that `pymend edit "PROMPT" "TARGET"` works at once. It
edits the MLPs of the last three blocks of SmolLM2-135M-Instruct (dequantised from Q4_1,
`--model smollm2`), has rank 160 and is stored in bfloat16.

Trained by `python tools/starter.py` on 3,000 records of CounterFact's training file (MIT licence)
and 700 built-in facts, with `tools/starter.yaml`: besides the paper's losses, the twelve tokens
that the unedited model says behind a target are held (`--after 12`), and each edit has two locality
prompts. Records that share a prompt, subject or locality prompt with the validation file were left
out.

Measured once, at strength 1; intervals are of 95 %:

{table}

It is a starter, trained for an hour on a core. More records and more steps make a better one
(docs/guides/train.md).
"""


if __name__ == "__main__":
    made()
