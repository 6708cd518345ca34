"""The command line: ``pymend train | edit | eval | import | demo | data | models | reproduce``.

The flags of training are made from ``TrainConfig`` and ``MendConfig``. A preset and a ``--config``
file are turned into flags and put before the user's own, so that later ones win and all are checked
alike. Torch is imported by the commands, not here.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import warnings
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from pymend import cli_data, cli_reproduce
from pymend.algorithms.registry import METHODS, TRAINED
from pymend.config import (
    CacheConfig,
    EditorConfig,
    EditRequest,
    FineTuneConfig,
    MendConfig,
    TrainConfig,
    from_json,
)
from pymend.errors import meant_for_user

logger = logging.getLogger("pymend")

T = TypeVar("T", bound=EditorConfig | TrainConfig)

EDITORS: dict[str, Any] = {name: METHODS[name].config for name in TRAINED}
HELD_OUT = 1000  # records of a training file kept for validation, at most: its last tenth
STRENGTH = "factor of the learned step sizes; below 1: fewer edits take, less else changes"
# Configuration, and what the name says about it.
RIVALS: dict[str, tuple[type[FineTuneConfig | CacheConfig], dict[str, Any]]] = {
    "ft": (FineTuneConfig, {}),
    "ft+kl": (FineTuneConfig, {"kl": True}),
    "cache": (CacheConfig, {}),
}
PRESETS = {"mend": "default"}  # of an algorithm; the others' have its own name
NOT_SETTINGS = ("command", "run", "config", "preset", "resume")  # of what config.yaml records

HELP = {
    "steps": "optimiser steps",
    "batch_size": "independent edits in one step",
    "accumulate": "passes that one step is split into, to save memory",
    "outer": "prompts the edit loss is taken on",
    "lr": "learning rate of the editor's networks",
    "alpha_lr": "learning rate of the step sizes alpha",
    "schedule": "learning rate after warm-up",
    "warmup": "steps of linear warm-up",
    "c_edit": "weight of the edit loss",
    "c_loc": "weight of the locality loss",
    "clip": "largest gradient norm",
    "seed": "seed of the editor's start and of the sampling",
    "eval_every": "steps between validations",
    "eval_records": "validation records",
    "patience": "validations without a better loss before stopping; 0: never",
    "keep": "which editor is saved: of the lowest validation loss, or the last",
    "save_every": "steps between checkpoints",
    "prefix_cache": "keep the states below the edited blocks in memory across epochs",
    "edit": "weights to edit: mlp, attention or all of the last blocks, paper for the paper's own "
    "list, or names and patterns",
    "blocks": "how many of the last blocks; 0: three, of an encoder-decoder two of each stack",
    "rank": "width of the editor's low-rank layers",
    "alpha": "initial step size",
    "shared": "one network for each weight shape, not for each weight",
    "norm": "normalise the inputs by running moments",
    "init": "start of the networks; id: the identity",
    "init_v": "start of the first factor of each layer",
    "combine": "one network for u and delta together",
    "one_sided": "transform only the smaller side",
    "x_only": "transform only u",
    "delta_only": "transform only delta",
    "n_edits": "simultaneous edits the editor is trained for",
    "official": "numeric conventions of the paper's code",
    "lstm": "width of the LSTM that reads a request, each way",
    "condition": "width of what the LSTM makes of a request",
    "hidden": "width of the network of each weight",
    "second_order": "differentiate through the gradient of the inner step",
    "c_base": "weight of the loss that keeps the adapted base close to the model",
}


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as one line, like every other error."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    # A user needs the sentence, not the line of code that says it.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        args.run(args)
    except KeyboardInterrupt as stop:
        print(f"\npymend: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        if not meant_for_user(error):
            raise
        print(f"pymend: error: {error}", file=sys.stderr)
        return 2
    return 0


# -- arguments -------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse ``argv``; for ``train``, after the flags of its preset and its ``--config`` file.

    Raises:
        ValueError: a wrong flag, an unknown key or a file that is no YAML mapping.
    """
    parser, train = _parsers()
    argv = list(argv)
    if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv):
        first = _Parser(prog="pymend train", add_help=False)
        first.add_argument("--config")
        first.add_argument("--preset")
        first.add_argument("--algorithm")
        given, _ = first.parse_known_args(argv[1:])
        own = read_settings(Path(given.config)) if given.config else {}
        algorithm = given.algorithm or str(own.get("algorithm") or "mend")
        usual = PRESETS.get(algorithm, algorithm) if algorithm in EDITORS else "default"
        preset = given.preset or str(own.get("preset") or usual)
        if preset not in _presets():
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(_presets())}")
        shipped = resources.files("pymend") / "presets" / f"{preset}.yaml"
        with resources.as_file(shipped) as path:
            flags = _flags(train, read_settings(path), path.name)
        argv = ["train", *flags, *_flags(train, own, given.config), *argv[1:]]
    return parser.parse_args(argv)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, whose sections only group them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, not a mapping, or a key that occurs twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"configuration file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not settings such as 'steps: 500'")
    settings: dict[str, Any] = {}
    for key, value in values.items():
        for name, inner in value.items() if isinstance(value, dict) else [(key, value)]:
            name = str(name).replace("-", "_")
            if name in settings:
                raise ValueError(f"{path}: {name} is given twice")
            settings[name] = inner
    return settings


def _flags(parser: argparse.ArgumentParser, settings: dict[str, Any], where: str) -> list[str]:
    """``settings`` as command line flags of ``parser``."""
    known = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    flags: list[str] = []
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"{where}: unknown setting {name!r}; known are {', '.join(known)}")
        option = known[name].option_strings[0]
        if isinstance(known[name], BooleanOptionalAction):
            if not isinstance(value, bool):
                raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
            flags.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [option, *map(str, value)]
        elif value is not None:
            flags.append(f"{option}={value}")
    return flags


def _presets() -> list[str]:
    folder = resources.files("pymend") / "presets"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def _parsers() -> tuple[_Parser, argparse.ArgumentParser]:
    """The whole parser, and that of ``train``."""
    parser = _Parser(
        prog="pymend", description="Correct facts inside a language model with MEND, and undo them."
    )
    parser.add_argument("--version", action="version", version=f"pymend {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an editor for a model")
    train.set_defaults(run=_train)
    train.add_argument("--data", required=True, help="facts (built in), or a file of records")
    train.add_argument(
        "--eval-data",
        help="validation records; by default the facts' validation split, or the last tenth of "
        f"the file, at most {HELD_OUT}",
    )
    train.add_argument(
        "--exclude", metavar="FILE", help="leave out records that overlap with this file"
    )
    train.add_argument("--output", required=True, metavar="DIR", help="receives the editor")
    train.add_argument(
        "--resume", action=BooleanOptionalAction, default=False, help="go on from a checkpoint"
    )
    train.add_argument("--config", metavar="FILE", help="settings as YAML; flags win over it")
    train.add_argument(
        "--preset",
        choices=_presets(),
        help="settings below those of --config, "
        "above the defaults shown here (default: the one named as the algorithm, for mend default)",
    )
    _add_model(train)
    train.add_argument("--algorithm", choices=EDITORS, default="mend", help="kind of editor")
    _add_settings(train, "training", TrainConfig)
    _add_settings(train, "editor", *EDITORS.values())

    edit = commands.add_parser("edit", help="edit facts with a trained editor")
    edit.set_defaults(run=_edit)
    edit.add_argument("--editor", required=True, metavar="DIR", help="what train wrote")
    edit.add_argument("--strength", type=float, default=1.0, help=STRENGTH)
    edit.add_argument(
        "--prompt", action="append", default=[], help="may be repeated: several facts, one edit"
    )
    edit.add_argument("--target", action="append", default=[], help="new answer, one per prompt")
    edit.add_argument("--data", help="all records of a file as one edit, in place of --prompt")
    edit.add_argument("--output", metavar="DIR", help="save the edit")
    edit.add_argument("--merge", metavar="DIR", help="save an ordinary model with the edit in it")
    edit.add_argument("--peft", metavar="DIR", help="save the edit as a LoRA adapter of PEFT")
    edit.add_argument(
        "--tokens", type=int, default=12, help="length of the answers shown (default: 12)"
    )
    _add_model(edit)

    evaluate = commands.add_parser("eval", help="measure a trained editor, or a rival")
    evaluate.set_defaults(run=_eval)
    evaluate.add_argument("--editor", metavar="DIR", help="what train wrote: mend, ke or enn")
    evaluate.add_argument(
        "--algorithm", choices=RIVALS, help="a rival without a trained editor, in its place"
    )
    evaluate.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of a rival, a field of its configuration; may be repeated",
    )
    evaluate.add_argument(
        "--locality-data", metavar="FILE", help="ft+kl: training records whose locality it holds"
    )
    evaluate.add_argument("--strength", type=float, default=1.0, help=STRENGTH)
    evaluate.add_argument("--data", required=True, help="facts (the test split), or a file")
    evaluate.add_argument("--limit", type=int, help="only the first records")
    evaluate.add_argument(
        "--output",
        metavar="FILE",
        help="write the results as JSON; the scores on the way "
        "are in FILE.part, from which the same command goes on",
    )
    evaluate.add_argument("--ppl-text", metavar="FILE", help="text for the perplexity drawdown")
    evaluate.add_argument(
        "--batch-size", type=int, default=16, help="edits in one pass (default: 16)"
    )
    evaluate.add_argument("--n-edits", type=int, default=1, help="simultaneous edits (default: 1)")
    _add_model(evaluate)

    imported = commands.add_parser("import", help="take an editor over from the paper's code")
    imported.set_defaults(run=_import)
    imported.add_argument("archive", metavar="FILE", help="what that code, or EasyEdit, saved")
    imported.add_argument("--output", required=True, metavar="DIR", help="receives the editor")
    imported.add_argument(
        "--edit", required=True, nargs="+", metavar="NAME", help="its inner_params, in their order"
    )
    imported.add_argument("--norm", action=BooleanOptionalAction, default=True, help=HELP["norm"])
    imported.add_argument("--init", choices=("id", "xavier"), default="id", help=HELP["init"])
    imported.add_argument("--n-edits", type=int, default=1, help=HELP["n_edits"])
    _add_model(imported)

    demo = commands.add_parser("demo", help="train, edit, undo and measure on built-in facts")
    demo.set_defaults(run=_demo)
    demo.add_argument(
        "--quick", action=BooleanOptionalAction, default=False, help="less of everything"
    )
    demo.add_argument(
        "--output",
        metavar="DIR",
        help="default: runs/demo, or runs/demo-quick; the same demo in it is continued or shown "
        "again, a demo with other settings is replaced, other files stay",
    )
    _add_model(demo)
    _add_settings(demo, "training", TrainConfig, defaults=False)
    _add_settings(demo, "editor", MendConfig, defaults=False)

    models = commands.add_parser("models", help="list known models, make small ones")
    models.set_defaults(run=_list_models, names=[])
    actions = models.add_subparsers(dest="action", metavar="ACTION")
    listed = actions.add_parser("list", help="what is edited in known models; the default")
    listed.add_argument("names", nargs="*", metavar="NAME", help="default: all of them")
    made = actions.add_parser("make", help="train a small model on the built-in facts, in minutes")
    made.set_defaults(run=_make_model)
    made.add_argument("name", metavar="NAME", help="bart-mini, t5-mini, bert-mini or gpt2-mini")
    made.add_argument("--seed", type=int, default=0, help="of its weights and of what it reads")
    made.add_argument("--threads", type=int, help="CPU threads")
    cli_data.add(commands, _add_machine, _model)
    cli_reproduce.add(commands, _add_machine)
    return parser, train


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="smollm2", help=f"{cli_data.MODELS} (default: smollm2)")
    group.add_argument(
        "--chat",
        action=BooleanOptionalAction,
        default=False,
        help="put prompts through the model's chat template",
    )
    _add_machine(parser)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the model; auto: what it was saved in (default: auto)",
    )
    group.add_argument("--device", help="default: the GPU if there is one")
    group.add_argument("--threads", type=int, help="CPU threads")
    group.add_argument(
        "--matmul",
        default="ieee",
        choices=("ieee", "bf16"),
        help="bf16: let float32 products on a CPU use its bfloat16 matrix units; faster where the "
        "CPU has them, with about three digits in place of seven (default: ieee)",
    )


def _add_settings(
    parser: argparse.ArgumentParser, title: str, *classes: type, defaults: bool = True
) -> None:
    """One flag for each field of ``classes``. What is not given stays out of the namespace."""
    group = parser.add_argument_group(title)
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    of_name: dict[str, list[Any]] = {}  # defaults
    for field in (f for cls in classes for f in fields(cls)):
        values = of_name.setdefault(field.name, [])
        if field.default not in values:
            values.append(field.default)
    for name, values in of_name.items():
        hint = hints[name]
        options: dict[str, Any] = {"type": hint}
        if hint is bool:
            options = {"action": BooleanOptionalAction}
        elif get_origin(hint) is Literal:
            options = {"choices": get_args(hint)}
        elif get_origin(hint) is tuple:
            options = {"nargs": "+", "metavar": "PATTERN"}
        text = HELP[name]
        if defaults and values != [()]:
            text += f" (default: {' or '.join(map(str, values))})"
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)


def settings_of(args: argparse.Namespace, base: T) -> T:
    """``base`` with the fields that were given as flags."""
    given: dict[str, Any] = {}
    for field in fields(base):
        if hasattr(args, field.name):
            value = getattr(args, field.name)
            given[field.name] = tuple(value) if isinstance(value, list) else value
    return replace(base, **given)


def _version() -> str:
    try:
        return version("pymend-editor")
    except PackageNotFoundError:  # a source tree that was not installed
        return "(not installed)"


# -- commands --------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> None:
    import torch

    from pymend.algorithms.registry import trainable
    from pymend.files import replacing, writable_dir
    from pymend.report.plots import learning_curves
    from pymend.training.trainer import Trainer

    train_config = settings_of(args, TrainConfig())
    config = _editor_config(args)
    train, held_out = _training_data(args)
    output = writable_dir(args.output)
    model, tokenizer = _model(args)
    torch.manual_seed(train_config.seed)
    editor = trainable(args.algorithm).from_config(model, config)
    logger.info("editing %s", ", ".join(w.name for w in editor.weights))
    trainer = Trainer(
        editor,
        model,
        tokenizer,
        train,
        held_out,
        config=train_config,
        output=output,
        resume=args.resume,
        chat=args.chat,
    )
    file = output / "config.yaml"
    chosen = {k: v for k, v in vars(args).items() if k not in NOT_SETTINGS}
    chosen |= asdict(train_config) | asdict(config) | {"edit": list(config.edit) or None}
    with replacing(file) as temporary:
        temporary.write_text(yaml.safe_dump(chosen, sort_keys=False), encoding="utf-8")
    try:
        trainer.train()
    except KeyboardInterrupt as stop:
        again = shlex.join(["pymend", "train", "--config", str(file), "--resume"])
        raise KeyboardInterrupt(f"{str(stop) or 'interrupted'}: {again}") from None
    learning_curves(output / "metrics.jsonl", output / "curves.png", args.model)
    if trainer.best_step:
        print(f"best validation loss {trainer.best_loss:.4f} at step {trainer.best_step}")
    _say_how_to_use(args.model, output)


def _say_how_to_use(model: str, output: Path) -> None:
    where = shlex.join(["--model", model, "--editor", str(output)])
    print(f"the editor is in {output}; use it with: pymend edit {where} --prompt ... --target ...")


def _editor_config(args: argparse.Namespace) -> EditorConfig:
    """The settings of the editor to train.

    Raises:
        ValueError: a flag that is another algorithm's.
    """
    config = settings_of(args, EDITORS[args.algorithm]())
    names = {f.name for cls in EDITORS.values() for f in fields(cls)}
    for name in sorted(names - {f.name for f in fields(config)}):
        if hasattr(args, name):
            raise ValueError(f"{name} is no setting of {args.algorithm}; leave it out")
    return config


def _training_data(args: argparse.Namespace) -> tuple[list[EditRequest], list[EditRequest]]:
    """Training and validation records."""
    from pymend.data import load_records, without_overlap

    train = load_records(args.data)
    if args.exclude:
        train = without_overlap(train, load_records(args.exclude))
    if args.eval_data or args.data == "facts":
        return train, load_records(args.eval_data or "facts", split="validation")
    count = min(HELD_OUT, len(train) // 10)
    logger.info(
        "training on the first %d records of %s, validating on its last %d",
        len(train) - count,
        args.data,
        count,
    )
    return train[: len(train) - count], train[len(train) - count :]


def _edit(args: argparse.Namespace) -> None:
    from pymend.algorithms.registry import load_editor
    from pymend.engine.generate import greedy
    from pymend.engine.tokens import Encoder
    from pymend.files import atomic_dir, empty_dir, writable_dir
    from pymend.report.tables import number, table

    _at_least_one(args, "tokens")
    requests = _requests(args)
    places = [Path(p).resolve() for p in (args.output, args.merge, args.peft) if p]
    if len(set(places)) < len(places):
        raise ValueError("--output, --merge and --peft need folders of their own; name others")
    if args.output:
        writable_dir(args.output)
    merged = empty_dir(args.merge) if args.merge else None
    if args.peft:
        empty_dir(args.peft)
    editor = load_editor(args.editor).scale_(args.strength)
    if (args.output or args.merge or args.peft) and not editor.low_rank:
        raise ValueError(
            f"an edit of {editor.kind} cannot be saved or merged; "
            "leave out --output, --merge and --peft"
        )
    model, tokenizer = _model(args)
    edit = editor.edit(model, tokenizer, requests, chat=args.chat)
    encoder = Encoder.for_model(model, tokenizer, args.chat)
    prompts = [r.prompt for r in requests]
    before = greedy(model, encoder, prompts, args.tokens)
    with edit.applied(model):
        after = greedy(model, encoder, prompts, args.tokens)
    undone = greedy(model, encoder, prompts, args.tokens)

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
    print(table(("prompt", "target", "P before", "P after", "took"), took, (60, 24, 9, 9, 4)))
    print()
    answers = list(zip(prompts, before, after, undone, strict=True))
    print(table(("prompt", "answer before", "after", "after undo"), answers, (40, 28, 28, 28)))
    if args.output:
        edit.save_pretrained(args.output)
        print(f"the edit is in {args.output}")
    if args.peft:
        edit.to_peft(args.peft)
        print(f"the adapter is in {args.peft}")
    if merged:
        edit.merge_(model)
        with atomic_dir(merged) as scratch:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        edit.unmerge_(model)
        print(f"the edited model is in {merged}")


def _requests(args: argparse.Namespace) -> list[EditRequest]:
    from pymend.data import load_records

    if bool(args.data) == bool(args.prompt or args.target):
        raise ValueError("name the edit by --prompt and --target, or by --data")
    if args.data:
        return load_records(args.data, split="test")
    if len(args.prompt) != len(args.target):
        raise ValueError(
            f"{len(args.prompt)} --prompt and {len(args.target)} --target; give one for each"
        )
    return [EditRequest(p, t) for p, t in zip(args.prompt, args.target, strict=True)]


def _eval(args: argparse.Namespace) -> None:
    from pymend.data import load_records
    from pymend.data.readers import read_text
    from pymend.evaluation import evaluate
    from pymend.files import write_json
    from pymend.report.tables import metrics_table

    _at_least_one(args, "limit", "batch_size")
    data = load_records(args.data, split="test")[: args.limit]
    text = read_text(Path(args.ppl_text)) if args.ppl_text else None
    output = _file(args.output) if args.output else None
    algorithm_for = _algorithm(args)
    model, tokenizer = _model(args)
    algorithm = algorithm_for(model, tokenizer)
    kept = output.with_name(f"{output.name}.part") if output else None
    try:
        result = evaluate(
            algorithm,
            model,
            tokenizer,
            data,
            batch_size=args.batch_size,
            ppl_text=text,
            chat=args.chat,
            n_edits=args.n_edits,
            kept=kept,
        )
    except KeyboardInterrupt:
        again = "; run the same command again to continue" if kept else ""
        raise KeyboardInterrupt(f"interrupted{again}") from None
    metrics = result.to_dict()
    print(metrics_table(metrics))
    print(metrics["protocol"])
    if output and kept:
        names = ("model", "algorithm", "editor", "data", "strength")
        source: dict[str, Any] = {n: getattr(args, n) for n in names}
        if args.algorithm in RIVALS:
            source["settings"] = asdict(algorithm.config)
        write_json(output, {**metrics, "source": source})
        kept.unlink(missing_ok=True)
        print(f"written to {output}")


def _algorithm(args: argparse.Namespace) -> Callable[[Any, Any], Any]:
    """What computes the edits, once it is given a model and its tokenizer.

    Raises:
        ValueError: a flag that the algorithm does not take or lacks, or a wrong setting.
    """
    from pymend.data import load_records

    if not args.algorithm:
        if args.set or args.locality_data:
            raise ValueError("--set and --locality-data are for rivals; leave them out")
        if not args.editor:
            raise ValueError("--editor is missing; name what pymend train wrote")
        from pymend.algorithms.registry import load_editor

        editor = load_editor(args.editor).scale_(args.strength)
        return lambda _model, _tokenizer: editor
    if args.editor or args.strength != 1:
        raise ValueError(f"{args.algorithm} has no trained editor; leave out --editor, --strength")
    cls, given = RIVALS[args.algorithm]
    config = from_json(cls, given | _rival_settings(args.set, cls), "--set")
    if isinstance(config, CacheConfig):
        from pymend.algorithms.cache import Cache

        cache = Cache(config)
        return lambda _model, _tokenizer: cache
    from pymend.algorithms.finetune import FineTune

    if config.kl != bool(args.locality_data):
        raise ValueError("--locality-data FILE is for ft+kl, which needs it")
    # Built-in facts: those of training, never those that are scored.
    records = load_records(args.locality_data, split="train") if args.locality_data else []
    return lambda model, tokenizer: FineTune.from_config(
        model, config, tokenizer=tokenizer, train_data=records, chat=args.chat
    )


def _rival_settings(pairs: Sequence[str], cls: type) -> dict[str, Any]:
    """NAME=VALUE as settings of ``cls``: a value is JSON, or else a word."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair} is no NAME=VALUE")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        patterns = isinstance(value, str) and isinstance(getattr(cls, name, None), tuple)
        settings[name] = [value] if patterns else value
    return settings


def _file(name: str) -> Path:
    """``name`` as a file that may be written.

    Raises:
        OSError: it is a folder, or its folder cannot be written.
    """
    from pymend.files import writable_dir

    file = Path(name)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a file for the results")
    writable_dir(file.parent)
    return file


def _import(args: argparse.Namespace) -> None:
    from pymend.files import writable_dir
    from pymend.interop.official import load_official

    if not Path(args.archive).is_file():
        raise FileNotFoundError(f"archive {args.archive} does not exist")
    output = writable_dir(args.output)
    model, _ = _model(args)
    mend = load_official(
        args.archive, model, args.edit, norm=args.norm, init=args.init, n_edits=args.n_edits
    )
    mend.save_pretrained(output)
    _say_how_to_use(args.model, output)


def _demo(args: argparse.Namespace) -> None:
    from pymend import demo
    from pymend.data import load_facts

    settings = demo.QUICK if args.quick else demo.FULL
    settings = replace(
        settings,
        train=settings_of(args, settings.train),
        mend=settings_of(args, settings.mend),
    )
    output = args.output or ("runs/demo-quick" if args.quick else "runs/demo")
    model, tokenizer = _model(args)
    train, validation, test = (load_facts(s) for s in ("train", "validation", "test"))
    try:
        demo.run(model, tokenizer, train, validation, test, output, settings, args.model, args.chat)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command again to continue") from None


def _list_models(args: argparse.Namespace) -> None:
    import torch

    from pymend.algorithms.mend.network import Editor
    from pymend.models.presets import preset, presets
    from pymend.models.structure import PAPER, find_weights
    from pymend.report.tables import blockwise, table
    from pymend.zoo import mini

    rows = []
    for name in args.names or [*presets(), *mini.RECIPES]:
        small = name in mini.RECIPES
        kind = PAPER if not small and preset(name).weights else "mlp"
        model = mini.skeleton(name) if small else preset(name).skeleton()
        weights = find_weights(model, (kind,))
        with torch.device("meta"):
            count = sum(p.numel() for p in Editor(weights, MendConfig()).nets_parameters())
        names = blockwise([w.name for w in weights])
        rows.append((name, kind, " ".join(names), f"{count / 1e6:.1f}M"))
    print(table(("model", "--edit", "weights", "editor"), rows, (36, 6, 64, 8)))


def _make_model(args: argparse.Namespace) -> None:
    import torch

    from pymend.report.tables import table
    from pymend.zoo import mini

    _at_least_one(args, "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    place = mini.make(args.name, args.seed)
    print(table(("mini.json", ""), [(k, str(v)) for k, v in mini.card(place).items()]))
    print(f"the model is in {place}; use it with: --model {place if args.seed else args.name}")


# -- shared by the commands ------------------------------------------------------------------


def _at_least_one(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def _model(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and tokenizer that ``args`` name, on a machine set up as they say."""
    import torch
    from transformers.utils import logging as quiet

    from pymend.zoo.load import load

    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not every retry
    _at_least_one(args, "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.backends.mkldnn.matmul.fp32_precision = args.matmul  # type: ignore[attr-defined]
    logger.info("loading %s", args.model)
    return load(args.model, dtype=args.dtype, device=args.device)
