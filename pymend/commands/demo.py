"""``pymend demo``: what ``pymend/demo.py`` does, with other settings where they are given."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pymend.commands.settings import Flag, Given, Machine, Model
from pymend.config import MendConfig, TrainConfig


def demo(
    model: Model,
    machine: Machine,
    training: Annotated[dict[str, Any], Given((TrainConfig,), defaults=False)],
    editor: Annotated[dict[str, Any], Given((MendConfig,), defaults=False)],
    quick: Annotated[bool, Flag("less of everything")] = False,
    output: Annotated[
        str | None,
        Flag(
            "default: runs/demo, or runs/demo-quick; the same demo in it is continued or shown "
            "again, a demo with other settings is replaced, other files stay",
            "DIR",
        ),
    ] = None,
) -> None:
    """Train, edit, undo and measure on built-in facts."""
    from pymend import demo
    from pymend.data import load_facts

    settings = demo.QUICK if quick else demo.FULL
    settings = replace(
        settings,
        train=replace(settings.train, **training),
        mend=replace(settings.mend, **editor),
    )
    model = model.of()
    folder = output or ("runs/demo-quick" if quick else "runs/demo")
    loaded, tokenizer = machine.load(model.model)
    train, validation, test = (load_facts(s) for s in ("train", "validation", "test"))
    named = (folder, settings, model.model, model.template)
    try:
        demo.run(loaded, tokenizer, train, validation, test, *named)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command again to continue") from None
