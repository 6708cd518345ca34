"""What ``edit`` and ``apply`` share: asking a model around its facts, and where results go."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymend.files import atomic_dir, editor_folder, empty_dir, kind_of_folder

if TYPE_CHECKING:
    from pymend.edit import Edit

HOME = "edits"  # where edits are saved if nobody says
VLLM_RANK = 512  # the largest that vLLM serves


def editor_of(editor: str | None, model: str) -> Path:
    """The folder of the editor that was named, or that ships for ``model``.

    Raises:
        ValueError: none was named, and none ships.
    """
    found = editor_folder(editor or model)
    if not editor and not kind_of_folder(found):
        raise ValueError(
            f"no editor ships for {model}; train one, once (pymend train --model {model} --data "
            "...), and give its folder as --editor"
        )
    return found


@contextmanager
def all_applied(model: Any, edits: Iterable[Any]) -> Iterator[None]:
    """``model`` acts with every one of ``edits``."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.applied(model))
        yield


def facts_table(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Whether the facts of an edit took, from its ``outcomes`` as they are saved."""
    from pymend.report.tables import number, table

    rows = [
        (
            o["prompt"],
            o["target"],
            f"{number(o['probability_before'])} -> {number(o['probability_after'])}",
            "yes" if o["success"] else "no",
        )
        for o in outcomes
    ]
    return table(("prompt", "target", "P(target)", "took"), rows)


def answers_table(answers: Iterable[Any]) -> str:
    """What a model says without and with an edit."""
    from pymend.report.tables import table

    rows = [(a.kind, a.prompt, a.before, a.after, a.verdict) for a in answers]
    return table(("", "prompt", "before", "after", ""), rows)


def slug(prompt: str, target: str, more: int = 0) -> str:
    """A folder's name from a fact, and the number of further ones."""
    words = re.sub(r"\W+", "-", f"{prompt} {target}".lower()).strip("-_")[:60].strip("-") or "edit"
    return words + (f"-and-{more}-more" if more else "")


def free(folder: Path) -> Path:
    """``folder``, or the same with a number behind it where that is taken."""
    taken, count = folder, 1
    while taken.exists() and any(taken.iterdir()):
        count += 1
        taken = folder.with_name(f"{folder.name}-{count}")
    return taken


def check_places(*places: str | None) -> None:
    """Refuse folders that cannot be filled, before any work.

    Raises:
        ValueError: two of them are the same.
        FileExistsError, PermissionError: as :func:`pymend.files.empty_dir`.
    """
    given = [Path(place).resolve() for place in places if place]
    if len(set(given)) < len(given):
        raise ValueError("--output, --merge and --peft need folders of their own; name others")
    for place in given:
        empty_dir(place, make=False)


def merged(model: Any, tokenizer: Any, edits: Sequence[Edit], folder: str) -> None:
    """Save an ordinary model with all ``edits`` in it; ``model`` is as before afterwards."""
    done: list[Edit] = []
    try:
        for edit in edits:
            edit.merge_(model)
            done.append(edit)
        with atomic_dir(empty_dir(folder)) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    finally:
        for edit in reversed(done):
            edit.unmerge_(model)
    print(f"the edited model is in {folder}")


def adapted(edits: Sequence[Edit], folder: str, model: str) -> None:
    """Save all ``edits`` as one LoRA adapter, and say how to serve it."""
    import json

    total = edits[0]
    for edit in edits[1:]:
        total = total + edit
    total.to_peft(folder)
    rank = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    print(f"the adapter is in {folder}")
    if rank > VLLM_RANK:
        print(
            f"its rank is {rank}: vLLM serves {VLLM_RANK} at most; merge it, or serve fewer facts"
        )
        return
    served = next(size for size in (8, 16, 32, 64, 128, 256, VLLM_RANK) if size >= rank)
    name = Path(folder).name
    print(
        f"serve it: vllm serve {model} --enable-lora --max-lora-rank {served} "
        f"--lora-modules {name}={folder}"
    )
