"""The benchmarks run, as scripts and under pytest, and record what they print. No timing is judged.

A new ``bench_<name>.py`` gets its rivals in ``RIVALS``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RIVALS = {  # by script, in the order of its table
    "train_step": [
        "official order",
        "ours, rephrase",
        "ours, rephrase, cached",
        "ours, both",
        "ours, both, cached",
        "ours, rephrase, no kernels",
        "ours, rephrase, cached, no kernels",
    ],
    "edit": ["official order", "ours, side path", "ours, merged", "ours, Mend.edit"],
    "products": ["torch", "oneDNN"] * 12,
    "moments": [
        f"{model}, {way}"
        for model in ("SmolLM2", "GPT-2")
        for way in ("row by row", "eager", "ours", "copy")
    ],
    "editor_mlp": [
        "per weight, eager",
        "grouped, eager",
        "grouped, ours",
        "epilogue, copy of its bytes",
        "epilogue, eager",
        "epilogue, ours",
    ]
    * 2,
    "apply_edit": [
        f"{case}, {way}"
        for case in ("8 rows", "32 rows", "128 rows", "32 rows, bfloat16")
        for way in ("official order", "lean dense", "factored", "grouped", "ours")
    ],
    "factored_adam": [
        f"{rival}, {rows} rows"
        for rows in (8, 24, 120, 240, 400, 800)
        for rival in ("official", "lean torch", "ours, dense", "ours, fused")
    ],
    "token_losses": ["torch", "ours", "copy"] * 2,  # passes
    # Three dtypes, three numbers of rows.
    "rank_update": ["torch addmm_", "ours", "copy"] * 6
    + ["official order", "lean dense", "torch addmm_", "ours", "copy"] * 3,
    "side_path": ["dense", "ours", "no edit"] * 6,
}
# Scripts or rivals without a product of matrices.
NO_PRODUCTS = ("moments", "epilogue", "token_losses", "copy")
# Every script as it is started from a shell, in one process: torch is imported once.
ALL = """
import contextlib, pathlib, runpy, sys
out, *names = sys.argv[1:]
sys.path.insert(0, "benchmarks")
options = ["--quick", "--rank=8", "--tokens=6", "--rounds=1", f"--output={out}"]
for name in names:
    script = f"benchmarks/bench_{name}.py"
    sys.argv = [script, *options]
    with open(pathlib.Path(out, f"{name}.txt"), "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(script, run_name="__main__")
"""
ENVIRONMENT = {"device", "threads", "torch", "python", "commit", "dtype", "matmul", "model"}


def run(line: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_every_script_is_run_here():
    scripts = {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")}
    assert scripts == RIVALS.keys()


def test_every_rival_stands_under_pytest_too():
    """All are collected, one is run: the others' calls are those that ``test_script`` makes."""
    options = ["--quick", "--benchmark-disable", "-p", "no:cacheprovider", "-q"]
    line = [sys.executable, "-m", "pytest", "benchmarks", *options]
    listed = run([*line, "--collect-only"])
    assert listed.returncode == 0, listed.stdout
    for name in RIVALS:
        assert f"benchmarks/bench_{name}.py::test_" in listed.stdout
    done = run([*line, "-k", "bench_token_losses"])
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE)


def test_a_plain_run_of_the_tests_leaves_benchmarks_out(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert not list((ROOT / "tests").rglob("bench_*.py"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """What every script printed and recorded, run one after the other in one process."""
    out = tmp_path_factory.mktemp("benchmarks")
    done = run([sys.executable, "-c", ALL, str(out), *RIVALS])
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("name", RIVALS)
def test_script(name: str, recorded: Path) -> None:
    printed = (recorded / f"{name}.txt").read_text()
    table = [line for line in printed.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in table[0].split("|")].index("rival")
    assert [line.split("|")[column].strip() for line in table[2:]] == RIVALS[name]
    rows = [json.loads(line) for line in (recorded / f"{name}.jsonl").read_text().splitlines()]
    assert [row["rival"] for row in rows] == RIVALS[name]
    for row in rows:
        assert row.keys() >= ENVIRONMENT
        assert row["seconds"] > 0
        assert row["GFLOP"] > 0 or name in NO_PRODUCTS or row["rival"].startswith(NO_PRODUCTS)
        assert name != "edit" or row["extra MiB"] > 0
