"""The command ``pymend reproduce``: the paper's tables at a scale that fits the machine."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymend.reproduce.plan import Scale
    from pymend.reproduce.runs import RunContext

TABLES = ("table3", "table4", "table5", "table6", "table8", "table9", "table10", "table11")
COSTS = ("memory", "time")


def add(commands: Any, machine: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the command to the parsers of ``pymend``.

    Args:
        machine: adds the flags of a model's machine to a parser.
    """
    parser = commands.add_parser("reproduce", help="the paper's tables, beside its numbers")
    parser.set_defaults(run=_reproduce)
    parser.add_argument(
        "names", nargs="+", metavar="TABLE", help=f"all, or of {', '.join((*TABLES, *COSTS))}"
    )
    parser.add_argument(
        "--scale", default="mini", help="mini, smollm2, paper, or a YAML file (default: mini)"
    )
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--output", metavar="DIR", help="default: runs/reproduce/SCALE[-quick]")
    parser.add_argument("--data", metavar="DIR", help="folder of the files that a scale names")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every training")
    machine(parser)


def _reproduce(args: argparse.Namespace) -> None:
    import torch

    from pymend.files import exclusive, writable_dir
    from pymend.reproduce.plan import load_scale
    from pymend.reproduce.runs import RunContext, start
    from pymend.zoo.load import find_device

    scale = load_scale(args.scale, args.quick)
    asked = [name for n in args.names for name in (scale.tables if n == "all" else [n])]
    names = list(dict.fromkeys(asked))
    for name in names:
        if name not in scale.tables:
            raise ValueError(
                f"scale {scale.name} has no {name!r}; choose all, or of {', '.join(scale.tables)}"
            )
    for name in ("jobs", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}; it must be at least 1")
    find_device(args.device)
    start(args.threads or torch.get_num_threads(), args.matmul)
    usual = f"runs/reproduce/{scale.name}{'-quick' if args.quick else ''}"
    output = writable_dir(args.output or usual)
    files = Path(args.data) if args.data else None
    place = RunContext(output, files, args.dtype, args.device, args.matmul, args.seed)
    with exclusive(output):
        for page in _pages(args, scale, names, place):
            print(page)


def _pages(
    args: argparse.Namespace, scale: Scale, names: list[str], place: RunContext
) -> Iterator[Path]:
    """Carry out what the tables ``names`` need, and write them."""
    from pymend.reproduce import costs, data, examples, figures, tables
    from pymend.reproduce.plan import Run
    from pymend.reproduce.runs import make_models, perform_all

    output = place.output
    scored = {name: table for name, table in tables.tables(scale).items() if name in names}
    runs = [run for name, table in scored.items() for run in tables.needed(scale, name, table)]
    shown = [name for name in names if name in examples.TITLES]
    runs += [Run(setup, "mend") for name in shown for setup in scale.tables[name]]
    measured = set(names) & set(COSTS)
    absent = [run.setup for run in runs if not (place.folder(run) / "result.json").is_file()]
    absent += [setup for name in shown for setup in scale.tables[name]]
    if measured:
        absent += [run.setup for run in costs.missing(scale, place)]
    for run in runs:  # what is wrong with any should not be found after hours of others
        for needed in (*scale.before(run), run):
            scale.settings(needed)
    for setup in absent:
        data.check(scale.setups[setup], place.files)
    make_models(scale, absent, args.jobs)
    if measured:  # first: what fails here should not cost hours of training
        costs.measured(scale, place)
    results = perform_all(scale, list(dict.fromkeys(runs)), place, args.jobs)
    memory = costs.memory_of_edits(scale, place)
    for name in names:
        command = _command(args, name)
        if name in scored:
            table = scored[name]
            page = tables.write(scale, name, table, results, memory, output, command, args.seed)
            figures.draw(scale, name, table, results, output / f"{name}.png")
        elif name in shown:
            page = examples.write(scale, name, output, command, place)
        else:
            page = costs.write(scale, name, command, place)
        yield page


def _command(args: argparse.Namespace, name: str) -> str:
    """What makes table ``name`` again."""
    words = ["pymend", "reproduce", name, "--scale", args.scale]
    words += ["--quick"] if args.quick else []
    words += ["--data", "DIR"] if args.data else []
    for flag, value, usual in (
        ("--seed", args.seed, 0),
        ("--dtype", args.dtype, "auto"),
        ("--matmul", args.matmul, "ieee"),
    ):
        words += [flag, str(value)] if value != usual else []
    return shlex.join(words)
