"""``pymend apply``: saved edits in use, asked, talked to, merged or exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pymend.commands.asking import adapted, all_applied, answers_table, check_places, merged
from pymend.commands.settings import MODELS, Flag, Machine
from pymend.files import kind_of_folder

if TYPE_CHECKING:
    from pymend.edit import Answer, Edit

HELP = """what you type is answered by the edited model
/before TEXT   the answer without the edits
/edits         the edits that act, by number
/undo [N]      take back the last edit, or edit N
/redo          put back what was taken last
/quit          end"""


def apply(
    edits: Annotated[tuple[str, ...], Flag("saved edits, in order", "EDIT", positional=True)],
    machine: Machine,
    model: Annotated[str | None, Flag(f"{MODELS}; default: the one they were made for")] = None,
    prompt: Annotated[
        tuple[str, ...], Flag("ask this; default: what was asked when they were made", "TEXT...")
    ] = (),
    chat: Annotated[bool, Flag("talk to the edited model")] = False,
    merge: Annotated[str | None, Flag("save an ordinary model with the edits in it", "DIR")] = None,
    peft: Annotated[str | None, Flag("save them as one LoRA adapter of PEFT", "DIR")] = None,
    tokens: Annotated[int, Flag("length of the answers shown", least=1)] = 20,
) -> None:
    """Use saved edits: ask, talk, merge, export."""
    if not edits:
        raise ValueError("name saved edits; pymend list shows those there are")
    if len({Path(folder).resolve() for folder in edits}) < len(edits):
        raise ValueError("an edit is named twice, and would act twice; name each once")
    for text in prompt:
        if kind_of_folder(text) == "edit":
            raise ValueError(f"{text} is a saved edit, not a prompt; name edits before --prompt")
    check_places(merge, peft)

    from pymend.edit import Edit
    from pymend.engine.tokens import Encoder

    loaded_edits = [Edit.from_pretrained(folder) for folder in edits]
    name = model or _one({e.origin.name for e in loaded_edits}, "models", "--model")
    speech = [e.origin.chat for e in loaded_edits]
    if any(way != speech[0] for way in speech):
        raise ValueError(
            "these edits were made for prompts put in different ways; apply them apart"
        )
    loaded, tokenizer = machine.load(name)
    for folder, edit in zip(edits, loaded_edits, strict=True):
        try:
            edit.check(loaded)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    encoder = Encoder.for_model(loaded, tokenizer, speech[0])
    if prompt or not chat:
        print(answers_table(_asked(loaded, encoder, loaded_edits, prompt, tokens)))
    if peft:
        adapted(loaded_edits, peft)
    if merge:
        merged(loaded, tokenizer, loaded_edits, merge)
    if chat:
        talk(loaded, encoder, dict(zip(edits, loaded_edits, strict=True)), tokens)


def _one(found: set[str], what: str, flag: str) -> str:
    """The one that all edits name."""
    found = found - {""}
    if len(found) != 1:
        raise ValueError(f"the edits name {', '.join(sorted(found)) or 'no'} {what}; give {flag}")
    return found.pop()


def _asked(
    model: Any, encoder: Any, edits: Sequence[Edit], prompts: Sequence[str], tokens: int
) -> list[Answer]:
    """Answers to ``prompts``, or to what was asked when the edits were made."""
    from pymend.data.around import PROMPT, REPHRASE, verdict
    from pymend.edit import Answer
    from pymend.engine.generate import greedy

    known = {o.prompt: (PROMPT, o.target) for e in edits for o in e.outcomes}
    # One's neighbour may be another's rephrase.
    kinds = {a.prompt: (a.kind, a.target) for e in edits for a in e.answers}
    wording = {a.prompt: (a.kind, a.target) for e in edits for a in e.answers if a.kind == REPHRASE}
    asked = kinds | wording | known
    if prompts:
        asked = {text: known.get(text, ("", "")) for text in prompts}
    before = greedy(model, encoder, [*asked], tokens)
    with all_applied(model, edits):
        after = greedy(model, encoder, [*asked], tokens)
    return [
        Answer(kind, text, target, b, a, verdict(kind, target, b, a))
        for (text, (kind, target)), b, a in zip(asked.items(), before, after, strict=True)
    ]


def talk(model: Any, encoder: Any, edits: dict[str, Edit], tokens: int) -> None:
    """Answer what is typed, with the edits that act, until the input ends."""
    acting, taken = dict(edits), dict[str, "Edit"]()
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/edits":
            for i, name in enumerate(acting, 1):
                print(f"{i}  {name}")
            print(f"{len(acting)} of {len(edits)} edits act")
        elif word == "/undo":
            chosen = _chosen([*acting], rest)
            if chosen:
                taken[chosen] = acting.pop(chosen)
                print(f"taken back: {chosen}")
            else:
                print(f"no edit {rest or 'is left'}; /edits shows them")
        elif word == "/redo" and taken:
            name, edit = taken.popitem()
            acting[name] = edit
            print(f"acts again: {name}")
        elif word == "/before" and rest:
            print(_answer(model, encoder, rest, tokens))
        elif word.startswith("/") or not line:
            print(HELP)
        else:
            with all_applied(model, acting.values()):
                print(_answer(model, encoder, line, tokens))


def _answer(model: Any, encoder: Any, prompt: str, tokens: int) -> str:
    """What the model says to ``prompt``, or why it cannot be asked that."""
    from pymend.engine.generate import greedy

    try:
        return greedy(model, encoder, [prompt], tokens)[0]
    except ValueError as error:  # too long a text ends no talk
        return f"({error})"


def _chosen(names: Sequence[str], number: str) -> str | None:
    """The name that a number, or nothing for the last, stands for."""
    if not number:
        return names[-1] if names else None
    return names[int(number) - 1] if number.isdecimal() and 0 < int(number) <= len(names) else None
