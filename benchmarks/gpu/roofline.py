"""Tables and a roofline plot from the results of a GPU run.

    python benchmarks/gpu/roofline.py FOLDER  # writes roofline.md and roofline.png beside gpu.json

Predictions were written down before any run (``predictions.json``). Floors use the ceilings that
the same run measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PREDICTIONS = Path(__file__).with_name("predictions.json")
NOT_YET = "not yet run on a GPU"
NOT_HERE = "not measured in this run"
REHEARSAL = "REHEARSAL on a CPU at tiny sizes: nothing here is a measurement."
NO_RUN = {"rehearsal": False, "stages": {}}
OURS = ("F ours graph", "E ours")
Results = Mapping[str, Any]
Row = dict[str, Any]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """``rows`` as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [["-" if v is None else str(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- reading -------------------------------------------------------------------------------------


def rows_of(results: Results, stage: str) -> list[Row]:
    """The timed rows of a stage."""
    rows = results.get("stages", {}).get(stage, {}).get("rows", [])
    return [row for row in rows if "rival" not in row or "seconds" in row]


def find(rows: Iterable[Row], **wanted: Any) -> Row:
    """The row with these entries.

    Raises:
        LookupError: none was measured.
    """
    for row in rows:
        if wanted.items() <= row.items():
            return row
    raise LookupError(str(wanted))


def floor(row: Row, results: Results) -> float:
    """Seconds that the phases of an edit, or one op, take at this device's measured ceilings."""
    ceilings = results["stages"]["ceilings"]
    rate = ceilings["bfloat16" if row["dtype"] == "bfloat16" else "tf32"]
    return sum(
        max(phase["bytes"] / ceilings["copy"], phase["flops"] / rate)
        for phase in row.get("phases", [row])
    )


# -- goals ---------------------------------------------------------------------------------------


def _edit(results: Results, model: str, rival: str, dtype: str, stage: str = "edit") -> Row:
    return find(rows_of(results, stage), model=model, rival=rival, dtype=dtype, N=32)


def _ours(results: Results, model: str, dtype: str) -> Row:
    """The better of our two ways; a graph replays what the eager way does."""
    rows = [_edit(results, model, rival, dtype) for rival in OURS]
    return min(rows, key=lambda row: row["seconds"])


def _share(results: Results, model: str) -> float:
    row = _ours(results, model, "bfloat16")
    return 100 * floor(row, results) / row["seconds"]


def _against(results: Results, model: str, rival: str, theirs: str, dtype: str) -> float:
    base = _edit(results, model, rival, theirs)["seconds"]
    return base / _ours(results, model, dtype)["seconds"]


def _compiled(results: Results, model: str) -> float:
    pair = [
        _edit(results, model, rival, "bfloat16", "compiled")["seconds"]
        for rival in ("C compiled graph", "F ours graph")
    ]
    return pair[0] / pair[1]


def _op(results: Results, rival: str, ours: str = "ours graph", **wanted: Any) -> float:
    rows = rows_of(results, "ops")
    base = find(rows, rival=rival, **wanted)["seconds"]
    return base / find(rows, rival=ours, **wanted)["seconds"]


def _update(results: Results, model: str, rows: int) -> float:
    return _op(results, "addmm_ graph", op="rank_update", model=model, N=rows, dtype="bfloat16")


def _system(results: Results, model: str, side: str, what: str) -> Row:
    return find(rows_of(results, "system"), model=model, side=side, what=what)


def _step(results: Results, what: str) -> float:
    base = _system(results, "GPT-Neo 2.7B", "official", "step")["seconds"]
    return base / _system(results, "GPT-Neo 2.7B", "ours", f"step, {what}")["seconds"]


def _peak(results: Results) -> float:
    # A rehearsal has no peak to read.
    return (_system(results, "GPT-J 6B", "ours", "edit")["peak bytes"] or 0) / 1e6


def _evaluated(results: Results, what: str) -> float:
    return _system(results, "GPT-J 6B", "ours", f"evaluate, {what}")["per second"]


def _adam(results: Results, steps: int) -> float:
    return _op(results, "addmm, clip, fused Adam graph", op="factored_adam", what=f"acc {steps}")


A, LEAN, B = "A official", "A' lean", "B factored"
F32, TF32, BF16 = "float32", "tf32", "bfloat16"
J, G2, L3 = "GPT-J 6B", "GPT-2 small", "Llama-3-8B"
REACHED: dict[str, Sequence[Callable[[Results], float]]] = {  # in the order of predictions.json
    "G1": (lambda r: _share(r, J), lambda r: _share(r, L3)),
    "G1b": (lambda r: _share(r, G2),),
    "G2": (lambda r: _against(r, J, A, F32, F32), lambda r: _against(r, G2, A, F32, F32)),
    "G2t": (lambda r: _against(r, J, A, TF32, TF32), lambda r: _against(r, G2, A, TF32, TF32)),
    "G2b": (lambda r: _against(r, J, A, F32, BF16), lambda r: _against(r, G2, A, F32, BF16)),
    "G3": (lambda r: _against(r, J, LEAN, F32, F32),),
    "G4": (lambda r: _against(r, J, B, BF16, BF16), lambda r: _against(r, G2, B, BF16, BF16)),
    "G5": (lambda r: _compiled(r, J), lambda r: _compiled(r, G2)),
    "G6": (
        lambda r: _update(r, J, 32),
        lambda r: _update(r, G2, 32),
        lambda r: _update(r, J, 1024),
    ),
    "G7": (lambda r: _adam(r, 1), lambda r: _adam(r, 10)),
    "G8": (lambda r: _op(r, "official loop", "ours", op="moments"),),
    "G9": tuple(lambda r, w=w: _step(r, w) for w in ("sequential", "batched", "cached")),
    "G10": (_peak,),
    "G12": tuple(lambda r, w=w: _evaluated(r, w) for w in ("sequential", "batched", "cached")),
}


def goals(results: Results) -> list[Row]:
    """Goal, prediction and what was reached. A rehearsal shows only that it could be worked out."""
    taken: dict[str, int] = {}
    table = []
    for goal in json.loads(PREDICTIONS.read_text())["goals"]:
        place = taken.get(goal["id"], 0)
        taken[goal["id"]] = place + 1
        try:
            value = REACHED[goal["id"]][place](results)
            reached = f"{NOT_YET} (rehearsed)"
            if not results["rehearsal"]:
                reached = f"{value:.3g} {goal['unit']}, {_grade(goal, value)}"
        except LookupError:
            reached = NOT_HERE if results["stages"] else NOT_YET
        row = {"goal": goal["id"], "what": goal["what"], "unit": goal["unit"]}
        row |= {key: goal[key] for key in ("must", "target", "stretch")}
        table.append({**row, "predicted": _range(goal["predicted"]), "reached": reached})
    return table


def _range(ends: Sequence[float | None] | None) -> str:
    if not ends:
        return "-"
    low, high = ends
    return f"{low:g}" if low == high else f"{low:g}+" if high is None else f"{low:g} to {high:g}"


def _grade(goal: Row, value: float) -> str:
    """The highest mark that ``value`` reaches; of memory, less is better."""
    for mark in ("stretch", "target", "must"):
        bound = goal[mark]
        if bound is not None and (value <= bound if goal["unit"] == "MB" else value >= bound):
            return mark
    return "missed"


# -- report --------------------------------------------------------------------------------------


def table_of(results: Results, stage: str) -> list[Row]:
    """Time, share of the floor and error of every rival."""
    table = []
    for row in rows_of(results, stage):
        named = [str(row[k]) for k in ("op", "model", "what", "dtype") if k in row]
        share = floor(row, results) / row["seconds"] if "bytes" in row else None
        peak = row.get("peak bytes")
        table.append(
            {
                "case": ", ".join(named),
                "N": row.get("N"),
                "who": row.get("rival", row.get("side")),
                "us, cold": f"{row['seconds'] * 1e6:.1f}",
                "us, warm": f"{row['warm seconds'] * 1e6:.1f}" if "warm seconds" in row else None,
                "spread": f"{row['spread']:.1%}",
                "of floor": f"{share:.0%}" if share is not None else None,
                "error": f"{row['error']:.1e}" if "error" in row else None,
                "peak MiB": f"{peak / 2**20:.0f}" if peak is not None else None,
            }
        )
    return table


def text(results: Results) -> str:
    """The whole report."""
    parts = ["# GPU run", ""]
    if not results:
        results = NO_RUN
    elif results["rehearsal"]:
        parts += [f"**{REHEARSAL}**", ""]
    stages = results["stages"]
    if stages:
        where = {k: v for k, v in stages["manifest"].items() if not isinstance(v, dict)}
        parts += [", ".join(f"{k} {v}" for k, v in where.items()), ""]
        rows = [
            {"stage": name, "status": s["status"], "s": s.get("took"), "note": _note(s)}
            for name, s in stages.items()
        ]
        rows += [
            {"stage": name, "status": "left out", "s": None, "note": why}
            for name, why in results["left out"].items()
        ]
        parts += [markdown(rows), ""]
    parts += ["## Goals", "", markdown(goals(results)), ""]
    if "float32" in stages.get("ceilings", {}):
        c = stages["ceilings"]
        rates = ", ".join(f"{k} {c[k] / 1e12:.3g} TFLOP/s" for k in ("bfloat16", "tf32", "float32"))
        parts += [f"Ceilings: copy {c['copy'] / 1e12:.3g} TB/s (read + write), {rates}.", ""]
        for stage in ("edit", "compiled", "ops", "system"):
            if table := table_of(results, stage):
                parts += [f"## {stage}", "", markdown(table), ""]
    return "\n".join(parts)


def _note(stage: Mapping[str, Any]) -> str:
    last = stage.get("traceback", "").strip().splitlines()[-1:]
    words = stage.get("reason") or (last[0] if last else "")
    cut = f"{stage['cut']} cases were cut" if stage.get("cut") else ""
    return "; ".join(x for x in (words, cut) if x).replace("|", "/")[:160]


def plot(results: Results, path: Path) -> bool:
    """FLOP/s over FLOP/byte below the measured roofs; False: no matplotlib, or no roof."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    ceilings = results["stages"].get("ceilings", {})
    if "float32" not in ceilings:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    intensity = [2.0**i for i in range(-1, 12)]
    for name in ("bfloat16", "tf32", "float32"):
        roof = [min(ceilings["copy"] * x, ceilings[name]) for x in intensity]
        axes.plot(intensity, roof, linewidth=1, label=f"roof, {name}")
    for stage, marker, palette in (("edit", "o", "tab10"), ("ops", "^", "Dark2")):
        rows = rows_of(results, stage)
        for i, rival in enumerate(dict.fromkeys(row["rival"] for row in rows)):
            mine = [row for row in rows if row["rival"] == rival]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in mine],
                [row["flops"] / row["seconds"] for row in mine],
                s=24 if "ours" in rival else 8,
                marker=marker,
                color=colormaps[palette](i),
                label=f"{stage}: {rival}",
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte, at least", ylabel="FLOP/s")
    device = results["stages"]["manifest"].get("device", "")
    axes.set_title(REHEARSAL if results["rehearsal"] else f"{device}, cold L2")
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=130)
    return True


def report(results: Results, out: Path) -> str:
    """Write ``roofline.md`` and ``roofline.png`` into ``out``; the table of goals."""
    (out / "roofline.md").write_text(text(results), encoding="utf-8")
    plot(results, out / "roofline.png")
    return markdown(goals(results))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        print(report(json.loads((folder / "gpu.json").read_text()), folder))
    else:
        print(text({}))
