"""The GPU run, rehearsed on a CPU: every stage, the time plan, and what becomes of a bad stage."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from gpu import ops, roofline  # noqa: E402
from gpu import run as gpu  # noqa: E402

STAGES = [stage.name for stage in gpu.STAGES]
MOST_FILES = 8  # that a borrowed machine may send back


def run(out: Path, *options: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "gpu.run", str(out), "--dry-run", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYMEND_KERNELS": "default"}
    environment["PYTHONPATH"] = (
        f"{ROOT / 'benchmarks'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = run(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert roofline.REHEARSAL in done.stdout
    return out


def test_every_stage_passes(rehearsed):
    results = json.loads((rehearsed / "gpu.json").read_text())
    status = {name: s["status"] for name, s in results["stages"].items()}
    assert status.pop("training") == "skipped"  # it needs a real model
    assert status == dict.fromkeys((name for name in STAGES if name != "training"), "passed")
    assert results["rehearsal"] and results["note"] == roofline.REHEARSAL
    assert not results["left out"] and set(results["seen"]) == set(STAGES)


def test_every_rival_was_checked_and_timed(rehearsed):
    stages = json.loads((rehearsed / "gpu.json").read_text())["stages"]
    sizes, models = 5 * 2 + 2, 2  # in float32 and bfloat16; in TF32
    assert len(stages["edit"]["rows"]) == sizes * (6 + 4) + models * 6
    assert len(stages["compiled"]["rows"]) == 2 * 2 * 3
    assert {row["op"] for row in stages["ops"]["rows"]} == set(ops.present())
    for stage in ("edit", "compiled", "ops"):
        for row in stages[stage]["rows"]:
            assert row["seconds"] > 0 and row["error"] >= 0 and "failed" not in row
    assert stages["edit"]["cut"] == 0


def test_the_report_says_that_it_measured_nothing(rehearsed):
    report = (rehearsed / "roofline.md").read_text()
    assert roofline.REHEARSAL in report
    goals = [line for line in report.splitlines() if re.match(r"\| G\d", line)]
    assert len(goals) == len(json.loads(roofline.PREDICTIONS.read_text())["goals"])
    for line in goals:
        there = "moments" not in line or "moments" in ops.present()
        there &= "factored_adam" not in line or "factored_adam" in ops.present()
        wanted = f"{roofline.NOT_YET} (rehearsed)" if there else roofline.NOT_HERE
        assert line.endswith(f"| {wanted} |")
    assert (rehearsed / "roofline.png").stat().st_size > 10_000
    assert len(list(rehearsed.iterdir())) <= MOST_FILES


def test_without_a_run_every_goal_is_open():
    rows = roofline.goals({"rehearsal": False, "stages": {}})
    assert {row["reached"] for row in rows} == {roofline.NOT_YET}


def test_a_short_plan_leaves_stages_out_in_the_listed_order():
    assert [s.name for s in gpu.plan(gpu.PLAN)[0]] == STAGES
    kept, dropped = gpu.plan(300)
    assert dropped == list(gpu.DROPPED[: len(dropped)]) and dropped
    assert sum(s.seconds for s in kept) + gpu.REPORT <= 300
    assert {s.name for s in kept} | set(dropped) == set(STAGES)


def fails(run):
    run.save(rows=[1])
    raise ArithmeticError("3 is not 4")


def hangs(run):
    child = subprocess.Popen(["sleep", "600"])
    run.save(rows=[1, 2], child=child.pid)
    child.wait()


def crashes(run):
    os.kill(os.getpid(), signal.SIGKILL)


def ended(pid: int) -> bool:
    """Whether the process is gone, or at most waits to be collected, within a minute."""
    for _ in range(600):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_stages_can_be_chosen_and_given_their_seconds():
    stages = gpu.picked(["edit=7.5", "tests"])
    assert [s.name for s in stages] == ["manifest", "tests", "edit"]
    assert stages[2].seconds == 7.5
    assert stages[1] in gpu.STAGES
    with pytest.raises(ValueError, match="no stage is called edits; there are manifest, build"):
        gpu.picked(["edits"])


@pytest.mark.parametrize(
    ("name", "status"), [("fails", "failed"), ("hangs", "cut"), ("crashes", "crashed (-9)")]
)
def test_a_bad_stage_is_recorded_and_the_run_goes_on(name, status, tmp_path):
    stage = gpu.Stage(f"test_gpu_dry_run:{name}", 1)
    # A stage that hangs is cut when its second is over; the others end by themselves long before.
    seconds = 1 if name == "hangs" else 600
    found = gpu.perform(stage, gpu.Run(tmp_path, name, True, time.monotonic() + seconds))
    assert found["status"] == status
    if name == "hangs":
        assert ended(found["child"])
    if name == "fails":
        assert "ArithmeticError: 3 is not 4" in found["traceback"]
    if name != "crashes":
        assert found["rows"]
    assert not list(tmp_path.iterdir())


def test_numbers_are_read_out_of_ptxas_and_ncu():
    ptxas = (
        "ptxas info    : Compiling entry function '_Zk' for 'sm_90'\n"
        "    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers\n"
    )
    assert gpu.parse_ptxas(ptxas) == [{"kernel": "_Zk", "spilled": 8, "registers": 40}]
    ncu = (
        "==PROF== Connected\nideal {} 5\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","rank_update_kernel","dram__bytes_read.sum","byte","1,024"\n'
        '"0","rank_update_kernel","dram__bytes_write.sum","byte","512"\n'
    )
    wanted = [{"kernel": "rank_update_kernel", "read": 1024.0, "written": 512.0}]
    assert ops.parse_ncu(ncu) == wanted
