"""What the stages of a GPU run share: files, a device with its CPU stand-in, how time is taken.

A rehearsal runs the same functions on a CPU: seconds come from the host's clock, a graph is the
call itself, memory is not measured. Its numbers mean nothing.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
CALLS = 20  # calls or replays between two events, fewer if they take longer than BETWEEN
BETWEEN = 0.02  # seconds
SLOW = 0.2  # seconds of a call that is not tried out again before it is timed
ROUNDS = 15  # their median counts
REPEATS = 2  # of the whole set; the medians' distance is the spread
COLD_BYTES = 200 * 2**20  # operands that are rotated, or four sets of them: L2 holds 50 MB
SANITIZERS = ("memcheck", "racecheck")  # tools of compute-sanitizer
GRAPH = " graph"  # ends the names of rivals that run as a CUDA graph: they must not wait
Call = Callable[[], Any]


class Skipped(Exception):
    """A stage that cannot run here; the message says why."""


def stand_in_for_transformers() -> bool:
    """Where transformers is missing let the ops still run, on a stand-in for its one class.

    Returns:
        Whether it is missing.
    """
    try:
        import transformers.pytorch_utils  # noqa: F401
    except ImportError:
        stub = types.ModuleType("transformers.pytorch_utils")
        stub.Conv1D = type("Conv1D", (nn.Module,), {})  # type: ignore[attr-defined]
        sys.modules |= {"transformers": types.ModuleType("transformers"), stub.__name__: stub}
        return True
    return False


def in_tf32(call: Call) -> Call:
    """``call`` while torch may take float32 products in TF32."""

    def allowed() -> Any:
        former = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(former)

    return allowed


# -- files ---------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    """The whole file or nothing."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@dataclass
class Run:
    """One stage: what it has found so far, on disk after every ``save``."""

    out: Path
    stage: str
    dry: bool
    deadline: float  # of time.monotonic()
    ready: bool = False  # the native module lies in pymend/ already
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until this stage is killed."""
        return self.deadline - time.monotonic()

    @property
    def part(self) -> Path:
        """Where the stage's findings lie until the run takes them over."""
        return self.out / f"{self.stage}.part.json"

    def save(self, **entries: Any) -> None:
        """Add findings and write them all."""
        self.data |= entries
        write(self.part, json.dumps(self.data, indent=1))

    def command(self, *line: object, **environment: str) -> str:
        """Run a command in the tree; its output goes to the stage's log, and is returned.

        Raises:
            RuntimeError: it failed; the message ends with its last words.
        """
        here = [str(ROOT), str(ROOT / "benchmarks")]
        paths = os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")])
        words = [str(word) for word in line]
        with open(self.out / f"{self.stage}.log", "a+", encoding="utf-8") as log:
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            begin = log.tell()
            done = subprocess.run(
                words,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": paths, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, self.left - 2),
            )
            log.seek(begin)
            output = log.read()
        if done.returncode:
            raise RuntimeError(f"{words[0]} ended with {done.returncode}:\n{output[-2000:]}")
        return output


# -- device --------------------------------------------------------------------------------------


class Device:
    """The GPU, or the CPU in its place."""

    def __init__(self, dry: bool) -> None:
        self.cuda = not dry
        self.name = "cuda" if self.cuda else "cpu"
        if self.cuda and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device; `make gpu-dry-run` rehearses on a CPU")

    def sync(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, calls: Sequence[Call]) -> float:
        """Mean seconds of ``calls``, one after the other between two events."""
        if not self.cuda:
            begin = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - begin) / len(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / len(calls)

    def graph(self, call: Call) -> Call:
        """``call`` captured: replaying it writes the tensors that the captured call returned."""
        if not self.cuda:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def peak(self, call: Call) -> int | None:
        """Bytes that ``call`` needs at its height, beyond what is allocated before it."""
        call()  # libraries take their workspace for good
        if not self.cuda:
            return None
        self.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        self.sync()
        del result
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        """Give back what nothing refers to."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def timed(
    device: Device,
    rivals: Mapping[str, Sequence[Call]],
    limit: float = 0.4,
    repeats: int = REPEATS,
) -> dict[str, dict[str, Any]]:
    """Seconds of every rival, interleaved, the whole set run ``repeats`` times.

    Args:
        rivals: the same call on several sets of operands, which are rotated.
        limit: seconds for one rival in one run of the set; slow calls get fewer rounds.

    Returns:
        ``seconds``, the mean of the runs' medians, and ``spread``, their distance over it.
    """
    turns, plan = {name: cycle(calls) for name, calls in rivals.items()}, {}
    for name, calls in rivals.items():
        once = max(device.seconds([call]) for call in calls)  # warms up, too
        if device.cuda and once < SLOW:
            once = device.seconds([next(turns[name])])
        count = max(1, min(CALLS, math.ceil(BETWEEN / max(once, 1e-6))))
        rounds = max(1, min(ROUNDS, math.floor(limit / max(once * count, 1e-6))))
        plan[name] = (count, rounds) if device.cuda else (1, 1)
    medians: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        samples: dict[str, list[float]] = {name: [] for name in rivals}
        for done in range(ROUNDS):
            for name, (count, rounds) in plan.items():
                if done < rounds:
                    calls = [next(turns[name]) for _ in range(count)]
                    samples[name].append(device.seconds(calls))
        for name, values in samples.items():
            medians[name].append(statistics.median(values))
    results = {}
    for name, values in medians.items():
        mean = statistics.mean(values)
        count, rounds = plan[name]
        spread = (max(values) - min(values)) / mean
        results[name] = {"seconds": mean, "spread": spread, "calls": count, "rounds": rounds}
    return results


# -- comparisons ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """One set of operands, and the calls on it.

    Every call returns the tensors that hold its result: new ones, or those of ``state``, which
    are the only operands that any call writes. ``exact`` gives the float64 truth; without it the
    first rival is what the others are held against.
    """

    state: Sequence[Tensor]
    rivals: Mapping[str, Call]
    exact: Call | None = None


@dataclass(frozen=True)
class Case:
    """One comparison: ``make(seed)`` gives a set of operands of ``size`` bytes.

    ``bytes`` and ``flops`` are what one call cannot help moving and doing. ``tolerance`` bounds
    |result - truth| / |truth| of every rival.
    """

    label: Mapping[str, Any]
    make: Callable[[int], Operands]
    size: float
    bytes: float
    flops: float
    tolerance: float


def error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest |got - truth| / |truth| over the tensors; NaN if any is."""
    assert len(got) == len(truth)
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        for a, b in zip(got, truth, strict=True)
    ]
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def compare(run: Run, device: Device, case: Case) -> list[dict[str, Any]]:
    """Check all rivals of ``case`` against the truth, then time them: a row for each.

    A rival that fails gets its traceback in ``failed`` and is left out of the timing.
    """
    several = 1 if case.size >= COLD_BYTES else min(4, math.ceil(COLD_BYTES / case.size))
    sets = [case.make(seed) for seed in range(2 if run.dry else several)]
    before = [t.clone() for t in sets[0].state]

    def restore() -> None:
        for tensor, value in zip(sets[0].state, before, strict=True):
            tensor.copy_(value)

    def checked(call: Call) -> list[Tensor]:
        restore()
        result = [t.clone() for t in call()]
        restore()
        return result

    truth = checked(sets[0].exact or next(iter(sets[0].rivals.values())))
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, list[Call]] = {}
    for name, first in sets[0].rivals.items():
        rows[name] = {**case.label, "rival": name, "sets": len(sets)}
        rows[name] |= {"bytes": case.bytes, "flops": case.flops}
        try:
            captured = name.endswith(GRAPH)
            mine = [s.rivals[name] for s in sets]
            if not captured:
                rows[name]["peak bytes"] = device.peak(first)
            mine = [device.graph(call) for call in mine] if captured else mine
            rows[name]["error"] = found = error(checked(mine[0]), truth)
            if not found <= case.tolerance:
                raise ArithmeticError(f"error {found:.2g}, tolerance {case.tolerance:g}")
            calls[name] = mine
        except Exception:
            rows[name]["failed"] = traceback.format_exc(limit=-4)
    truth.clear()
    for name, result in timed(device, calls).items():
        rows[name] |= result
    one_set = {name: calls[name][:1] for name in calls if name.endswith(GRAPH)}
    for name, result in timed(device, one_set, repeats=1).items():
        rows[name]["warm seconds"] = result["seconds"]
    calls.clear()
    sets.clear()
    device.free()
    return list(rows.values())


def compare_all(run: Run, device: Device, cases: Sequence[Callable[[], Case]]) -> None:
    """Compare case after case while time lasts; the rows are saved after each.

    Raises:
        ArithmeticError: a rival failed or is wrong; all others were measured nevertheless.
    """
    rows: list[dict[str, Any]] = []
    longest, cut = 0.0, 0
    for make in cases:
        if run.left < 5 + longest:
            cut += 1
            continue
        begin = time.monotonic()
        case = make()
        rows += compare(run, device, case)
        longest = max(longest, time.monotonic() - begin)
        run.save(rows=rows, cut=cut)
        print(_line(case, rows), flush=True)
    run.save(rows=rows, cut=cut)
    failed = [row for row in rows if "failed" in row]
    if failed:
        names = ", ".join(f"{row['rival']} ({_words(row)})" for row in failed[:8])
        raise ArithmeticError(f"{len(failed)} rivals failed: {names}\n{failed[0]['failed']}")


def _words(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[k]) for k in ("op", "model", "what", "N", "dtype") if k in row)


def _line(case: Case, rows: Sequence[Mapping[str, Any]]) -> str:
    mine = [row for row in rows if case.label.items() <= row.items() and "seconds" in row]
    times = ", ".join(f"{row['rival']} {row['seconds'] * 1e6:.0f} us" for row in mine)
    return f"  {_words(case.label)}: {times}"
