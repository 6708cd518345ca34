"""Editable neural networks (Sinitsin et al., ICLR 2020): one gradient step on an adapted base.

base   W' = parameters trained so that one step is enough; the model itself is never changed
edit   W~ = W' - alpha dL/dW'; all of dL/dW' that is needed are its factors (u_t, delta_t)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pymend.algorithms.trained import Trainable, edit_gradient
from pymend.config import EnnConfig
from pymend.edit import BaseEdit, Edit, LowRank, Outcome
from pymend.engine.losses import LabelRows, mean_per_row
from pymend.engine.replay import Replay
from pymend.engine.tokens import Batch, Row, stacked
from pymend.models.structure import EditedWeight, unwrapped


class EnnEditor(nn.Module):
    """A copy of all of a model's parameters and a step size for every edited weight.

    Args:
        shapes: of the parameters, by name. A new copy is not filled yet.
    """

    def __init__(
        self, weights: Sequence[EditedWeight], config: EnnConfig, shapes: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((len(weights),), config.alpha))
        # Names of entries must not hold dots.
        self.base = nn.ParameterDict(
            {name.replace(".", "#"): torch.empty(shape) for name, shape in shapes.items()}
        )

    def named_base(self) -> dict[str, nn.Parameter]:
        """The copy by the names that the model gives its parameters."""
        return {key.replace("#", "."): p for key, p in self.base.items()}


class Enn(Trainable["EnnEdit"]):
    """An ENN: the adapted base and the step sizes.

    ``compute`` and ``edit`` give an :class:`EnnEdit`, which shares the adapted base with this:
    training on changes it too.
    """

    kind = "enn"
    config_type = EnnConfig
    low_rank = False  # an edit is nothing without the adapted base
    config: EnnConfig
    editor: EnnEditor

    def __init__(
        self, config: EnnConfig, weights: Sequence[EditedWeight], shapes: Mapping[str, Any]
    ) -> None:
        editor = EnnEditor(weights, config, shapes)
        super().__init__(config, weights, editor, {"shapes": shapes}, config.n_edits)

    @classmethod
    def sizes_of(cls, model: nn.Module) -> dict[str, Any]:
        """The shape of every parameter."""
        return {"shapes": {name: list(p.shape) for name, p in model.named_parameters()}}

    @classmethod
    def from_config(cls, model: nn.Module, config: Any = None, **_: Any) -> Enn:
        """An ENN whose adapted base is ``model`` itself, in float32 at least.

        Raises:
            ValueError: the configuration names weights that do not exist or cannot be edited, or
                the model has parameters that cannot be trained.
        """
        odd = [name for name, p in model.named_parameters() if not p.is_floating_point()]
        if odd:
            raise ValueError(
                f"{odd[0]} is quantised, and ENN trains all parameters; load the model in float32 "
                "or bfloat16"
            )
        enn = super().from_config(model, config)
        copies = enn.editor.named_base()
        for name, own in model.named_parameters():
            dtype = torch.promote_types(own.dtype, torch.float32)
            copies[name].data = own.detach().to(copies[name].device, dtype, copy=True)
        return enn

    @property
    def step_sizes(self) -> nn.Parameter:
        """alpha [weights]."""
        return self.editor.alpha

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose parameters are not those that were adapted.

        Raises:
            ValueError: names the first one that is missing, foreign or of another shape.
        """
        super().check(model)
        own, copies = dict(model.named_parameters()), self.editor.named_base()
        for name in sorted(own.keys() ^ copies.keys()):
            kind = "lacks" if name in copies else "has the foreign parameter"
            raise ValueError(f"this model {kind} {name}; this editor was made for another model")
        for name, p in own.items():
            if p.shape != copies[name].shape:
                raise ValueError(
                    f"{name} is {tuple(p.shape)} in this model, expected "
                    f"{tuple(copies[name].shape)}; this editor was made for another model"
                )

    def replay(self, model: nn.Module, keep: bool = False) -> Replay:
        """The model without a frozen prefix: the adapted base differs from its first layer on."""
        return Replay(model, self.weights, keep, prefix=False)

    # -- the adapted base --------------------------------------------------------------------

    @contextmanager
    def adapted(self, model: nn.Module, trained: bool = False) -> Iterator[nn.Module]:
        """``model`` computes with the adapted base inside the block.

        The model's modules hold other parameters meanwhile; its own are not written.

        Args:
            trained: gradients reach the adapted base.

        Raises:
            ValueError: as :meth:`check`.
        """
        yielded, model = model, unwrapped(model)
        self.check(model)
        copies = self.editor.named_base()
        stand_ins: dict[Tensor, Tensor] = {}
        for name, own in model.named_parameters():
            copy = copies[name]
            # The head's losses and fast products are for parameters that need no gradient.
            stand_ins[own] = copy.to(own) if trained else nn.Parameter(copy.detach().to(own), False)
        # A tied parameter stands in several places.
        places = [
            (module._parameters, key, p)
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None
        ]
        try:
            for holder, key, own in places:
                holder[key] = stand_ins[own]  # type: ignore[assignment]
            yield yielded
        finally:
            for holder, key, own in places:
                holder[key] = own

    def penalty(self, replay: Replay, locality: Batch, base: LabelRows, episodes: int) -> Tensor:
        """c_base KL(model || adapted base) on the locality rows, [episodes]."""
        with self.adapted(replay.model, torch.is_grad_enabled()):
            kl = replay.label_rows(locality).losses(base=base).kl
        size = len(locality.rows) // episodes
        return self.config.c_base * mean_per_row(kl, locality.row // size, episodes)

    # -- editing -----------------------------------------------------------------------------

    def step(
        self, replay: Replay, rows: Sequence[Row], episodes: int, second_order: bool = False
    ) -> Edit:
        """The inner step as factors, for use on the adapted base; differentiable in alpha.

        Args:
            second_order: differentiable in the adapted base too.

        Raises:
            NonFiniteError: the captured gradients are not finite.
        """
        # Other kinds of attention cannot be differentiated twice.
        attention = sdpa_kernel(SDPBackend.MATH) if second_order else nullcontext()
        with self.adapted(replay.model, second_order), attention:
            captured, _ = edit_gradient(
                replay, self.weights, rows, episodes, second_order=second_order
            )
        factors = {}
        # A copy: training on must not change the step of an edit that was made.
        for w, alpha in zip(self.weights, self.editor.alpha.clone(), strict=True):
            rows_of = captured[w.name]
            u, delta = (stacked(x, rows_of.counts) for x in (rows_of.u, rows_of.delta))
            factors[w.name] = LowRank(u, delta, alpha)
        edit = Edit(self.weights, factors)
        edit.check(replay.model)
        return edit

    def differentiable(
        self, replay: Replay, rows: Sequence[Row], episodes: int, merge: bool = False
    ) -> EnnEdit:
        """Independent edits, one an episode, through which gradients reach base and step sizes.

        Args:
            rows: that many equal groups of simultaneous edits.

        Raises:
            NonFiniteError: the captured gradients are not finite.
        """
        trained = torch.is_grad_enabled()
        step = self.step(replay, rows, episodes, trained and self.config.second_order)
        return EnnEdit(self, step, trained=trained)

    @torch.no_grad()
    def compute(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> EnnEdit:
        """One edit for each of ``rows``, or one for all of them if ``joint``; nothing is trained.

        Raises:
            NonFiniteError: the captured gradients are not finite.
        """
        step = self.step(replay, rows, 1 if joint else len(rows))
        return EnnEdit(self, step[0] if joint else step)


class EnnEdit(BaseEdit):
    """An edit of an ENN: the adapted base, and the factors of one step on top of it.

    There is no weight to merge it into, since it changes all of them. ``fingerprint`` tells for
    which model it was made; the values of that model's parameters play no part in ``applied``.
    """

    def __init__(
        self,
        enn: Enn,
        step: Edit,
        fingerprint: str = "",
        outcomes: Sequence[Outcome] = (),
        trained: bool = False,
    ) -> None:
        self.enn, self.step, self.trained = enn, step, trained
        super().__init__(step.episodes, fingerprint, outcomes)

    def _pick(self, index: int) -> EnnEdit:
        return EnnEdit(self.enn, self.step[index], trained=self.trained)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """``model`` acts edited inside the block; its parameters are never written.

        Raises:
            ValueError: another model, or a batch that does not split into the edits.
        """
        with self.enn.adapted(model, self.trained), self.step.applied(model):
            yield model
