"""The tables as pictures: scores, simultaneous edits, thresholds, memory and time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymend.algorithms.registry import METHODS
from pymend.files import replacing
from pymend.report.plots import BLUE, GREEN, LEGEND, RED
from pymend.reproduce.plan import Scale
from pymend.reproduce.tables import Results, Row, Table, cell, paper, printed

GREY = "#888888"
OUT_OF_MEMORY = "out of memory"


@contextmanager
def _figure(path: Path, panels: int, title: str, width: float = 5.0) -> Iterator[Any]:
    """Axes side by side, saved at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    yield axes
    for ax in axes:
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color="#444444")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def draw(scale: Scale, name: str, table: Table, results: Results, path: Path) -> None:
    """The picture that belongs to a table of scores."""
    special = {"table5": _batches, "table11": _thresholds}
    special.get(name, _scores)(scale, name, table, results, path)


def _scores(scale: Scale, name: str, table: Table, results: Results, path: Path) -> None:
    """Edit success of every row with its interval, the paper's beside it; a panel a column."""
    columns, theirs = scale.tables[name], paper(name)
    with _figure(path, len(columns), f"{name}: edit success (bars: 95 % intervals)") as axes:
        labels = [row.label for row in table.rows][::-1]
        for ax, (setup, column) in zip(axes, columns.items(), strict=True):
            for y, row in enumerate(reversed(table.rows)):
                found = cell(scale, results, row, setup)
                if found:
                    low, high = found.success_interval
                    ax.plot([low, high], [y, y], color=BLUE, linewidth=2)
                    ax.plot([found.success], [y], "o", color=BLUE, label="here" if not y else None)
                given = theirs.get(column, {}).get(row.label)
                if given:
                    label = "paper" if row is table.rows[-1] else None
                    ax.plot([printed(given)[0]], [y + 0.2], "x", color=GREY, label=label)
            ax.set_yticks(range(len(labels)), labels)
            ax.set_xlim(-0.03, 1.03)
            ax.set_title(f"{Path(scale.setups[setup].model).name}, {setup}", fontsize=9)
            ax.legend(loc="lower left", bbox_to_anchor=(-0.02, -0.25), ncols=2, **LEGEND)


def _batches(scale: Scale, name: str, table: Table, results: Results, path: Path) -> None:
    """Edit success and drawdown over the number of simultaneous edits."""
    [(setup, column)] = scale.tables[name].items()
    theirs = paper(name).get(column, {})
    with _figure(path, 2, f"{name}: simultaneous edits, {scale.setups[setup].model}") as axes:
        for algorithm, colour in (("mend", BLUE), ("enn", RED)):
            rows = [row for row in table.rows if row.algorithm == algorithm]
            pairs = [(row.n_edits, cell(scale, results, row, setup)) for row in rows]
            seen = [(k, c) for k, c in pairs if c]
            given = [(r.n_edits, *printed(theirs[r.label])) for r in rows if r.label in theirs]
            label = METHODS[algorithm].title
            for ax, part in zip(axes, ("success", "drawdown"), strict=True):
                at = [k for k, _ in seen]
                ax.plot(at, [getattr(c, part) for _, c in seen], "o-", color=colour, label=label)
                bounds = [getattr(c, f"{part}_interval") for _, c in seen]
                ax.fill_between(
                    at, [b[0] for b in bounds], [b[1] for b in bounds], color=colour, alpha=0.15
                )
                place = 1 if part == "success" else 2
                values = [g[place] for g in given]
                ks = [g[0] for g in given]
                ax.plot(ks, values, "x--", color=colour, alpha=0.5, label=f"{label}, paper")
        for ax, label in zip(axes, ("edit success", "accuracy drawdown"), strict=True):
            ax.set_xlabel("edits at once")
            ax.set_ylabel(label)
            ax.legend(**LEGEND)
        axes[0].set_ylim(-0.02, 1.02)


def _thresholds(scale: Scale, name: str, table: Table, results: Results, path: Path) -> None:
    """Edit success and drawdown of Cache over its threshold, MEND's as lines."""
    columns = scale.tables[name]
    mend = table.rows[0]
    with _figure(path, len(columns), f"{name}: Cache over its threshold", 4.2) as axes:
        for ax, setup in zip(axes, columns, strict=True):
            looks = results[Row("", "cache").run(setup)].get("thresholds")
            if not looks:  # no eps* where MEND diverged
                continue
            kind = scale.setups[setup].drawdown
            own = cell(scale, results, mend, setup)
            ax.set_ylim(-0.05, 1.05)
            cost = ax
            if kind.startswith("perplexity"):  # it has no bound, and so an axis of its own
                cost = ax.twinx()
                cost.set_yscale("symlog", linthresh=1)
                cost.set_ylabel("perplexity drawdown", color=RED)
                cost.spines["right"].set_visible(True)
            parts = ((ax, "es_outer", "edit success", BLUE), (cost, kind, "drawdown", RED))
            lines = []
            for side, score, label, colour in parts:
                values = [look["metrics"][score] for look in looks]
                factors = [look["factor"] for look in looks]
                lines += side.plot(factors, values, "o-", color=colour, label=f"Cache, {label}")
                if own:
                    level = own.success if score == "es_outer" else own.drawdown
                    mark = f"MEND, {label}"
                    lines += [side.axhline(level, color=colour, linestyle="--", label=mark)]
            # Below the curves, never on them.
            if ax is axes[0]:
                ax.legend(
                    handles=lines,
                    loc="upper left",
                    bbox_to_anchor=(-0.02, -0.2),
                    ncols=2,
                    **LEGEND,
                )
            ax.set_xscale("log", base=2)
            ax.set_xlabel(f"eps / eps*   (eps* = {_star(looks):.2g})")
            ax.set_title(f"{Path(scale.setups[setup].model).name}, {setup}", fontsize=9)


def _star(looks: Sequence[Mapping[str, Any]]) -> float:
    return float(looks[0]["eps"] / looks[0]["factor"])


def bars(
    title: str, unit: str, values: Mapping[str, Mapping[str, float | None]], path: Path
) -> None:
    """A panel for each key of ``values``, in it a bar for each of its names, with its number.

    Args:
        values: None is of what did not fit into memory, which the panel says in words.
    """
    with _figure(path, len(values), title, 4.2) as axes:
        for ax, (panel, named) in zip(axes, values.items(), strict=True):
            lengths = list(named.values())[::-1]
            drawn = ax.barh(list(named)[::-1], [x or 0.0 for x in lengths], color=GREEN)
            labels = [OUT_OF_MEMORY if x is None else f"{x:.3g}" for x in lengths]
            ax.bar_label(drawn, labels, padding=3, fontsize=8)
            ax.margins(x=0.15)
            ax.set_axisbelow(True)
            ax.set_xlabel(unit)
            ax.set_title(panel, fontsize=9)
