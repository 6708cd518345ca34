"""Finds, by structure and never by name, what can be edited in a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from inspect import signature
from itertools import product
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pymend.models.presets import paper_weights

KINDS = ("mlp", "attention", "all", "routed", "shared")  # matrices of a block
EXPERTS = KINDS[3:]
ROUTED = True  # how experts are edited where nobody says; docs/results has both ways
PAPER = "paper"  # the paper's own list for the model at hand


@dataclass(frozen=True)
class EditedWeight:
    """A matrix that receives edits.

    ``name`` is the parameter's, ``module`` its module's. The layer maps ``a`` features to ``b``.
    ``transposed`` marks GPT-2's ``Conv1D`` layout, [a, b] in place of [b, a]. ``mode`` is the
    position among the edited weights of the same shape: the network's row of scale and shift.

    ``experts`` above 0: the parameter holds that many matrices, [experts, b, a] or [experts, a, b].
    If ``routed``, each changes by what the tokens sent to it say; if not, all change alike.
    """

    name: str
    module: str
    a: int
    b: int
    transposed: bool
    mode: int
    experts: int = 0
    routed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out), the key under which weights share an editor network."""
        return self.a, self.b


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers of ``torch.compile``, DistributedDataParallel and PEFT.

    Raises:
        ValueError: it has a PEFT adapter that is more than layers in its place, as prompts are.
    """
    outer: Any = model
    while True:
        if "_orig_mod" in outer._modules:  # torch.compile
            outer = outer._orig_mod
        elif isinstance(outer, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            outer = outer.module
        elif hasattr(outer, "get_base_model"):  # PEFT
            if any(c.is_prompt_learning for c in outer.peft_config.values()):
                raise ValueError(
                    "this model carries a PEFT adapter of prompts, beside which an edit would not "
                    "act as it was computed; remove the adapter"
                )
            outer = outer.get_base_model()
        else:
            inner: nn.Module = outer
            return inner


def module_of(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path``; of a layer that carries an adapter of PEFT, the layer itself.

    Raises:
        AttributeError: there is none.
    """
    module: nn.Module = unwrapped(model).get_submodule(path)
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base  # PEFT wraps experts once for each of their parameters
    return module


def _matrices(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, int, int]]:
    """Name, module, in and out features of every linear layer below ``module``.

    A layer with an adapter of PEFT goes by its own name; the adapter's matrices are none.
    """
    adapted: set[str] = set()
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(getattr(child, "base_layer", None), nn.Module):
            adapted.add(f"{name}.")
            child = cast(nn.Module, child.base_layer)
        elif any(name.startswith(path) for path in adapted):
            continue
        if isinstance(child, nn.Linear):
            yield name, child, child.in_features, child.out_features
        elif isinstance(child, Conv1D):
            yield name, child, child.nx, child.nf


def _expert_weights(part: nn.Module, prefix: str = "") -> Iterator[tuple[EditedWeight, nn.Module]]:
    """The matrices of experts that run through transformers' registry of expert functions.

    Such a module holds the ways up and down of all its experts in two parameters, and says how they
    lie; the registry may replace what computes with them, and so may an edit.
    """
    for name, module in part.named_modules(prefix=prefix):
        told = [getattr(module, key, None) for key in ("has_gate", "is_transposed", "has_bias")]
        # [tokens, d], the k experts of each token, and their shares
        called = len(signature(type(module).forward).parameters) == 1 + 3
        if None in told or not called or getattr(module, "_is_expert_parallel", False):
            continue
        keys = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
        found = [module._parameters.get(key) for key in keys]
        if any(p is None or p.dim() != 3 or not p.is_floating_point() for p in found):
            continue
        for key, p in zip(keys, cast(list[nn.Parameter], found), strict=True):
            count, b, a = p.shape
            flipped = bool(module.is_transposed)
            a, b = (b, a) if flipped else (a, b)
            path = plain_name(f"{name}.")[:-1]
            yield EditedWeight(f"{path}.{key}", path, a, b, flipped, 0, count, ROUTED), module


def _experts(block: nn.Module, prefix: str) -> list[str]:
    """The parameters of a block that hold a matrix for every expert."""
    return [
        f"{name}.{key}"
        for name, module in block.named_modules(prefix=prefix)
        if not isinstance(module, nn.modules.conv._ConvNd)
        for key, p in module._parameters.items()
        if p is not None and p.dim() == 3 and min(p.shape) > 1
    ]


def _holds_experts(block: nn.Module) -> bool:
    """Whether some module of a block has the ways up and down of experts as two parameters."""
    for module in block.modules():
        shapes = [p.shape for p in module._parameters.values() if p is not None and p.dim() == 3]
        for (_, *up), (_, a, b) in product(shapes, shapes):  # LongCat's ways down are fewer
            if {*up} in ({2 * a, b}, {2 * b, a}):
                return True
    return False


def _mlp_names(block: nn.Module, prefix: str) -> list[str]:
    """The layers between the residual stream and the block's widest hidden layer.

    A way up leads from d features to f, or to 2f where gate and up are one matrix, and the way down
    from f to d. They stand alone in their module: one or two ways up and one down. Where none do,
    as in BERT, the MLP is the widest of the pairs with f > d in the whole block; not if the block
    has experts whose matrices are in one parameter, since then such a pair is attention's.
    """
    layers = [(name, a, b) for name, _, a, b in _matrices(block, prefix)]
    modules: dict[str, list[tuple[str, int, int]]] = {}
    for layer in layers:
        modules.setdefault(layer[0].rpartition(".")[0], []).append(layer)
    mlps: dict[int, list[str]] = {}
    for inside in modules.values():
        for f in _hidden(inside) if len(inside) <= 3 else ():
            if sum(a == f for _, a, _ in inside) == 1:
                mlps.setdefault(f, []).extend(name for name, *_ in inside)
    if mlps or _experts(block, prefix):
        return mlps[max(mlps)] if mlps else []
    shapes = {(a, b) for _, a, b in layers}
    ups = {(f, d): (d, f) if (d, f) in shapes else (d, 2 * f) for f, d in shapes if f > d}
    pairs = [(down, up) for down, up in ups.items() if up in shapes]
    wide = max((f for (f, _), _ in pairs), default=0)
    mlp = {shape for pair in pairs if wide in pair[0] for shape in pair}
    return [name for name, a, b in layers if (a, b) in mlp]


def _hidden(layers: Sequence[tuple[str, int, int]]) -> list[int]:
    """The f for which all of ``layers`` are a way up d -> f or d -> 2f, or the way down f -> d.

    The first is a way up: f -> d and d -> f alone would not tell which is wide.
    """
    shapes, up = {(a, b) for _, a, b in layers}, layers[0][1]
    ways = [f for f, d in shapes if f != d == up]
    return [f for f in ways if shapes in ({(f, up), (up, f)}, {(f, up), (up, 2 * f)})]


def find_blocks(part: nn.Module, prefix: str = "") -> tuple[str, nn.ModuleList]:
    """A transformer's list of blocks: the longest one whose members hold an MLP, and its path.

    Where there is none, as with experts only, the longest whose members hold a linear layer.

    Raises:
        ValueError: there is none either.
    """
    lists = [(n, m) for n, m in part.named_modules(prefix=prefix) if isinstance(m, nn.ModuleList)]
    for holds in (_mlp_names, lambda block, _: [*_matrices(block)]):
        found: tuple[str, nn.ModuleList] | None = None
        for name, module in lists:
            if found and name.startswith(f"{found[0]}."):
                continue  # T5's blocks hold lists themselves
            longer = len(module) > len(found[1] if found else ())
            if longer and any(holds(block, "") for block in module):
                found = name, module
        if found is not None:
            return found
    raise ValueError(
        f"{type(part).__name__} has no list of blocks with linear layers; name the weights to edit"
    )


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of ``model`` with blocks of their own, by path: an encoder and a decoder, or all.

    In an encoder-decoder the encoder comes first. A model that also sees or hears has the part that
    reads text.
    """
    model = unwrapped(model)
    paths = {module: name for name, module in model.named_modules()}
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    asked = ("get_encoder", "get_decoder") if two else ("get_decoder",)
    parts = [getattr(model, name)() for name in asked if hasattr(model, name)]
    # What is called a decoder may be a head.
    lists = [any(isinstance(m, nn.ModuleList) for m in part.modules()) for part in parts]
    if not parts or not all(lists) or any(part not in paths for part in parts):
        return {"": model}
    return {paths[part]: part for part in parts}


def plain_name(name: str) -> str:
    """The name of a parameter as it is without an adapter of PEFT."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def find_weights(
    model: nn.Module, patterns: Sequence[str] = (), blocks: int = 0, experts: bool = True
) -> tuple[EditedWeight, ...]:
    """The matrices to edit, in ``named_parameters()`` order, or in the paper's.

    Args:
        patterns: parameter names or fnmatch patterns; or one of ``mlp`` (the default; experts
            where a block has nothing else), ``attention`` and ``all``: those matrices of the last
            ``blocks`` blocks of every stack; ``routed`` or ``shared``: their experts, each with a
            change of its own or all with the same; or ``paper``: the paper's own list for a model
            of these sizes.
        blocks: 0 for the paper's choice (appendix C): three, of an encoder-decoder two of each.
        experts: whether those can be edited.

    Raises:
        ValueError: a pattern without a match, a parameter that is no linear layer's matrix, or a
            model that the paper has no list for.
    """
    model = unwrapped(model)
    layers: dict[str, tuple[EditedWeight, nn.Module]] = {}
    for path, layer, a, b in _matrices(model):
        plain = EditedWeight(f"{path}.weight", path, a, b, isinstance(layer, Conv1D), 0)
        layers[plain.name] = plain, layer
    layers |= {w.name: (w, module) for w, module in _expert_weights(model)}
    # A matrix that several blocks share goes by its first name.
    shared = [*model.named_parameters(remove_duplicate=False)]
    first = {id(p): name for name, p in reversed(shared)}
    same = {plain_name(name): plain_name(first[id(p)]) for name, p in shared}
    names: Sequence[str] = [name for name, other in same.items() if name == other]
    kind = patterns[0] if len(patterns) == 1 else "mlp" if not patterns else ""
    if kind in KINDS:
        chosen = {same.get(name, name) for name in _of_kind(model, kind, blocks)}
    else:
        if kind == PAPER:
            patterns = paper_weights(getattr(model, "config", None))
        mixed = [p for p in patterns if p in (*KINDS, PAPER)] if len(patterns) > 1 else []
        if mixed:
            raise ValueError(f"{mixed[0]!r} stands alone; leave out the other names, or name all")
        for pattern in patterns:
            matches = [n for n in names if fnmatchcase(n, pattern)]
            if not matches:
                raise ValueError(
                    f"no parameter is called {pattern!r}; names look like {names[-1]!r}, "
                    f"or give one of {', '.join((*KINDS, PAPER))}"
                )
            for name in matches:
                if name not in layers:
                    raise ValueError(f"{name} is not the matrix of a linear layer; leave it out")
        chosen = {n for n in names if any(fnmatchcase(n, p) for p in patterns)}
        names = patterns if kind == PAPER else names
    weights: list[EditedWeight] = []
    for name in (n for n in names if n in chosen):
        found, module = layers[name]
        if found.experts and not experts:
            raise ValueError(
                f"{name} holds the matrices of experts, which only MEND edits; choose attention, "
                "or name other weights"
            )
        others = [n for n, other in same.items() if other == name and n != name]
        if any(module_of(model, n.rpartition(".")[0]) is not module for n in others):
            raise ValueError(
                f"{name} is also {others[0]}, so an edit would act in both when merged and in one "
                "when applied; name other weights"
            )
        mode = sum(w.shape == found.shape for w in weights)
        routed = found.routed if kind not in EXPERTS else kind == "routed"
        weights.append(replace(found, mode=mode, routed=bool(found.experts) and routed))
    if not weights:
        raise ValueError(
            f"none of {', '.join(sorted(chosen))} can be reached in {type(model).__name__}; name "
            "other weights"
        )
    return tuple(weights)


def _of_kind(model: nn.Module, kind: str, blocks: int) -> set[str]:
    """Names of the parameters of one of KINDS in the last blocks of every stack.

    Raises:
        ValueError: there are none.
    """
    chosen = set()
    for path, block in _last_blocks(model, blocks):
        mlp = set(_mlp_names(block, path))
        every = {name for name, *_ in _matrices(block, path)}
        layers = {"mlp": mlp, "attention": every - mlp, "all": every}.get(kind, set())
        chosen |= {f"{name}.weight" for name in layers}
        if kind in (*EXPERTS, "all") or (kind == "mlp" and not mlp):
            chosen |= {w.name for w, _ in _expert_weights(block, path)}
    if not chosen:
        experts = [
            name for path, block in _last_blocks(model, blocks) for name in _experts(block, path)
        ]
        held = f"; its experts are held as {experts[0]}, which cannot be edited" if experts else ""
        raise ValueError(
            f"the last blocks of {type(model).__name__} have no {kind} matrices{held}; choose "
            f"another of {', '.join(KINDS)}, more blocks, or name the weights to edit"
        )
    return chosen


def _last_blocks(model: nn.Module, blocks: int) -> Iterator[tuple[str, nn.Module]]:
    """The last blocks of every stack, by path."""
    parts = stacks(model)
    for prefix, part in parts.items():
        path, block_list = find_blocks(part, prefix)
        count = min(blocks or (3 if len(parts) == 1 else 2), len(block_list))
        for i in range(len(block_list) - count, len(block_list)):
            yield f"{path}.{i}", block_list[i]


@dataclass(frozen=True)
class Origin:
    """What an edit was made for, and by what.

    ``name``: the folder or hub name that the model was loaded from. ``task``: PEFT's name of what
    it does. ``experts``: some block keeps the matrices of its experts in one parameter. ``chat``:
    how prompts were put. ``editor``: what made the edit. ``kind``: the model's type.
    """

    name: str = ""
    task: str = ""
    experts: bool = False
    chat: bool | dict[str, Any] = False
    editor: str = ""
    kind: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """The origin of edits of ``model``."""
        inner: Any = unwrapped(model)
        task = ""  # of a classifier PEFT would also want the head
        if hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None:
            two = getattr(inner.config, "is_encoder_decoder", False)
            task = "SEQ_2_SEQ_LM" if two else "CAUSAL_LM"
        experts = False
        for prefix, part in stacks(inner).items():
            with suppress(ValueError):
                experts |= any(_holds_experts(b) for b in find_blocks(part, prefix)[1])
        kind = getattr(getattr(inner, "config", None), "model_type", "")
        name = str(getattr(inner, "name_or_path", "") or "")
        return cls(name, task, experts, kind=str(kind))


def left_out(model: nn.Module, weights: Sequence[EditedWeight]) -> dict[str, str]:
    """The matrices that stand in a block beside edited ``weights`` and are not edited, and why."""
    model = unwrapped(model)
    edited = {w.module for w in weights} | {w.name for w in weights}
    found: dict[str, str] = {}
    for prefix, part in stacks(model).items():
        path, blocks = find_blocks(part, prefix)
        for i, block in enumerate(blocks):
            inside = f"{path}.{i}"
            if any(name.startswith(f"{inside}.") for name in edited):
                mlp = _mlp_names(block, inside)
                for name, *_ in _matrices(block, inside):
                    if name not in edited:
                        found[name] = "an MLP's" if name in mlp else "not the MLP's"
                experts = [name for name in _experts(block, inside) if name not in edited]
                found |= dict.fromkeys(experts, "experts in one parameter")
    return found


def lowest_block(
    model: nn.Module, weights: Sequence[EditedWeight]
) -> tuple[nn.ModuleList | None, int]:
    """The first stack's list of blocks, and how many of them lie below every edited weight.

    That is all of an encoder whose decoder alone is edited; (None, 0) where a weight lies beside
    the blocks.
    """
    parts = stacks(model)
    prefix, part = next(iter(parts.items()))
    try:
        path, blocks = find_blocks(part, prefix)
    except ValueError:
        return None, 0
    modules = [*unwrapped(model).named_modules(remove_duplicate=False)]
    edited = {id(module_of(model, w.module)) for w in weights}
    indices = [len(blocks)]
    # A module that several blocks share acts in the lowest of them.
    for name in {w.module for w in weights} | {n for n, module in modules if id(module) in edited}:
        head, _, rest = name.partition(f"{path}.")
        if not head and rest:
            indices.append(int(rest.split(".")[0]))
        elif len(parts) == 1 or name.startswith(f"{prefix}."):
            return None, 0
    return blocks, min(indices)


def weight_of(model: nn.Module, weight: EditedWeight) -> torch.Tensor:
    """The parameter itself.

    Raises:
        ValueError: the model has no such layer, or one of another shape or layout.
    """
    try:
        module: nn.Module | None = module_of(model, weight.module)
    except AttributeError:
        module = None
    if weight.experts and module is not None:
        held = {w.name: w for w, _ in _expert_weights(module, weight.module)}
        own = held.get(weight.name)
        if own is None or replace(own, mode=weight.mode, routed=weight.routed) != weight:
            raise ValueError(
                f"{type(model).__name__} has no {weight.experts} experts of {weight.a} by "
                f"{weight.b} at {weight.name}; this editor or edit was made for another model"
            )
        return module.get_parameter(weight.name.rpartition(".")[2])
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise ValueError(
            f"{type(model).__name__} has no linear layer {weight.module}; "
            "this editor or edit was made for another model"
        )
    parameter = module.weight
    expected = (weight.a, weight.b) if weight.transposed else (weight.b, weight.a)
    if tuple(parameter.shape) != expected or isinstance(module, Conv1D) != weight.transposed:
        raise ValueError(
            f"{weight.name} is {tuple(parameter.shape)} in this model, expected {expected}; "
            "this editor or edit was made for another model"
        )
    return parameter
