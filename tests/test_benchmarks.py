"""The benchmark scripts run, name every rival, and record what they print. No timing is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAIN_STEP = [
    "official order",
    "ours, rephrase",
    "ours, rephrase, cached",
    "ours, both",
    "ours, both, cached",
]
EDIT = ["official order", "ours, side path", "ours, merged", "ours, Mend.edit"]
ENVIRONMENT = {"device", "threads", "torch", "python", "commit", "dtype", "matmul", "model"}


@pytest.mark.parametrize(("name", "rivals"), [("train_step", TRAIN_STEP), ("edit", EDIT)])
def test_script(name: str, rivals: list[str], tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / f"bench_{name}.py"
    options = ["--quick", "--rank=8", "--tokens=6", "--rounds=1", f"--output={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == rivals
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert [row["rival"] for row in rows] == rivals
    for row in rows:
        assert row.keys() >= ENVIRONMENT
        assert row["seconds"] > 0
        assert row["GFLOP"] > 0
        assert name != "edit" or row["extra MiB"] > 0
