"""The command line: ``pymend train``, ``edit``, ``apply`` and what else ``pymend --help`` lists.

A file a command. What is imported here must be light: torch, transformers and the like are
imported by a command when it runs, so that help, a version and a mistake cost no seconds.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pymend
from pymend.commands import (
    apply,
    data,
    demo,
    edit,
    evaluate,
    imports,
    models,
    reproduce,
    saved,
    train,
)
from pymend.commands.settings import Command, flags
from pymend.errors import did_you_mean, meant_for_user

logger = logging.getLogger("pymend")


class Group(TyperGroup):
    """Commands below a name, which alone shows what they are, unless it does something."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse; without a word, as if help was asked for."""
        usual = [] if self.invoke_without_command else ["--help"]
        return super().parse_args(ctx, args or usual)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with."""
        if args[0] not in self.commands:
            known = ", ".join(self.commands)
            meant = did_you_mean(args[0], self.commands)
            ctx.fail(f"there is no command {args[0]!r}; choose one of {known}{meant}")
        return super().resolve_command(ctx, args)


def group(**options: Any) -> typer.Typer:
    """A new group of commands."""
    shown = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
    return typer.Typer(
        cls=Group, add_completion=False, rich_markup_mode=None, context_settings=shown, **options
    )


def add(app: typer.Typer, name: str, command: Callable[..., None], cls: Any = Command) -> None:
    """Make ``command`` the command ``name`` of ``app``."""
    app.command(name, cls=cls)(flags(command))


# The names of the commands, in the order in which the help has them.
app = group(help="Correct facts inside a language model with MEND, and undo them.")
add(app, "train", train.train, train.Train)
add(app, "edit", edit.edit)
add(app, "apply", apply.apply)
add(app, "show", saved.show)
add(app, "list", saved.listed)
add(app, "eval", evaluate.evaluate)
add(app, "import", imports.imports)
add(app, "demo", demo.demo)
known = group(help="List known models, make small ones.", invoke_without_command=True)
add(known, "list", models.listed)
add(known, "make", models.make)
app.add_typer(known, name="models")
sets = group(help="Build data sets, look at data files.")
builders = group(help="Make an edit data set, with a card.")
for build in (data.zsre, data.zsre_hard, data.fever, data.claims, data.qa, data.wikitext):
    add(builders, build.__name__.replace("_", "-"), build)
sets.add_typer(builders, name="build")
add(sets, "show", data.show)
app.add_typer(sets, name="data")
add(app, "reproduce", reproduce.reproduce)


def _version(asked: bool) -> None:
    if asked:
        print(f"pymend {pymend.__version__}")
        raise typer.Exit


@app.callback()
def before(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="Show it and exit."),
    ] = False,
) -> None:
    """What may stand before a command."""


@known.callback()
def list_models(context: typer.Context) -> None:
    """Without a command, list all models."""
    if context.invoked_subcommand is None:
        models.listed()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    # A user needs the sentence, not the line of code that says it.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    words = list(sys.argv[1:] if argv is None else argv)
    command: Any = typer.main.get_command(app)
    try:
        with command.make_context("pymend", list(words)) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt as stop:
        print(f"\npymend: {_told(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if hasattr(error, "format_message"):  # of typer: what was typed
            message = f"{_mistake(error)} (see {_help(command, words)})"
        elif meant_for_user(error):
            message = _told(error)
        else:
            raise
        print(f"pymend: error: {message}", file=sys.stderr)
        return 2
    return 0


def _told(error: BaseException) -> str:
    """What a module says, in the words of the command line."""
    return re.sub(r"\b(pass|with) resume\b", r"\1 --resume", str(error))


def _mistake(error: Any) -> str:
    """What is wrong with what was typed."""
    parameter = getattr(error, "param", None)
    if parameter is not None:
        name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
        source = error.ctx.get_parameter_source(parameter.name)
        of = " of --config" if source is not None and source.name == "DEFAULT_MAP" else ""
        return f"{name}{of} {error.message or 'is missing'}"
    if hasattr(error, "possibilities"):
        meant = did_you_mean(error.option_name, error.possibilities or ())
        return f"there is no flag {error.option_name}{meant}"
    return str(error.format_message()).removesuffix(".")


def _help(command: Any, words: Sequence[str]) -> str:
    """The help to read about ``words``."""
    path = ["pymend"]
    for word in words:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        path.append(word)
    return " ".join([*path, "--help"])
