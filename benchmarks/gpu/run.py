"""One command that gathers everything about a GPU: build, checks, ceilings, benchmarks, counters.

    make gpu OUT=folder      # on a machine with one GPU, in 9 minutes
    make gpu-dry-run         # every stage on a CPU at tiny sizes; measures nothing

It needs a CUDA toolkit, PyTorch 2.11 or later, numpy, transformers and cmake; pymend need not be
installed. It changes no setting of the card.

Every stage runs in a process of its own, so that a fault of the device ends that stage alone, and
has its place in a time plan: it is killed when its seconds and those that earlier stages left over
are used up. What it found by then is in ``gpu.json``, which is whole after every stage. Where the
plan is shorter than all stages, the ones in ``DROPPED`` are left out, in that order; ``--stages``
chooses by hand. ``PYMEND_GPU_MODEL`` names a folder for the stage ``training``, which is skipped
without one. ``PYMEND_COMMIT`` names the commit where the tree came without git. The exit
status is 1 if a stage that checks something failed or did not finish.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpu import measure, roofline
from gpu.measure import ROOT, Device, Run, Skipped, write

FORMAT = 1
PLAN = 540.0  # seconds
REPORT = 5.0  # of them, for the tables at the end


@dataclass(frozen=True)
class Stage:
    """``module:function`` and its share of the plan.

    ``checks``: its failure fails the run. ``needs``: packages without which it is skipped.
    """

    function: str
    seconds: float
    checks: bool = False
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The function's name, also of the stage's files."""
        return self.function.partition(":")[2]


STAGES = (
    Stage("gpu.run:manifest", 20, checks=True),  # and the first import of torch
    Stage("gpu.run:build", 45, checks=True),
    Stage("gpu.ops:ceilings", 5),
    Stage("gpu.ops:stream", 10, checks=True),
    Stage("gpu.run:tests", 40, checks=True, needs=("pytest", "hypothesis", "transformers")),
    Stage("gpu.ops:sanitizers", 70, checks=True),
    Stage("gpu.ops:ops", 80, checks=True),
    Stage("gpu.edit:edit", 80, checks=True),
    Stage("gpu.system:system", 75, needs=("transformers",)),
    Stage("gpu.edit:compiled", 60),
    Stage("gpu.ops:counters", 45),
    Stage("gpu.training:training", 5, needs=("transformers",)),  # where there is a model: more
)
DROPPED = ("counters", "compiled", "sanitizers", "system", "ops", "edit", "tests")
WORKERS = 6  # of the tests: most of their time is the host's
LOADED = "from pymend import build_info, has_kernels; assert has_kernels(); print(build_info())"
LOGS = ("build", "tests", *measure.SANITIZERS, "counters")


# -- stages --------------------------------------------------------------------------------------


def manifest(run: Run) -> None:
    """What is measured, and where."""
    device = Device(run.dry)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    run.save(
        commit=os.environ.get("PYMEND_COMMIT") or commit or "unknown",
        kernels=os.environ["PYMEND_KERNELS"],
        torch=torch.__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in ("numpy", "transformers", "triton")},
        cpus=os.cpu_count(),
        tools={t: shutil.which(t) for t in ("nvcc", "cmake", "ninja", "compute-sanitizer", "ncu")},
    )
    if not device.cuda:
        run.save(device=f"none: a rehearsal on {platform.machine()}", capability="9.0")
        return
    properties = torch.cuda.get_device_properties(0)
    run.save(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory=properties.total_memory,
        multiprocessors=properties.multi_processor_count,
        L2=properties.L2_cache_size,
        cuda=torch.version.cuda,
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


def build(run: Run) -> None:
    """The native module for this device alone; the log holds registers and spills.

    With ``--ready`` the one that lies in ``pymend/``, from another machine and torch, is kept.
    """
    found = json.loads((run.out / "gpu.json").read_text())["stages"]["manifest"]
    folder = run.out / "build" if run.dry else ROOT / "build/gpu"
    if run.ready:
        run.save(target="ready", info=run.command(sys.executable, "-c", LOADED))
        return
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", ".", "-B", folder, *generator]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    if run.dry:  # configures everything, compiles the smallest target
        configure += ["-DPYMEND_CUDA=off", f"-DPYMEND_OUTPUT={folder}"]
        target = "cpu_base"
    else:
        configure += ["-DPYMEND_CUDA=on", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v"]
        target = "_C"
    run.command(*configure, TORCH_CUDA_ARCH_LIST=found["capability"])
    jobs = ["--parallel", os.cpu_count()]
    output = run.command("cmake", "--build", folder, "--target", target, *jobs)
    run.save(target=target, kernels=parse_ptxas(output))
    if run.dry:
        shutil.rmtree(folder)
        return
    run.command(sys.executable, "-c", LOADED)


def parse_ptxas(output: str) -> list[dict[str, Any]]:
    """Kernel, registers and bytes spilled, from what ``ptxas -v`` printed."""
    kernels: list[dict[str, Any]] = []
    for line in output.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernels.append({"kernel": match[1]})
        elif match := re.search(r"(\d+) bytes spill stores", line):
            kernels[-1]["spilled"] = int(match[1])
        elif match := re.search(r"Used (\d+) registers", line):
            kernels[-1]["registers"] = int(match[1])
    return kernels


def tests(run: Run) -> None:
    """The suite's tests that are marked ``cuda``."""
    chosen = (
        ["tests/ops/test_rank_update.py", "-k", "by_hand and cpu"]
        if run.dry
        else ["tests", "-m", "cuda"]
    )
    workers = ["-n", str(WORKERS)] if find_spec("xdist") and not run.dry else []
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, *chosen]
    output = run.command(*line)
    run.save(summary=output.splitlines()[-1])


# -- the run -------------------------------------------------------------------------------------


def plan(seconds: float) -> tuple[list[Stage], list[str]]:
    """The stages that fit, and the names of those left out."""
    stages, dropped = list(STAGES), []
    for name in DROPPED:
        if sum(s.seconds for s in stages) + REPORT <= seconds:
            break
        stages = [s for s in stages if s.name != name]
        dropped.append(name)
    return stages, dropped


def picked(words: Sequence[str]) -> list[Stage]:
    """The stages named in ``words``, as ``NAME`` or ``NAME=SECONDS``, in the order of a full run.

    Raises:
        ValueError: a word names no stage, or its seconds are no number.
    """
    wanted = {name: seconds for name, _, seconds in (word.partition("=") for word in words)}
    known = [stage.name for stage in STAGES]
    if unknown := ", ".join(sorted(wanted.keys() - known)):
        raise ValueError(f"no stage is called {unknown}; there are {', '.join(known)}")
    stages = [stage for stage in STAGES if stage.name in {"manifest", *wanted}]
    seconds = {name: float(text) for name, text in wanted.items() if text}
    return [replace(s, seconds=seconds.get(s.name, s.seconds)) for s in stages]


def execute(stage: Stage, run: Run) -> None:
    """Run ``stage`` in this process, which is its own, and record how it ended."""
    os.setsid()  # one group with the compilers and profilers it starts
    began = time.monotonic()
    run.save(status="running")
    try:
        module, _, name = stage.function.partition(":")
        getattr(importlib.import_module(module), name)(run)
        status = {"status": "passed"}
    except Skipped as reason:
        status = {"status": "skipped", "reason": str(reason)}
    except Exception:
        status = {"status": "failed", "traceback": traceback.format_exc()}
        traceback.print_exc()
    run.save(**status, took=round(time.monotonic() - began, 1))


def perform(stage: Stage, run: Run) -> dict[str, Any]:
    """Give ``stage`` a process and its time; what it found."""
    process = multiprocessing.get_context("fork").Process(target=execute, args=(stage, run))
    process.start()
    process.join(max(0.1, run.left))
    killed = process.is_alive()
    assert process.pid is not None
    with suppress(ProcessLookupError):  # its compilers and profilers, too, which may outlive it
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    found = json.loads(run.part.read_text()) if run.part.exists() else {"status": "running"}
    run.part.unlink(missing_ok=True)
    if found["status"] == "running":
        found["status"] = "cut" if killed else f"crashed ({process.exitcode})"
    return found


def seen() -> str:
    """Clocks, temperature and power of the card as it is; nothing is ever set."""
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    try:
        line = ["nvidia-smi", query, "--format=csv,noheader"]
        return subprocess.run(line, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def preload() -> list[str]:
    """Import what the stages need, once, and touch no device; the packages that are missing."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if measure.stand_in_for_transformers():
        return [*missing, "transformers"]
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401

    return missing


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole run; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=PLAN, help="time plan of the whole run")
    parser.add_argument("--stages", nargs="+", metavar="NAME[=SECONDS]", help="only these")
    parser.add_argument("--ready", action="store_true", help="use the module in pymend/ as it is")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on a CPU, tiny sizes")
    options = parser.parse_args(arguments)
    begin, dry = time.monotonic(), options.dry_run
    try:
        stages, dropped = (picked(options.stages), []) if options.stages else plan(options.seconds)
    except ValueError as problem:
        parser.error(str(problem))
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (f"{name}.log" for name in LOGS):
        (out / old).unlink(missing_ok=True)
    # Children must see the kernels that are off until they are measured.
    os.environ.setdefault("PYMEND_KERNELS", "default" if dry else "all")
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT))
    missing = preload()

    results: dict[str, Any] = {
        "format_version": FORMAT,
        "rehearsal": dry,
        "note": roofline.REHEARSAL if dry else "measured on the device named in the manifest",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "plan": {s.name: s.seconds for s in stages},
        "left out": {name: f"no room in {options.seconds:g} s" for name in dropped},
        "seen": {},
        "stages": {},
    }
    if dry:
        print(roofline.REHEARSAL)
    planned = 0.0
    for stage in stages:
        planned += stage.seconds
        print(f"{stage.name}: {time.monotonic() - begin:.0f} s", flush=True)
        lacks = ", ".join(package for package in stage.needs if package in missing)
        if lacks:
            found = {"status": "skipped", "reason": f"not installed: {lacks}"}
        else:
            found = perform(stage, Run(out, stage.name, dry, begin + planned, options.ready))
        results["stages"][stage.name] = found
        results["seen"][stage.name] = "a rehearsal" if dry else seen()
        results["took"] = round(time.monotonic() - begin, 1)
        write(out / "gpu.json", json.dumps(results, indent=1))
        print(f"{stage.name}: {found['status']} {found.get('reason', '')}", flush=True)
        if stage.name == "manifest" and found["status"] != "passed":
            return 1
    print(roofline.report(results, out))
    bad = [s.name for s in stages if s.checks and not _fine(results["stages"][s.name])]
    if bad:
        print(f"not passed: {', '.join(bad)}")
    return 1 if bad else 0


def _fine(found: dict[str, Any]) -> bool:
    return found["status"] in ("passed", "skipped")


if __name__ == "__main__":
    sys.exit(main())
