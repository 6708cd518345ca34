"""The benchmarks run, as scripts and under pytest, and record what they print. No timing is judged.

A new ``bench_<name>.py`` gets its rivals in ``RIVALS``.
"""

from __future__ import annotations

import json
import os
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
ENVIRONMENT = {"device", "threads", "torch", "python", "commit", "dtype", "matmul", "model"}


def test_every_script_is_run_here():
    scripts = {p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")}
    assert scripts == RIVALS.keys()


def test_every_rival_runs_under_pytest_too():
    options = ["--quick", "--benchmark-disable", "-p", "no:cacheprovider", "-rA", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    for name in RIVALS:
        assert f"PASSED benchmarks/bench_{name}.py::test_" in done.stdout


def test_a_plain_run_of_the_tests_leaves_benchmarks_out(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert not list((ROOT / "tests").rglob("bench_*.py"))


@pytest.mark.parametrize("name", RIVALS)
def test_script(name: str, tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / f"bench_{name}.py"
    options = ["--quick", "--rank=8", "--tokens=6", "--rounds=1", f"--output={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    column = [cell.strip() for cell in table[0].split("|")].index("rival")
    assert [line.split("|")[column].strip() for line in table[2:]] == RIVALS[name]
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["rival"] for row in rows] == RIVALS[name]
    for row in rows:
        assert row.keys() >= ENVIRONMENT
        assert row["seconds"] > 0
        assert row["GFLOP"] > 0 or name in NO_PRODUCTS or row["rival"].startswith(NO_PRODUCTS)
        assert name != "edit" or row["extra MiB"] > 0
