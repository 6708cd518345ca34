"""Plain text tables."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# A rule below the headers, and no other line.
RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
UNKNOWN = 120, 24  # columns and lines where there is no terminal


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table, as wide as the terminal at most; cells are wrapped, never cut.

    A line break in a cell would break the table and is shown as a slash.
    """
    grid = Table(box=RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        grid.add_column(Text(header), overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell.replace("\n", " / ")) for cell in row))
    text = io.StringIO()
    Console(file=text, width=shutil.get_terminal_size(UNKNOWN).columns).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def number(value: float | None, digits: int = 3) -> str:
    """A score, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def blockwise(names: Sequence[str]) -> list[str]:
    """Weight names, those of consecutive blocks that else agree as one: ``h.9-11.mlp.c_fc``."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for name in names:
        head, block, rest = (*re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1), "", "")[:3]
        blocks.setdefault((head, rest), []).append(block)
    return [
        f"{head}{'-'.join(dict.fromkeys((found[0], found[-1])))}{rest}"
        for (head, rest), found in blocks.items()
    ]


def memory(count: float) -> str:
    """A number of bytes in a unit that reads well."""
    if count < 2**20:
        return f"{count / 2**10:.0f} KiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _read_rows(reads: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of what a person reads."""
    rows = []
    for kind in ("prompt", "rephrase"):
        begins = number(reads["begins_with_target"][kind]["value"])
        loops, before = (number(reads[key][kind]["value"]) for key in ("loops", "loops_before"))
        rows.append((f"answer begins with the target, {kind}", begins, ""))
        rows.append((f"target three times or more, {kind}", loops, f"before: {before}"))
    before = number(reads["entropy_before"]["value"], 2)
    rows.append(("n-gram entropy, bits", number(reads["entropy"]["value"], 2), f"before: {before}"))
    kept = reads["neighbours_kept"]
    what = f"neighbours' first {kept['tokens']} tokens as before"
    return [*rows, (what, number(kept["value"]), f"of {reads['records']} records")]


def metrics_table(metrics: Mapping[str, Any], extra: Sequence[tuple[str, str]] = ()) -> str:
    """The table that ends an evaluation, from what ``Metrics.to_dict`` gives.

    Args:
        extra: further rows (what, value).
    """
    rows = []
    for name in ("edit_success", "generality", "locality", "accuracy_drawdown"):
        bounds = metrics["intervals_95"][name]
        spread = "" if bounds is None else f"95 %: {bounds[0]:.3f} to {bounds[1]:.3f}"
        rows.append((name.replace("_", " "), number(metrics[name]), spread))
    text = metrics["perplexity"]
    change = "-" if text["before"] is None else f"{text['before']:.2f} -> {text['after']:.2f}"
    rows.append(("perplexity drawdown", number(metrics["perplexity_drawdown"]), change))
    rows.append(("edits", str(metrics["n"]), ""))
    rows.append(("edits per second", number(metrics["edits_per_second"], 2), ""))
    rows.append(("evaluation, seconds", number(metrics["seconds"], 1), ""))
    rows += _read_rows(metrics["reads"]) if "reads" in metrics else []
    rows += [(what, value, "") for what, value in extra]
    rows.append(("peak memory", memory(metrics["peak_memory_bytes"]), ""))
    return table(("measure", "value", ""), rows)
