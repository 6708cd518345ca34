"""``pymend reproduce``: the paper's tables at a scale that fits the machine."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pymend.commands.settings import Flag, Machine
from pymend.errors import did_you_mean
from pymend.reproduce.plan import COSTS, SCALES, TABLES, Run, Scale, load_scale

if TYPE_CHECKING:
    from pymend.reproduce.runs import RunContext


def reproduce(
    tables: Annotated[
        tuple[str, ...], Flag(f"all, or of {', '.join(TABLES)}", "TABLE", positional=True)
    ],
    machine: Machine,
    scale: Annotated[str, Flag(f"{', '.join(SCALES)}, or a YAML file")] = "mini",
    quick: Annotated[bool, Flag("less of everything")] = False,
    output: Annotated[str | None, Flag("default: runs/reproduce/SCALE[-quick]", "DIR")] = None,
    data: Annotated[str | None, Flag("folder of the files that a scale names", "DIR")] = None,
    jobs: Annotated[int, Flag("runs at the same time", least=1)] = 1,
    seed: Annotated[int, Flag("seed of every training")] = 0,
) -> None:
    """The paper's tables, beside its numbers."""
    plan = load_scale(scale, quick)
    asked = [name for n in tables for name in (plan.tables if n == "all" else [n])]
    names = list(dict.fromkeys(asked))
    for name in names:
        if name not in plan.tables:
            known = ", ".join(plan.tables)
            meant = did_you_mean(name, plan.tables)
            raise ValueError(f"scale {plan.name} has no {name!r}; choose all, or of {known}{meant}")

    import torch

    from pymend.files import exclusive, writable_dir
    from pymend.reproduce.runs import RunContext, start
    from pymend.zoo.load import find_device

    find_device(machine.device)
    start(machine.threads or torch.get_num_threads(), machine.matmul)
    folder = writable_dir(output or f"runs/reproduce/{plan.name}{'-quick' if quick else ''}")
    place = RunContext(
        folder,
        Path(data) if data else None,
        machine.dtype,
        machine.device,
        machine.matmul,
        seed,
    )
    # What makes a table again, after its name.
    again = [
        "--scale",
        scale,
        *(["--quick"] if quick else []),
        *(["--data", "DIR"] if data else []),
    ]
    for flag, value, usual in (
        ("--seed", seed, 0),
        ("--dtype", machine.dtype, "auto"),
        ("--matmul", machine.matmul, "ieee"),
    ):
        again += [flag, str(value)] if value != usual else []
    with exclusive(folder):
        for page in _pages(plan, names, place, jobs, again):
            print(page)


def _pages(
    scale: Scale, names: list[str], place: RunContext, jobs: int, again: list[str]
) -> Iterator[Path]:
    """Carry out what the tables ``names`` need, and write them."""
    from pymend.reproduce import costs, data, examples, figures, tables
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
    make_models(scale, absent, jobs)
    if measured:  # first: what fails here should not cost hours of training
        costs.measured(scale, place)
    results = perform_all(scale, list(dict.fromkeys(runs)), place, jobs)
    memory = costs.memory_of_edits(scale, place)
    for name in names:
        command = shlex.join(["pymend", "reproduce", name, *again])
        if name in scored:
            table = scored[name]
            page = tables.write(scale, name, table, results, memory, output, command, place.seed)
            figures.draw(scale, name, table, results, output / f"{name}.png")
        elif name in shown:
            page = examples.write(scale, name, output, command, place)
        else:
            page = costs.write(scale, name, command, place)
        yield page
