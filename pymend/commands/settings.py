"""Flags from dataclasses, and their values from a YAML file.

A command is a function. ``flags`` makes the function that typer wants of it: every parameter is
annotated with its ``Flag``, or is a dataclass, each field of which becomes a flag.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml
from typer.core import TyperCommand

from pymend.config import setting
from pymend.errors import did_you_mean
from pymend.zoo.recipes import RECIPES

MODELS = f"smollm2, {', '.join(RECIPES)}, a folder, or a hub name"
DEFAULT = "smollm2"  # the model, if neither the command line nor an editor names one
SETS = "a data set, a folder or a hub name: NAME[:CONFIG][:SPLIT]"
KINDS = {int: "a whole number", float: "a number"}
EMPTY = (None, (), "")  # defaults that ``--help`` does not show


@dataclass(frozen=True)
class Flag:
    """What the command line says of a parameter.

    Args:
        metavar: stands for its value; with ``...`` at its end, one flag takes several values.
        choices: its values, if it has only some.
        least: the smallest of its values.
        positional: it is no flag, but goes by its place.
    """

    help: str
    metavar: str | None = None
    choices: Sequence[str] = ()
    least: int | None = None
    positional: bool = False


@dataclass(frozen=True)
class Given:
    """Annotates a parameter that gets, by name, those settings of ``classes`` that were given."""

    classes: tuple[type, ...]
    defaults: bool = True  # ``--help`` shows them


@dataclass(frozen=True)
class Machine:
    """What a model runs on, and in which precision."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the model; auto: what it was saved in"
    )
    device: str | None = setting(None, "default: the GPU if there is one")
    threads: int | None = setting(None, "CPU threads")
    matmul: Literal["ieee", "bf16"] = setting(
        "ieee",
        "bf16: let float32 products on a CPU use its bfloat16 matrix units; faster where the CPU "
        "has them, with about three digits in place of seven",
    )

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")

    def load(self, name: str) -> tuple[Any, Any]:
        """The model ``name`` and its tokenizer, on this machine, set up so."""
        import torch
        from huggingface_hub.utils.tqdm import enable_progress_bars
        from transformers.utils import logging as quiet

        from pymend.zoo.load import load

        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        enable_progress_bars()  # of a download, which takes minutes
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not every retry
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.backends.mkldnn.matmul.fp32_precision = self.matmul  # type: ignore[attr-defined]
        logging.getLogger("pymend").info("loading %s", name)
        return load(name, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Model:
    """Which model, and how it is spoken to."""

    model: str = setting("", f"{MODELS}; default: the editor's, or {DEFAULT}")
    chat: bool | None = setting(
        None, "put prompts through the model's chat template; default: as the editor was trained"
    )
    chat_options: tuple[str, ...] = setting(
        (), "options of the chat template, such as enable_thinking=false", "NAME=VALUE..."
    )

    def of(self, editor: str | None = None) -> Model:
        """The same with its name: as given, or of the model that ``editor`` was trained for."""
        trained = Path(editor or "") / "config.yaml"
        known = read_settings(trained).get("model") if editor and trained.is_file() else None
        return self if self.model else replace(self, model=known or DEFAULT)

    @property
    def template(self) -> bool | dict[str, Any] | None:
        """How prompts are put: plain, by the chat template, with these options, or as trained.

        Raises:
            ValueError: options of a template that is not to be used, or one that is none.
        """
        if self.chat_options and self.chat is False:
            raise ValueError("--chat-options are for --chat; leave out one of them")
        return named_values(self.chat_options, "--chat-options") or self.chat

    def speech(self, algorithm: Any) -> bool | dict[str, Any]:
        """How ``algorithm`` is asked; the log says so where it is no plain prompt.

        Raises:
            ValueError: it was trained to be asked in another way.
        """
        found: bool | dict[str, Any] = algorithm.chat_for(self.template)
        if found:
            options = f" with {found}" if found is not True else ""
            logging.getLogger("pymend").info("prompts go through the chat template%s", options)
        return found


# -- flags -----------------------------------------------------------------------------------


def flags(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with a flag for each of its parameters, and for each field of its dataclasses."""
    asked: list[inspect.Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind, note = get_args(parameter.annotation) or (parameter.annotation, None)
        if isinstance(note, Flag):
            asked.append(_asked(name, kind, note, parameter.default))
        else:
            found = _settings(note or Given((kind,)), name)
            groups[name] = (dict if note else kind), [flag.name for flag in found]
            asked += found

    @functools.wraps(command)
    def run(**values: Any) -> None:
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        for name, (kind, names) in groups.items():
            given = {n: values.pop(n) for n in names}
            values[name] = kind(**{n: v for n, v in given.items() if v is not None})
        command(**values)

    run.__signature__ = inspect.Signature(asked)  # type: ignore[attr-defined]
    return run


def _settings(given: Given, panel: str) -> list[inspect.Parameter]:
    """The parameters that are settings. What is not given will be None."""
    kinds = {name: kind for cls in given.classes for name, kind in get_type_hints(cls).items()}
    found = []
    for name, kind in kinds.items():
        same = [f for cls in given.classes for f in fields(cls) if f.name == name]
        shown = " or ".join(
            str(d) for d in dict.fromkeys(f.default for f in same) if d not in EMPTY
        )
        help = same[0].metadata["help"]
        help += f" (default: {shown})" if shown and given.defaults else ""
        found.append(_asked(name, kind, Flag(help, same[0].metadata["metavar"]), None, panel))
    return found


def _asked(
    name: str, kind: Any, flag: Flag, default: Any, panel: str | None = None
) -> inspect.Parameter:
    """A parameter as typer wants it."""
    required = default is inspect.Parameter.empty
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    choices = get_args(kind) if get_origin(kind) is Literal else flag.choices
    several = get_origin(kind) is tuple
    kind = str if choices or several else kind
    shown = "" if required or default in EMPTY or default is False else f" (default: {default})"
    options: dict[str, Any] = {
        "help": flag.help + shown,
        "metavar": flag.metavar or "|".join(choices) or ("PATTERN..." if several else None),
        "show_default": False,
        "rich_help_panel": panel,
    }
    if kind in KINDS or choices:
        options["parser"] = functools.partial(_read, kind, choices, flag.least)
    info = (typer.Argument if flag.positional else typer.Option)(**options)
    kind = list[str] if several else kind
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind if required else kind | None, info],
    )


def _read(kind: type, choices: Sequence[str], least: int | None, text: Any) -> Any:
    """The value that ``text`` says.

    Raises:
        typer.BadParameter: it says none; the rest of a sentence that begins with the flag.
    """
    if choices and text not in choices:
        meant = did_you_mean(text, choices)
        raise typer.BadParameter(f"is {text!r}; choose one of {', '.join(choices)}{meant}")
    try:
        value = kind(text)
    except ValueError:
        raise typer.BadParameter(f"is {text!r}; it must be {KINDS[kind]}") from None
    if least is not None and value < least:
        raise typer.BadParameter(f"is {value}; it must be at least {least}")
    return value


class Command(TyperCommand):
    """A command whose flags with ``...`` take several values at once: ``--edit a b``.

    Its help has a section for each group of flags, in plain lines: a name is never cut.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write those sections."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            title = getattr(parameter, "rich_help_panel", None) or "options"
            record = parameter.get_help_record(ctx)
            if record:
                sections.setdefault(title.capitalize(), []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, with such a flag repeated before each of its values."""
        several = {o for p in self.params if (p.metavar or "").endswith("...") for o in p.opts}
        spread: list[str] = []
        flag = ""
        for word in args:
            if word.startswith("-"):
                flag = word
            elif flag in several and spread[-1] != flag:
                spread.append(flag)
            spread.append(word)
        return super().parse_args(ctx, spread)


def named_values(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """NAME=VALUE as a mapping: a value is JSON, or else a word.

    Raises:
        ValueError: one of them is none.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} {pair} is no NAME=VALUE")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


# -- files -----------------------------------------------------------------------------------


def presets() -> list[str]:
    """The names of the settings that are shipped."""
    folder = resources.files("pymend") / "presets"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The settings that are shipped as ``name``."""
    with resources.as_file(resources.files("pymend") / "presets" / f"{name}.yaml") as path:
        return read_settings(path)


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


def as_flags(command: TyperCommand, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``settings`` as if they had been given to ``command`` as flags.

    Raises:
        ValueError: an unknown setting, or a value that no flag could give it.
    """
    known: dict[str, Any] = {p.name: p for p in command.params if p.name != "config"}
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            meant = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            raise ValueError(f"{where}: unknown setting {name!r}{meant}")
        parameter, several = known[name], isinstance(value, list)
        if value is None:
            continue
        if parameter.is_flag != isinstance(value, bool):
            wanted = "must be true or false" if parameter.is_flag else "cannot be true or false"
            raise ValueError(f"{where}: {name} {wanted}, got {value!r}")
        if several and not parameter.multiple:
            raise ValueError(f"{where}: {name} takes one value, got {value!r}")
        if parameter.multiple:
            given[name] = list(map(str, value if several else [value]))
        else:
            given[name] = value if parameter.is_flag else str(value)
    return given
