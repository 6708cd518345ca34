"""editor_stream on five back ends against pymend.reference in float64; without a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds, sizes, with_strides
from test_editor_mlp import address, reference_layer
from tolerances import assert_no_worse_than_eager
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pymend import _lib
from pymend.algorithms.mend.editor import network
from pymend.config import MendConfig
from pymend.ops import editor_mlp
from pymend.ops import editor_stream as op

needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")
ORDERS = [("reversed", 0)] + [("random", seed) for seed in range(3)]


@dataclass
class Case:
    x: Tensor  # float32, the layers float32 or bfloat16
    layers: list[op.Layer]
    mode: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """All in one dtype; what has it already is not copied."""
        return self.map(lambda t: t.to(dtype))

    def map(self, change) -> Case:
        """``change`` applied to every floating tensor."""
        layers = [
            op.Layer(*(t if t is None else change(t) for t in of.tensors()), of.residual)
            for of in self.layers
        ]
        return replace(self, x=change(self.x), layers=layers)

    def arguments(self):
        return self.x, self.layers, self.mode


def make_case(dtype, rows, d, rank=3, modes=2, residual=True, whole=False, seed=0) -> Case:
    """``whole``: small whole numbers, so that every sum is exact."""
    g = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-1, 2, shape, generator=g).float()
        return torch.randn(shape, generator=g)

    def layer() -> op.Layer:
        fan_in = 1 if whole else max(rank, 1) ** 0.5 * max(d, 1) ** 0.5
        of = [values(rank, d), values(d, rank) / fan_in, values(d)]
        of += [values(modes, d), values(modes, d)] if modes else [None, None]
        return op.Layer(*(t if t is None else t.to(dtype) for t in of), residual)

    mode = torch.randint(0, max(modes, 1), (rows,), generator=g)
    return Case(values(rows, d), [layer(), layer()], mode)


def samples(dtype) -> dict[str, Case]:
    sizes_of = {
        "no rows": dict(rows=0, d=9),
        "one row": dict(rows=1, d=1, rank=1, modes=1),
        "7 rows": dict(rows=7, d=70, rank=13, modes=5),
        "8 rows": dict(rows=8, d=37, rank=5, modes=3),
        "12 rows": dict(rows=12, d=64, rank=16),  # loads of 16 bytes
        "31 rows": dict(rows=31, d=33, rank=7, modes=0),
        "33 rows": dict(rows=33, d=40, rank=8, residual=False),
        "64 rows": dict(rows=64, d=41, rank=6, modes=0, residual=False),
        "slices": dict(rows=40, d=1100, rank=5),  # of V, with a tail
        "slices of U": dict(rows=33, d=8, rank=1032),
        "no columns": dict(rows=4, d=0),
        "no rank": dict(rows=4, d=6, rank=0),
    }
    cases = {name: make_case(dtype, **of) for name, of in sizes_of.items()}
    strided = make_case(dtype, 33, 40)
    cases["strides"] = strided.map(lambda t: with_strides(t) if t.dim() == 2 else t)
    return cases


NAMES = tuple(samples(torch.float32))


def run(backend: str, case: Case, **emulation) -> Tensor:
    """y [R, d] float32."""
    if backend == "reference":
        return through_reference(case).float()
    if backend == "eager":
        return op.eager(*case.to(torch.float32).arguments())
    if backend == "emu":
        return emulate(*case.arguments(), **emulation)
    if backend.startswith("cuda"):
        moved = replace(case.map(lambda t: t.to(backend)), mode=case.mode.to(backend))
        return op._streamed(*moved.arguments()).cpu()
    return op.editor_stream(*case.to(torch.float32).arguments())


def through_reference(case: Case) -> Tensor:
    exact = case.to(torch.float64)
    y = exact.x
    for layer in exact.layers:
        y = reference_layer(y, *layer.tensors(), case.mode, layer.residual)
    return y


def emulate(x, layers, mode, **options) -> Tensor:
    """The CUDA kernel's own source on fibers."""
    _emu = pytest.importorskip("_emu", reason="the emulation module is not built (pybind11)")
    x, residual = x.contiguous(), layers[0].residual
    layers = [[t if t is None else t.contiguous() for t in of.tensors()] for of in layers]
    v, _, _, scale, _ = layers[0]
    shape = [*x.shape, len(v), 0 if scale is None else len(scale)]
    y = torch.full_like(x, torch.nan)
    if not x.numel():
        return y
    # As the op finds out for itself: 16 bytes at once where every row of weights allows it.
    aligned = all(width * v.element_size() % 16 == 0 for width in v.shape)
    options = {"aligned": aligned} | options
    _emu.editor_stream(
        str(v.dtype).removeprefix("torch."), [[address(t) for t in of] for of in layers], shape,
        address(x), address(mode), address(y), residual, **options,
    )  # fmt: skip
    return y


def assert_right(backend: str, case: Case, **emulation) -> None:
    ours, theirs = run(backend, case, **emulation), run("eager", case)
    length = 2 * (case.x.shape[1] + len(case.layers[0].v))
    assert_no_worse_than_eager(ours, theirs, through_reference(case), length)


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_both_layers(backend, name, dtype):
    assert_right(backend, samples(dtype)[name])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    case = make_case(
        data.draw(st.sampled_from(op.DTYPES)),
        data.draw(sizes),
        data.draw(sizes),
        data.draw(st.integers(0, 9)),
        data.draw(st.integers(0, 3)),
        data.draw(st.booleans()),
        seed=data.draw(seeds),
    )
    if data.draw(st.booleans()):
        case = case.map(lambda t: t.t().contiguous().t() if t.dim() == 2 else t)
    assert_right(backend, case)


def test_by_hand(backend):
    """Row (1, 2); U V x = x in both layers; biases (1, -1) and (-5, 0)."""
    eye = torch.eye(2)
    biases = torch.tensor([1.0, -1.0]), torch.tensor([-5.0, 0.0])
    layers = [op.Layer(eye, eye, bias, None, None, True) for bias in biases]
    case = Case(torch.tensor([[1.0, 2.0]]), layers, torch.zeros(1, dtype=torch.int64))
    # (1, 2) + (2, 1) = (3, 3), then (3, 3) + (0, 3)
    assert run(backend, case).tolist() == [[3.0, 6.0]]


def test_nan_is_not_cut_and_stays_in_its_row(backend):
    case = make_case(torch.float32, 9, 40)
    case.x[1, 2] = torch.nan
    y = run(backend, case)
    assert y[1].isnan().all() and not y[torch.arange(9) != 1].isnan().any()


# ----------------------------------------------------------------------- the kernel, emulated


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [7, 40])
def test_emulated_schedules_blocks_and_grids_are_bit_equal(rows, dtype):
    """Slices depend on the number of rows alone, so blocks, grids and orders give the same bits."""
    # With 40 rows two slices, and of three blocks the second one, of two warps, works on both.
    case = make_case(dtype, rows, 530, rank=26)
    plain = run("emu", case, blocks=1)
    for blocks, block in ((2, 32), (5, 64), (3, 256)):
        assert torch.equal(run("emu", case, blocks=blocks, block=block), plain), f"{blocks} {block}"
    for order, seed in ORDERS:
        other = run("emu", case, blocks=3, block=64, order=order, seed=seed)
        assert torch.equal(other, plain), f"{order} {seed}"


@pytest.mark.parametrize("dtype", op.DTYPES, ids=str)
def test_emulated_loads_of_16_bytes_change_nothing(dtype):
    case = make_case(dtype, 12, 192, rank=16)
    assert torch.equal(run("emu", case, aligned=True), run("emu", case, aligned=False))


def test_emulation_refuses():
    case = make_case(torch.float32, 2, 2)
    for options, message in (({"block": 48}, "block is 48"), ({"order": "up"}, "schedule is 'up'")):
        with pytest.raises(ValueError, match=message):
            run("emu", case, **options)


# ------------------------------------------------------------------------------- who is called


@pytest.fixture
def streamed(monkeypatch) -> list[int]:
    """CUDA tensors are played by CPU tensors, the kernel by its emulation; rows of each call."""
    calls: list[int] = []

    def emulated(x, *others):
        calls.append(len(x))
        return emulate(x, *others)

    monkeypatch.setattr(op, "DEVICE", "cpu")
    monkeypatch.setattr(op, "_streamed", emulated)
    return calls


def test_the_kernel_serves_few_rows_without_gradients(streamed):
    case = make_case(torch.float32, 64, 9)
    assert torch.equal(op.editor_stream(*case.arguments()), emulate(*case.arguments()))
    half = make_case(torch.bfloat16, 5, 9, whole=True).to(torch.bfloat16)
    assert torch.equal(op.editor_stream(*half.arguments()), op.eager(*half.arguments()))
    assert streamed == [64, 5]


def test_layers_of_one_op_each_serve_the_rest(streamed, monkeypatch):
    case = make_case(torch.float32, 9, 9)
    other = make_case(torch.float32, 9, 9, rank=2)
    none = make_case(torch.float32, 9, 9, modes=0)
    without = replace(case.layers[1], residual=False)
    rest = {
        "rows": make_case(torch.float32, 65, 9),
        "float64": case.to(torch.float64),
        "float16": make_case(torch.float32, 9, 9, whole=True).to(torch.float16),
        "one layer": replace(case, layers=case.layers[:1]),
        "two ranks": replace(case, layers=[case.layers[0], other.layers[0]]),
        "one with modes": replace(case, layers=[case.layers[0], none.layers[0]]),
        "no layer": replace(case, layers=[]),
        "one residual": replace(case, layers=[case.layers[0], without]),
    }
    for name, of in rest.items():
        y = op.editor_stream(*of.arguments())
        torch.testing.assert_close(y, op.eager(*of.arguments()), msg=name)
    leaf = case.map(lambda t: nn.Parameter(t.clone()))
    op.editor_stream(*leaf.arguments()).sum().backward()
    assert leaf.layers[0].v.grad is not None
    assert streamed == []
    with torch.no_grad():
        op.editor_stream(*leaf.arguments())
    assert streamed == [9]


def test_on_a_cpu_it_is_editor_mlp_twice():
    case = make_case(torch.float32, 9, 9)
    y = case.x
    for layer in case.layers:
        y = editor_mlp.editor_mlp(y, *layer.tensors(), case.mode, layer.residual)
    assert torch.equal(op.editor_stream(*case.arguments()), y)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("combine", [True, False])
def test_the_network_uses_it(combine, shared, streamed):
    config = MendConfig(rank=4, combine=combine, norm=False)
    net = network.EditorNet(5, 8, 2 if shared else 0, config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    rows = [torch.randn(3, 5)], [torch.randn(3, 8)], [3], torch.tensor([0, 1, 0])
    with torch.no_grad():
        inference = net(*rows)
    assert streamed == ([3] if combine else [3, 3])
    training = net(*rows)
    for a, b in zip(inference, training, strict=True):
        torch.testing.assert_close(a, b.detach())
        assert b.requires_grad


# ------------------------------------------------------------------------------------ the op


@needs_binary
@pytest.mark.parametrize("modes", [0, 2])
def test_fake(modes):
    """Shapes and dtypes without a device; opcheck needs code of the op, and a CPU has none."""
    with FakeTensorMode():
        y = op._streamed(*make_case(torch.float32, 5, 7, modes=modes).arguments())
    assert y.shape == (5, 7) and y.dtype == torch.float32


@needs_binary
def test_a_cpu_has_no_native_code():
    with pytest.raises(NotImplementedError, match="editor_stream"):
        op._streamed(*make_case(torch.float32, 5, 7).arguments())


def native_operands(case: Case) -> list:
    sides = zip(*(layer.tensors() for layer in case.layers), strict=True)
    return [case.x, *map(list, sides), case.mode.to(case.x.device), True]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_opcheck():
    case = make_case(torch.float32, 5, 7).map(Tensor.cuda)
    torch.library.opcheck(torch.ops.pymend.editor_stream.default, native_operands(case))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_in_a_graph():
    """The counter of the grid's barrier is set back within the graph: it can be replayed."""
    case = make_case(torch.float32, 33, 530)
    case = replace(case.map(Tensor.cuda), mode=case.mode.cuda())
    plain = op._streamed(*case.arguments())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op._streamed(*case.arguments())
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, plain)


# ---------------------------------------------------------------------------------- bad input


REFUSED = {
    "x": (dict(x=torch.ones(7)), ValueError, r"x has shape \[7\], expected a matrix"),
    "v": (dict(v=torch.ones(3, 8)), ValueError, r"v has shape \[3, 8\], expected \[3, 7\]"),
    "u": (dict(u=torch.ones(7, 4)), ValueError, r"u has shape \[7, 4\], expected \[7, 3\]"),
    "dtype": (dict(bias=torch.ones(7).double()), TypeError, "bias has dtype torch.float64"),
    "scale": (dict(shift=None), ValueError, "shift is None and scale is not"),
    "mode": (dict(mode=torch.tensor([0, 1, 2, 0, 0])), ValueError, "mode holds 2"),
}


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, kernel, request):
    calls = request.getfixturevalue("streamed") if kernel else []
    change, kind, message = REFUSED[name]
    case = make_case(torch.float32, 5, 7)
    of_case = {k: t for k, t in change.items() if k in ("x", "mode")}
    of_layer = {k: t for k, t in change.items() if k not in of_case}
    layers = [replace(layer, **of_layer) for layer in case.layers]
    with pytest.raises(kind, match=message):
        op.editor_stream(*replace(case, layers=layers, **of_case).arguments())
    assert calls == []


NATIVE_REFUSED = {
    "x dtype": (0, lambda x: x.double(), "x has dtype Double, expected Float"),
    "rows": (0, lambda x: x.repeat(13, 1), "x has 65 rows, at most 64"),
    "x strides": (0, lambda x: x.t().contiguous().t(), "x is not contiguous"),
    "layers": (1, lambda v: v[:1], "v has 1 entries, expected 2"),
    "weights": (1, lambda v: [t.half() for t in v], "expected Float or BFloat16"),
    "v": (1, lambda v: [v[0], v[1][:2]], r"v\[1\] has shape \[2, 7\], expected \[3, 7\]"),
    "u": (2, lambda u: [u[0].bfloat16(), u[1]], r"u\[0\] has dtype BFloat16, expected Float"),
    "bias": (3, lambda b: [b[0], b[1][:6]], r"bias\[1\] has shape \[6\], expected \[7\]"),
    "one of two": (4, lambda s: [], "one of scale and shift is missing"),
    "shift": (5, lambda s: [s[0], s[1][:1]], r"shift\[1\] has shape \[1, 7\], expected \[2, 7\]"),
    "mode": (6, lambda m: m.int(), "mode has dtype Int, expected Long"),
}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", NATIVE_REFUSED)
def test_native_checks_stand_alone(name):
    case = make_case(torch.float32, 5, 7).map(Tensor.cuda)
    of = native_operands(case)
    index, change, message = NATIVE_REFUSED[name]
    of[index] = change(of[index])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymend.editor_stream.default(*of)
