"""Adam for an editor's networks and step sizes, its schedule, and the guarded step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.optim.adam import adam

from pymend.algorithms.mend.network import LowRankLayer
from pymend.algorithms.trained import Trainable
from pymend.config import TrainConfig
from pymend.ops.factored_adam import factored_adam, fused_rows, gram_norm


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor of the learning rates at ``step`` (from 0): warm-up, then the schedule."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class EditorOptimizer:
    """Adam over the parameters of an algorithm's editor, each group at its own rate.

    The matrices of the networks get an attribute ``factors``. While it is there, a backward pass
    may append pairs (left [n, rows], right [n, cols]) to it in place of adding to ``.grad``; the
    gradient is the sum of left^T right. With few rows it is never formed, with many it goes into a
    buffer that is kept: fresh pages for gradients every step cost as much as Adam. The number of
    rows alone decides, so that a run can be repeated to the bit.
    """

    def __init__(self, algorithm: Trainable[Any], config: TrainConfig) -> None:
        self.config = config
        groups = algorithm.parameter_groups(config)
        self.parameters: list[Tensor] = [p for members, _ in groups for p in members]
        self.rates = [rate for members, rate in groups for _ in members]
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}  # of the parameters that had a gradient
        self.steps: dict[int, int] = {}
        self.buffers: dict[int, Tensor] = {}
        for layer in algorithm.editor.modules():
            if isinstance(layer, LowRankLayer):
                for matrix in (layer.u, layer.v):
                    matrix.factors = []  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Clip, update, clear the gradients.

        Returns:
            The gradient norm before clipping. When it is not finite nothing is updated.
        """
        factored, dense = self._gradients()
        norms = [gram_norm(*pair) for pair in factored.values()]
        # Row by row first: one long sum in float32 would lose digits.
        norms += [vector_norm(vector_norm(g, dim=-1).double()) for g in dense.values()]
        norm = float(vector_norm(torch.stack(norms))) if norms else 0.0
        if math.isfinite(norm):
            scale = min(1.0, self.config.clip / (norm + 1e-6))
            self._adam(factored, dense, scale, learning_rate_factor(self.config, step))
        self.discard()
        return norm

    def _gradients(self) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]:
        """The gradients by index of the parameter: as factors, and as tensors."""
        factored, dense = {}, {}
        for i, p in enumerate(self.parameters):
            pairs = _factors(p)
            rows = sum(len(left) for left, _ in pairs)
            if pairs and p.grad is None and rows <= fused_rows(p):
                lefts, rights = zip(*pairs, strict=True)
                factored[i] = (torch.cat(lefts), torch.cat(rights)) if len(pairs) > 1 else pairs[0]
            elif pairs:
                dense[i] = self._product(i, pairs)
            elif p.grad is not None:
                dense[i] = p.grad
        return factored, dense

    def _product(self, i: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum of left^T right, added to ``.grad`` or in the buffer of parameter ``i``."""
        gradient = self.parameters[i].grad
        if gradient is None:
            if i not in self.buffers:
                self.buffers[i] = torch.empty_like(self.parameters[i])
            (left, right), *pairs = pairs
            gradient = torch.mm(left.t(), right, out=self.buffers[i])
        for left, right in pairs:
            gradient.addmm_(left.t(), right)
        return gradient

    def _adam(
        self,
        factored: dict[int, tuple[Tensor, Tensor]],
        dense: dict[int, Tensor],
        scale: float,
        factor: float,
    ) -> None:
        """One step of Adam for every gradient times ``scale``, at ``factor`` of the rates."""
        for i in (*factored, *dense):
            p = self.parameters[i]
            self.steps[i] = self.steps.get(i, 0) + 1
            if i not in self.moments:
                self.moments[i] = (torch.zeros_like(p), torch.zeros_like(p))
        device = self.parameters[0].device
        clip = torch.tensor(scale).to(device, non_blocking=True)
        for i, (left, right) in factored.items():
            p, rate = self.parameters[i], self.rates[i] * factor
            factored_adam(p, *self.moments[i], left, right, clip, lr=rate, step=self.steps[i])
        if scale < 1 and dense:
            torch._foreach_mul_(list(dense.values()), scale)
        for rate in dict.fromkeys(self.rates):
            members = [i for i in dense if self.rates[i] == rate]
            # They count on from the steps before this one.
            steps = torch.tensor([self.steps[i] - 1.0 for i in members])
            adam(
                [self.parameters[i] for i in members],
                [dense[i] for i in members],
                [self.moments[i][0] for i in members],
                [self.moments[i][1] for i in members],
                [],
                list(steps.to(device, non_blocking=True).unbind()),
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=rate * factor,
                weight_decay=0.0,
                eps=1e-8,
                maximize=False,
            )

    def discard(self) -> None:
        """Forget the gradients gathered so far."""
        for p in self.parameters:
            p.grad = None
            _factors(p).clear()

    def state(self) -> dict[str, Tensor]:
        """Adam's moments as flat tensors, for safetensors."""
        tensors: dict[str, Tensor] = {}
        for i, p in enumerate(self.parameters if self.moments else []):
            # A parameter that nothing depends on never had a gradient.
            exp_avg, exp_avg_sq = self.moments.get(i) or (torch.zeros_like(p), torch.zeros_like(p))
            tensors[f"{i}.step"] = torch.tensor(float(self.steps.get(i, 0)))
            tensors |= {f"{i}.exp_avg": exp_avg, f"{i}.exp_avg_sq": exp_avg_sq}
        return tensors

    def load(self, tensors: dict[str, Tensor], where: Path, stepped: bool = True) -> None:
        """Restore what :meth:`state` gave.

        Args:
            where: names the source in errors.
            stepped: Adam had made a step; before its first one it has no moments.

        Raises:
            ValueError: names the first key that is missing, foreign or of another shape.
        """
        shapes: dict[str, torch.Size] = {}
        for i, p in enumerate(self.parameters if stepped else []):
            shapes |= {f"{i}.step": torch.Size(), f"{i}.exp_avg": p.shape}
            shapes |= {f"{i}.exp_avg_sq": p.shape}
        for name in sorted(shapes.keys() ^ tensors.keys()):
            kind = "lacks" if name in shapes else "has the foreign key"
            raise ValueError(f"{where} {kind} {name}; it was written for another editor")
        for name, value in tensors.items():
            if value.shape != shapes[name]:
                raise ValueError(
                    f"{where}: {name} is {tuple(value.shape)}, expected {tuple(shapes[name])}"
                )
        self.moments, self.steps = {}, {}
        for i, p in enumerate(self.parameters if stepped else []):
            first, second = (tensors[f"{i}.{name}"] for name in ("exp_avg", "exp_avg_sq"))
            self.moments[i] = (first.to(p, copy=True), second.to(p, copy=True))
            self.steps[i] = int(tensors[f"{i}.step"])


def _factors(p: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The pairs that backward passes have left on a parameter."""
    return getattr(p, "factors", [])
