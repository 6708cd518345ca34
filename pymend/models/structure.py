"""Finds, by structure and never by name, what can be edited in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pymend.models.presets import paper_weights

KINDS = ("mlp", "attention", "all")  # matrices of a block
PAPER = "paper"  # the paper's own list for the model at hand


@dataclass(frozen=True)
class EditedWeight:
    """A matrix that receives edits.

    ``name`` is the parameter's, ``module`` its module's. The layer maps ``a`` features to ``b``.
    ``transposed`` marks GPT-2's ``Conv1D`` layout, [a, b] in place of [b, a]. ``mode`` is the
    position among the edited weights of the same shape: the network's row of scale and shift.
    """

    name: str
    module: str
    a: int
    b: int
    transposed: bool
    mode: int

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out), the key under which weights share an editor network."""
        return self.a, self.b


def _matrices(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, int, int]]:
    """Name, module, in and out features of every linear layer below ``module``."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, nn.Linear):
            yield name, child, child.in_features, child.out_features
        elif isinstance(child, Conv1D):
            yield name, child, child.nx, child.nf


def _mlp_names(block: nn.Module, prefix: str) -> list[str]:
    """The layers between the residual stream and the block's widest hidden layer.

    A way up leads from d features to f > d, or to 2f where gate and up are one matrix, and the way
    down from f to d. The other such pairs are attention's, which are narrower.
    """
    layers = [(name, a, b) for name, _, a, b in _matrices(block, prefix)]
    shapes = {(a, b) for _, a, b in layers}
    ups = {(f, d): (d, f) if (d, f) in shapes else (d, 2 * f) for f, d in shapes if f > d}
    pairs = [(down, up) for down, up in ups.items() if up in shapes]
    wide = max((f for (f, _), _ in pairs), default=0)
    mlp = {shape for pair in pairs if wide in pair[0] for shape in pair}
    return [name for name, a, b in layers if (a, b) in mlp]


def find_blocks(part: nn.Module, prefix: str = "") -> tuple[str, nn.ModuleList]:
    """A transformer's list of blocks: the longest one whose members hold an MLP, and its path.

    Raises:
        ValueError: there is none.
    """
    found: tuple[str, nn.ModuleList] | None = None
    for name, module in part.named_modules(prefix=prefix):
        if found and name.startswith(f"{found[0]}."):
            continue  # T5's blocks hold lists themselves
        longer = isinstance(module, nn.ModuleList) and len(module) > len(found[1] if found else ())
        if longer and _mlp_names(module[-1], ""):
            found = name, module
    if found is None:
        raise ValueError(
            f"{type(part).__name__} has no list of blocks with MLP matrices; "
            "name the weights to edit"
        )
    return found


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of ``model`` with blocks of their own, by path: an encoder and a decoder, or all.

    In an encoder-decoder the encoder comes first.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"": model}
    paths = {module: name for name, module in model.named_modules()}
    parts = (model.get_encoder(), model.get_decoder())  # type: ignore[operator]
    return {paths[part]: part for part in parts}


def find_weights(
    model: nn.Module, patterns: Sequence[str] = (), blocks: int = 0
) -> tuple[EditedWeight, ...]:
    """The matrices to edit, in ``named_parameters()`` order, or in the paper's.

    Args:
        patterns: parameter names or fnmatch patterns; or one of ``mlp`` (the default),
            ``attention`` and ``all``: those matrices of the last ``blocks`` blocks of every stack;
            or ``paper``: the paper's own list for a model of these sizes.
        blocks: 0 for the paper's choice (appendix C): three, of an encoder-decoder two of each.

    Raises:
        ValueError: a pattern without a match, a parameter that is no linear layer's matrix, or a
            model that the paper has no list for.
    """
    layers = {f"{name}.weight": (name, m, a, b) for name, m, a, b in _matrices(model)}
    names: Sequence[str] = [name for name, _ in model.named_parameters()]
    kind = patterns[0] if len(patterns) == 1 else "mlp" if not patterns else ""
    if kind in KINDS:
        chosen = _of_kind(model, kind, blocks)
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
        module_name, module, a, b = layers[name]
        mode = sum(w.shape == (a, b) for w in weights)
        weights.append(EditedWeight(name, module_name, a, b, isinstance(module, Conv1D), mode))
    return tuple(weights)


def _of_kind(model: nn.Module, kind: str, blocks: int) -> set[str]:
    """Names of the parameters of one of KINDS in the last blocks of every stack."""
    chosen = set()
    parts = stacks(model)
    for prefix, part in parts.items():
        path, block_list = find_blocks(part, prefix)
        count = min(blocks or (3 if len(parts) == 1 else 2), len(block_list))
        for i in range(len(block_list) - count, len(block_list)):
            mlp = set(_mlp_names(block_list[i], f"{path}.{i}"))
            every = {name for name, *_ in _matrices(block_list[i], f"{path}.{i}")}
            of_kind = {"mlp": mlp, "attention": every - mlp, "all": every}[kind]
            chosen |= {f"{name}.weight" for name in of_kind}
    return chosen


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
    indices = [len(blocks)]
    for weight in weights:
        head, _, rest = weight.module.partition(f"{path}.")
        if not head and rest:
            indices.append(int(rest.split(".")[0]))
        elif len(parts) == 1 or weight.module.startswith(f"{prefix}."):
            return None, 0
    return blocks, min(indices)


def weight_of(model: nn.Module, weight: EditedWeight) -> torch.Tensor:
    """The parameter itself.

    Raises:
        ValueError: the model has no such layer, or one of another shape or layout.
    """
    try:
        module = model.get_submodule(weight.module)
    except AttributeError:
        module = None
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
