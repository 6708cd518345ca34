"""What the benchmarks share: subjects, interleaved timing, memory peaks, ceilings, results.

Every benchmark runs its rivals in one process, one round of each after the other, so that a change
in the machine's load meets all of them. The first round is thrown away: the first calls of a
process touch their memory for the first time. Memory is measured in a fresh process for each rival.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from gpu.roofline import markdown
from report import cells
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pymend.engine.tokens import IGNORE, EncodedRequest, Row
from pymend.zoo import smollm2

RESULTS = Path(__file__).resolve().parent / "results"
SHAPE = {  # of SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TINY = {
    **SHAPE,
    "vocab_size": 128,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
}
LABELS = 2  # tokens of every target


def _linear_flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * w[0]


FLOPS = {torch.ops.mkldnn._linear_pointwise: _linear_flops}  # which torch's counter does not know


# -- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the ones the goals are stated for."""

    quick: bool = False  # a tiny model, two rounds: shows that everything runs, measures nothing
    rank: int = 1920
    tokens: int = 20  # of every row, the target's two included
    rounds: int = 5
    matmul: str = "ieee"  # precision of float32 matrix products; "bf16" for both sides alike
    output: Path = RESULTS
    peak_of: str = ""  # a rival: print its extra peak memory and stop

    def apply(self) -> None:
        """Set the precision, and a fixed seed."""
        torch.manual_seed(0)
        torch.backends.mkldnn.matmul.fp32_precision = self.matmul

    def command(self) -> list[str]:
        """These settings as a command line."""
        line = [f"--rank={self.rank}", f"--tokens={self.tokens}", f"--matmul={self.matmul}"]
        return [*line, "--quick"] if self.quick else line


def settings(description: str) -> Settings:
    """Read the command line that all benchmarks share."""
    default = Settings()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="tiny model: only checks that it runs")
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--tokens", type=int, default=default.tokens)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument("--matmul", choices=("ieee", "bf16"), default=default.matmul)
    parser.add_argument("--output", type=Path, default=default.output, help="folder of the results")
    parser.add_argument("--peak-of", default="", help=argparse.SUPPRESS)
    return Settings(**vars(parser.parse_args()))


# -- subjects ------------------------------------------------------------------------------------


def load(quick: bool, random_weights: bool = False) -> tuple[nn.Module, str]:
    """SmolLM2-135M (with its real weights if they are cached), or a tiny model, and its name."""
    if smollm2.is_cached() and not quick and not random_weights:
        model = AutoModelForCausalLM.from_pretrained(smollm2.prepare(), dtype=torch.float32)
        return model.eval(), smollm2.NOTE
    model = LlamaForCausalLM(LlamaConfig(**(TINY if quick else SHAPE)))
    return model.eval(), "tiny Llama" if quick else "SmolLM2-135M's shape, random weights"


def random_records(model: nn.Module, count: int, tokens: int) -> list[EncodedRequest]:
    """Requests with one rephrase and one locality row, all of ``tokens`` random tokens."""
    rng = random.Random(0)

    def row() -> Row:
        ids = rng.choices(range(model.config.vocab_size), k=tokens)
        return Row(tuple(ids), tokens - LABELS - 1)

    return [EncodedRequest(row(), (row(),), (row(),), None, (), ()) for _ in range(count)]


def dense_batch(row: Row) -> dict[str, Tensor]:
    """``row`` as a batch of the dense rival: ids, mask and labels [1, tokens]."""
    ids = torch.tensor([row.ids])
    labels = ids.masked_fill(torch.arange(len(row.ids)) <= row.first, IGNORE)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# -- time ----------------------------------------------------------------------------------------


ROUND = 5e-3  # seconds that a round of a rival takes at least


def no_undo() -> None:
    """Of a call that leaves nothing to be undone."""


@dataclass(frozen=True)
class Rival:
    """One side of a comparison. ``undo`` takes back what ``call`` did, outside of the timing."""

    call: Callable[[], object]
    undo: Callable[[], object] = no_undo
    goal: float = 0.0  # wanted times faster than the first rival; 0: none stated
    flops: int | None = None  # of one call, where torch's counter does not know its ops


def interleaved(rivals: Mapping[str, Rival], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each rival, of every round: one round of each after the other.

    The order moves on by one each round: none always runs on the caches that another left. Short
    calls are timed many at a time, as ``torch.utils.benchmark`` does.
    """
    order = list(rivals.items())
    calls = {name: _calls_in_a_round(rival) for name, rival in order}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for done in range(rounds):
        shift = done % len(order)
        for name, rival in order[shift:] + order[:shift]:
            begin = time.perf_counter()
            for _ in range(calls[name] - 1):
                rival.call()
            result = rival.call()
            seconds[name].append((time.perf_counter() - begin) / calls[name])
            rival.undo()
            del result
    return seconds


def _calls_in_a_round(rival: Rival) -> int:
    """Enough to fill ``ROUND``, or one where each has to be undone; found by two untimed calls."""
    took = 0.0
    for _ in range(2):  # the first may build what later ones use
        begin = time.perf_counter()
        rival.call()
        took = time.perf_counter() - begin
        rival.undo()
    return max(1, math.ceil(ROUND / took)) if rival.undo is no_undo else 1


def compare(
    rivals: Mapping[str, Rival], rounds: int, ceiling: Ceiling, weights: int = 0, episodes: int = 1
) -> list[dict[str, Any]]:
    """Time the rivals; the first is what the others are compared with.

    Args:
        weights: bytes that one call cannot help reading.
        episodes: edits in one call.

    Returns:
        A row per rival. ``calls`` counts rounds. ``spread`` is (slowest - fastest) / median;
        ``ceiling`` is the share of the call that its own arithmetic (or ``weights``) would take at
        the machine's best rate.
    """
    seconds = interleaved(rivals, rounds)
    base = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, rival in rivals.items():
        times = seconds[name]
        median = statistics.median(times)
        flops = _count_flops(rival) if rival.flops is None else rival.flops
        floor = max(flops / ceiling.flops, weights / ceiling.bytes)
        rows.append(
            {
                "rival": name,
                "calls": rounds,
                "seconds": median,
                "spread": (max(times) - min(times)) / median,
                "episodes/s": episodes / median,
                "times faster": base / median,
                "goal": rival.goal,
                "GFLOP": flops / 1e9,
                "ceiling": floor / median,
            }
        )
    return rows


def _count_flops(rival: Rival) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        rival.call()
    rival.undo()
    return counter.get_total_flops()


def under_pytest(benchmark: Any, rival: Rival, rounds: int = 10, **about: object) -> None:
    """Time one rival by pytest-benchmark's fixture; its record keeps what it is ``about``."""
    benchmark.extra_info.update(about)
    benchmark.pedantic(rival.call, teardown=rival.undo, rounds=rounds, warmup_rounds=1)


@dataclass(frozen=True)
class Ceiling:
    """The machine's best rates: float32 products in FLOP/s, and a copy in bytes/s (both ways)."""

    flops: float
    bytes: float

    @classmethod
    def measure(cls, quick: bool) -> Ceiling:
        """Products of 2048 x 2048 matrices and copies of 256 MiB, the best of five."""
        n, size = (64, 2**16) if quick else (2048, 2**26)
        a, b = torch.randn(n, n), torch.randn(n, n)
        source, target = torch.ones(size), torch.zeros(size)
        rivals = {"product": Rival(lambda: a @ b), "copy": Rival(lambda: target.copy_(source))}
        seconds = {name: min(times) for name, times in interleaved(rivals, 5).items()}
        return cls(2 * n**3 / seconds["product"], 8 * size / seconds["copy"])


# -- memory --------------------------------------------------------------------------------------


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_extra_peak(call: Callable[[], object]) -> None:
    """Print the peak of this process, which has loaded its subjects, during ``call``.

    It counts from what the process holds before. Where the kernel cannot forget an earlier peak (it
    is not Linux), it counts from that, and comes out too small.
    """
    forgotten = forget_peak()
    before = status("VmRSS") if forgotten else peak_rss()
    result = call()
    peak = status("VmHWM") if forgotten else peak_rss()
    print(f"peak {peak - before}")
    del result


def forget_peak() -> bool:
    """Let the peak of this process begin at its present size; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(name: str) -> int:
    """One size of this process from Linux' /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return int(kib) * 1024


def extra_peak(script: str, rival: str, settings: Settings) -> int:
    """Run ``script`` in a fresh process that calls :func:`print_extra_peak` for ``rival``."""
    command = [sys.executable, script, *settings.command(), f"--peak-of={rival}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.splitlines()[-1].removeprefix("peak "))


# -- results -------------------------------------------------------------------------------------


def environment(model: str, settings: Settings, ceiling: Ceiling) -> dict[str, Any]:
    """Where and on what a result was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "device": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "model": model,
        "dtype": "float32",
        "matmul": settings.matmul,
        "rank": settings.rank,
        "tokens": settings.tokens,
        "rounds": settings.rounds,
        "GFLOP/s": round(ceiling.flops / 1e9, 1),
        "GB/s": round(ceiling.bytes / 1e9, 1),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def report(
    name: str, rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], out: Path
) -> None:
    """Print the table and its environment, and append both to ``out/name.jsonl``."""
    print(f"\n{name}: " + ", ".join(f"{k} {v}" for k, v in where.items()) + "\n")
    print(markdown([cells(row) for row in rows]), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **where}) + "\n" for row in rows)
