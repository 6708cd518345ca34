"""apply_edit and EditGraph against pymend.reference in float64 and the package's own way."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds, sizes, with_strides
from tiny import official_name
from tolerances import error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pymend import _lib
from pymend import reference as ref
from pymend.algorithms.mend.network import Editor
from pymend.config import MendConfig
from pymend.models.structure import EditedWeight
from pymend.ops import apply_edit as op
from pymend.ops import editor_mlp, rank_update

aten = torch.ops.aten
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCE = {f64: 1e-9, f32: 1e-5}
VARIANTS = {
    "joint": {},
    "not shared": {"shared": False},
    "xavier": {"init": "xavier"},
    "separate": {"combine": False},
    "one-sided": {"combine": False, "one_sided": True},
    "u only": {"combine": False, "x_only": True},
    "delta only": {"combine": False, "delta_only": True},
}
SHAPES = ((20, 33), (33, 20), (20, 33), (24, 24))
ROWS = (3, 9, 1, 0)
SEEN = 50


@dataclass
class Case:
    """Weights of several shapes with captured rows, and a trained-looking editor."""

    editor: Editor
    config: MendConfig
    weights: list[Tensor]
    u: list[Tensor]
    delta: list[Tensor]
    flags: list[bool]

    @property
    def alpha(self) -> Tensor:
        return self.editor.alpha.detach()

    def fresh(self) -> list[Tensor]:
        """The weights before any edit; strides are kept."""
        return [w.clone() for w in self.weights]

    def operands(self) -> tuple:
        """Between the weights and the groups."""
        return self.u, self.delta, self.alpha

    def on(self, device: str) -> Case:
        lists = ([t.to(device) for t in ts] for ts in (self.weights, self.u, self.delta))
        return Case(self.editor.to(device), self.config, *lists, self.flags)


def make_case(
    dtype=f32, shapes=SHAPES, rows=ROWS, seed=0, editor=None, conv1d=False, **options
) -> Case:
    """``dtype`` of the weights; ``editor``: of the networks, that of the weights if not given."""
    torch.manual_seed(seed)
    config = MendConfig(rank=7, **options)
    modes: dict[tuple[int, int], int] = {}
    named = []
    for i, (a, b) in enumerate(shapes):
        modes[a, b] = mode = modes.get((a, b), -1) + 1
        named.append(EditedWeight(f"w{i}", "", a, b, conv1d, mode))
    net = Editor(named, config).to(editor or dtype).requires_grad_(False)
    for name, p in net.named_parameters():
        p.normal_(mean=float("scale" in name), std=0.3)
    net.alpha.uniform_(1e-2, 1e-1)
    for group in net.nets.values():
        group.moments.mean.normal_(std=0.1)
        group.moments.m2.uniform_(0.5 * SEEN, 2 * SEEN)
        group.moments.count.fill_(SEEN)
    wide = torch.promote_types(editor or dtype, f32)
    weights = [torch.randn((a, b) if conv1d else (b, a)).to(dtype) for a, b in shapes]
    u = [torch.randn(n, a, dtype=wide) for n, (a, _) in zip(rows, shapes, strict=True)]
    delta = [torch.randn(n, b, dtype=wide) for n, (_, b) in zip(rows, shapes, strict=True)]
    return Case(net, config, weights, u, delta, [conv1d] * len(shapes))


def with_dead_rows(case: Case) -> Case:
    """Rows without u, without delta, and NaN opposite a zero row."""
    case.u[0][0] = 0
    case.delta[1][-1] = 0
    case.u[1][2] = 0
    case.u[1][-1, 0] = math.nan
    return case


def expected(case: Case) -> list[Tensor]:
    """Dense weights in float64, in the words of ``pymend/reference.py``."""
    edited = []
    names = ("combine", "one_sided", "x_only", "delta_only", "init")
    options = {name: getattr(case.config, name) for name in names}
    for i, w in enumerate(case.editor.weights):
        key = next(k for k, ws in case.editor.groups.items() if w in ws)
        net = case.editor.nets[key]
        moments = ref.Moments(w.a, w.b)
        moments.k = net.moments.count
        moments.u_mean, moments.delta_mean = net.moments.mean.split([w.a, w.b])
        moments.u_s, moments.delta_s = net.moments.m2.split([w.a, w.b])
        params = reference_params(net)
        u, delta = ref.kept_rows(case.u[i], case.delta[i])
        mode = w.mode if case.config.shared else None
        u, delta = ref.editor_forward(u.double(), delta.double(), params, moments, mode, **options)
        change = u.t() @ delta if w.transposed else delta.t() @ u
        edited.append(case.weights[i].double() - case.alpha[i].double() * change)
    return edited


def reference_params(net) -> ref.Params:
    """The network's parameters in float64, by the reference's names."""
    return {official_name(name): p.double() for name, p in net.named_parameters()}


def apply(case: Case, weights: list[Tensor], way: str = "apply_edit") -> Tensor:
    """Edit ``weights`` in place by one of the three ways in."""
    groups = case.editor.plain()
    if way == "graph":
        return op.EditGraph(weights, groups, case.flags)(weights, *case.operands())
    return getattr(op, way)(weights, *case.operands(), groups, case.flags)


def assert_edited(weights: list[Tensor], case: Case, tolerance: float) -> None:
    for i, (weight, exact) in enumerate(zip(weights, expected(case), strict=True)):
        assert error(weight, exact) <= tolerance, f"weight {i}: {error(weight, exact):.2g}"


# -- against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["apply_edit", "unchecked", "graph"])
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [f64, f32])
def test_dense_reference(dtype, variant, conv1d, way):
    case = with_dead_rows(make_case(dtype, conv1d=conv1d, **VARIANTS[variant]))
    if way == "graph":  # which takes no NaN, not even in a dead row
        case.u[1][-1] = 0
    weights = case.fresh()
    fidelity = apply(case, weights, way)
    assert_edited(weights, case, TOLERANCE[dtype])
    torch.testing.assert_close(fidelity, torch.ones(4).to(fidelity), rtol=0, atol=1e-4)
    assert torch.equal(weights[3], case.weights[3]), "a weight without rows keeps its bits"
    assert not torch.equal(weights[0], case.weights[0])


@pytest.mark.parametrize("way", ["apply_edit", "unchecked", "graph"])
@pytest.mark.parametrize("dtype", [bf16, f16])
def test_narrow_weights_are_rounded_once(dtype, way):
    case = make_case(dtype, editor=f32)
    weights = case.fresh()
    apply(case, weights, way)
    for weight, exact in zip(weights, expected(case), strict=True):
        bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-4
        assert ((weight.double() - exact).abs() <= bound).all()


def test_a_bfloat16_editor_runs():
    case = make_case(bf16)
    weights = case.fresh()
    apply(case, weights)
    assert_edited(weights, case, 3e-2)


def test_mixed_dtypes_and_strides():
    case = make_case(f32)
    case.weights = [
        w.to(dtype).t().contiguous().t() if i % 2 else w.to(dtype)
        for i, (w, dtype) in enumerate(zip(case.weights, (f64, bf16, f32, f64), strict=True))
    ]
    case.u = [with_strides(u) for u in case.u]
    case.delta[0] = case.delta[0].to(bf16)
    weights = case.fresh()
    apply(case, weights)
    for weight, exact in zip(weights, expected(case), strict=True):
        assert error(weight, exact) <= max(torch.finfo(weight.dtype).eps, 1e-5)


@settings(max_examples=30, deadline=None)
@given(st.tuples(sizes, sizes, sizes, sizes), seeds)
def test_any_numbers_of_rows(rows, seed):
    case = make_case(f64, rows=rows, seed=seed)
    for way in ("apply_edit", "graph"):
        weights = case.fresh()
        apply(case, weights, way)
        assert_edited(weights, case, 1e-9)


def test_the_packages_own_way_gives_the_same():
    case = make_case(f32)
    named = {
        w.name: (u, delta, (len(u),))
        for w, u, delta in zip(case.editor.weights, case.u, case.delta, strict=True)
    }
    low_rank = case.editor(named)
    u, delta = zip(*(low_rank[w.name] for w in case.editor.weights), strict=True)
    theirs, ours = case.fresh(), case.fresh()
    rank_update.rank_update(theirs, u, delta, case.alpha, case.flags)
    apply(case, ours)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_g_of_zero_is_not_zero():
    """Otherwise the tests of dead rows would show nothing."""
    case = make_case(f64, rows=(1, 1, 1, 1))
    layer = case.editor.plain()[0].joint[0]
    assert layer.bias.abs().max() > 0
    zeros = torch.zeros(1, len(layer.bias), dtype=f64)
    mode = torch.zeros(1, dtype=torch.int64)
    y = editor_mlp.eager(zeros, [layer], mode)
    assert y.abs().max() > 0.1


def test_random_rounding_takes_the_seed():
    case = make_case(bf16, editor=f32)
    results = []
    for seed in (None, 1, 1, 2):
        weights = case.fresh()
        op.apply_edit(weights, *case.operands(), case.editor.plain(), case.flags, seed)
        results.append(torch.cat([w.flatten() for w in weights]))
    assert torch.equal(results[1], results[2])
    assert not torch.equal(results[1], results[0]) and not torch.equal(results[1], results[3])


# -- buckets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [f64, f32])
def test_padding_changes_nothing(dtype):
    case = make_case(dtype, rows=(8, 5, 2, 0))
    padded = replace(
        case,
        u=[torch.cat([u, u.new_zeros(13 - len(u), u.shape[1])]) for u in case.u],
        delta=[torch.cat([d, d.new_zeros(13 - len(d), d.shape[1])]) for d in case.delta],
    )
    plain, more = case.fresh(), case.fresh()
    apply(case, plain)
    apply(padded, more)
    for a, b in zip(more, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * torch.finfo(dtype).eps, atol=1e-6)


def test_one_bucket_serves_several_calls():
    """Fewer rows after more: what the buffers held before must not show."""
    first = make_case(f64, rows=(8, 7, 5, 6))
    weights = first.fresh()
    graph = op.EditGraph(weights, first.editor.plain(), first.flags)
    assert graph.buckets == ()
    for rows, buckets in (
        ((8, 7, 5, 6), (8,)),
        ((2, 0, 1, 3), (8,)),
        ((9, 0, 1, 32), (8, 32)),
        ((1, 1, 1, 1), (8, 32)),
        ((0, 0, 0, 0), (8, 32)),
    ):
        case = make_case(f64, rows=rows, seed=sum(rows) + 1)
        case.editor.load_state_dict(first.editor.state_dict())
        for weight, value in zip(weights, case.weights, strict=True):
            weight.copy_(value)
        fidelity = graph(weights, *case.operands())
        assert_edited(weights, case, 1e-9)
        assert graph.buckets == buckets
        assert fidelity.dtype == f64


def test_results_of_a_graph_are_not_overwritten():
    case = make_case(bf16, editor=f32)
    weights = case.fresh()
    graph = op.EditGraph(weights, case.editor.plain(), case.flags)
    first = graph(weights, *case.operands())
    kept = first.clone()
    second = graph(weights, case.u, case.delta, case.alpha * 1e-4)
    assert torch.equal(first, kept) and not torch.equal(second, first)


def test_a_graph_sees_what_was_trained():
    case = make_case(f64)
    weights = case.fresh()
    graph = op.EditGraph(weights, case.editor.plain(), case.flags)
    graph(weights, *case.operands())
    for p in case.editor.parameters():
        p.mul_(1.25)
    case.weights = case.fresh()
    for weight, value in zip(weights, case.weights, strict=True):
        weight.copy_(value)
    graph(weights, *case.operands())
    assert_edited(weights, case, 1e-9)


def test_preparing_a_bucket_keeps_every_bit_of_the_weights():
    """What a capture runs before it: dead rows and a zero alpha, here on negative zeros."""
    for dtype in (f64, f32, bf16, f16):
        case = make_case(dtype, editor=f32)
        for weight in case.weights:
            weight[::2] = -0.0
        weights = case.fresh()
        op.EditGraph(weights, case.editor.plain(), case.flags)._prepare(8).run()
        for weight, value in zip(weights, case.weights, strict=True):
            assert torch.equal(weight, value) and torch.equal(weight.signbit(), value.signbit())


def test_version_counters_move():
    for way in ("apply_edit", "unchecked", "graph"):
        case = make_case()
        weights = case.fresh()
        before = [w._version for w in weights]
        apply(case, weights, way)
        assert all(w._version > v for w, v in zip(weights, before, strict=True))


# -- nothing waits -------------------------------------------------------------------------------


class NoWait(TorchDispatchMode):
    """Fails at an operator that reads a value, or that takes a tensor from beside ``device``."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is aten.index.Tensor:  # waits only for a mask, to count
            reads = [x for x in tensors[1:] if x.dtype == torch.bool]
        strangers = [x for x in tensors if x.device.type != self.device]
        fresh = func is aten.lift_fresh.default  # a tensor made of numbers: a copy on a GPU
        if reads or strangers or fresh:
            raise AssertionError(f"{func} makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernels", ["all", "off"])
@pytest.mark.parametrize("dtype", [f64, f32, bf16])
def test_no_value_is_read(dtype, kernels, monkeypatch):
    monkeypatch.setenv("PYMEND_KERNELS", kernels)
    case = make_case(dtype)
    weights, groups = case.fresh(), case.editor.plain()
    bucket = op.EditGraph(weights, groups, case.flags)._prepare(16)
    bucket.fill(*case.operands())
    with NoWait("cpu") as mode:
        bucket.run()
    assert mode.seen > 20, "the mode saw the work"
    with NoWait("cpu"):
        op.unchecked(weights, *case.operands(), groups, case.flags, seed=1)


def test_the_mode_catches_what_waits():
    case, weights = make_case(), make_case().fresh()
    rows, index = case.u[0], torch.tensor([0])
    for wait in (
        lambda: apply(case, weights),
        lambda: rows[0, 0].item(),
        lambda: rows[rows[:, 0] > 0],
        lambda: rows.nonzero(),
        lambda: torch.tensor([1, 2]),
        lambda: rows[[0, 1]],
        lambda: bool((rows > 0).all()),
    ):
        with pytest.raises(AssertionError, match="makes the host wait"), NoWait("cpu"):
            wait()
    with NoWait("cpu"):
        rows[index]
    with pytest.raises(AssertionError, match="makes the host wait"), NoWait("cuda"):
        rows + 1


@pytest.mark.skipif(not _lib.has_cuda_kernels(), reason="the native module has no CUDA code")
@pytest.mark.parametrize("dtype", [f64, f32])
def test_no_value_is_read_on_a_gpu(dtype):
    """Tensors without values, as if on a GPU: the kernels' way, and nothing comes from the host."""
    case = make_case(dtype)
    groups, alpha = case.editor.plain(), case.alpha
    with FakeTensorMode():

        def fake(tensor):
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        def layers(found):
            return tuple(layer.map(fake) for layer in found)

        groups = [
            op.Group(
                g.places,
                *map(fake, (g.modes, g.mean, g.m2, g.count)),
                *map(layers, (g.joint, g.u_side, g.delta_side)),
            )
            for g in groups
        ]
        lists = ([fake(t) for t in ts] for ts in (case.weights, case.u, case.delta))
        alpha = fake(alpha)
        with NoWait("cuda") as mode:
            fidelity = op.unchecked(*lists, alpha, groups, case.flags)
        assert mode.seen > 20, "the mode saw the work"
        assert fidelity.device.type == "cuda" and fidelity.shape == (4,)


# -- refusals ------------------------------------------------------------------------------------


def refused(case: Case, kind, message: str, way: str = "apply_edit", groups=None) -> None:
    weights = case.fresh()
    groups = case.editor.plain() if groups is None else groups
    with pytest.raises(kind, match=message):
        if way == "graph":
            op.EditGraph(weights, groups, case.flags)(weights, *case.operands())
        else:
            op.apply_edit(weights, *case.operands(), groups, case.flags)
    for weight, value in zip(weights, case.weights, strict=True):
        assert torch.equal(weight, value), "nothing was written"


@pytest.mark.parametrize("way", ["apply_edit", "graph"])
def test_operands_that_do_not_fit(way):
    case = make_case()
    refused(replace(case, u=case.u[:3]), ValueError, "u has 3 entries for 4", way)
    wrong = [case.u[0][:, 1:], *case.u[1:]]
    refused(replace(case, u=wrong), ValueError, r"u\[0\] has shape \[3, 19\]", way)
    wrong = [case.delta[0][1:], *case.delta[1:]]
    refused(replace(case, delta=wrong), ValueError, r"delta\[0\] has shape \[2, 33\]", way)
    for part in (case.u, case.delta):
        part[2][0, 3] = math.inf
        refused(case, ValueError, r"(u|delta)\[2\] is not finite", way)
        part[2][0, 3] = 0
    case.editor.alpha[1] = math.nan
    refused(case, ValueError, r"alpha\[1\] is not finite", way)


@pytest.mark.parametrize("way", ["apply_edit", "graph"])
def test_groups_that_do_not_fit(way):
    case = make_case()
    first, *others = case.editor.plain()
    layer = first.joint[0]
    for change, message in (
        ({"places": (0, 1)}, r"places \[0, 1, 1, 3\]"),
        ({"places": ()}, "places"),
        ({"joint": ()}, "has no layer"),
        ({"modes": torch.tensor([0, 2])}, "modes of .* runs from 0 to 2, scale has 2"),
        ({"modes": torch.tensor([0])}, r"int64 \[1\], expected int64 \[2\]"),
        ({"count": torch.tensor(0)}, "count of .* is 0"),
        ({"mean": first.mean[1:]}, r"mean has shape \[52\]"),
        ({"joint": (layer._replace(bias=layer.bias[1:]),)}, r"bias has shape \[52\]"),
    ):
        refused(case, ValueError, message, way, [replace(first, **change), *others])
    swapped = [replace(first, places=(0, 1)), replace(others[0], places=(2,)), *others[1:]]
    refused(case, ValueError, r"holds weights\[1\] \[20, 33\] beside weights\[0\]", way, swapped)
    layer = layer._replace(bias=layer.bias.double())
    refused(case, TypeError, "bias", way, [replace(first, joint=(layer,)), *others])


def test_what_grad_mode_refuses():
    case = make_case()
    weights = case.fresh()
    weights[1].requires_grad_()
    for way in ("apply_edit", "graph"):
        with pytest.raises(RuntimeError, match=r"weights\[1\] requires grad"):
            graph = way == "graph" and op.EditGraph(weights, case.editor.plain(), case.flags)
            if graph:
                graph(weights, *case.operands())
            apply(case, weights, way)
        with torch.no_grad():
            apply(case, weights, way)
    assert not torch.equal(weights[1], case.weights[1])


def test_what_a_graph_refuses():
    case = make_case()
    weights = case.fresh()
    groups = case.editor.plain()
    graph = op.EditGraph(weights, groups, case.flags)
    others = [*weights[:2], weights[2].clone(), weights[3]]
    with pytest.raises(ValueError, match=r"weights\[2\] is not the tensor"):
        graph(others, *case.operands())
    with pytest.raises(ValueError, match="weights has 3 entries, not 4"):
        graph(weights[:3], *case.operands())
    wide = replace(case, u=[u.double() for u in case.u])
    with pytest.raises(TypeError, match=r"u\[0\] has dtype torch.float64, the buffers have"):
        graph(weights, *wide.operands())
    many = make_case(rows=(1025, 1, 1, 1))
    with pytest.raises(ValueError, match=r"u\[0\] has 1025 rows, the largest bucket has 1024"):
        graph(weights, *many.operands())
    with pytest.raises(ValueError, match="transposed has 3 entries for 4 weights"):
        op.EditGraph(weights, groups, case.flags[:3])
    with pytest.raises(ValueError, match=r"weights holds a tensor \[20\], expected matrices"):
        op.EditGraph([weights[0][0], *weights[1:]], groups)
    with pytest.raises(ValueError, match="weights is empty"):
        op.EditGraph([], [])
    with pytest.raises(ValueError, match="share memory"):
        op.EditGraph([weights[0], *weights[:2], weights[3]], groups)
    assert graph.buckets == ()
    for weight, value in zip(weights, case.weights, strict=True):
        assert torch.equal(weight, value)


@pytest.mark.parametrize(
    ("options", "setting"), [({"norm": False}, "norm=False"), ({"official": True}, "official=True")]
)
def test_editors_without_a_plain_form(options, setting):
    with pytest.raises(ValueError, match=setting):
        make_case(**options).editor.plain()


def test_no_weight():
    assert op.apply_edit([], [], [], torch.ones(0), []).shape == (0,)


# -- on a GPU ------------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("kernels", ["all", "off"])
@pytest.mark.parametrize("dtype", [f64, f32])
def test_captured_once_per_bucket(dtype, kernels, monkeypatch):
    monkeypatch.setenv("PYMEND_KERNELS", kernels)
    first = make_case(dtype).on("cuda")
    weights = first.fresh()
    graph = op.EditGraph(weights, first.editor.plain(), first.flags)
    captures = []
    captured = op._captured
    monkeypatch.setattr(op, "_captured", lambda *a: captures.append(a) or captured(*a))
    for rows in ((3, 8, 1, 0), (7, 2, 0, 1), (20, 0, 0, 9), (1, 1, 1, 1)):
        case = make_case(dtype, rows=rows, seed=sum(rows)).on("cuda")
        case.editor.load_state_dict(first.editor.state_dict())
        for weight, value in zip(weights, case.weights, strict=True):
            weight.copy_(value)
        graph(weights, *case.operands())
        case = case.on("cpu")
        assert_edited([w.cpu() for w in weights], case, TOLERANCE[dtype])
    assert len(captures) == 2 and graph.buckets == (8, 32)


@pytest.mark.cuda
@needs_cuda
def test_the_uncaptured_form_does_not_wait():
    case = make_case().on("cuda")
    weights, groups = case.fresh(), case.editor.plain()
    op.unchecked(weights, *case.operands(), groups, case.flags)  # libraries load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.unchecked(weights, *case.operands(), groups, case.flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
