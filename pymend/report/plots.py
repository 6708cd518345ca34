"""Learning curves as a PNG, from the ``metrics.jsonl`` of a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymend.files import replacing

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
LEGEND = {"frameon": False, "fontsize": 9, "columnspacing": 1.2, "handlelength": 1.6}
PANELS = (
    ("loss", {"loss": ("c_edit NLL + c_loc KL", BLUE)}),
    ("parts of the loss", {"nll": ("edit NLL", RED), "kl": ("locality KL", GREEN)}),
    (
        "score",
        {
            "edit_success": ("edit success", BLUE),
            "generality": ("generality", RED),
            "locality": ("locality", GREEN),
        },
    ),
)


def learning_curves(metrics_jsonl: str | Path, png: str | Path, title: str = "") -> None:
    """Draw training (thin, running mean) and validation (dots) over the steps.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no training step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    lines = [json.loads(x) for x in Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()]
    train = [x for x in lines if "eval" not in x]
    held_out = [{"step": x["step"], **x["eval"]} for x in lines if "eval" in x]
    if not train:
        raise ValueError(f"{metrics_jsonl} holds no training step")

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, curves) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for key, (label, colour) in curves.items():
            steps, values = _column(train, key)
            if len(curves) == 1:
                axes.plot(steps, values, color=colour, alpha=0.15, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=colour, alpha=0.55, linewidth=1.2)
            axes.plot(*_column(held_out, key), "o-", color=colour, ms=4, linewidth=2, label=label)
        axes.set_ylabel(name)
        axes.set_xlabel("optimiser step")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        if name == "score":
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.set_yscale("log")
            # Plain numbers in place of powers of ten: a panel spans one or two decades.
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        # Above the curves, never on them.
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, **LEGEND)
    note = "thick with dots: validation; thin: training, running mean"
    figure.suptitle(f"{title}  ({note})" if title else note, fontsize=10, color="#444444")
    with replacing(Path(png)) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _column(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    scored = [x for x in lines if key in x]  # a skipped step has no scores
    return [x["step"] for x in scored], [x[key] for x in scored]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the last tenth of a run's length, at most, up to each point."""
    window = max(1, min(50, len(values) // 10))
    recent = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in recent]
