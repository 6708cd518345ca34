"""The one room in which a model is hooked or patched; nothing stays behind, come what may."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pymend.ops.products import frozen_linear


class Shared(Protocol):
    """A forward that several may have opened at once."""

    users: int

    def __init__(self, module: Any) -> None: ...


O = TypeVar("O", bound=Shared)  # noqa: E741


class Call(NamedTuple):
    """What a module was given and returned; ``version`` counts the writes to the latter so far."""

    inputs: tuple[Any, ...]
    output: Any
    version: int


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled models run as they are written, or they would not see what is hooked or patched."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def forward_hooks(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let every module run its hook on (module, args, kwargs, output) inside.

    What a hook returns takes the place of the output, unless it is None.
    """
    with ExitStack() as stack:
        stack.enter_context(_eager())
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def watch(module: nn.Module) -> Iterator[list[Call]]:
    """The calls of ``module`` inside, as they come."""
    calls: list[Call] = []

    def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(Call((args, kwargs), output, getattr(output, "_version", 0)))

    with forward_hooks({module: note}):
        yield calls


@contextmanager
def changed_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """``module`` is given ``change`` of its first input inside."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (change(args[0]), *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def first_input(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """The input of a linear layer, however it was passed."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients and fast products inside; as before afterwards.

    Inference mode is lifted, since capture differentiates; whether gradients are recorded is not.
    """
    recording = torch.is_grad_enabled()
    modules = list(model.modules())
    training = [m for m in modules if m.training]
    parameters = (p for m in modules for p in m._parameters.values())  # one walk of the model
    wanted = [p for p in parameters if p is not None and p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in wanted:
            parameter.requires_grad_(False)
        fast = forwards(_frozen_layers(modules))
        with torch.inference_mode(False), torch.set_grad_enabled(recording), fast:
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)


def _frozen_layers(modules: Sequence[nn.Module]) -> dict[nn.Module, Callable[..., Any]]:
    """Another way on a CPU to compute plain linear layers; subclasses and wrapped ones stay."""
    ways: dict[type, Callable[..., Any]] = {nn.Linear: _linear, Conv1D: _conv1d}
    layers: dict[nn.Module, Callable[..., Any]] = {}
    for module in modules:
        way = ways.get(type(module))
        if way is None or "forward" in vars(module):
            continue
        if cast(torch.Tensor, module.weight).device.type == "cpu":
            layers[module] = partial(way, module)
    return layers


def _linear(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return frozen_linear(input, module.weight, module.bias)


def _conv1d(module: Conv1D, x: torch.Tensor) -> torch.Tensor:
    return frozen_linear(x, module.weight.t(), module.bias)


def is_plain(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether ``module`` computes x W^T + b and no one watches: no hook, wrapper or odd weight."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return False
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    forward = vars(module).get("forward")
    own = forward is None or getattr(forward, "func", None) is _linear  # set by ``frozen``
    return own and not any(hooks)


@contextmanager
def opened(module: nn.Module, kind: type[O]) -> Iterator[O]:
    """The forward of ``module`` is one ``kind(module)``, shared by all who ask for it.

    The last of them to leave gives the module its own forward back, whatever their order.

    Raises:
        ValueError: another tool has replaced the forward.
    """
    own = vars(module).get("forward")
    if own is None:
        own = vars(module)["forward"] = kind(module)
    elif not isinstance(own, kind):
        raise ValueError(
            f"the forward of {type(module).__name__} is replaced by another tool, so it cannot be "
            "edited inside; remove that, or edit other weights"
        )
    own.users += 1
    try:
        yield own
    finally:
        own.users -= 1
        if not own.users and vars(module).get("forward") is own:
            del vars(module)["forward"]


@contextmanager
def checked(module: nn.Module, check: Callable[[Any, Any], None]) -> Iterator[None]:
    """``check`` sees the arguments of every call of ``module`` inside, before it runs."""

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        check(args, kwargs)

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forwards(methods: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let every module run the given function; their own methods come back at the end."""
    former = {module: vars(module).get("forward") for module in methods}
    try:
        for module, forward in methods.items():
            module.forward = forward
        with _eager():
            yield
    finally:
        for module, method in former.items():
            if method is None:
                vars(module).pop("forward", None)
            else:
                module.forward = method
