"""What acts beside the edited weights: probes while gradients are captured, changes of an edit.

A linear layer is reached by a forward hook. The experts of a mixture are two parameters of one
module, whose forward is replaced by one that computes the same and is open between its products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pymend.engine.hooks import first_input, forward_hooks, opened
from pymend.models.structure import EditedWeight, module_of
from pymend.ops.products import frozen_linear

# From a weight's input x [.., a] and output y [.., b] to the output that takes y's place. Routed
# experts are given a row for each of the experts that a token was sent to, [tokens * k, .], and
# which they are, [tokens, k]; other weights None.
Side = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@contextmanager
def beside(
    model: nn.Module, weights: Sequence[EditedWeight], sides: Mapping[str, Side]
) -> Iterator[None]:
    """What ``sides[name]`` returns takes the place of the output of every weight inside.

    Raises:
        ValueError: something else has replaced the forward of experts. Inside: a module returns
            more than a tensor.
    """
    hooks: dict[nn.Module, Callable[..., Any]] = {}
    experts: dict[nn.Module, dict[str, Side]] = {}
    for w in weights:
        module, key = module_of(model, w.module), w.name.rpartition(".")[2]
        if w.experts:
            place = key if w.routed else f"{key}, shared"
            if getattr(module, "has_post_expert_norm", False) and not w.routed:
                raise ValueError(
                    f"{w.name} is normalised behind every expert, so no change can be shared; edit "
                    "it routed"
                )
            experts.setdefault(module, {})[place] = sides[w.name]
        else:
            hooks[module] = partial(_beside, w.name, sides[w.name])
    with ExitStack() as stack:
        stack.enter_context(forward_hooks(hooks))
        for module, own in experts.items():
            stack.enter_context(stack.enter_context(opened(module, _Open)).acting(own))
        yield


def _beside(name: str, side: Side, _module: nn.Module, args: Any, kwargs: Any, y: Any) -> Tensor:
    if not isinstance(y, Tensor):  # Llama 4's routers
        raise ValueError(f"the module of {name} returns more than its product; edit other weights")
    return side(first_input(args, kwargs), y, None)


class _Open:
    """The forward of experts, with what acts beside their two products.

    ``sides`` go by the parameter's name, behind which ", shared" stands where all experts change
    alike: that change is linear in what a token's experts are given, so it is computed once for it.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.users = module, 0
        self.sides: dict[str, list[Side]] = {}

    @contextmanager
    def acting(self, sides: Mapping[str, Side]) -> Iterator[None]:
        """``sides`` act as well inside."""
        for key, side in sides.items():
            self.sides.setdefault(key, []).append(side)
        try:
            yield
        finally:
            for key, side in sides.items():
                self.sides[key].remove(side)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """What the module's own forward returns, [tokens, d], with what acts beside it."""
        x, expert, share = *args, *kwargs.values()  # [tokens, d], twice [tokens, k]
        m, k = self.module, expert.shape[-1]
        products = _Products(m, expert)
        up = "gate_up_proj" if m.has_gate else "up_proj"
        given = x.repeat_interleave(k, 0)
        y = self._routed(up, given, products(up, given), expert)
        for side in self.sides.get(f"{up}, shared", ()):
            y = y + side(x, torch.zeros_like(y[::k]), None).repeat_interleave(k, 0)
        hidden = m._apply_gate(y) if m.has_gate else m.act_fn(y)
        y = self._routed("down_proj", hidden, products("down_proj", hidden), expert)
        if m.has_post_expert_norm:
            y = m.post_expert_norm(y)
        out = _mixed(y, share)
        for side in self.sides.get("down_proj, shared", ()):
            out = side(_mixed(hidden, share), out, None)
        return out.to(x.dtype)

    def _routed(self, key: str, x: Tensor, y: Tensor, expert: Tensor) -> Tensor:
        for side in self.sides.get(key, ()):
            y = side(x, y, expert)
        return y


def _mixed(y: Tensor, share: Tensor) -> Tensor:
    """What a token's experts say [tokens * k, n], by the share [tokens, k] of each: [tokens, n]."""
    return (y.view(*share.shape, -1) * share[..., None]).sum(1)


class _Products:
    """Products of rows with the matrices of their experts, one expert after the other.

    Args:
        expert: [tokens, k], to which experts each token is sent.
    """

    def __init__(self, module: Any, expert: Tensor) -> None:
        self.module = module
        self.expert = expert.flatten()
        self.order = self.expert.argsort(stable=True)
        self.back = self.order.argsort()
        self.counts = torch.bincount(self.expert).tolist()
        if len(self.counts) > len(module.down_proj):
            raise ValueError(
                f"{type(module).__name__} sends tokens to expert {len(self.counts) - 1}, which has "
                "no matrices; edit other weights"
            )

    def __call__(self, key: str, x: Tensor) -> Tensor:
        """x [tokens * k, a] -> [tokens * k, b]."""
        m = self.module
        weight, bias = getattr(m, key), getattr(m, f"{key}_bias", None) if m.has_bias else None
        parts = [
            frozen_linear(rows, w.t() if m.is_transposed else w, None if bias is None else bias[e])
            for e, (rows, w) in enumerate(
                zip(x[self.order].split(self.counts), weight, strict=False)
            )
            if len(rows)
        ]
        return torch.cat(parts)[self.back]
