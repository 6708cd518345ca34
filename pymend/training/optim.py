"""Adam for the networks and the step sizes, its schedule, and the guarded step."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from pymend.config import TrainConfig
from pymend.mend import Mend


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor of the learning rates at ``step`` (from 0): warm-up, then the schedule."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class EditorOptimizer:
    """Adam over networks and alpha, each with its own rate (``official``: one rate for both)."""

    def __init__(self, mend: Mend, config: TrainConfig) -> None:
        self.config = config
        self.parameters = [*mend.editor.nets_parameters(), mend.editor.alpha]
        alpha_lr = config.lr if mend.config.official else config.alpha_lr
        self.rates = (config.lr, alpha_lr)
        self.adam = torch.optim.Adam(
            [{"params": mend.editor.nets_parameters()}, {"params": [mend.editor.alpha]}],
            fused=True,
        )

    def step(self, step: int) -> float:
        """Clip, update, clear the gradients.

        Returns:
            The gradient norm before clipping. When it is not finite nothing is updated.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
        if math.isfinite(norm):
            for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
                group["lr"] = rate * learning_rate_factor(self.config, step)
            self.adam.step()
        self.discard()
        return norm

    def discard(self) -> None:
        """Forget the gradients gathered so far."""
        self.adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Adam's moments as flat tensors, for safetensors."""
        return {
            f"{index}.{name}": value
            for index, values in self.adam.state_dict()["state"].items()
            for name, value in values.items()
        }

    def load(self, tensors: dict[str, torch.Tensor], where: Path, stepped: bool = True) -> None:
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
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": state, "param_groups": groups})
