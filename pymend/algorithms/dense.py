"""An edit that is a whole matrix for each weight: what rivals of MEND compute."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pymend.edit import BaseEdit, Outcome, check_fingerprint, split_episodes
from pymend.engine.hooks import first_input, forward_hooks
from pymend.errors import NonFiniteError
from pymend.models.structure import EditedWeight, module_of, weight_of


class DenseEdit(BaseEdit):
    """W + residual for the weights of one model, applied beside them.

    ``residuals``: by weight, of its shape and layout; or [episodes, ., .] for independent edits
    side by side. ``steps``: how many optimiser steps each took, where the algorithm takes any.
    """

    def __init__(
        self,
        weights: Sequence[EditedWeight],
        residuals: Mapping[str, Tensor],
        steps: Sequence[int] = (),
        fingerprint: str = "",
        outcomes: Sequence[Outcome] = (),
    ) -> None:
        self.weights = tuple(weights)
        self.residuals = dict(residuals)
        self.steps = tuple(steps)
        first = next(iter(self.residuals.values()))
        super().__init__(len(first) if first.dim() == 3 else None, fingerprint, outcomes)
        self._model: weakref.ref[nn.Module] | None = None

    def _pick(self, index: int) -> DenseEdit:
        residuals = {name: r[index] for name, r in self.residuals.items()}
        return DenseEdit(self.weights, residuals, self.steps[index:][:1])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """``model`` acts edited inside the block; its weights are never written.

        With independent edits the batch is as many equal groups of rows, one after the other, and
        each group sees its own edit.

        Raises:
            ValueError: another model, non-finite residuals, or a batch that does not split.
        """
        self.check(model)
        with forward_hooks({module_of(model, w.module): self._hook(w) for w in self.weights}):
            yield model

    def _hook(self, weight: EditedWeight) -> Any:
        residual = self.residuals[weight.name]
        factor = residual if weight.transposed else residual.mT

        def hook(_module: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            x = split_episodes(first_input(args, kwargs), self.episodes)
            change = x.to(factor.dtype) @ factor.to(x.device)
            return y + change.view(y.shape).to(y.dtype)

        return hook

    def check(self, model: nn.Module) -> None:
        """Refuse a model this edit was not made for, and residuals that would break one.

        Raises:
            ValueError: names the weight and what is wrong with it.
        """
        if self._model is not None and self._model() is model:
            return
        for w in self.weights:
            residual, shape = self.residuals[w.name], weight_of(model, w).shape
            if residual.shape[-2:] != shape:
                raise ValueError(
                    f"the residual of {w.name} is {tuple(residual.shape)}, the weight "
                    f"{tuple(shape)}; this edit was made for another model"
                )
            # A sum is finite only if every element is; no mask, no copy.
            if not torch.isfinite(residual.detach().sum()):
                raise NonFiniteError(f"the residual of {w.name} is not finite; compute it again")
        check_fingerprint(model, self.weights, self.fingerprint)
        self._model = weakref.ref(model)
