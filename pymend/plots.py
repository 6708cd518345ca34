"""Learning curves as a PNG, from the ``metrics.jsonl`` of a training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymend.files import replacing

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
PANELS = (
    ("Loss", {"loss": ("c_edit NLL + c_loc KL", BLUE)}),
    ("Parts of the loss", {"nll": ("edit NLL", RED), "kl": ("locality KL", GREEN)}),
    (
        "Scores",
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

    lines = [json.loads(x) for x in Path(metrics_jsonl).read_text(encoding="utf-8").splitlines()]
    train = [x for x in lines if "eval" not in x]
    held_out = [{"step": x["step"], **x["eval"]} for x in lines if "eval" in x]
    if not train:
        raise ValueError(f"{metrics_jsonl} holds no training step")

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, curves) in zip(figure.subplots(1, len(PANELS)), PANELS):
        for key, (label, colour) in curves.items():
            steps, values = _column(train, key)
            if len(curves) == 1:
                axes.plot(steps, values, color=colour, alpha=0.15, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=colour, alpha=0.55, linewidth=1.2)
            axes.plot(*_column(held_out, key), "o-", color=colour, ms=4, linewidth=2, label=label)
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("optimiser step")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        if name == "Scores":
            axes.set_ylim(-0.02, 1.02)
        else:
            axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=9)
    note = "thick with dots: validation; thin: training, running mean"
    figure.suptitle(f"{title}  ({note})" if title else note, fontsize=10, color="#444444")
    with replacing(Path(png)) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _column(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [x["step"] for x in lines], [x[key] for x in lines]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the last tenth of a run's length, at most, up to each point."""
    window = max(1, min(50, len(values) // 10))
    recent = (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in recent]
