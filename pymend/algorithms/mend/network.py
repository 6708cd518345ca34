"""The trainable part of MEND (paper, section 3.2): networks g and step sizes alpha.

A network takes normalised (u, delta) rows to (u~, d~) rows, of all weights of one shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pymend.algorithms.mend.moments import RunningMoments
from pymend.config import MendConfig
from pymend.models.structure import EditedWeight
from pymend.ops.apply_edit import Group
from pymend.ops.editor_mlp import Layer, editor_mlp
from pymend.ops.moments import joined


class LowRankLayer(nn.Module):
    """y = x + max(s_l * (U V x + b) + o_l, 0), with s and o of the row's weight l (Eq. 3).

    The derivative of max(p, 0) at 0 is 1: at the identity start p is 0 everywhere, and a ReLU would
    never train. Parameters: u [d, r], v [r, d], bias [d], scale and shift [modes, d], which a
    network of one weight (``modes=0``) does without.
    """

    def __init__(self, d: int, modes: int, config: MendConfig) -> None:
        super().__init__()
        rank = min(config.rank, d)
        self.residual = config.init == "id"
        self.u = nn.Parameter(torch.zeros(d, rank))
        self.v = nn.Parameter(torch.empty(rank, d))
        self.bias = nn.Parameter(torch.zeros(d))
        self.scale = nn.Parameter(torch.ones(modes, d)) if modes else None
        self.shift = nn.Parameter(torch.zeros(modes, d)) if modes else None
        if config.init == "xavier":
            nn.init.xavier_uniform_(self.u, gain=2**0.5)
        if config.init == "xavier" or config.init_v == "xavier":
            nn.init.xavier_uniform_(self.v)
        else:
            nn.init.normal_(self.v)

    def operands(self) -> Layer:
        """The parameters, as the ops take them."""
        return Layer(self.v, self.u, self.bias, self.scale, self.shift, self.residual)

    def plain(self) -> Layer:
        """The same as detached tensors, which share this layer's memory."""
        return self.operands().map(Tensor.detach)


class EditorNet(nn.Module):
    """Moments and layers for all edited weights of one shape (a, b).

    One network on the joined row, or, with ``combine=False``, one for each side; a side that the
    ``one_sided``, ``x_only`` and ``delta_only`` variants (Table 6) leave out passes through
    normalised.
    """

    def __init__(self, a: int, b: int, modes: int, config: MendConfig) -> None:
        super().__init__()
        self.a, self.b, self.norm = a, b, config.norm
        self.moments = RunningMoments(a + b, config.official)

        def layers(d: int) -> nn.ModuleList:
            return nn.ModuleList(LowRankLayer(d, modes, config) for _ in range(2))

        only_u = config.x_only or (config.one_sided and a <= b)
        only_delta = config.delta_only or (config.one_sided and a > b)
        self.joint = layers(a + b) if config.combine else None
        self.u_side = layers(a) if not config.combine and not only_delta else None
        self.delta_side = layers(b) if not config.combine and not only_u else None

    def forward(
        self,
        us: Sequence[Tensor],
        deltas: Sequence[Tensor],
        counts: Sequence[int],
        mode: Tensor,
        merge: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Transform the rows of all weights of this shape in one pass.

        Args:
            us, deltas: [n_i, a] and [n_i, b] of every weight, episode by episode.
            counts: rows of each segment, episode by episode and within one weight by weight.
            mode: [n], the weight each row belongs to; n = sum of counts.
            merge: in training, take the segments into the moments in this order.

        Returns:
            u~ [n, a] and d~ [n, b], in the order of the segments.
        """
        dtype = next(self.parameters()).dtype
        if self.norm:
            z = self.moments(us, deltas, counts, merge, dtype)
        else:
            z = joined(us, deltas, counts).to(dtype)
        if self.joint is not None:
            z = _through(self.joint, z, mode)
        u, delta = z.split([self.a, self.b], 1)
        if self.u_side is not None:
            u = _through(self.u_side, u, mode)
        if self.delta_side is not None:
            delta = _through(self.delta_side, delta, mode)
        return u, delta

    def plain(self, places: Sequence[int], modes: Sequence[int]) -> Group:
        """What ``pymend.ops.apply_edit`` needs for weights of this shape, sharing memory.

        Args:
            places: of the weights in the lists that the op will be given; modes: of each.

        Raises:
            ValueError: ``norm=False`` or ``official=True``, which that op does not know.
        """
        if not self.norm or self.moments.official:
            setting = "official=True" if self.moments.official else "norm=False"
            raise ValueError(
                f"apply_edit does not know editors with {setting}; use Mend.edit and Edit.merge_"
            )
        return Group(
            tuple(places),
            torch.tensor(modes, device=self.moments.count.device),
            self.moments.mean,
            self.moments.m2,
            self.moments.count,
            *(_plain(layers) for layers in (self.joint, self.u_side, self.delta_side)),
        )


def _plain(layers: nn.ModuleList | None) -> tuple[Layer, ...]:
    return tuple(cast(LowRankLayer, layer).plain() for layer in layers or ())


def _through(layers: nn.ModuleList, z: Tensor, mode: Tensor) -> Tensor:
    """z [n, d], mode [n] int64 -> [n, d]."""
    return editor_mlp(z, [cast(LowRankLayer, layer).operands() for layer in layers], mode)


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
