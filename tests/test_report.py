"""The tables of the pages say what ``benchmarks/results`` says. No row is measured here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import report  # noqa: E402

MANIFEST = {"device": "Some GPU", "torch": "2.13.0", "commit": "abc"}
GPU_RUN = {"time": "2030-01-02T03:04:05+00:00", "rehearsal": False, "left out": {}}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages and results, which the generator works on."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    for script in (ROOT / "benchmarks").glob("bench_*.py"):
        (tmp_path / "benchmarks" / script.name).touch()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def row(**changes: object) -> dict[str, object]:
    """A row as the harness writes it."""
    where = {"device": "A CPU", "threads": 2, "torch": "2.13.0", "commit": "abc", "model": "M"}
    measured = {"rival": "torch", "seconds": 1.25, "spread": 0.031, "times faster": 1.0}
    return {**measured, **where, "time": "2030-01-02T03:04:05+00:00", **changes}


def record(tree: Path, name: str, *rows: object) -> Path:
    path = tree / f"benchmarks/results/{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_pages_are_up_to_date():
    command = [sys.executable, "benchmarks/report.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_benchmark_has_a_table():
    page = (ROOT / "docs/performance.md").read_text()
    scripts = list((ROOT / "benchmarks").glob("bench_*.py"))
    assert scripts
    for script in scripts:
        assert f"<!-- table: {script.stem.removeprefix('bench_')} -->" in page, script.name


@pytest.mark.parametrize(
    ("page", "line"),
    [("README.md", "| one edit, beside"), ("docs/performance.md", "| ours, rephrase |")],
)
def test_a_changed_number_is_found_and_put_right(tree, capsys, page, line):
    text = (tree / page).read_text()
    cell = re.search(rf"^{re.escape(line)}.*?\| (\d)", text, re.MULTILINE)
    changed = f"{text[: cell.start(1)]}{9 - int(cell[1])}{text[cell.end(1) :]}"
    (tree / page).write_text(changed)
    assert report.main(["--check"]) == 1
    assert f"{page} differs" in capsys.readouterr().out
    assert (tree / page).read_text() == changed
    assert report.main([]) == 0 and (tree / page).read_text() == text
    assert report.main(["--check"]) == 0


def test_a_changed_result_is_found(tree, capsys):
    path = tree / "benchmarks/results/edit.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    path.write_text(path.read_text() + json.dumps(row(time=last["time"], rival="another")) + "\n")
    assert report.main(["--check"]) == 1
    assert "docs/performance.md differs" in capsys.readouterr().out


def test_only_the_latest_run_is_shown_with_its_place(tree):
    old = [row(time="2029-12-31T23:59:59+00:00", rival="old")]
    # Later than its text looks: the zone counts.
    late = "2030-01-02T01:04:05-05:00"
    new = [
        row(time=late, goal=0.0, n=8, calls=5),
        row(time=late, goal=4.0, n=8, calls=5, rival="ours", seconds=0.0123456, spread=0.5)
        | {"times faster": 101.25},
    ]
    record(tree, "products", *new, *old, row(rival="older"))
    text = report.table(tree / "benchmarks/results", "products")
    assert text.splitlines() == [
        "| rival | n | ms | spread | times faster | goal |",
        "| --- | --- | --- | --- | --- | --- |",
        "| torch | 8 | 1250 | 3% | 1 | - |",
        "| ours | 8 | 12.3 | 50% | 101 | >= 4 |",
        "",
        "2030-01-02, A CPU, 2 threads, torch 2.13.0, commit abc, M, calls 5.",
    ]


def test_what_varies_becomes_a_column(tree):
    rows = [row(dtype="float32", n=8), row(dtype="bfloat16", n=32)]
    record(tree, "rank_update", *rows)
    text = report.table(tree / "benchmarks/results", "rank_update")
    assert text.startswith("| rival | dtype | n | seconds |")
    assert "| torch | bfloat16 | 32 | 1.25 |" in text and "float32," not in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected an object, got list"),
        (json.dumps({"rival": "torch"}), "no commit, device, seconds, spread"),
        (json.dumps(row(seconds="fast")), "seconds is 'fast', expected a finite number"),
        (json.dumps(row(seconds=0)), "seconds is 0, expected a time"),
        (json.dumps(row(spread=float("nan"))), "spread is nan, expected a finite number"),
        (json.dumps(row(time="yesterday")), "yesterday"),
        (json.dumps(row(time="2030-01-02T03:04:05")), "expected one with a time zone"),
    ],
)
def test_a_malformed_row_is_named(tree, capsys, line, message):
    path = record(tree, "products", row())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message) as found:
        report.latest(path)
    assert str(found.value).startswith("products.jsonl, line 2: ")
    assert report.main(["--check"]) == 1
    assert "products.jsonl, line 2" in capsys.readouterr().err


def test_a_file_without_rows_is_refused(tree):
    with pytest.raises(ValueError, match=r"products\.jsonl has no rows"):
        report.latest(record(tree, "products"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: moments -->\n", "README.md: a table without its end"),
        ("<!-- end -->\n", "README.md: a table without its end, or an end alone"),
        ("<!-- table: moments -->\n<!-- table: edit -->\n<!-- end -->\n", "without its end"),
        ("<!-- table: nothing -->\n<!-- end -->\n", "there is no table 'nothing'"),
    ],
)
def test_bad_marks_are_refused(tree, text, message):
    (tree / "README.md").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.outdated(tree)


def test_the_summary_names_a_rival_that_is_missing(tree):
    record(tree, "train_step", row(rival="official order"))
    with pytest.raises(ValueError, match="no rival 'ours, rephrase'"):
        report.table(tree / "benchmarks/results", "summary")


def test_a_gpu_run_fills_the_goals(tree):
    results = tree / "benchmarks/results"
    for recorded in results.glob("gpu*"):
        shutil.rmtree(recorded)
    assert report.roofline.NOT_YET in report.table(results, "gpu")
    folder = results / "gpu-some"
    folder.mkdir()
    rows = [
        {"op": "moments", "rival": r, "seconds": s}
        for r, s in (("official loop", 2), ("ours", 1e-3))
    ]
    run = {**GPU_RUN, "stages": {"manifest": MANIFEST, "ops": {"rows": rows}}}
    (folder / "gpu.json").write_text(json.dumps(run))
    text = report.table(results, "gpu")
    assert "| 2e+03 x, target |" in text
    assert "2030-01-02, Some GPU, torch 2.13.0, commit abc; `benchmarks/results/gpu-some/" in text
    (folder / "gpu.json").write_text(json.dumps({**run, "rehearsal": True}))
    with pytest.raises(ValueError, match="is a rehearsal on a CPU"):
        report.table(results, "gpu")
    (folder / "gpu.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the file of a GPU run"):
        report.table(results, "gpu")
