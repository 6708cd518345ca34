"""``pymend train``: an editor for a model."""

from __future__ import annotations

import logging
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import yaml

from pymend.algorithms.registry import METHODS, TRAINED
from pymend.commands.settings import (
    SETS,
    Command,
    Flag,
    Given,
    Machine,
    Model,
    as_flags,
    presets,
    read_preset,
    read_settings,
)
from pymend.config import EditRequest, TrainConfig

logger = logging.getLogger("pymend")

HELD_OUT = 1000  # records of a training file kept for validation, at most: its last tenth
EDITORS = tuple(METHODS[name].config for name in TRAINED)


def train(
    data: Annotated[str, Flag(f"facts (built in), a file of records, or {SETS}")],
    output: Annotated[str, Flag("receives the editor", "DIR")],
    model: Model,
    machine: Machine,
    training: TrainConfig,
    editor: Annotated[dict[str, Any], Given(EDITORS)],
    eval_data: Annotated[
        str | None,
        Flag(
            "validation records; by default the facts' validation split, or the last tenth of "
            f"the file or set, at most {HELD_OUT}"
        ),
    ] = None,
    exclude: Annotated[
        str | None, Flag("leave out records that overlap with this file", "FILE")
    ] = None,
    resume: Annotated[bool, Flag("go on from a checkpoint")] = False,
    config: Annotated[str | None, Flag("settings as YAML; flags win over it", "FILE")] = None,
    preset: Annotated[
        str | None,
        Flag(
            "settings below those of --config, above the defaults shown here (default: the one "
            "named as the algorithm, for mend default)",
            choices=presets(),
        ),
    ] = None,
    algorithm: Annotated[str, Flag("kind of editor", choices=TRAINED)] = "mend",
) -> None:
    """Train an editor for a model."""
    method = METHODS[algorithm]
    own = {f.name for f in fields(method.config)}
    for name in editor:
        if name not in own:
            raise ValueError(f"{name} is no setting of {algorithm}; leave it out")
    settings = method.settings(editor, "flags")
    records, held_out = _records(data, eval_data, exclude)

    import torch

    from pymend.algorithms.registry import trainable
    from pymend.files import replacing, writable_dir
    from pymend.models.structure import left_out
    from pymend.report.plots import learning_curves
    from pymend.report.tables import blockwise
    from pymend.training.trainer import Trainer

    writable_dir(output, make=False)
    model = model.of()
    loaded, tokenizer = machine.load(model.model)
    torch.manual_seed(training.seed)
    made = trainable(algorithm).from_config(loaded, settings)
    logger.info("editing %s", ", ".join(blockwise([w.name for w in made.weights])))
    why: dict[str, list[str]] = {}
    for name, reason in left_out(loaded, made.weights).items():
        why.setdefault(reason, []).append(name)
    beside = [f"{', '.join(blockwise(names))} ({reason})" for reason, names in why.items()]
    logger.info("left out of the same blocks: %s", "; ".join(beside) or "nothing")
    folder = writable_dir(output)
    trainer = Trainer(
        made,
        loaded,
        tokenizer,
        records,
        held_out,
        config=training,
        output=folder,
        resume=resume,
        chat=model.template,
    )
    file = folder / "config.yaml"
    chosen: dict[str, Any] = {"data": data, "eval_data": eval_data, "exclude": exclude}
    chosen |= {"output": output} | asdict(model) | asdict(machine) | {"algorithm": algorithm}
    chosen |= asdict(training) | asdict(settings)
    chosen |= {name: list(chosen[name]) or None for name in ("edit", "chat_options")}
    with replacing(file) as temporary:
        temporary.write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    try:
        trainer.train()
    except KeyboardInterrupt as stop:
        again = shlex.join(["pymend", "train", "--config", str(file), "--resume"])
        raise KeyboardInterrupt(f"{str(stop) or 'interrupted'}: {again}") from None
    learning_curves(folder / "metrics.jsonl", folder / "curves.png", model.model)
    if trainer.best_step:
        print(f"best validation loss {trainer.best_loss:.4f} at step {trainer.best_step}")
    print(how_to_use(model.model, output))


def how_to_use(model: str, editor: str) -> str:
    """What to do with an editor that is ready."""
    where = shlex.join(["--model", model, "--editor", editor])
    return f"the editor is in {editor}; use it with: pymend edit {where} --prompt ... --target ..."


def _records(
    data: str, eval_data: str | None, exclude: str | None
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Training and validation records."""
    from pymend.data import load_records, without_overlap

    train = load_records(data)
    if exclude:
        train = without_overlap(train, load_records(exclude))
    if eval_data or data == "facts":
        return train, load_records(eval_data or "facts", split="validation")
    count = min(HELD_OUT, len(train) // 10)
    logger.info(
        "training on the first %d records of %s, validating on its last %d",
        len(train) - count,
        data,
        count,
    )
    return train[: len(train) - count], train[len(train) - count :]


class Train(Command):
    """The command: its preset lies below ``--config``, and that below the flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with the values of both files as defaults.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no settings in it, or an unknown one.
        """
        given: dict[str, Any] = self.make_parser(ctx).parse_args(list(args))[0]
        if "help" not in given:
            file = given.get("config")
            own = as_flags(self, read_settings(Path(file)), file) if file else {}
            algorithm = given.get("algorithm") or own.get("algorithm") or "mend"
            preset = given.get("preset") or own.get("preset")
            if preset is None and algorithm in TRAINED:
                preset = METHODS[algorithm].preset
            # A name that is none is refused with the flags.
            below = read_preset(preset) if preset in presets() else {}
            ctx.default_map = as_flags(self, below, f"{preset}.yaml") | own
        return super().parse_args(ctx, args)
