"""editor_mlp on its back ends against pymend.reference in float64, gradients included."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, seeds, sizes, with_strides
from tolerances import assert_accurate
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pymend import _lib, reference
from pymend.ops import editor_mlp as op

BACKENDS = ("eager", "cpu", "emu", "cuda")
WIDE = (torch.float64, torch.float32)
HALF = (torch.bfloat16, torch.float16)  # run in torch ops where there are gradients
needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")
DIFFERENTIABLE = ("x", "v", "u", "bias", "scale", "shift")


@dataclass
class Case:
    x: Tensor
    v: Tensor
    u: Tensor
    bias: Tensor
    scale: Tensor | None
    shift: Tensor | None
    mode: Tensor
    residual: bool
    cotangent: Tensor  # gradient of y

    @property
    def layer(self) -> op.Layer:
        return op.Layer(self.v, self.u, self.bias, self.scale, self.shift, self.residual)

    def arguments(self):
        return self.x, [self.layer], self.mode

    def map(self, change) -> Case:
        """``change`` applied to every floating tensor."""
        given_ = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: t for k, t in given_.items() if isinstance(t, Tensor) and k != "mode"}
        return replace(self, **{k: change(t) for k, t in tensors.items()})


def make_case(dtype, rows, d, rank=3, modes=2, residual=True, whole=False, seed=0) -> Case:
    """``whole``: small whole numbers, so that every sum is exact and many a pre is exactly 0."""
    g = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-1, 2, shape, generator=g).to(dtype)
        return torch.randn(shape, generator=g).to(dtype)

    return Case(
        values(rows, d),
        values(rank, d),
        values(d, rank),
        values(d),
        values(modes, d) if modes else None,
        values(modes, d) if modes else None,
        torch.randint(0, max(modes, 1), (rows,), generator=g),
        residual,
        values(rows, d),
    )


def samples(dtype) -> dict[str, Case]:
    exact = dtype in HALF  # in half precision the sign of pre would depend on rounding
    sizes_of = {
        "modes": dict(rows=37, d=70, modes=5),
        "long": dict(rows=300, d=33, modes=3),  # more rows than one block's warps
        "wide": dict(rows=5, d=600, modes=2),
        "no modes": dict(rows=19, d=70, modes=0),
        "no residual": dict(rows=19, d=33, residual=False),
        "neither": dict(rows=3, d=40, modes=0, residual=False),
        "one row": dict(rows=1, d=1, rank=1, modes=1),
        "no rows": dict(rows=0, d=9),
        "no columns": dict(rows=4, d=0),
        "no rank": dict(rows=4, d=6, rank=0),
    }
    cases = {name: make_case(dtype, whole=exact, **of) for name, of in sizes_of.items()}
    cases["exact zeros"] = make_case(dtype, 33, 65, whole=True)
    cases["an unused mode"] = replace(cases["modes"], mode=torch.full((37,), 3))
    strided = make_case(dtype, 33, 40, whole=exact)
    cases["strides"] = strided.map(lambda t: with_strides(t) if t.dim() == 2 else t)
    return cases


NAMES = tuple(samples(torch.float32))


def run(backend: str, case: Case, **emulation) -> dict[str, Tensor]:
    """y, and the gradient of each argument that has one."""
    if backend == "reference":
        exact = run_by(by_reference, case.map(Tensor.double))
        return {name: t.to(case.x.dtype) for name, t in exact.items()}
    if backend == "eager":
        return run_by(op.eager, case)
    if backend == "emu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "_epilogue", lambda *of, **how: emulate(*of, **how, **emulation))
            patch.setattr(op, "_epilogue_backward", lambda *of: emulate_backward(*of, **emulation))
            return run_by(op.editor_mlp, case)
    moved = replace(case.map(lambda t: t.to(backend)), mode=case.mode.to(backend))
    return {name: t.cpu() for name, t in run_by(op.editor_mlp, moved).items()}


def run_by(layer, case: Case) -> dict[str, Tensor]:
    case = case.map(lambda t: t.detach().requires_grad_())
    y = layer(*case.arguments())
    y.backward(case.cotangent.detach())
    result = {"y": y.detach()}
    for name in DIFFERENTIABLE:
        tensor = getattr(case, name)
        if tensor is not None:
            # autograd gives None to what no element of y depends on
            result[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return result


def by_reference(x, layers, mode):
    """The dense reference, which takes the rows of one weight at a time."""
    named, residual = [], layers[0].residual
    for v, u, bias, scale, shift, _ in layers:
        named.append({"u": u, "v": v, "bias": bias})
        if scale is not None:
            named[-1] |= {"mode_scale.weight": scale, "mode_shift.weight": shift}
    if layers[0].scale is None:
        return reference.transform(x, named, None, residual)
    y = torch.zeros_like(x)
    for m in range(len(layers[0].scale)):
        of_mode = (mode == m).nonzero().flatten()
        y = y.index_add(0, of_mode, reference.transform(x[of_mode], named, m, residual))
    return y


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def operands(p, layer, mode):
    """Contiguous, and the addresses in the bindings' order."""
    _, *kept = op._contiguous(None, p, layer, mode)
    p, _, scale, _, mode = kept
    place = [address(t) for t in kept[:4]] + [0 if scale is None else address(mode)]
    return kept, place, [*p.shape, 0 if scale is None else len(scale)]


def emulate(x, p, layer, mode, alone=False, **options) -> Tensor:
    """The CUDA kernel's own source on fibers."""
    import _emu

    kept, place, shape = operands(p, layer, mode)
    x = x.contiguous() if layer.residual else None
    y = torch.full_like(kept[0], torch.nan)
    name = str(p.dtype).removeprefix("torch.")
    _emu.editor_mlp(name, place, shape, address(x), address(y), **options)
    return y


def emulate_backward(grad, p, layer, mode, **options):
    import _emu

    kept, place, shape = operands(p, layer, mode)
    grad = grad.contiguous()
    out = [None if t is None else torch.full_like(t, torch.nan) for t in kept[:4]]
    name = str(p.dtype).removeprefix("torch.")
    addresses = [address(grad), *(address(t) for t in out)]
    _emu.editor_mlp_backward(name, place, shape, addresses, **options)
    return tuple(out)


def assert_right(backend: str, case: Case) -> None:
    ours, theirs = run(backend, case), run("eager", case)
    exact = run_by(by_reference, case.map(Tensor.double))
    assert ours.keys() == exact.keys()
    length = sum(case.x.shape) + len(case.v)
    for name, truth in exact.items():
        assert_accurate(ours[name], theirs[name], truth, length)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_layer_and_gradients(backend, name, dtype):
    assert_right(backend, samples(dtype)[name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_runs_in_torch_ops(name, dtype):
    assert_right("cpu", samples(dtype)[name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_without_gradients(backend, name, dtype):
    """A GPU has a kernel for it, which rounds once."""
    case = samples(dtype)[name]
    exact, theirs = (
        layer(*c.arguments()).detach()
        for layer, c in ((by_reference, case.map(Tensor.double)), (op.eager, case))
    )
    if backend == "emu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "_epilogue", emulate)
            ours = op.editor_mlp(*case.arguments())
    else:
        device = "cuda" if backend == "cuda" else "cpu"
        moved = replace(case.map(lambda t: t.to(device)), mode=case.mode.to(device))
        ours = (op.eager if backend == "eager" else op.editor_mlp)(*moved.arguments()).cpu()
    assert_accurate(ours, theirs, exact, sum(case.x.shape) + len(case.v))


@pytest.mark.parametrize("name", NAMES)
def test_without_kernels(name, monkeypatch):
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    assert_right("cpu", samples(torch.float32)[name])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    case = make_case(
        data.draw(st.sampled_from(WIDE)),
        data.draw(sizes),
        data.draw(sizes),
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(0, 3)),
        data.draw(st.booleans()),
        whole=True,  # random numbers near 0 could have another sign in float32 than in truth
        seed=data.draw(seeds),
    )
    if data.draw(st.booleans()):
        case = case.map(lambda t: t.t().contiguous().t() if t.dim() == 2 else t)
    assert_right(backend, case)


def test_by_hand(backend_or_reference):
    """Rows (1, 2) and (3, 4); U V x = x; modes (2, 1) and (-1, 1), shifts (-5, 0) and (5, -3)."""
    case = Case(
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.eye(2),
        torch.eye(2),
        torch.tensor([1.0, -1.0]),
        torch.tensor([[2.0, 1.0], [-1.0, 1.0]]),
        torch.tensor([[-5.0, 0.0], [5.0, -3.0]]),
        torch.tensor([0, 1]),
        True,
        torch.tensor([[1.0, 10.0], [100.0, 1000.0]]),
    )
    result = run(backend_or_reference, case)
    # x + b = (2, 1), (4, 3); under the max (-1, 1), (1, 0), of which -1 alone is cut
    assert result["y"].tolist() == [[1.0, 3.0], [4.0, 4.0]]
    assert result["x"].tolist() == [[1.0, 20.0], [0.0, 2000.0]]
    assert result["bias"].tolist() == [-100.0, 1010.0]
    assert result["scale"].tolist() == [[0.0, 10.0], [400.0, 3000.0]]
    assert result["shift"].tolist() == [[0.0, 10.0], [100.0, 1000.0]]
    assert result["u"].tolist() == [[-300.0, -400.0], [3010.0, 4020.0]]


def test_the_identity_start_trains(backend):
    case = make_case(torch.float32, 6, 40)
    case.u.zero_(), case.bias.zero_(), case.shift.zero_(), case.scale.fill_(1)
    result = run(backend, case)
    assert torch.equal(result["y"], case.x)
    torch.testing.assert_close(result["bias"], case.cotangent.sum(0))
    torch.testing.assert_close(result["u"], case.cotangent.t() @ (case.x @ case.v.t()))


def test_backward_takes_the_sign_that_forward_took(backend):
    """scale * z + shift is 0 with two roundings, and below 0 as a multiply-add of one."""
    z, d = 1 + 2.0**-12, 40
    ones = torch.ones(3, d)
    case = Case(
        ones, torch.zeros(1, d), torch.zeros(d, 1), ones[0] * z, -ones[:1] * z,
        ones[:1] * (1 + 2.0**-11), torch.zeros(3, dtype=torch.int64), True, ones,
    )  # fmt: skip
    assert case.scale[0, 0] * case.bias[0] + case.shift[0, 0] == 0
    assert torch.equal(run(backend, case)["shift"], 3 * ones[:1])


@pytest.mark.parametrize("modes", [0, 3])
def test_layers_follow_each_other(modes):
    """The second, which has no residual, takes what the first made."""
    first = make_case(torch.float64, 5, 7, modes=modes)
    second = make_case(torch.float64, 5, 7, modes=modes, residual=False, seed=1)
    y = op.editor_mlp(first.x, [first.layer, second.layer], first.mode)
    between = by_reference(*first.arguments())
    torch.testing.assert_close(y, by_reference(between, [second.layer], first.mode))
    assert torch.equal(op.editor_mlp(first.x, [], first.mode), first.x)


def test_nan_is_not_cut(backend):
    case = make_case(torch.float32, 4, 40)
    case.x[1, 2] = torch.nan
    assert run(backend, case)["y"][1].isnan().all()
    assert not run(backend, case)["y"][[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("name", ["modes", "no modes", "no residual", "no rank"])
def test_gradcheck(name, monkeypatch):
    case = samples(torch.float64)[name]
    case = replace(case, x=case.x[:4], mode=case.mode[:4])
    case = case.map(lambda t: t[..., :6].clone().requires_grad_() if t.shape[-1] > 6 else t)
    case = replace(case, u=case.u[:6].detach().requires_grad_())

    def layer(x, *parts):
        return op.editor_mlp(x, [op.Layer(*parts)], case.mode)

    for kernels in ("all", "off"):
        monkeypatch.setenv("PYMEND_KERNELS", kernels)
        assert torch.autograd.gradcheck(layer, (case.x, *case.layer))


# ------------------------------------------------------------------------- what autograd asks for


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=6)))
def test_only_what_is_wanted_is_computed(wanted, monkeypatch):
    case = make_case(torch.float32, 5, 7)
    full = run("cpu", case)
    products = []
    for name in ("_rows_by_columns", "_columns_by_columns"):
        product = getattr(op, name)
        monkeypatch.setattr(
            op, name, lambda *of, product=product: products.append(0) or product(*of)
        )
    for name, need in zip(DIFFERENTIABLE, wanted, strict=True):
        getattr(case, name).requires_grad_(need)
    y = op.editor_mlp(*case.arguments())
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(case.cotangent)
    need_x, need_v, need_u, *_ = wanted
    assert len(products) == need_u + need_v + need_x + (need_x or need_v)
    for name, need in zip(DIFFERENTIABLE, wanted, strict=True):
        grad = getattr(case, name).grad
        assert torch.equal(grad, full[name]) if need else grad is None


def as_parameters(case: Case, factored: str = "uv") -> Case:
    parameters = case.map(lambda t: nn.Parameter(t.clone()))
    for name in factored:
        getattr(parameters, name).factors = []
    return parameters


def sum_of(pairs) -> Tensor:
    return sum(left.t() @ right for left, right in pairs)


@pytest.mark.parametrize("kernels", ["all", "off"])
@pytest.mark.parametrize("name", ["modes", "no modes", "no residual", "no rows"])
@pytest.mark.parametrize("factored", ["u", "v", "uv"])
def test_factored_gradients(factored, name, kernels, monkeypatch):
    monkeypatch.setenv("PYMEND_KERNELS", kernels)
    plain = run("cpu", samples(torch.float32)[name])
    case = as_parameters(samples(torch.float32)[name], factored)
    op.editor_mlp(*case.arguments()).backward(case.cotangent.detach())
    for name in DIFFERENTIABLE:
        parameter = getattr(case, name)
        if parameter is None:
            continue
        if name not in factored:
            assert torch.equal(parameter.grad, plain[name])
            continue
        assert parameter.grad is None
        ((left, right),) = parameter.factors
        assert left.shape == (len(case.x), parameter.shape[0])
        assert right.shape == (len(case.x), parameter.shape[1])
        assert not left.requires_grad and not right.requires_grad
        torch.testing.assert_close(left.t() @ right, plain[name])


def test_factors_of_two_layers_and_two_passes():
    """A parameter that is used twice, then once more: its gradient is the sum over three pairs."""
    case, plain = (as_parameters(make_case(torch.float64, 5, 7), f) for f in ("uv", ""))

    def network(c: Case) -> Tensor:
        return op.editor_mlp(c.x, [c.layer, c.layer], c.mode)

    for c in (case, plain):
        network(c).backward(c.cotangent.detach())
        op.editor_mlp(*c.arguments()).sum().backward()
    for name in ("u", "v"):
        assert len(getattr(case, name).factors) == 3
        torch.testing.assert_close(sum_of(getattr(case, name).factors), getattr(plain, name).grad)
    torch.testing.assert_close(case.x.grad, plain.x.grad)


def test_no_factors_where_no_gradient_is_wanted():
    case = as_parameters(make_case(torch.float32, 5, 7))
    with torch.no_grad():
        op.editor_mlp(*case.arguments())
    op.editor_mlp(*case.arguments()).sum().backward(inputs=[case.x, case.bias])
    torch.autograd.grad(op.editor_mlp(*case.arguments()).sum(), case.x)
    case.u.requires_grad_(False)
    case.v.requires_grad_(False)
    op.editor_mlp(*case.arguments()).sum().backward()
    assert case.u.factors == [] and case.v.factors == []


def test_a_list_given_after_the_forward_pass_is_the_one_filled():
    case = as_parameters(make_case(torch.float32, 5, 7))
    old = case.u.factors
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        y = op.editor_mlp(*case.arguments())
    case.u.factors = []
    y.sum().backward()
    assert old == [] and len(case.u.factors) == len(case.v.factors) == 1
    del case.u.factors  # and without a list an ordinary gradient comes out
    op.editor_mlp(*case.arguments()).sum().backward()
    assert case.u.grad is not None


def test_backward_notices_a_changed_parameter():
    case = as_parameters(make_case(torch.float32, 5, 7))
    y = op.editor_mlp(*case.arguments())
    with torch.no_grad():
        case.u.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_second_derivative():
    x = torch.randn(5, 7, requires_grad=True)
    case = replace(make_case(torch.float32, 5, 7), x=x)
    total = op.editor_mlp(*case.arguments()).square().sum()
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ----------------------------------------------------------------------------- the native kernels


def epilogue_operands(case: Case):
    return case.x, (case.x @ case.v.t() @ case.u.t()).contiguous(), case.layer, case.mode


@needs_binary
@pytest.mark.parametrize("name", NAMES)
def test_the_forward_kernels_have_the_bits_of_torch(name, monkeypatch):
    """One rounding an operation, everywhere."""
    of = epilogue_operands(samples(torch.float32)[name])
    native = op._epilogue(*of)
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    assert torch.equal(op._epilogue(*of), native)
    pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")
    assert torch.equal(emulate(*of), native)


ORDERS = [("reversed", 0)] + [("random", seed) for seed in range(3)]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@blocks
@pytest.mark.parametrize("modes", [0, 3])
def test_emulated_schedules_are_bit_equal(modes, block, dtype):
    pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")
    case = make_case(dtype, 35, 70, modes=modes)
    plain = run("emu", case, block=block)
    for order, seed in ORDERS:
        other = run("emu", case, block=block, order=order, seed=seed)
        assert all(torch.equal(other[name], plain[name]) for name in plain), f"{order} {seed}"
    forward = run("emu", case, block=32)
    assert torch.equal(forward["y"], plain["y"]) and torch.equal(forward["x"], plain["x"])
    assert_right("emu", case)


def test_emulation_refuses():
    pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")
    of = epilogue_operands(make_case(torch.float32, 2, 2))
    for options, message in (({"block": 48}, "block is 48"), ({"order": "up"}, "schedule is 'up'")):
        with pytest.raises(ValueError, match=message):
            emulate(*of, **options)
        with pytest.raises(ValueError, match=message):
            emulate_backward(of[1], *of[1:], **options)


def test_threads_do_not_change_a_bit():
    case = make_case(torch.float32, 130, 700, modes=3)
    threads = torch.get_num_threads()
    of = epilogue_operands(case)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([op._epilogue(*of), *op._epilogue_backward(case.cotangent, *of[1:])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_binary
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", ["modes", "no modes", "no residual", "no rows"])
def test_opcheck(name, dtype):
    case = samples(dtype)[name]
    first, *of = epilogue_operands(case)
    native = op._contiguous(first if case.residual else None, *of)
    torch.library.opcheck(torch.ops.pymend.editor_mlp.default, native)
    native = op._contiguous(case.cotangent, *of)
    torch.library.opcheck(torch.ops.pymend.editor_mlp_backward.default, native)


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
def test_compiles_whole(dtype):
    case = make_case(dtype, 5, 7, whole=dtype == torch.bfloat16)
    plain = run("cpu", case)
    compiled = run_by(torch.compile(op.editor_mlp, fullgraph=True, backend="aot_eager"), case)
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)


def test_autocast_and_inference_mode_change_nothing():
    case = make_case(torch.float32, 5, 7)
    plain = run("cpu", case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run("cpu", case)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)
    with torch.inference_mode():
        assert torch.equal(op.editor_mlp(*case.arguments()), plain["y"])


def test_gate_and_missing_binary(monkeypatch):
    case = make_case(torch.float32, 5, 7, whole=True)
    plain = run("cpu", case)
    monkeypatch.setattr(_lib, "_C", None)
    monkeypatch.setattr(_lib, "_warned", False)
    with pytest.warns(RuntimeWarning, match="without its native kernels"):
        fallback = run("cpu", case)
    assert all(torch.equal(fallback[name], plain[name]) for name in plain)


# -------------------------------------------------------------------------------------- bad input


REFUSED = {
    "x dtype": (dict(x=torch.ones(5, 7, dtype=torch.int32)), TypeError,
                "x has dtype torch.int32, expected a floating dtype"),
    "x shape": (dict(x=torch.ones(7)), ValueError, r"x has shape \[7\], expected a matrix"),
    "v shape": (dict(v=torch.ones(3, 8)), ValueError,
                r"v has shape \[3, 8\], expected \[3, 7\] for x \[5, 7\]"),
    "v vector": (dict(v=torch.ones(7)), ValueError, r"v has shape \[7\], expected a matrix"),
    "u shape": (dict(u=torch.ones(7, 4)), ValueError,
                r"u has shape \[7, 4\], expected \[7, 3\] for x \[5, 7\] and rank 3"),
    "bias shape": (dict(bias=torch.ones(1, 7)), ValueError, r"bias has shape \[1, 7\]"),
    "bias dtype": (dict(bias=torch.ones(7).double()), TypeError,
                   "bias has dtype torch.float64, expected torch.float32"),
    "scale alone": (dict(shift=None), ValueError, "shift is None and scale is not"),
    "shift alone": (dict(scale=None), ValueError, "scale is None and shift is not"),
    "shift shape": (dict(shift=torch.ones(3, 7)), ValueError,
                    r"shift has shape \[3, 7\], expected \[2, 7\]"),
    "mode dtype": (dict(mode=torch.zeros(5, dtype=torch.int32)), TypeError,
                   "mode has dtype torch.int32, expected torch.int64"),
    "mode shape": (dict(mode=torch.zeros(4, dtype=torch.int64)), ValueError,
                   r"mode has shape \[4\], expected \[5\]"),
    "mode too large": (dict(mode=torch.tensor([0, 1, 2, 0, 0])), ValueError,
                       "mode holds 2, expected values from 0 to 1"),
    "mode negative": (dict(mode=torch.tensor([0, 1, -1, 0, 0])), ValueError, "mode holds -1"),
    "device": (dict(u=torch.empty(7, 3, device="meta")), ValueError, "u is on meta, x is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        op.editor_mlp(*replace(make_case(torch.float32, 5, 7), **change).arguments())


NATIVE_REFUSED = {
    "p dtype": (1, torch.ones(5, 7).half(), "p has dtype Half, expected Float or Double"),
    "p shape": (1, torch.ones(5), r"p has shape \[5\], expected \[any, any\]"),
    "bias": (2, torch.ones(8), r"bias has shape \[8\], expected \[7\]"),
    "scale": (3, torch.ones(2, 8), r"scale has shape \[2, 8\], expected \[any, 7\]"),
    "shift": (4, torch.ones(3, 7), r"shift has shape \[3, 7\], expected \[2, 7\]"),
    "one of two": (4, None, "one of scale and shift is missing"),
    "mode dtype": (5, torch.zeros(5), "mode has dtype Float, expected Long"),
    "mode value": (5, torch.tensor([0, 1, 0, 2, 0]), r"mode\[3\] is 2, expected 0 to 1"),
    "strides": (1, with_strides(torch.ones(5, 7)), "p is not contiguous"),
    "first": (0, torch.ones(5, 8), r"(x|grad) has shape \[5, 8\], expected \[5, 7\]"),
}  # fmt: skip


@needs_binary
@pytest.mark.parametrize("native", ["editor_mlp", "editor_mlp_backward"])
@pytest.mark.parametrize("name", NATIVE_REFUSED)
def test_native_checks_stand_alone(name, native):
    """The ops themselves refuse too: they can be called without the wrapper."""
    index, value, message = NATIVE_REFUSED[name]
    of = op._contiguous(*epilogue_operands(make_case(torch.float32, 5, 7)))
    of[index] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.pymend, native).default(*of)


@pytest.mark.skipif(not _lib.has_cuda_kernels(), reason="the native module has no CUDA code")
def test_on_a_gpu_the_kernel_is_for_narrow_rows(monkeypatch):
    """Where it was measured to win; "all" takes it everywhere."""
    with FakeTensorMode():
        narrow, wide = (torch.empty(2, n, device="cuda") for n in (3840, 20480))
        monkeypatch.setenv("PYMEND_KERNELS", "default")
        assert op._use_kernel(narrow) and not op._use_kernel(wide)
        monkeypatch.setenv("PYMEND_KERNELS", "all")
        assert op._use_kernel(narrow) and op._use_kernel(wide)
