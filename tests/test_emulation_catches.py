"""Faults planted in the kernels' own sources, and that the emulated suite catches each.

A fault is one change of text. The kernel's bindings are compiled with it, linked with the other
objects of the build, and the op's emulation tests run on the result: they must fail.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from stamps import where_csrc_changed

from pymend import _lib

ROOT = Path(__file__).parent.parent
OBJECTS = ROOT / "build/cmake/CMakeFiles/_emu.dir/csrc/emu"


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in csrc/``path``; ``op`` is compiled again and tested."""

    op: str
    path: str
    old: str
    new: str


RANK_UPDATE = "kernels/rank_update.cuh"
RANK_UPDATE_MMA = "kernels/rank_update_mma.cuh"
OUTER_TILE = "kernels/outer_tile.cuh"
FAULTS = {
    "missing barrier": Fault(
        "rank_update",
        OUTER_TILE,
        "next_right.put(shared.right[stage]);\n    __syncthreads();",
        "next_right.put(shared.right[stage]);",
    ),
    "wrong bound": Fault(
        "rank_update", OUTER_TILE, "if (i < inside) to[i]", "if (i <= inside) to[i]"
    ),
    "wrong fragment index": Fault(
        "rank_update", RANK_UPDATE_MMA, "/ 2 * 32 + g / 2 * 8", "/ 2 * 32 + t / 2 * 8"
    ),
}
MORE_FAULTS = {
    "stage of a product overwritten while it is read": Fault(
        "rank_update", OUTER_TILE, "    stage ^= 1;", "    stage ^= 0;"
    ),
    "first row past the end of a factor": Fault(
        "rank_update", OUTER_TILE, "i * STEP < below", "i * STEP <= below"
    ),
    "weights of the next tile not read ahead": Fault(
        "rank_update", RANK_UPDATE_MMA, "if (turn + 1 < strip) {", "if (turn + 2 < strip) {"
    ),
    "factors of the former tile": Fault(
        "rank_update", RANK_UPDATE_MMA, "      of_rows += Tile::ROWS / UNIT", "      of_rows += 0"
    ),
    "weights of the next turns not read ahead": Fault(
        "rank_update",
        RANK_UPDATE_MMA,
        "if (turn + AHEAD < last)",
        "if (turn + 2 * AHEAD < last)",
    ),
    "factors of the former turn": Fault(
        "rank_update", RANK_UPDATE_MMA, "of_rows += STEPS * PARTS * WARP;", "of_rows += 0;"
    ),
    "factors of the first column step twice": Fault(
        "rank_update",
        RANK_UPDATE_MMA,
        "b[i / 8][i % 8 / 2], i % 2)",
        "b[0][i % 8 / 2], i % 2)",
    ),
    "strips of half a pair of turns": Fault(
        "rank_update", RANK_UPDATE_MMA, "m.rows % (AHEAD * UNIT)", "m.rows % UNIT"
    ),
    "a row in the segment before": Fault(
        "moments", "kernels/moments.cuh", ".first <= row) found", ".first < row) found"
    ),
    "segments from the second on": Fault(
        "moments", "kernels/moments.cuh", "int found = 0;", "int found = count > 1;"
    ),
    "low parts forgotten": Fault(
        "rank_update",
        RANK_UPDATE_MMA,
        "mma_bf16(sum, a[0].of, low);",
        "",
    ),
    "tile of the wrong matrix": Fault(
        "rank_update",
        "math/rank_update.h",
        "while (tile >= end_tile(i))",
        "while (tile > end_tile(i))",
    ),
    "fidelity of another matrix": Fault(
        "rank_update", RANK_UPDATE, "fidelity[list.item[index].index]", "fidelity[0]"
    ),
    "alpha of another matrix": Fault(
        "rank_update",
        RANK_UPDATE,
        "const Acc<T> step = -alpha[m.index];",
        "const Acc<T> step = -alpha[0];",
    ),
    "no tie to even": Fault(
        "module", "math/rounding.h", "0x7FFFu + ((word >> 16) & 1u)", "0x8000u"
    ),
}


def compile_fault(fault: Fault, folder: Path) -> None:
    """Put _emu with the fault, and the untouched _C, into ``folder``."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    path = sources / fault.path
    text = path.read_text()
    assert fault.old in text, f"{fault.path} no longer has {fault.old!r}: plant the fault anew"
    path.write_text(text.replace(fault.old, fault.new, 1))

    commands = json.loads((ROOT / "build/cmake/compile_commands.json").read_text())
    name = f"csrc/emu/{fault.op}.cpp"
    command = shlex.split(next(c["command"] for c in commands if c["file"].endswith(name)))
    made = folder / "fault.o"
    command[command.index("-o") + 1] = str(made)
    command = [str(sources) if part == str(ROOT / "csrc") else part for part in command]
    command = [part.replace(f"-I{ROOT}/csrc", f"-I{sources}") for part in command]
    command = [part.replace(str(ROOT / name), str(folder / name)) for part in command]
    subprocess.run([*command, "-O1"], cwd=folder, check=True)
    names = [p.name for p in (ROOT / "csrc/emu").glob("*.cpp") if p.stem != fault.op]
    others = [OBJECTS / f"{name}.o" for name in names]  # a build keeps those of sources that went
    link = [command[0], "-shared", "-o", folder / "_emu.so", made, *others]
    boost = "-DPYMEND_BOOST_CONTEXT" in command
    subprocess.run([*link, *["-lboost_context"] * boost], check=True)
    shutil.copy(_lib._C.__file__, folder)


def suite_of(fault: Fault) -> list[str]:
    files = ["tests/test_emulation.py", f"tests/ops/test_{fault.op}.py"]
    return [name for name in files if (ROOT / name).exists()]


def run_suite(fault: Fault, folder: Path) -> subprocess.CompletedProcess[str]:
    """The op's emulation tests on the module in ``folder``, up to the first failure."""
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-k", "emu or emulation"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *suite_of(fault)],
        cwd=ROOT,
        env={**os.environ, "PYMEND_NATIVES": str(folder)},
        capture_output=True,
        text=True,
    )


def check_caught(fault: Fault, folder: Path) -> None:
    if not OBJECTS.exists() or not _lib.has_kernels():
        pytest.skip("no objects of _emu below build/cmake: run make build")
    compile_fault(fault, folder)
    done = run_suite(fault, folder)
    crashed = done.returncode < 0  # a write out of bounds may end the process at once
    assert crashed or (done.returncode == 1 and " failed" in done.stdout), done.stdout + done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_caught(name, tmp_path):
    fault = FAULTS[name]
    files = ["tests/test_emulation_catches.py", "tests/tolerances.py", *suite_of(fault)]
    with where_csrc_changed(name.replace(" ", "-"), *files):
        check_caught(fault, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_FAULTS)
def test_more_are_caught(name, tmp_path):
    check_caught(MORE_FAULTS[name], tmp_path)


@pytest.mark.slow
def test_without_a_fault_the_same_way_passes(tmp_path):
    sound = Fault("rank_update", RANK_UPDATE, "#pragma once", "#pragma once")
    compile_fault(sound, tmp_path)
    done = run_suite(sound, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
