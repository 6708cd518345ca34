"""The trainable part of MEND: one network per weight shape and one step size per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pymend.algorithms.mend.network import EditorNet
from pymend.config import MendConfig
from pymend.models.structure import EditedWeight
from pymend.ops.apply_edit import Group

__all__ = ["Editor", "EditorNet"]


class Editor(nn.Module):
    """Networks g and step sizes alpha for a list of edited weights.

    ``alpha`` [weights] is subtracted (paper); ``official`` editors hold the negative of the code's
    learning rates, which is the same number exactly.
    """

    def __init__(self, weights: Sequence[EditedWeight], config: MendConfig) -> None:
        super().__init__()
        self.weights = tuple(weights)
        sign = -1.0 if config.official else 1.0
        self.alpha = nn.Parameter(torch.full((len(weights),), sign * config.alpha))
        self.groups: dict[str, list[EditedWeight]] = {}
        for w in weights:
            # Module names must not hold dots.
            key = f"{w.a}x{w.b}" if config.shared else w.name.replace(".", "#")
            self.groups.setdefault(key, []).append(w)
        self.shared = config.shared
        self.nets = nn.ModuleDict(
            {
                k: EditorNet(ws[0].a, ws[0].b, len(ws) if config.shared else 0, config)
                for k, ws in self.groups.items()
            }
        )

    def nets_parameters(self) -> list[nn.Parameter]:
        """Parameters of the networks, without alpha."""
        return list(self.nets.parameters())

    def plain(self) -> tuple[Group, ...]:
        """The networks as plain tensors for ``pymend.ops.apply_edit``, weights in own order.

        They share the editor's memory; ask again after it moved to another device or dtype.

        Raises:
            ValueError: ``norm=False`` or ``official=True``.
        """
        place = {w.name: i for i, w in enumerate(self.weights)}
        return tuple(
            cast(EditorNet, self.nets[key]).plain([place[w.name] for w in ws], [w.mode for w in ws])
            for key, ws in self.groups.items()
        )

    def forward(
        self, rows: Mapping[str, tuple[Tensor, Tensor, Sequence[int]]], merge: bool = False
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Transform captured rows; all weights of one shape go through their network in one pass.

        Args:
            rows: name -> (u [n, a], delta [n, b], rows of each episode).
            merge: take the rows into the running moments, episode by episode and within one in
                the order of the weights (training).

        Returns:
            name -> (u~ [n, a], d~ [n, b]).
        """
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for key, weights in self.groups.items():
            names = [w.name for w in weights]
            parts = [rows[n] for n in names]
            # Rows lie episode by episode, then weight by weight: the order of the moments.
            counts = [int(p[2][e]) for e in range(len(parts[0][2])) for p in parts]
            us, deltas = [p[0] for p in parts], [p[1] for p in parts]
            modes = [w.mode for w in weights]
            # Made by Python: torch's repeat_interleave on a host with many cores takes 0.6 ms.
            each = zip(modes * (len(counts) // len(modes)), counts, strict=True)
            mode = torch.tensor([m for m, n in each for _ in range(n)], dtype=torch.int64)
            mode = mode.to(us[0].device, non_blocking=True)
            u, delta = self.nets[key](us, deltas, counts, mode, merge)
            us, deltas = u.split(counts), delta.split(counts)
            for i, name in enumerate(names):
                out[name] = torch.cat(us[i :: len(names)]), torch.cat(deltas[i :: len(names)])
        return out
