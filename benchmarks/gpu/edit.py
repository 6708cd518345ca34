"""The edit op, captured rows in and edited weights out, against six other ways to compute it.

A   official: the order of work of the paper's code, dense, with its six logged statistics a matrix
A'  lean: the same without the log
B   factored: one matrix after the other, eager, ``addmm_``
C   compiled: grouped by shape, ``torch.compile`` max-autotune, in a CUDA graph
D   cuBLAS: grouped by shape, ``addmm_``, in a CUDA graph
E   ours: what the package does, eager, with its checks
F   ours: ``apply_edit`` without the checks that wait, in a CUDA graph

A and A' are float32, as that code is. Every way is held against float64 before it is timed. In
"tf32" everything is float32, and torch may take its products in TF32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from official_order import OfficialOrder
from torch import Tensor

from gpu.measure import Call, Case, Device, Operands, Run, compare_all, in_tf32
from pymend import reference as ref
from pymend.algorithms.mend.network import Editor
from pymend.config import MendConfig
from pymend.models.structure import EditedWeight
from pymend.ops import apply_edit
from pymend.ops import rank_update as rank_update_op

RANK = 1920
MODELS: dict[str, tuple[tuple[tuple[int, int, int], ...], bool]] = {  # (a, b, count), Conv1D
    "GPT-J 6B": (((4096, 16384, 3), (16384, 4096, 3)), False),
    "GPT-2 small": (((768, 3072, 3), (3072, 768, 3)), True),
    "Llama-3-8B": (((4096, 14336, 6), (14336, 4096, 3)), False),
    "SmolLM2-135M": (((576, 1536, 6), (1536, 576, 3)), False),
    "T5-XXL": (((4096, 10240, 4), (10240, 4096, 4)), False),
}
COMPARED = ("GPT-2 small", "GPT-J 6B")  # against what takes long, the short one first
FIRST, LATER = (32, 128), (8, 1024)  # rows per matrix, in the order of their worth
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
# The edit is about as large as the weight, so this bounds the error of either.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-4, "tf32": 5e-3}
SHRINK = 64  # of every width, in a rehearsal
OFFICIAL = ("A official", "A' lean")
COMPILED = ("C compiled graph", "D cuBLAS graph", "F ours graph")
SEEN = 1000


@dataclass(frozen=True)
class Group:
    """The matrices of one shape: their places, modes of all rows, network, statistics."""

    members: tuple[int, ...]
    mode: Tensor
    net: Any
    mean: Tensor  # float32, for the rivals
    inverse: Tensor


class Subject:
    """Weights, rows and an editor, all random: no rival can gain from zeros.

    Args:
        dtype: of the weights, and of the editor unless ``editor_dtype`` is given.
    """

    def __init__(
        self,
        model: str,
        rows: int,
        dtype: torch.dtype,
        device: Device,
        dry: bool,
        seed: int,
        editor_dtype: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(seed)
        shapes, transposed = MODELS[model]
        shrink = SHRINK if dry else 1
        self.rows, self.dtype, self.device = rows, dtype, device
        self.editor_dtype = dtype if editor_dtype is None else editor_dtype
        self.weights = [
            EditedWeight(f"w{a}x{b}.{i}", "", a // shrink, b // shrink, transposed, i)
            for a, b, count in shapes
            for i in range(count)
        ]
        options: dict[str, Any] = {"device": device.name}
        self.step = 0.02 / math.sqrt(rows)  # makes the edit about as large as the weight
        self.W, self.u, self.delta = [], [], []
        for w in self.weights:
            shape = (w.a, w.b) if transposed else (w.b, w.a)
            self.W.append((0.02 * torch.randn(shape, **options)).to(dtype))
            self.u.append(torch.randn(rows, w.a, **options))
            self.delta.append(torch.randn(rows, w.b, **options))
        self.alpha = torch.full((len(self.weights),), self.step, **options)
        with torch.device(device.name):
            self.editor = Editor(self.weights, MendConfig(rank=RANK // shrink))
        self.editor.requires_grad_(False)
        self.editor.alpha.fill_(self.step)
        self.groups = []
        for key, members in self.editor.groups.items():
            net = self.editor.nets[key]
            self._randomise(net)
            places = tuple(self.weights.index(w) for w in members)
            mode = torch.arange(len(places), device=device.name).repeat_interleave(rows)
            sigma = (net.moments.m2 / (SEEN - 1)).sqrt()
            inverse = (1 / (sigma + ref.EPS)).float()
            self.groups.append(Group(places, mode, net, net.moments.mean.float(), inverse))
        self.plain = self.editor.plain()

    def _randomise(self, net: Any) -> None:
        for layer in net.joint:
            layer.u.normal_(std=layer.u.shape[1] ** -0.5)
            layer.v.normal_(std=layer.v.shape[1] ** -0.5)
            layer.bias.normal_(std=0.1)
            layer.scale.normal_(mean=1, std=0.1)
            layer.shift.normal_(std=0.1)
        for parameter in net.parameters():
            parameter.data = parameter.data.to(self.editor_dtype)
        net.moments.mean.normal_(std=0.1)
        net.moments.m2.uniform_(0.5 * SEEN, 2 * SEEN)
        net.moments.count.fill_(SEEN)

    # -- the rivals: each returns the edited weights ---------------------------------------------

    def _reference(self, dtype: torch.dtype) -> list[tuple[ref.Params, ref.Moments]]:
        """The editor in the words of ``pymend/reference.py``, one for each matrix."""
        per_weight: list[Any] = [None] * len(self.weights)
        official = dtype == torch.float32
        for group in self.groups:
            a, b = self.weights[group.members[0]].shape
            params: ref.Params = {}
            for i, layer in enumerate(group.net.joint):
                named = {"u": layer.u, "v": layer.v, "bias": layer.bias}
                named |= {"mode_scale.weight": layer.scale, "mode_shift.weight": layer.shift}
                params |= {f"mlp.layers.{i}.{k}": p.data.to(dtype) for k, p in named.items()}
            moments = ref.Moments(a, b, official=official, dtype=dtype, device=self.device.name)
            moments.k.fill_(SEEN)
            state = group.net.moments
            moments.u_mean, moments.delta_mean = state.mean.to(dtype).split([a, b])
            moments.u_s, moments.delta_s = state.m2.to(dtype).split([a, b])
            for i in group.members:
                per_weight[i] = params, moments
        return per_weight

    def dense(self, log: bool, dtype: torch.dtype = torch.float32) -> Call:
        """A and A'; in float64, the truth."""
        editors = self._reference(dtype)

        def call() -> list[Tensor]:
            edited = []
            for w, W, u, delta, (params, moments) in zip(
                self.weights, self.W, self.u, self.delta, editors, strict=True
            ):
                equation = "ta,tb->ab" if w.transposed else "ta,tb->ba"
                if dtype == torch.float32:
                    true = torch.einsum(equation, u, delta)  # what backward leaves in W.grad
                    u, delta = ref.kept_rows(u, delta)
                u, delta = ref.editor_forward(u.to(dtype), delta.to(dtype), params, moments, w.mode)
                pseudo = torch.einsum(equation, u, delta)
                if log:
                    OfficialOrder._diagnostics(w.name, true, pseudo)
                edited.append(W.to(dtype) + -self.step * pseudo)
            return edited

        return call

    def factored(self) -> list[Tensor]:
        """B: four thin products and an ``addmm_`` for each matrix."""
        for group in self.groups:
            for i in group.members:
                w = self.weights[i]
                z = (torch.cat([self.u[i], self.delta[i]], 1) - group.mean) * group.inverse
                z = _layers(z.to(self.editor_dtype), group.net, w.mode)
                self._addmm(i, *z.split([w.a, w.b], 1))
        return self.W

    def grouped(self) -> list[Tensor]:
        """C and D: all rows of a shape in one pass."""
        for group in self.groups:
            w = self.weights[group.members[0]]
            rows = [torch.cat([self.u[i], self.delta[i]], 1) for i in group.members]
            z = (torch.cat(rows) - group.mean) * group.inverse
            z = _layers(z.to(self.editor_dtype), group.net, group.mode)
            for i, part in zip(group.members, z.split(self.rows), strict=True):
                self._addmm(i, *part.split([w.a, w.b], 1))
        return self.W

    def _addmm(self, i: int, u: Tensor, delta: Tensor) -> None:
        u, delta = u.to(self.dtype), delta.to(self.dtype)
        left, right = (u, delta) if self.weights[i].transposed else (delta, u)
        self.W[i].addmm_(left.t(), right, alpha=-self.step)

    def package(self) -> list[Tensor]:
        """E."""
        rows = {
            w.name: (u, delta, (self.rows,))
            for w, u, delta in zip(self.weights, self.u, self.delta, strict=True)
        }
        low_rank = self.editor(rows)
        u, delta = zip(*(low_rank[w.name] for w in self.weights), strict=True)
        flags = [w.transposed for w in self.weights]
        rank_update_op.rank_update(self.W, u, delta, self.editor.alpha, flags)
        return self.W

    def unchecked(self) -> list[Tensor]:
        """F: rows are not looked at, nothing is read back."""
        flags = [w.transposed for w in self.weights]
        operands = (self.W, self.u, self.delta, self.alpha, self.plain, flags)
        apply_edit.unchecked(*operands)
        return self.W


def _layers(z: Tensor, net: Any, mode: Any) -> Tensor:
    for layer in net.joint:
        p = torch.addmm(layer.bias, z @ layer.v.t(), layer.u.t())
        z = z + (layer.scale[mode] * p + layer.shift[mode]).clamp(min=0)
    return z


# -- cases ---------------------------------------------------------------------------------------


def case(
    run: Run, device: Device, model: str, rows: int, dtype: str, names: Sequence[str] = ()
) -> Case:
    """One model, number of rows and dtype; ``names``: of the rivals, all but C if empty."""
    count = max(2, rows // 16) if run.dry else rows

    def make(seed: int) -> Operands:
        s = Subject(model, count, DTYPES[dtype], device, run.dry, seed)
        rivals: dict[str, Call] = {}
        if dtype != "bfloat16":
            rivals |= {OFFICIAL[0]: s.dense(log=True), OFFICIAL[1]: s.dense(log=False)}
        rivals |= {"B factored": s.factored, "D cuBLAS graph": s.grouped}
        rivals |= {"E ours": s.package, "F ours graph": s.unchecked}
        if "C compiled graph" in names:
            mode: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"}
            rivals["C compiled graph"] = torch.compile(
                s.grouped, dynamic=False, **({"backend": "aot_eager"} if run.dry else mode)
            )
        rivals = {n: c for n, c in rivals.items() if not names or n in names}
        if dtype == "tf32":
            rivals = {name: in_tf32(call) for name, call in rivals.items()}
        return Operands(s.W, rivals, lambda: s.dense(log=False, dtype=torch.float64)())

    network, update = phases(model, rows, DTYPES[dtype].itemsize)
    return Case(
        {"model": model, "N": rows, "dtype": dtype, "phases": [network, update]},
        make,
        size=network["bytes"] + update["bytes"] / 2,
        bytes=update["bytes"] + network["bytes"],
        flops=update["flops"] + network["flops"],
        tolerance=TOLERANCE[dtype],
    )


def phases(model: str, rows: int, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes and operations of the network and of the update, ``width`` bytes an element."""
    shapes, _ = MODELS[model]
    elements = sum(a * b * n for a, b, n in shapes)
    editors = sum(4 * (a + b) * min(RANK, a + b) for a, b, _ in shapes)
    passes = sum(4 * (a + b) * min(RANK, a + b) * n for a, b, n in shapes)
    update = {"bytes": 2 * width * elements, "flops": 2 * rows * elements}
    return {"bytes": width * editors, "flops": 2 * rows * passes}, update


@torch.no_grad()
def edit(run: Run) -> None:
    """All models, 32 and 128 rows first; a rehearsal has 8 and 1024 rows of one model only."""
    device = Device(run.dry)
    run.save(tolerance=TOLERANCE)
    sizes = [(model, rows) for rows in FIRST for model in MODELS]
    sizes += [(model, rows) for rows in LATER for model in list(MODELS)[: 1 if run.dry else None]]
    wanted = [(*size, dtype) for size in sizes for dtype in ("bfloat16", "float32")]
    wanted[2:2] = [(model, FIRST[0], "tf32") for model in COMPARED]
    compare_all(run, device, [partial(case, run, device, *what) for what in wanted])


@torch.no_grad()
def compiled(run: Run) -> None:
    """The strongest rival, which takes long to compile, on two models."""
    device = Device(run.dry)
    compare_all(
        run,
        device,
        [
            partial(case, run, device, model, rows, "bfloat16", COMPILED)
            for rows in FIRST
            for model in COMPARED
        ],
    )
