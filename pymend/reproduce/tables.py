"""The paper's tables of scores: their cells, their layout, and the orderings that they show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pymend.algorithms.registry import METHODS, RIVALS
from pymend.report.tables import number
from pymend.reproduce.page import markdown, write_page
from pymend.reproduce.plan import VARIANTS, Run, Scale

Results = Mapping[Run, Mapping[str, Any]]

CACHE = {1.0: "Cache eps*", 0.5: "Cache eps*/2", 2.0: "Cache 2 eps*"}
PROTOCOL = (
    "Edit success is `es_outer`, what the paper's tables were made with: teacher-forced exact "
    "match on one random rephrase of each edit. Drawdown is of the exact match on the true "
    "answers of locality prompts, on Wikitext (and zsRE with SmolLM2) of the perplexity of "
    "locality texts. In brackets 95 % intervals by bootstrap, in which records of a subject, or "
    "of a group of simultaneous edits, are drawn together (Wikitext passages one by one, though a "
    "fact has about two; groups share some facts). Steps of an editor for several edits come "
    "after those for fewer. Seconds per edit were taken beside the other runs of `--jobs`; extra "
    "MiB are the peak memory of an edit over the loaded model and editor, where `memory` was "
    "measured."
)


@dataclass(frozen=True)
class Row:
    """One row of a table: what is run on each setup, and for Cache which threshold is shown."""

    label: str
    algorithm: str
    variant: str = ""
    n_edits: int = 1
    factor: float = 1.0

    def run(self, setup: str) -> Run:
        """The run whose result stands in the row."""
        return Run(setup, self.algorithm, self.variant, self.n_edits)


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper's table shows.

    Args:
        better: the row with the higher edit success, or the lower drawdown if ``drawdown``.
        columns: only those of the paper's columns that contain this.
    """

    better: str
    worse: str
    columns: str = ""
    drawdown: bool = False


@dataclass(frozen=True)
class Table:
    """A table of scores."""

    title: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True)
class Cell:
    """Scores of one run in a table."""

    success: float
    success_interval: tuple[float, float]
    drawdown: float
    drawdown_interval: tuple[float, float]
    metrics: Mapping[str, Any]


MEND = Row("MEND", "mend")
CACHES = tuple(Row(label, "cache", factor=factor) for factor, label in CACHE.items())


def tables(scale: Scale) -> dict[str, Table]:
    """The tables of scores that ``scale`` has setups for."""
    rivals = [Row(METHODS[name].title, name) for name in RIVALS if name != "cache"]
    over = tuple(Claim("MEND", name) for name in ("FT", "FT+KL"))
    cheaper = Claim("MEND", "FT", "Wikitext", drawdown=True)
    several = tuple(
        Row(f"{METHODS[name].title} {k}", name, n_edits=k)
        for name in ("enn", "mend")
        for k in scale.batches
    )
    ablations = tuple(Row(v, "mend", v) for v in VARIANTS if v not in ("", "attention"))
    known = {
        "table3": Table(
            "Large models",
            (*(row for row in rivals if row.algorithm != "enn"), MEND),
            (*over, Claim("MEND", "KE"), cheaper),
        ),
        "table4": Table(
            "Small models",
            (*rivals, CACHES[0], MEND),
            (*over, Claim("MEND", "KE", "Wikitext"), cheaper),
        ),
        "table5": Table(
            "Simultaneous edits",
            several,
            tuple(Claim(f"MEND {k}", f"ENN {k}") for k in scale.batches if k >= 25),
        ),
        "table6": Table(
            "Ablations of MEND",
            (*ablations, MEND),
            tuple(
                Claim("MEND", variant, "Wikitext")
                for variant in ("no normalisation", "no identity init")
            ),
        ),
        "table9": Table(
            "Attention matrices in place of the MLP's",
            (Row("attention", "mend", "attention"), MEND),
            (Claim("MEND", "attention"),),
        ),
        "table11": Table(
            "The Cache editor",
            (MEND, *CACHES),
            (
                Claim("MEND", CACHE[1.0], "Wikitext"),
                Claim("MEND", CACHE[1.0], "zsRE-hard"),
                Claim(CACHE[1.0], CACHE[0.5], "FEVER"),
                Claim(CACHE[1.0], CACHE[0.5], "zsRE"),
                Claim(CACHE[1.0], CACHE[2.0], drawdown=True),
            ),
        ),
    }
    return {name: table for name, table in known.items() if name in scale.tables}


def needed(scale: Scale, name: str, table: Table) -> list[Run]:
    """The runs that ``table`` shows."""
    return list(dict.fromkeys(row.run(s) for s in scale.tables[name] for row in table.rows))


def paper(name: str) -> dict[str, dict[str, str]]:
    """The paper's numbers: column, row, "edit success / drawdown" as printed."""
    file = resources.files("pymend.reproduce") / "paper.json"
    return dict(json.loads(file.read_text(encoding="utf-8")).get(name, {}))


def printed(cell: str) -> tuple[float, float]:
    """The two numbers of a cell of the paper, its bounds taken as numbers."""
    success, drawdown = (float(x.strip().lstrip("<>")) for x in cell.split("/"))
    return success, drawdown


def cell(scale: Scale, results: Results, row: Row, setup: str) -> Cell | None:
    """What stands in ``row`` for ``setup``; None if there is none, as of what diverged.

    Raises:
        ValueError: the records had nothing to score.
    """
    result = results[row.run(setup)]
    if "failed" in result:
        return None
    metrics = result.get("metrics")
    if metrics is None:
        metrics = next(t["metrics"] for t in result["thresholds"] if t["factor"] == row.factor)
    kind = scale.setups[setup].drawdown
    spread = metrics["intervals_95"]
    for name in ("es_outer", kind):
        if spread[name] is None:
            what = "no" if metrics[name] is None else "no interval, of several groups, of"
            raise ValueError(f"{setup}: its test records give {what} {name.replace('_', ' ')}")
    return Cell(
        metrics["es_outer"], tuple(spread["es_outer"]), metrics[kind], tuple(spread[kind]), metrics
    )


def verdict(claim: Claim, better: Cell | None, worse: Cell | None) -> tuple[str, str]:
    """Whether a claim holds, and the numbers.

    It holds clearly if the intervals do not touch. A run that diverged loses.
    """
    if better is None or worse is None:
        return "holds" if better else "does not hold", "diverged"
    part = "drawdown" if claim.drawdown else "success"
    values = [getattr(x, part) for x in (better, worse)]
    (low, high), (low_worse, high_worse) = spans = [
        getattr(x, f"{part}_interval") for x in (better, worse)
    ]
    if claim.drawdown:
        holds, clear = values[0] < values[1], high < low_worse
    else:
        holds, clear = values[0] > values[1], low > high_worse
    shown = [f"{number(v)} {_span(s)}" for v, s in zip(values, spans, strict=True)]
    numbers = " against ".join(shown)
    if not holds:
        return "does not hold", numbers
    return "holds" if clear else "holds, intervals overlap", numbers


def _span(interval: tuple[float, float]) -> str:
    return f"[{number(interval[0])}, {number(interval[1])}]"


def write(
    scale: Scale,
    name: str,
    table: Table,
    results: Results,
    memory: Mapping[Run, float | None],
    folder: Path,
    command: str,
    seed: int,
) -> Path:
    """Write ``name``.md, .csv and .json into ``folder``; return the first.

    Args:
        memory: extra peak memory of an edit [MiB], of runs where it was measured.
        command: makes this table again.
    """
    columns = scale.tables[name]
    cells = {
        (row.label, setup): cell(scale, results, row, setup)
        for setup in columns
        for row in table.rows
    }
    body = [*_layout(scale, name, table, cells), ""]
    claims = _claims(columns, table, cells, paper(name))
    if claims:
        body += ["## What the paper's table shows", ""]
        body += markdown(("where", "claim", "here", "edit success or drawdown"), claims)
        body.append("")
    details = _details(scale, table, columns, cells, results, memory)
    sheet = list(details[0]), [[*line.values()] for line in details]
    body += ["## Every run", "", *markdown(*sheet), "", f"![{table.title}]({name}.png)"]
    runs = {row.run(s).name: results[row.run(s)] for s in columns for row in table.rows}
    note = f"{scale.note} {PROTOCOL} Seed {seed}."
    source = {"paper": paper(name), "runs": runs}
    return write_page(folder, name, table.title, note, command, body, sheet, source)


def _layout(
    scale: Scale, name: str, table: Table, cells: Mapping[tuple[str, str], Cell | None]
) -> list[str]:
    """The table as in the paper: edit success / drawdown, the paper's own beside each."""
    columns, theirs = scale.tables[name], paper(name)
    head = [""]
    for setup, column in columns.items():
        head += [f"{Path(scale.setups[setup].model).name}, {setup}"]
        head += [f"paper: {column}"] if column else []
    rows = []
    for row in table.rows:
        line = [row.label]
        for setup, column in columns.items():
            found = cells[row.label, setup]
            ours = (
                "diverged"
                if found is None
                else f"{number(found.success)} {_span(found.success_interval)} / "
                f"{number(found.drawdown)} {_span(found.drawdown_interval)}"
            )
            line += [ours, *([theirs.get(column, {}).get(row.label, "-")] if column else [])]
        rows.append(line)
    return markdown(head, rows)


def _claims(
    columns: Mapping[str, str],
    table: Table,
    cells: Mapping[tuple[str, str], Cell | None],
    theirs: Mapping[str, Mapping[str, str]],
) -> list[tuple[str, str, str, str]]:
    rows = []
    for setup, column in columns.items():
        shown = theirs.get(column, {})
        for claim in table.claims:
            if claim.columns in column and claim.better in shown and claim.worse in shown:
                said = "costs less than" if claim.drawdown else "over"
                sides = cells[claim.better, setup], cells[claim.worse, setup]
                rows.append(
                    (setup, f"{claim.better} {said} {claim.worse}", *verdict(claim, *sides))
                )
    return rows


def _details(
    scale: Scale,
    table: Table,
    columns: Mapping[str, str],
    cells: Mapping[tuple[str, str], Cell | None],
    results: Results,
    memory: Mapping[Run, float | None],
) -> list[dict[str, Any]]:
    """One line for each cell, with every score."""
    lines = []
    for setup in columns:
        for row in table.rows:
            found = cells[row.label, setup]
            metrics = found.metrics if found else {}
            spread = metrics.get("intervals_95", {})
            line: dict[str, Any] = {"setup": setup, "row": row.label, "n": metrics.get("n", 0)}
            scores = ("es_outer", "edit_success", "generality", "locality")
            for score in (*scores, scale.setups[setup].drawdown):
                title = "drawdown" if score not in scores else score.replace("_", " ")
                line[title] = number(metrics.get(score))
                line[f"{title}, 95 %"] = _span(tuple(spread[score])) if spread.get(score) else "-"
            settings = results[row.run(setup)]["spec"]["settings"]
            train = settings["train"]
            for setting in ("steps", "batch_size", "c_edit"):
                line[setting] = train[setting] if train else "-"
            if row.n_edits > 1:
                before = [x["train"]["steps"] for x in results[row.run(setup)]["spec"]["before"]]
                line["steps"] = " + ".join(map(str, [*before, line["steps"]]))
            line["seconds per edit"] = (
                number(1 / metrics["edits_per_second"]) if metrics else "diverged"
            )
            line["extra MiB"] = number(memory.get(row.run(setup)), 1)
            lines.append(line)
    return lines
