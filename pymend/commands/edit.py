"""``pymend edit``: change facts with a trained editor, look around them, save the result."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pymend.commands.asking import (
    HOME,
    adapted,
    all_applied,
    answers_table,
    check_places,
    editor_of,
    facts_table,
    free,
    merged,
    slug,
)
from pymend.commands.settings import SETS, Flag, Machine, Model
from pymend.config import EditRequest

if TYPE_CHECKING:
    from pymend.edit import Answer, BaseEdit

STRENGTH = "factor of the learned step sizes; below 1: fewer edits take, less else changes"
WAYS = ("joint", "independent", "sequential")
MANY = 4  # facts of an edit above which only their prompts are asked


def edit(
    model: Model,
    machine: Machine,
    words: Annotated[
        tuple[str, ...], Flag("a prompt and its new answer", "PROMPT TARGET", positional=True)
    ] = (),
    editor: Annotated[
        str | None, Flag("what train wrote; default: the one that ships for the model", "DIR")
    ] = None,
    strength: Annotated[float, Flag(STRENGTH)] = 1.0,
    prompt: Annotated[tuple[str, ...], Flag("may be repeated: several facts", "TEXT")] = (),
    target: Annotated[tuple[str, ...], Flag("new answer, one per prompt", "TEXT")] = (),
    data: Annotated[
        str | None, Flag(f"all records of a file, in place of a prompt; or of {SETS}")
    ] = None,
    facts: Annotated[
        str,
        Flag(
            "several facts: joint in one edit, independent edits, or sequential, each on top of "
            "those before",
            choices=WAYS,
        ),
    ] = "joint",
    output: Annotated[
        str | None, Flag(f"receives the edit, or one folder each of several (default: {HOME})")
    ] = None,
    merge: Annotated[str | None, Flag("save an ordinary model with the edit in it", "DIR")] = None,
    peft: Annotated[str | None, Flag("save the edit as a LoRA adapter of PEFT", "DIR")] = None,
    tokens: Annotated[int, Flag("length of the answers shown", least=1)] = 12,
) -> None:
    """Edit facts, see what changes around them."""
    requests = _requests(words, prompt, target, data)
    check_places(output, merge, peft, home=HOME)
    if facts == "independent" and (merge or peft):
        raise ValueError("independent edits go into no common model; apply those you want together")

    model = model.of(editor)
    found = editor_of(editor, model.model)

    from pymend.algorithms.registry import load_editor
    from pymend.edit import Edit
    from pymend.engine.tokens import Encoder

    maker = load_editor(found).scale_(strength)
    if not maker.low_rank and (output or merge or peft):
        raise ValueError(
            f"an edit of {maker.kind} cannot be saved or merged; "
            "leave out --output, --merge and --peft"
        )
    chat = model.speech(maker)
    loaded, tokenizer = machine.load(model.model)
    encoder = Encoder.for_model(loaded, tokenizer, chat)
    made = _edits(maker, loaded, tokenizer, requests, facts, chat)
    for i, (one, about) in enumerate(made):
        below = [e for e, _ in made[:i]] if facts == "sequential" else []
        answers = _look(loaded, encoder, maker, [*below, one], about, tokens)
        print(f"{facts_table([asdict(o) for o in one.outcomes])}\n")
        print(answers_table(answers))
        if isinstance(one, Edit):
            one.answers = answers
            with warnings.catch_warnings():  # to know what rounding would leave of it
                warnings.simplefilter("ignore")
                one.merge_(loaded)
                one.unmerge_(loaded)
            name = slug(about[0].prompt, about[0].target, len(about) - 1)
            home = Path(output or HOME)
            place = home if output and len(made) == 1 else free(home / name)
            one.save_pretrained(place)
            print(f"saved: {place}\n")
    every = [one for one, _ in made]
    if peft:
        adapted(every, peft)
    if merge:
        merged(loaded, tokenizer, every, merge)


def _edits(
    maker: Any,
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    facts: str,
    chat: Any,
) -> list[tuple[Any, list[EditRequest]]]:
    """The edits, each with its facts."""
    if facts == "joint":
        return [(maker.edit(model, tokenizer, requests, chat=chat), list(requests))]
    if facts == "independent":
        many = maker.edit_many(model, tokenizer, requests, chat=chat)
        return [(many[i], [request]) for i, request in enumerate(requests)]
    made = []
    with ExitStack() as before:
        for request in requests:
            one = maker.edit(model, tokenizer, request, chat=chat)
            before.enter_context(one.applied(model))
            made.append((one, [request]))
    return made


def _look(
    model: Any,
    encoder: Any,
    maker: Any,
    edits: Sequence[BaseEdit],
    about: Sequence[EditRequest],
    tokens: int,
) -> tuple[Answer, ...]:
    """Ask the model around the facts of the last of ``edits``, without and with it."""
    from pymend.data.around import FEW, around, verdict
    from pymend.edit import Answer
    from pymend.engine.generate import greedy

    few = FEW if len(about) <= MANY else 0
    asked = [(*q, r.target) for r in about for q in around(r, maker.elsewhere, few)]
    prompts = [text for _, text, _ in asked]
    with all_applied(model, edits[:-1]):
        before = greedy(model, encoder, prompts, tokens)
    with all_applied(model, edits):
        after = greedy(model, encoder, prompts, tokens)
    return tuple(
        Answer(kind, text, target, b, a, verdict(kind, target, b, a))
        for (kind, text, target), b, a in zip(asked, before, after, strict=True)
    )


def _requests(
    words: tuple[str, ...], prompt: tuple[str, ...], target: tuple[str, ...], data: str | None
) -> list[EditRequest]:
    from pymend.data import load_records

    ways = [bool(words), bool(prompt or target), bool(data)]
    if sum(ways) != 1:
        raise ValueError(
            'name the edit as pymend edit "PROMPT" "TARGET", by --prompt and --target, or by --data'
        )
    if data:
        return load_records(data, split="test")
    if words:
        if len(words) != 2:
            raise ValueError(
                f"{len(words)} texts in place of two, a prompt and its new answer; put each in "
                "quotes"
            )
        prompt, target = words[:1], words[1:]
    if len(prompt) != len(target):
        raise ValueError(f"{len(prompt)} --prompt and {len(target)} --target; give one for each")
    return [EditRequest(p, t) for p, t in zip(prompt, target, strict=True)]
