"""Per-token factors (u, delta) of chosen weights, from one forward and one partial backward.

dL/dW of a linear layer is sum_t delta_t u_t^T: u is the layer's input, delta the gradient at its
output. Adding a zero *probe* to each output and differentiating with respect to the probes gives
delta, and nothing else: no weight gradient, and nothing below the lowest probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pymend.models import EditedWeight, weight_of

HALF_SCALE = 2.0**10  # keeps small float16 deltas above underflow; a power of two, so exact
DEAD, LIVE, NOT_FINITE = 0, 1, 2  # what a captured row can be


class NonFiniteError(ValueError):
    """Gradients or factors that are not finite: nothing can be made of the edit they belong to."""


@dataclass(frozen=True)
class Factors:
    """Rows u [n, a] and delta [n, b] of one weight; ``counts`` rows of each episode, in order."""

    u: Tensor
    delta: Tensor
    counts: tuple[int, ...]


class Tape:
    """Inputs and probes of the edited modules, filled by their forward hooks."""

    def __init__(self, weights: Sequence[EditedWeight], second_order: bool = False) -> None:
        self.weights = tuple(weights)
        self.second_order = second_order
        self._inputs: dict[str, list[Tensor]] = {w.name: [] for w in weights}
        self._probes: dict[str, list[Tensor]] = {w.name: [] for w in weights}

    def _record(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        probe = torch.zeros_like(y, requires_grad=True)
        self._inputs[name].append(x if self.second_order else x.detach())
        self._probes[name].append(probe)
        return y + probe

    def backward(self, loss: Tensor, episodes: int) -> dict[str, Factors]:
        """Differentiate ``loss`` and return the live rows, at least float32.

        Rows whose u or delta is zero throughout (padding, tokens after the last label) are dropped;
        the one read-back of that row set is the only synchronisation.

        Args:
            loss: scalar, a sum over ``episodes`` of terms that depend on their own rows only.
            episodes: the batch is that many equal groups of rows, one after the other.

        Raises:
            RuntimeError: an edited module was not called.
            NonFiniteError: a live row is not finite.
        """
        probes = [p for w in self.weights for p in self._probes[w.name]]
        missing = [w.name for w in self.weights if not self._probes[w.name]]
        if missing:
            raise RuntimeError(f"the forward pass never called the module of {missing[0]}")
        scale = HALF_SCALE if any(p.dtype == torch.float16 for p in probes) else 1.0
        with torch.enable_grad():
            grads = iter(torch.autograd.grad(loss * scale, probes, create_graph=self.second_order))
        rows = {}
        for w in self.weights:
            # A module called several times contributes the rows of all its calls.
            u = torch.cat([_episodes(x, episodes) for x in self._inputs[w.name]], 1)
            delta = torch.cat([_episodes(next(grads), episodes) for _ in self._probes[w.name]], 1)
            rows[w.name] = u, delta / scale
        states = [_state(u, delta) for u, delta in rows.values()]
        on_host = torch.cat([x.flatten() for x in states]).cpu().split([x.numel() for x in states])
        captured = {}
        for (name, (u, delta)), state in zip(rows.items(), on_host, strict=True):
            if (state == NOT_FINITE).any():
                raise NonFiniteError(
                    f"the gradients of {name} are not finite: the model's own output is not, or "
                    "its precision overflows; try float32"
                )
            mask = state == LIVE
            counts = mask.view(episodes, -1).sum(1).tolist()
            index = mask.nonzero()[:, 0].to(u.device)
            captured[name] = Factors(
                u.flatten(0, 1)[index], delta.flatten(0, 1)[index], tuple(counts)
            )
        return captured


def _state(u: Tensor, delta: Tensor) -> Tensor:
    """Which of DEAD, LIVE and NOT_FINITE each row is, int8."""
    live = (u != 0).any(-1) & (delta != 0).any(-1)
    finite = (u.sum(-1) + delta.sum(-1)).isfinite()
    return torch.where(live, torch.where(finite, LIVE, NOT_FINITE), DEAD).char()


def _episodes(x: Tensor, episodes: int) -> Tensor:
    """[batch, tokens, n] or [batch * tokens, n] -> [episodes, rows, n], at least float32."""
    return x.reshape(episodes, -1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def capture(
    model: nn.Module, weights: Sequence[EditedWeight], second_order: bool = False
) -> Iterator[Tape]:
    """Record the edited modules during a forward pass; hooks are gone at the end, come what may.

    The caller runs the model under ``frozen`` and calls :meth:`Tape.backward` on its loss.

    Args:
        second_order: u and delta can be differentiated further; else they are constants.

    Raises:
        ValueError: the model lacks a weight, before any hook is set.
    """
    for weight in weights:
        weight_of(model, weight)
    tape = Tape(weights, second_order)
    handles = []
    try:
        with torch.enable_grad():
            for w in weights:
                module = model.get_submodule(w.module)

                def hook(_module, args, kwargs, y, name=w.name):  # type: ignore[no-untyped-def]
                    return tape._record(name, first_input(args, kwargs), y)

                handles.append(module.register_forward_hook(hook, with_kwargs=True))
            yield tape
    finally:
        for handle in handles:
            handle.remove()


def first_input(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """The input of a linear layer, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))
