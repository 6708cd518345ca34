"""Per-token factors (u, delta) of chosen weights, from one forward and one partial backward.

dL/dW of a linear layer is sum_t delta_t u_t^T: u is the layer's input, delta the gradient at its
output. Adding a zero *probe* to each output and differentiating with respect to the probes gives
delta, and nothing else: no weight gradient, and nothing below the lowest probe.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from pymend.engine.beside import beside
from pymend.errors import NonFiniteError
from pymend.models.structure import EditedWeight, weight_of

# Of the largest row of a weight in an episode: what is not above is the rounding of a zero. A key
# that attends to itself alone has one: its gradient is a difference of equal sums.
LIVE = {
    dtype: torch.finfo(dtype).eps * (512 if dtype.itemsize > 2 else 1 / 8)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
# Of that bound: the same beside the largest row of all weights, whose rounding it is.
BESIDE = 1 / 64
HALF_SCALE = 2.0**10  # keeps small float16 deltas above underflow; a power of two, so exact


@dataclass(frozen=True)
class Factors:
    """Rows u [n, a] and delta [n, b] of one weight; ``counts`` rows of each episode, in order.

    ``expert`` [n] int64: whose rows they are, of routed experts.
    """

    u: Tensor
    delta: Tensor
    counts: tuple[int, ...]
    expert: Tensor | None = None


class Tape:
    """Inputs and probes of the edited modules, filled by their forward hooks."""

    def __init__(self, weights: Sequence[EditedWeight], second_order: bool = False) -> None:
        self.weights = tuple(weights)
        self.second_order = second_order
        self._inputs: dict[str, list[Tensor]] = {w.name: [] for w in weights}
        self._probes: dict[str, list[Tensor]] = {w.name: [] for w in weights}
        self._experts: dict[str, list[Tensor]] = {w.name: [] for w in weights if w.routed}

    def record(self, name: str, x: Tensor, y: Tensor, expert: Tensor | None) -> Tensor:
        """What acts beside a weight: note its input, add a probe to its output."""
        probe = torch.zeros_like(y, requires_grad=True)
        self._inputs[name].append(x if self.second_order else x.detach())
        self._probes[name].append(probe)
        if expert is not None:
            self._experts[name].append(expert)
        return y + probe

    def _check_whole(self, shapes: Collection[tuple[int, ...]]) -> None:
        """Refuse modules whose inputs cannot be told apart by episode."""
        count = {rows for rows, *_ in shapes}  # one number
        flat = count | {math.prod(shape) for shape in shapes}
        for name, inputs in self._inputs.items():
            # Routed experts have several rows a token, one after the other.
            for x, given in zip(inputs, self._experts.get(name, inputs), strict=True):
                if len(given) not in (flat if x.dim() == 2 else count):
                    raise ValueError(mixed(name, f"is given {tuple(x.shape)}"))

    def backward(
        self, loss: Tensor, episodes: int, shapes: Collection[tuple[int, ...]] = ()
    ) -> dict[str, Factors]:
        """Differentiate ``loss`` and return the live rows, at least float32.

        Rows whose u or delta is zero throughout (padding, tokens after the last label), or only
        rounding beside the largest of their episode, are dropped; the one read-back of that row set
        is the only synchronisation.

        Args:
            loss: scalar, a sum over ``episodes`` of terms that depend on their own rows only.
            episodes: the batch is that many equal groups of rows, one after the other.
            shapes: [rows, tokens] of what the model was called with; a module that was given
                anything else is refused if there are several episodes.

        Raises:
            ValueError: an edited module was not called, was called with some of the tokens, or has
                no part in the loss.
            NonFiniteError: a live row is not finite.
        """
        probes = [p for w in self.weights for p in self._probes[w.name]]
        missing = [w.name for w in self.weights if not self._probes[w.name]]
        if missing:
            raise ValueError(
                f"{missing[0]} has no part in this text: its module was not called, as of an "
                "expert that was not chosen or of attention to an encoder that is not there; edit "
                "other weights"
            )
        if shapes and episodes > 1:
            self._check_whole(shapes)
        scale = HALF_SCALE if any(p.dtype == torch.float16 for p in probes) else 1.0
        if not loss.requires_grad:
            raise ValueError(
                f"what the model says cannot be differentiated at the output of "
                f"{self.weights[0].name}; edit other weights, or another model"
            )
        with torch.enable_grad():
            found = torch.autograd.grad(
                loss * scale, probes, create_graph=self.second_order, allow_unused=True
            )
        each = iter(found)
        for name in (w.name for w in self.weights):
            # A module that is called several times may be heard once.
            if all([next(each) is None for _ in self._probes[name]]):
                raise ValueError(
                    f"what the model says does not depend on the output of {name} in a way that "
                    "can be differentiated; edit other weights"
                )
        grads = (
            torch.zeros_like(p) if g is None else g for p, g in zip(probes, found, strict=True)
        )
        rows = {}
        for w in self.weights:
            # A module called several times contributes the rows of all its calls.
            u = _rows(self._inputs[w.name], episodes)
            delta = _rows([next(grads) for _ in self._probes[w.name]], episodes)
            rows[w.name] = u, delta if scale == 1 else delta / scale
        # Zero only if every element is, finite only if every element is: all are read back at once.
        norms = [
            [vector_norm(x.detach(), 1, -1) for x in side]
            for side in zip(*rows.values(), strict=True)
        ]
        on_host = torch.stack([torch.cat(side) for side in norms]).cpu()  # [2, rows of all weights]
        lengths = [len(u) for u, _ in rows.values()]
        floor = max(LIVE[p.dtype] for p in probes)
        live = _live(on_host.split(lengths, 1), episodes, floor)
        broken = live & ~on_host.isfinite().all(0)
        if broken.any():
            parts = zip(rows, broken.split(lengths), strict=True)
            raise NonFiniteError(
                f"the gradients of {next(name for name, part in parts if part.any())} are not "
                "finite: the model's own output is not, or its precision overflows; try float32"
            )
        masks = live.split(lengths)
        counts = [mask.view(episodes, -1).sum(1).tolist() for mask in masks]
        kept = torch.cat([mask.nonzero()[:, 0] for mask in masks])
        indices = kept.to(norms[0][0].device, non_blocking=True).split([sum(c) for c in counts])
        captured = {}
        for (name, (u, delta)), index, count in zip(rows.items(), indices, counts, strict=True):
            expert = None
            if name in self._experts:
                ids = [x.reshape(episodes, -1) for x in self._experts[name]]
                expert = torch.cat(ids, 1).flatten()[index]
            captured[name] = Factors(u[index], delta[index], tuple(count), expert)
        return captured


def mixed(name: str, given: str) -> str:
    """Why the rows of a weight cannot be told apart by text, as a sentence for the user."""
    return (
        f"the module of {name} {given}, not text after text, as experts and layers that put time "
        "first are, so edits would be mixed; edit facts one by one (training: accumulate as large "
        "as batch_size), or other weights"
    )


def _live(norms: Sequence[Tensor], episodes: int, floor: float) -> Tensor:
    """Which rows count [rows of all weights]: neither side is mere rounding.

    Args:
        norms: of each weight those of u and delta, [2, rows].
    """
    by_episode = [x.view(2, episodes, -1) for x in norms]
    largest = [x.nan_to_num(0, 0, 0).amax(2, keepdim=True) for x in by_episode]
    of_all = torch.stack(largest).amax(0) * torch.tensor([0, BESIDE])[:, None, None]  # of deltas
    live = [
        ((x > floor * torch.maximum(most, of_all)) | ~x.isfinite()).all(0).flatten()
        for x, most in zip(by_episode, largest, strict=True)
    ]
    return torch.cat(live)


def _rows(parts: Sequence[Tensor], episodes: int) -> Tensor:
    """[batch, tokens, n] or [batch * tokens, n] of each call -> [rows, n], episode by episode.

    At least float32.
    """
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    parts = [x.reshape(episodes, -1, x.shape[-1]) for x in parts]
    joined = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    return joined.flatten(0, 1).to(wide)


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
    sides = {w.name: partial(tape.record, w.name) for w in weights}
    with torch.enable_grad(), beside(model, weights, sides):
        yield tape
