"""``pymend models``: what is edited in known models; small models that are made here."""

from __future__ import annotations

from typing import Annotated

from pymend.commands.settings import Flag
from pymend.config import MendConfig
from pymend.zoo.recipes import RECIPES


def listed(
    names: Annotated[tuple[str, ...], Flag("default: all of them", "NAME", positional=True)] = (),
) -> None:
    """What is edited in known models; the default."""
    import torch

    from pymend.algorithms.mend.network import Editor
    from pymend.models.presets import preset, presets
    from pymend.models.structure import PAPER, find_weights
    from pymend.report.tables import blockwise, table
    from pymend.zoo import mini

    rows = []
    for name in names or [*presets(), *RECIPES]:
        small = name in RECIPES
        kind = PAPER if not small and preset(name).weights else "mlp"
        model = mini.skeleton(name) if small else preset(name).skeleton()
        weights = find_weights(model, (kind,))
        with torch.device("meta"):
            count = sum(p.numel() for p in Editor(weights, MendConfig()).nets_parameters())
        shown = blockwise([w.name for w in weights])
        rows.append((name, kind, " ".join(shown), f"{count / 1e6:.1f}M"))
    print(table(("model", "--edit", "weights", "editor"), rows))


def make(
    name: Annotated[str, Flag(", ".join(RECIPES), "NAME", positional=True)],
    seed: Annotated[int, Flag("of its weights and of what it reads")] = 0,
    threads: Annotated[int | None, Flag("CPU threads", least=1)] = None,
) -> None:
    """Train a small model on the built-in facts, in minutes."""
    import torch

    from pymend.report.tables import table
    from pymend.zoo import mini

    if threads is not None:
        torch.set_num_threads(threads)
    place = mini.make(name, seed)
    print(table(("mini.json", ""), [(k, str(v)) for k, v in mini.card(place).items()]))
    print(f"the model is in {place}; use it with: --model {place if seed else name}")
