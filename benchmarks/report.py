"""The tables of the pages, generated from the rows in ``benchmarks/results``.

    python benchmarks/report.py            # rewrites README.md and the pages below docs/
    python benchmarks/report.py --check    # changes nothing; names what differs, exit status 1

A table stands between a comment "table: NAME" and a comment "end". NAME is a results file without
``.jsonl``, of which the latest run is shown: the rows that share its newest ``time``. "summary" is
the short table of README, "gpu" the goals for a GPU and what a run (``gpu*/gpu.json``) reached.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gpu import roofline
from gpu.roofline import markdown

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(
    r"(<!-- table: ([^\n]*?) -->\n)((?:(?!<!-- table: ).)*?)(<!-- end -->)", re.DOTALL
)
# What a row says about where and how it was measured: a line under the table, not columns of it.
WHERE = (
    *("device", "capability", "threads", "torch", "python", "commit", "time"),
    *("model", "dtype", "matmul", "rank", "tokens", "rounds", "calls", "GFLOP/s", "GB/s"),
)
NEEDED = {"rival", "seconds", "spread", "device", "threads", "torch", "commit", "time"}
SHOWN = (
    *("seconds", "spread", "times faster", "goal", "over lean", "goal over lean"),
    *("over no kernels", "ceiling", "extra MiB"),
)
MEASURED = (*SHOWN, "episodes/s", "GFLOP", "memory ratio")
SHORT = 0.1  # seconds; a table with shorter times is in milliseconds
SUMMARY = (  # results file, rival, what it is called in README
    ("train_step", "ours, rephrase", "a training step of ten episodes, the same work"),
    ("edit", "ours, side path", "one edit, beside the weights"),
)
Row = dict[str, Any]


# -- cells ---------------------------------------------------------------------------------------


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """The text of each column of ``row``."""
    return {column: _cell(column, value) for column, value in row.items()}


def _cell(column: str, value: Any) -> str:
    goal = column.startswith("goal")
    if value is None or (goal and not value):
        return "-"
    if goal:
        return f">= {value:g}"
    if column in ("spread", "ceiling"):
        return f"{value:.0%}"
    # Three digits, never with an exponent.
    return f"{float(f'{value:.3g}'):.10g}" if isinstance(value, float) else str(value)


# -- rows ----------------------------------------------------------------------------------------


def latest(path: Path) -> list[Row]:
    """The rows of the last run in a results file.

    Raises:
        ValueError: a line is no row of a benchmark; names the file, the line and what is wrong.
    """
    runs: dict[datetime, list[Row]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            runs.setdefault(_checked(row), []).append(row)
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
    if not runs:
        raise ValueError(f"{path.name} has no rows")
    return runs[max(runs)]


def _checked(row: Any) -> datetime:
    """When ``row`` was measured, if it has all that a table needs."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    if missing := sorted(NEEDED - row.keys()):
        raise ValueError(f"no {', '.join(missing)}")
    for name in row.keys() & set(MEASURED):
        value = row[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}, expected a finite number")
    if not row["seconds"] or row["seconds"] < 0:
        raise ValueError(f"seconds is {row['seconds']!r}, expected a time")
    time = datetime.fromisoformat(str(row["time"]))
    if time.tzinfo is None:
        raise ValueError(f"time is {row['time']!r}, expected one with a time zone")
    return time


def _columns(rows: Sequence[Row]) -> list[str]:
    """Rival, what tells its cases apart, and what was measured."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    # dtype, for example, is a line under most tables and a column where both were measured.
    varied = [k for k in names if len({json.dumps(row.get(k)) for row in rows}) > 1]
    labels = [k for k in names if k not in MEASURED and (k not in WHERE or k in varied)]
    labels = ["rival", *(k for k in labels if k != "rival")]
    return labels + [k for k in SHOWN if any(row.get(k) for row in rows)]


def _line(rows: Sequence[Row]) -> str:
    """The line under a table: when, where and on what."""
    constant = _constant(rows)
    parts = [*_place(rows), f"commit {rows[0]['commit']}", *_subject(rows)]
    parts += [f"{k} {constant[k]}" for k in ("matmul", "rank", "tokens", "calls") if k in constant]
    rates = [f"{constant[k]} {k}" for k in ("GFLOP/s", "GB/s") if k in constant]
    return ", ".join(parts) + (f"; ceilings {' and '.join(rates)}." if rates else ".")


def _place(rows: Sequence[Row]) -> list[str]:
    row = rows[0]
    day = f"{datetime.fromisoformat(row['time']):%Y-%m-%d}"
    return [day, str(row["device"]), f"{row['threads']} threads", f"torch {row['torch']}"]


def _subject(rows: Sequence[Row]) -> list[str]:
    constant = _constant(rows)
    return [str(constant[k]) for k in ("model", "dtype") if k in constant]


def _constant(rows: Sequence[Row]) -> Row:
    """What all rows say alike of where and how they were measured."""
    row = rows[0]
    return {k: row[k] for k in WHERE if k in row and all(r.get(k) == row[k] for r in rows)}


# -- tables --------------------------------------------------------------------------------------


def table(results: Path, name: str) -> str:
    """What stands between the marks of the table ``name``.

    Raises:
        ValueError: there is no such table, or its rows are malformed.
    """
    if name == "summary":
        return _summary(results)
    if name == "gpu":
        return _gpu(results)
    path = results / f"{name}.jsonl"
    if not path.is_file():
        return _missing(results, name)
    rows = latest(path)
    return f"{markdown(_with_unit(rows, _columns(rows)))}\n\n{_line(rows)}"


def _missing(results: Path, name: str) -> str:
    script = f"benchmarks/bench_{name}.py"
    if not (results.parents[1] / script).is_file():
        raise ValueError(f"there is no table {name!r}: neither {name}.jsonl nor {script}")
    return f"Not measured yet: `python {script}`."


def _with_unit(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """The cells of ``columns``, times in the unit that suits the shortest."""
    scale, unit = (1000, "ms") if min(row["seconds"] for row in rows) < SHORT else (1, "seconds")
    shown = []
    for row in rows:
        picked = {k: row.get(k) for k in columns} | {"seconds": scale * float(row["seconds"])}
        shown.append({unit if k == "seconds" else k: v for k, v in cells(picked).items()})
    return shown


def _summary(results: Path) -> str:
    """The main comparisons, each with the rival of its file in the same row."""
    shown, lines = [], {}
    for name, rival, what in SUMMARY:
        if not (results / f"{name}.jsonl").is_file():
            return _missing(results, name)
        rows = latest(results / f"{name}.jsonl")
        lines[f"{', '.join([*_place(rows), *_subject(rows)])}."] = None
        base, ours = rows[0], next((r for r in rows if r["rival"] == rival), None)
        if ours is None:
            raise ValueError(f"{name}.jsonl: its latest run has no rival {rival!r}")
        row = {"what": what, f"{base['rival']}, s": _cell("seconds", base["seconds"])}
        row["ours, s"] = _cell("seconds", ours["seconds"])
        row |= cells({k: ours.get(k) for k in ("spread", "times faster")})
        both = [_cell("extra MiB", r.get("extra MiB")) for r in (ours, base)]
        row["extra MiB"] = f"{both[0]} against {both[1]}" if ours.get("extra MiB") else "-"
        shown.append(row)
    return "\n\n".join([markdown(shown), "<br>\n".join(lines)])


def _gpu(results: Path) -> str:
    """Goals, predictions and what every recorded run reached, the latest first, by its folder."""
    runs = []
    for path in sorted(results.glob("gpu*/gpu.json")):
        name = path.relative_to(results.parents[1])
        try:
            run = json.loads(path.read_text(encoding="utf-8"))
            place = run["stages"]["manifest"]
            named = f"{run['time'][:10]}, {place['device']}, torch {place['torch']}"
            rehearsal, commit = run["rehearsal"], place["commit"]
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} is not the file of a GPU run: {error!r}") from error
        if rehearsal:
            raise ValueError(f"{name} is a rehearsal on a CPU, no result")
        line = f"{named}, commit {commit}; `{name}`"
        runs.append((run["time"], path.parent.name, line, run))
    if not runs:
        rows = roofline.goals(roofline.NO_RUN)
        return f"{markdown(rows)}\n\nGoals and predictions only: {roofline.NOT_YET}."
    runs.sort(key=lambda run: run[0], reverse=True)
    table: list[dict[str, Any]] = []
    for _, folder, _, run in runs:
        goals = roofline.goals(run)
        table = table or [{k: v for k, v in row.items() if k != "reached"} for row in goals]
        for row, goal in zip(table, goals, strict=True):
            row[folder.removeprefix("gpu-")] = (
                "-" if goal["reached"] == roofline.NOT_HERE else goal["reached"]
            )
    lines = "<br>\n".join(line for _, _, line, _ in runs)
    return f"{markdown(table)}\n\n{lines}"


# -- pages ---------------------------------------------------------------------------------------


def pages(root: Path) -> list[Path]:
    """The files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def generated(root: Path, page: Path) -> str:
    """The text of ``page`` with its tables from the results.

    Raises:
        ValueError: a mark without its other half, an unknown table, or malformed rows.
    """
    text = page.read_text(encoding="utf-8")
    found = len(MARKED.findall(text))
    if not found == text.count("<!-- table: ") == text.count("<!-- end -->"):
        raise ValueError(f"{page.relative_to(root)}: a table without its end, or an end alone")
    results = root / "benchmarks/results"
    return MARKED.sub(lambda m: f"{m[1]}{table(results, m[2])}\n{m[4]}", text)


def outdated(root: Path) -> dict[Path, str]:
    """The pages whose tables differ from the results, with what they should say."""
    texts = {page: generated(root, page) for page in pages(root)}
    return {page: text for page, text in texts.items() if text != page.read_text(encoding="utf-8")}


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the pages, or only say which differ; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    check = parser.parse_args(argv).check
    try:
        wrong = outdated(ROOT)
    except ValueError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    for page, text in wrong.items():
        name = page.relative_to(ROOT)
        if check:
            print(f"{name} differs from benchmarks/results: run benchmarks/report.py")
        else:
            page.write_text(text, encoding="utf-8")
            print(f"{name} rewritten")
    return 1 if check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
