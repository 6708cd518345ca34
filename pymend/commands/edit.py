"""``pymend edit``: change facts with a trained editor, show the answers, save the result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pymend.commands.settings import Flag, Machine, Model
from pymend.config import EditRequest

STRENGTH = "factor of the learned step sizes; below 1: fewer edits take, less else changes"


def edit(
    editor: Annotated[str, Flag("what train wrote", "DIR")],
    model: Model,
    machine: Machine,
    strength: Annotated[float, Flag(STRENGTH)] = 1.0,
    prompt: Annotated[
        tuple[str, ...], Flag("may be repeated: several facts, one edit", "TEXT")
    ] = (),
    target: Annotated[tuple[str, ...], Flag("new answer, one per prompt", "TEXT")] = (),
    data: Annotated[
        str | None, Flag("all records of a file as one edit, in place of --prompt")
    ] = None,
    output: Annotated[str | None, Flag("save the edit", "DIR")] = None,
    merge: Annotated[str | None, Flag("save an ordinary model with the edit in it", "DIR")] = None,
    peft: Annotated[str | None, Flag("save the edit as a LoRA adapter of PEFT", "DIR")] = None,
    tokens: Annotated[int, Flag("length of the answers shown", least=1)] = 12,
) -> None:
    """Edit facts with a trained editor."""
    requests = _requests(prompt, target, data)
    places = [Path(p).resolve() for p in (output, merge, peft) if p]
    if len(set(places)) < len(places):
        raise ValueError("--output, --merge and --peft need folders of their own; name others")

    from pymend.files import atomic_dir, empty_dir, writable_dir

    if output:
        writable_dir(output, make=False)
    for folder in filter(None, (merge, peft)):
        empty_dir(folder, make=False)

    from pymend.algorithms.registry import load_editor
    from pymend.engine.generate import greedy
    from pymend.engine.tokens import Encoder
    from pymend.report.tables import number, table

    mend = load_editor(editor).scale_(strength)
    if places and not mend.low_rank:
        raise ValueError(
            f"an edit of {mend.kind} cannot be saved or merged; "
            "leave out --output, --merge and --peft"
        )
    loaded, tokenizer = machine.load(model.model)
    edit = mend.edit(loaded, tokenizer, requests, chat=model.chat)
    encoder = Encoder.for_model(loaded, tokenizer, model.chat)
    prompts = [r.prompt for r in requests]
    before = greedy(loaded, encoder, prompts, tokens)
    with edit.applied(loaded):
        after = greedy(loaded, encoder, prompts, tokens)
    undone = greedy(loaded, encoder, prompts, tokens)

    took = [
        (
            o.prompt,
            o.target,
            number(o.probability_before),
            number(o.probability_after),
            "yes" if o.success else "no",
        )
        for o in edit.outcomes
    ]
    print(table(("prompt", "target", "P before", "P after", "took"), took))
    print()
    answers = list(zip(prompts, before, after, undone, strict=True))
    print(table(("prompt", "answer before", "after", "after undo"), answers))
    if output:
        edit.save_pretrained(output)
        print(f"the edit is in {output}")
    if peft:
        edit.to_peft(peft)
        print(f"the adapter is in {peft}")
    if merge:
        edit.merge_(loaded)
        with atomic_dir(empty_dir(merge)) as scratch:
            loaded.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        edit.unmerge_(loaded)
        print(f"the edited model is in {merge}")


def _requests(
    prompt: tuple[str, ...], target: tuple[str, ...], data: str | None
) -> list[EditRequest]:
    from pymend.data import load_records

    if bool(data) == bool(prompt or target):
        raise ValueError("name the edit by --prompt and --target, or by --data")
    if data:
        return load_records(data, split="test")
    if len(prompt) != len(target):
        raise ValueError(f"{len(prompt)} --prompt and {len(target)} --target; give one for each")
    return [EditRequest(p, t) for p, t in zip(prompt, target, strict=True)]
