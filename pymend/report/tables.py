"""Plain text tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int] | None = None
) -> str:
    """A text table; cells longer than their column's ``widths`` are wrapped."""
    limits = widths or [60] * len(headers)
    lines = [
        [_wrapped(cell, limit) for cell, limit in zip(row, limits, strict=True)]
        for row in (headers, *rows)
    ]
    used = [max(len(part) for row in lines for part in row[i]) for i in range(len(headers))]
    out = []
    for row in lines:
        for k in range(max(map(len, row))):
            cells = (cell[k] if k < len(cell) else "" for cell in row)
            out.append("  ".join(c.ljust(w) for c, w in zip(cells, used, strict=True)).rstrip())
    head = max(map(len, lines[0]))
    return "\n".join([*out[:head], "  ".join("-" * w for w in used), *out[head:]])


def _wrapped(cell: str, width: int) -> list[str]:
    """The lines of a cell; a line break in it would break the table and is shown as a slash."""
    return textwrap.wrap(cell.replace("\n", " / "), width) or [""]


def number(value: float | None, digits: int = 3) -> str:
    """A score, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def blockwise(names: Sequence[str]) -> list[str]:
    """Weight names, those of consecutive blocks that else agree as one: ``h.9-11.mlp.c_fc``."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for name in names:
        head, block, rest = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        blocks.setdefault((head, rest), []).append(block)
    return [
        f"{head}{'-'.join(dict.fromkeys((found[0], found[-1])))}{rest}"
        for (head, rest), found in blocks.items()
    ]


def memory(count: float) -> str:
    """A number of bytes in a unit that reads well."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


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
    rows += [(what, value, "") for what, value in extra]
    rows.append(("peak memory", memory(metrics["peak_memory_bytes"]), ""))
    return table(("measure", "value", ""), rows)
