"""Memory and time of training steps and edits, each algorithm in a process of its own."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pymend.algorithms.base import Algorithm
from pymend.algorithms.registry import METHODS, load_editor, trainable
from pymend.config import EditorConfig, to_json
from pymend.data.builders import Splits
from pymend.files import read_json, write_json
from pymend.progress import tqdm
from pymend.report.tables import number
from pymend.reproduce import data, figures
from pymend.reproduce.page import markdown, write_page
from pymend.reproduce.plan import Run, Scale, Settings
from pymend.reproduce.runs import RunContext, in_processes, loaded
from pymend.training.trainer import Trainer
from pymend.zoo.mini import edition

STEPS, EDITS = 5, 10
ALGORITHMS = tuple(METHODS)
TITLES = {"memory": "Memory", "time": "Time"}
UNITS = {"memory": "MiB", "time": "seconds"}
STEP = ("editor MiB", "step MiB", "step seconds")  # of algorithms that are trained
EDIT = ("edit MiB", "edit seconds")
NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
NOTE = (
    "The steps and the edits of each algorithm in processes of their own. Memory is the peak of "
    "resident memory (on a GPU, of what torch allocated) on top of the loaded model and the "
    "editor, what libraries allocate at first use included. Time is the median of "
    f"{STEPS} training steps and of {EDITS} edits, one at a time, in which FT takes up to 100 "
    "steps. The paper gives memory as a picture only, and no times."
)


def measured(scale: Scale, place: RunContext) -> dict[str, Any]:
    """What ``memory`` and ``time`` show, measured once for both.

    ``costs.json`` keeps each algorithm on each setup as soon as it is measured, or did not fit into
    memory; delete it to measure again.

    Raises:
        ValueError: as :func:`missing`.
    """
    left, known = missing(scale, place), _known(scale, place)
    for run in tqdm(left, "costs", disable=not left):
        known["costs"].append(_measure(scale, run, place))
        write_json(_file(place), known)
    return known


def missing(scale: Scale, place: RunContext) -> list[Run]:
    """What :func:`measured` has still to measure.

    Raises:
        ValueError: ``costs.json`` is of other settings, or was begun on another machine.
    """
    known = _known(scale, place)
    done = {Run(c["setup"], c["algorithm"]) for c in known["costs"]}
    left = [run for run in _runs(scale) if run not in done]
    if left and known["machine"] != machine():
        raise ValueError(
            f"{_file(place)} was begun on another machine ({known['machine']}, here "
            f"{machine()}); go on there, or delete it to measure again"
        )
    return left


def memory_of_edits(scale: Scale, place: RunContext) -> dict[Run, float | None]:
    """Extra peak memory of an edit [MiB], of what was measured; None if it did not fit.

    Raises:
        ValueError: ``costs.json`` is of other settings.
    """
    costs = _known(scale, place)["costs"]
    return {Run(c["setup"], c["algorithm"]): c["edit MiB"] for c in costs}


def _known(scale: Scale, place: RunContext) -> dict[str, Any]:
    """What ``costs.json`` holds, or is to hold before anything is measured."""
    file, spec = _file(place), _spec(scale, place)
    if not file.is_file():
        return {"spec": spec, "machine": machine(), "costs": []}
    known = read_json(file)
    if known.get("spec") != spec:
        raise ValueError(f"{file} is of other settings; delete it to measure again")
    return known


def _file(place: RunContext) -> Path:
    return place.output / "costs.json"


def _runs(scale: Scale) -> list[Run]:
    return [Run(setup, algorithm) for setup in setups(scale) for algorithm in ALGORITHMS]


def setups(scale: Scale) -> list[str]:
    """The setups that are measured."""
    return list(dict.fromkeys(s for part in TITLES for s in scale.tables.get(part, {})))


def _spec(scale: Scale, place: RunContext) -> dict[str, Any]:
    """What the measurements depend on, as JSON gives it back."""
    made = {name: edition(scale.setups[name].model) for name in setups(scale)}
    return {
        "dtype": place.dtype,
        "matmul": place.matmul,
        "settings": {run.name: to_json(_settings(scale, run)) for run in _runs(scale)},
        "editions": {name: number for name, number in made.items() if number},
    }


def _settings(scale: Scale, run: Run) -> Settings:
    """Those of ``run``, with a few training steps and no shortcut by a cache."""
    own = scale.settings(run)
    if own.train is None:
        return own
    few = replace(own.train, steps=STEPS, save_every=2 * STEPS, prefix_cache="none")
    return replace(own, train=few)


def write(scale: Scale, name: str, command: str, place: RunContext) -> Path:
    """Write ``name``.md, .csv and .png of :func:`measured`."""
    folder, known = place.output, measured(scale, place)
    unit = UNITS[name]
    costs = [c for c in known["costs"] if c["setup"] in scale.tables[name]]
    kinds = [kind for kind in (*STEP, *EDIT) if kind.endswith(unit)]
    rows = [
        (c["setup"], c["algorithm"], *(_cell(c, k) for k in kinds), c["episodes in a step"])
        for c in costs
    ]
    head = ("setup", "algorithm", *kinds, "episodes in a step")
    body = [f"Machine: {known['machine']}.", "", *markdown(head, rows), ""]
    body.append(f"![{name}]({name}.png)")
    note = f"{scale.note} {NOTE}"
    page = write_page(folder, name, TITLES[name], note, command, body, (head, rows))
    panels = {
        f"{kind}, {setup}": {
            c["algorithm"]: c[kind] for c in costs if c["setup"] == setup and kind in c
        }
        for kind in kinds[-2:]
        for setup in scale.tables[name]
    }
    figures.bars(f"{name}: a training step, and an edit", unit, panels, folder / f"{name}.png")
    return page


def machine() -> str:
    """What computes here, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} threads, torch {torch.__version__}"


def _cell(costs: Mapping[str, Any], kind: str) -> str:
    """A dash where there is nothing to measure, as steps of what is not trained."""
    failed = kind in costs and costs[kind] is None
    return figures.OUT_OF_MEMORY if failed else number(costs.get(kind))


def _measure(scale: Scale, run: Run, place: RunContext) -> dict[str, Any]:
    """What ``run`` takes; None, and why, from where it did not fit into memory.

    A process for each measurement, since memory that was freed is not given back to the system.
    """
    data.prepare(scale.setups[run.setup], place.sets)
    train = scale.settings(run).train
    costs: dict[str, Any] = {
        "setup": run.setup,
        "algorithm": run.algorithm,
        "episodes in a step": train.batch_size if train else "-",
        **dict.fromkeys((*STEP, *EDIT) if train else EDIT),
    }
    with tempfile.TemporaryDirectory() as scratch:
        asked = {run: (scale, run, place, Path(scratch))}
        try:
            for measure in (measure_steps, measure_edits) if train else (measure_edits,):
                [(_, taken)] = in_processes(measure, asked, 1, place.matmul)
                costs |= taken
        except (RuntimeError, MemoryError) as error:
            if not _is_lack_of_memory(error):
                raise
            costs["failed"] = str(error)
    return costs


def _is_lack_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # On a CPU, and from within an operator of this package, it has no type of its own.
    return any(words in str(error) for words in NO_MEMORY)


def measure_steps(scale: Scale, run: Run, place: RunContext, scratch: Path) -> dict[str, float]:
    """Extra peak memory [MiB] and median seconds of a training step, and the editor's memory.

    Extra is what comes on top of the loaded model and the untrained editor.

    Args:
        scratch: an empty folder that receives the editor.
    """
    model, tokenizer, splits = _loaded(scale, run, place)
    settings = _settings(scale, run)
    assert settings.train is not None and isinstance(settings.editor, EditorConfig)
    begin = _memory(model)
    algorithm = trainable(run.algorithm).from_config(model, settings.editor)
    own = _mib(_memory(model), begin)
    begin = _restart(model)
    config, train = settings.train, splits["train"]
    Trainer(
        algorithm, model, tokenizer, train, [], config=config, output=scratch, progress=False
    ).train()
    log = (scratch / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "editor MiB": own,
        "step MiB": _mib(_peak(model), begin),
        "step seconds": statistics.median(json.loads(line)["seconds"] for line in log),
    }


def measure_edits(scale: Scale, run: Run, place: RunContext, scratch: Path) -> dict[str, float]:
    """Extra peak memory [MiB] and median seconds of an edit.

    Args:
        scratch: holds the editor, of an algorithm that is trained.
    """
    model, tokenizer, splits = _loaded(scale, run, place)
    method = METHODS[run.algorithm]
    algorithm: Algorithm[Any]
    if method.trained:
        algorithm = load_editor(scratch)
        algorithm.prepare(model)
    else:
        config = scale.settings(run).editor
        algorithm = method.load().from_config(
            model, config, tokenizer=tokenizer, train_data=splits["train"]
        )
    begin = _restart(model)
    seconds = []
    for request in splits["test"]:
        start = time.perf_counter()
        algorithm.edit(model, tokenizer, request)
        seconds.append(time.perf_counter() - start)
    return {"edit MiB": _mib(_peak(model), begin), "edit seconds": statistics.median(seconds)}


def _loaded(scale: Scale, run: Run, place: RunContext) -> tuple[Any, Any, Splits]:
    """The model, its tokenizer and the records that are measured on."""
    setup = scale.setups[run.setup]
    splits = data.records(setup, place.sets, place.files)
    few: Splits = {"train": splits["train"][:200], "test": splits["test"][:EDITS]}
    model, tokenizer = loaded(setup.model, place.dtype, place.device)
    for parameter in model.parameters():  # a file's pages are read at first use
        parameter.sum()
    return model, tokenizer, few


def _mib(now: int, before: int) -> float:
    return max(0, now - before) / 2**20


def _on_gpu(model: Any) -> bool:
    return bool(next(model.parameters()).device.type == "cuda")


def _restart(model: Any) -> int:
    """Forget the peak so far; the memory in use now, in bytes."""
    if _on_gpu(model):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is resident
    return _memory(model)


def _memory(model: Any) -> int:
    return torch.cuda.memory_allocated() if _on_gpu(model) else _status("VmRSS")


def _peak(model: Any) -> int:
    return torch.cuda.max_memory_allocated() if _on_gpu(model) else _status("VmHWM")


def _status(name: str) -> int:
    """A line of the process's own status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(value) * 1024
