"""rank_update on its back ends against pymend.reference in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, factors, seeds, sizes, with_strides
from tolerances import assert_accurate
from torch import Tensor

from pymend import _lib, reference
from pymend.ops import rank_update as op

BACKENDS = ("eager", "cpu", "emu", "cuda")
SEEDED = op.SEEDED
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")


@dataclass
class Case:
    weights: list[Tensor]
    u: list[Tensor]
    delta: list[Tensor]
    alpha: Tensor
    transposed: list[bool]
    seed: int | None = None  # of random rounding

    def arguments(self):
        return self.weights, self.u, self.delta, self.alpha, self.transposed

    def seeds(self) -> list[int]:
        """What the op itself is given."""
        return [] if self.seed is None else [self.seed + i for i in range(len(self.weights))]


def make_case(dtype, shapes, rows, transposed=None, alpha=1e-2, seed=0) -> Case:
    """Weights of ``shapes`` [b, a] with ``rows`` rows of factors each."""
    g = torch.Generator().manual_seed(seed)
    flags = transposed or [False] * len(shapes)
    weights = [
        torch.randn((a, b) if flag else (b, a), generator=g).to(dtype)
        for (b, a), flag in zip(shapes, flags, strict=True)
    ]
    u = [torch.randn(n, a, generator=g) for (_, a), n in zip(shapes, rows, strict=True)]
    delta = [torch.randn(n, b, generator=g) for (b, _), n in zip(shapes, rows, strict=True)]
    return Case(weights, u, delta, torch.full((len(shapes),), alpha), flags)


def samples(dtype) -> dict[str, Case]:
    strided = make_case(dtype, [(33, 40), (40, 33)], [5, 3])
    strided.u = [with_strides(t) for t in strided.u]
    strided.delta = [t.t().contiguous().t() for t in strided.delta]
    return {
        "one": make_case(dtype, [(48, 80)], [8]),
        "mixed shapes": make_case(dtype, [(33, 65), (1, 300), (300, 1), (16, 16)], [3, 1, 40, 33]),
        "Conv1D": make_case(dtype, [(33, 65), (31, 32), (32, 31)], [3, 9, 1], [True, False, True]),
        "empty": make_case(dtype, [(0, 5), (5, 0), (5, 7), (7, 5)], [3, 3, 0, 2]),
        "strides": strided,
        # On a GPU: strips of bfloat16, one of them shorter than the others.
        "whole tiles": make_case(dtype, [(96, 64), (160, 192), (64, 320)], [9, 32, 17]),
        "many": make_case(dtype, [(3, 4 + i) for i in range(32)], [1 + i % 3 for i in range(32)]),
        "negative alpha": make_case(dtype, [(17, 19)], [4], alpha=-3.0),
    }


def run(backend: str, case: Case, **emulation) -> tuple[list[Tensor], Tensor]:
    """New weights (the case's own are left alone) and fidelities."""
    case = copy.deepcopy(case)
    if backend == "reference":
        exact = expected(case)
        new = [e.to(w.dtype) for e, w in zip(exact, case.weights, strict=True)]
        return new, fidelity_of(case, new)
    if backend == "eager":
        return case.weights, op.eager(*case.arguments(), case.seeds())
    if backend == "emu":
        return case.weights, emulate(case, **emulation)
    case = Case(
        *([t.to(backend) for t in ts] for ts in (case.weights, case.u, case.delta)),
        case.alpha,
        case.transposed,
        case.seed,
    )
    fidelity = op.rank_update(*case.arguments(), seed=case.seed)
    return [w.cpu() for w in case.weights], fidelity


def emulate(case: Case, **options) -> Tensor:
    """The CUDA kernel's own source on fibers; one dtype for the whole case."""
    import _emu

    dtype = case.weights[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = [d if not t else u for u, d, t in zip(case.u, case.delta, case.transposed, strict=True)]
    cols = [u if not t else d for u, d, t in zip(case.u, case.delta, case.transposed, strict=True)]
    rows, cols = ([t.to(wide).contiguous() for t in ts] for ts in (rows, cols))
    alpha = case.alpha.to(wide)
    fidelity = torch.full_like(alpha, math.nan)
    seeds = case.seeds() or [0] * len(rows)
    matrices = [
        (w.data_ptr(), r.data_ptr(), c.data_ptr(), *w.shape, len(r), seed)
        for w, r, c, seed in zip(case.weights, rows, cols, seeds, strict=True)
    ]
    options["random"] = case.seed is not None
    name = str(dtype).removeprefix("torch.")
    _emu.rank_update(name, matrices, alpha.data_ptr(), fidelity.data_ptr(), **options)
    return fidelity


def expected(case: Case) -> list[Tensor]:
    """The truth: float64 from end to end."""
    return [
        reference.rank_update(w.double(), u.double(), d.double(), a.double(), t)
        for w, u, d, a, t in zip(*case.arguments(), strict=True)
    ]


def wanted_of(case: Case) -> list[Tensor]:
    """The changes, which a small edit would lose as a difference of weights even in float64."""
    zero = [torch.zeros_like(w) for w in case.weights]
    return expected(Case(zero, case.u, case.delta, case.alpha, case.transposed))


def fidelity_of(case: Case, new: list[Tensor]) -> Tensor:
    """The definition: <applied, wanted> / |wanted|^2, in float64."""
    result = []
    for before, after, wanted in zip(case.weights, new, wanted_of(case), strict=True):
        kept = ((after.double() - before.double()) * wanted).sum()
        result.append(kept / wanted.square().sum() if wanted.any() else torch.ones(()).double())
    return torch.stack(result)


def assert_right(backend: str, case: Case, atol: float = 1e-4, **emulation) -> None:
    new, fidelity = run(backend, case, **emulation)
    eager, _ = run("eager", case)
    for i, (ours, theirs, exact) in enumerate(zip(new, eager, expected(case), strict=True)):
        assert_accurate(ours, theirs, exact, length=len(case.u[i]) + 1)
    torch.testing.assert_close(
        fidelity.double(), fidelity_of(case, new), rtol=1e-4, atol=atol, check_device=False
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", samples(torch.float32))
def test_forward(backend, name, dtype):
    assert_right(backend, samples(dtype)[name])


def test_by_hand(backend_or_reference):
    """W = 0, alpha = 1/2, u = (1, 2), delta = (3, 4, 5)."""
    for flag in (False, True):
        product = -0.5 * torch.tensor([[3.0, 6.0], [4.0, 8.0], [5.0, 10.0]])
        want = product.t().contiguous() if flag else product
        case = Case(
            [torch.zeros_like(want)],
            [torch.tensor([[1.0, 2.0]])],
            [torch.tensor([[3.0, 4.0, 5.0]])],
            torch.tensor([0.5]),
            [flag],
        )
        new, fidelity = run(backend_or_reference, case)
        assert torch.equal(new[0], want)
        assert fidelity.item() == 1


def test_fidelity_tells_a_lost_edit(backend):
    """In bfloat16 a change below half a step is lost, and a large one is kept."""
    lost = make_case(torch.bfloat16, [(40, 40)], [1], alpha=1e-6)
    lost.weights = [torch.ones(40, 40).bfloat16()]
    new, fidelity = run(backend, lost)
    assert torch.equal(new[0], lost.weights[0]) and fidelity.item() == 0
    _, fidelity = run(backend, make_case(torch.bfloat16, [(40, 40)], [4], alpha=1.0))
    assert abs(fidelity.item() - 1) < 0.01


def test_fidelity_of_tiny_updates_is_finite(backend):
    """Squares of the change lie below the range of float32."""
    case = make_case(torch.float32, [(20, 20)], [2], alpha=1e-25)
    case.weights = [torch.zeros(20, 20)]
    _, fidelity = run(backend, case)
    assert abs(fidelity.item() - 1) < 1e-5


@pytest.mark.parametrize("dtype", op.SEEDED, ids=str)
def test_random_rounding_is_fair_and_repeats(backend, dtype):
    """Only the two neighbours come out, their mean is the value, and every back end agrees."""
    case = make_case(dtype, [(96, 1000), (7, 5)], [1, 2], seed=3)
    case.weights[0] = torch.ones(96, 1000, dtype=dtype)
    case.u[0], case.delta[0] = torch.ones(1, 1000), torch.ones(1, 96)
    case.alpha = torch.tensor([-0.3 * torch.finfo(dtype).eps, 0.1])  # 0.3 of a step upwards
    case.seed = 2**40 + 5
    new, fidelity = run(backend, case)
    same, _ = run("eager", case)
    assert all(torch.equal(a, b) for a, b in zip(new, same, strict=True))
    steps = (new[0].double() - 1) / torch.finfo(dtype).eps
    assert set(steps.unique().tolist()) == {0.0, 1.0}
    assert abs(steps.mean() - 0.3) < 4 * (0.21 / steps.numel()) ** 0.5
    assert abs(steps.mean(0).std() - (0.21 / 96) ** 0.5) < 0.01  # columns are independent
    assert abs(steps.mean(1).std() - (0.21 / 1000) ** 0.5) < 0.01  # and so are rows
    assert abs(fidelity[0].item() - 1) < 0.03
    case.seed += 1
    assert not torch.equal(run(backend, case)[0][0], new[0])


def test_random_rounding_of_every_size(backend):
    """Zero, subnormal, normal and the largest float16 values, of both signs, and beyond."""
    values = torch.tensor([0.0, 1e-8, 3e-8, 5.9e-5, 6.2e-5, 1e-3, 1.0, 60000.0, 65504.0])
    values = torch.cat([values, -values])
    case = Case(
        [torch.zeros(400, len(values)).half()],
        [values[None]],
        [torch.ones(1, 400)],
        torch.tensor([-1.0]),
        [False],
        seed=1,
    )
    (new,), _ = run(backend, case)
    assert torch.equal(new, run("eager", case)[0][0])
    exact, got = values.double(), new.double()
    step = exact.abs().clamp(min=2.0**-14).log2().floor().exp2() / 1024
    assert ((got - exact).abs() < step).all()
    assert ((got.mean(0) - exact).abs() <= 0.1 * step).all()
    case.weights[0].fill_(65504)
    case.u[0] = values.abs()[None]
    assert run(backend, case)[0][0].isinf().any(0)[7:9].all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    dtype = data.draw(dtypes)
    case = Case([], [], [], torch.empty(0), [])
    for _ in range(data.draw(st.integers(1, 3))):
        b, a, n = data.draw(sizes), data.draw(sizes), data.draw(sizes)
        flag = data.draw(st.booleans())
        g = torch.Generator().manual_seed(data.draw(seeds))
        case.weights.append(torch.randn((a, b) if flag else (b, a), generator=g).to(dtype))
        case.u.append(data.draw(factors(n, a)))
        case.delta.append(data.draw(factors(n, b)))
        case.transposed.append(flag)
    case.alpha = torch.full((len(case.weights),), data.draw(st.sampled_from((0.0, 1e-4, -1e-4))))
    assert_right(backend, case, atol=1e-2)  # a change near the rounding step has a noisy fidelity


def test_mixed_dtypes_and_layouts():
    """One call for float64, float32, bfloat16, float16 and a transposed view, in one list."""
    parts = [make_case(dtype, [(9, 12)], [3], seed=i) for i, dtype in enumerate(DTYPES)]
    view = make_case(torch.bfloat16, [(9, 12)], [3], seed=9)
    view.weights = [view.weights[0].t().contiguous().t()]
    parts.append(view)
    whole = copy.deepcopy(parts)
    fidelity = op.rank_update(
        [p.weights[0] for p in whole],
        [p.u[0] for p in whole],
        [p.delta[0] for p in whole],
        torch.cat([p.alpha for p in whole]),
    )
    for part, changed, kept in zip(parts, whole, fidelity, strict=True):
        new, alone = run("cpu", part)
        assert torch.equal(new[0], changed.weights[0])
        assert kept == alone


def test_empty_list():
    assert op.rank_update([], [], [], torch.empty(0), []).shape == (0,)


def test_threads_do_not_change_a_bit():
    case = make_case(torch.bfloat16, [(300, 200), (64, 64)], [7, 40])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("cpu", case))
    finally:
        torch.set_num_threads(threads)
    for new, fidelity in results[1:]:
        assert torch.equal(fidelity, results[0][1])
        assert all(torch.equal(a, b) for a, b in zip(new, results[0][0], strict=True))


@needs_binary
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["one", "mixed shapes", "Conv1D", "empty"])
def test_opcheck(name, dtype):
    case = samples(dtype)[name]
    for chosen in ([], [7] * len(case.u)):
        torch.library.opcheck(torch.ops.pymend.rank_update.default, (*case.arguments(), chosen))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_whole(dtype):
    case = make_case(dtype, [(20, 30), (30, 20)], [3, 5])
    new, fidelity = run("cpu", case)
    compiled = torch.compile(op.rank_update, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case.arguments()), fidelity)
    assert all(torch.equal(a, b) for a, b in zip(case.weights, new, strict=True))


def test_autocast_and_inference_mode_change_nothing():
    case = make_case(torch.float32, [(20, 30)], [3])
    new, fidelity = run("cpu", case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_fidelity = run("cpu", case)
    with torch.inference_mode():
        inference, _ = run("cpu", case)
    assert torch.equal(cast[0], new[0]) and torch.equal(cast_fidelity, fidelity)
    assert torch.equal(inference[0], new[0])


def test_backward_notices_the_write():
    """A tensor saved for backward and then updated must not give silent wrong gradients."""
    weight = torch.randn(4, 4).bfloat16()
    x = torch.randn(4, 4, dtype=torch.bfloat16, requires_grad=True)
    y = (x @ weight).sum()
    op.rank_update([weight], [torch.randn(1, 4)], [torch.randn(1, 4)], torch.ones(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gate_and_missing_binary(monkeypatch):
    case = make_case(torch.bfloat16, [(8, 8)], [2])
    new, _ = run("cpu", case)
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    off, _ = run("cpu", case)
    assert torch.equal(off[0], new[0])
    monkeypatch.setenv("PYMEND_KERNELS", "some")
    with pytest.raises(ValueError, match="PYMEND_KERNELS is 'some'"):
        run("cpu", case)
    monkeypatch.setenv("PYMEND_KERNELS", "default")
    monkeypatch.setattr(_lib, "_C", None)
    monkeypatch.setattr(_lib, "_warned", False)
    with pytest.warns(RuntimeWarning, match="without its native kernels"):
        fallback, _ = run("cpu", case)
    assert torch.equal(fallback[0], new[0])
    assert not _lib.has_kernels() and not _lib.has_cuda_kernels() and _lib.build_info() == {}
    run("cpu", case)  # said once: a second warning would be an error of this test's filter


def two() -> Case:
    return make_case(torch.float32, [(3, 4), (5, 6)], [2, 2])


def spoil(case: Case, field: str, index: int, value) -> Case:
    getattr(case, field)[index] = value
    return case


BASE = torch.randn(40)
REFUSED = {
    "u too short": (lambda: spoil(two(), "u", 1, torch.randn(2, 5)), ValueError,
                    r"u\[1\] has shape \[2, 5\], expected \[n, 6\] for weights\[1\] \[5, 6\]"),
    "rows differ": (lambda: spoil(two(), "delta", 0, torch.randn(3, 3)), ValueError,
                    r"delta\[0\] has shape \[3, 3\], expected \[2, 3\]"),
    "Conv1D not said": (lambda: spoil(two(), "transposed", 1, True), ValueError,
                        r"u\[1\] has shape \[2, 6\], expected \[n, 5\].*in Conv1D layout"),
    "list lengths": (lambda: Case(*two().arguments()[:2], two().delta[:1], *two().arguments()[3:]),
                     ValueError, "delta has 1 entries for 2 weights"),
    "alpha shape": (lambda: Case(*two().arguments()[:3], torch.ones(3), [False] * 2), ValueError,
                    r"alpha has shape \[3\], expected \[2\]"),
    "weight dtype": (lambda: spoil(two(), "weights", 0, torch.ones(3, 4, dtype=torch.int8)),
                     TypeError, r"weights\[0\] has dtype torch.int8, expected one of float64"),
    "u dtype": (lambda: spoil(two(), "u", 0, torch.ones(2, 4, dtype=torch.int64)), TypeError,
                r"u\[0\] has dtype torch.int64"),
    "vector": (lambda: spoil(two(), "weights", 1, torch.randn(6)), ValueError,
               r"weights\[1\] has shape \[6\], expected a matrix"),
    "device": (lambda: spoil(two(), "delta", 1, torch.empty(2, 5, device="meta")), ValueError,
               r"delta\[1\] is on meta, its weight is on cpu"),
    "strides": (lambda: spoil(two(), "weights", 1, with_strides(torch.randn(5, 6))), ValueError,
                r"weights\[1\] has strides \(13, 2\).*update a contiguous copy"),
    "same weight twice": (lambda: make_same(), ValueError, r"weights\[0\] and weights\[1\] share"),
    "overlapping weights": (
        lambda: Case([BASE[:24].view(4, 6), BASE[18:38].view(4, 5)],
                     [torch.randn(1, 6), torch.randn(1, 5)], [torch.randn(1, 4)] * 2,
                     torch.ones(2), [False, False]),
        ValueError, r"weights\[0\] and weights\[1\] share memory"),
    "weight as factor": (
        lambda: Case([BASE[:24].view(4, 6)], [BASE[6:12].view(1, 6)], [torch.randn(1, 4)],
                     torch.ones(1), [False]),
        ValueError, r"weights\[0\] and u\[0\] share memory"),
    "nan in u": (lambda: spoil(two(), "u", 1, torch.full((2, 6), math.nan)), ValueError,
                 r"u\[1\] is not finite: nan at \[0, 0\]; weights\[1\] was left alone"),
    "inf in delta": (lambda: spoil(two(), "delta", 1, torch.full((2, 5), math.inf)), ValueError,
                     r"delta\[1\] is not finite: inf"),
    "nan in alpha": (lambda: spoil(two(), "alpha", 1, math.nan), ValueError,
                     r"alpha\[1\] is not finite: nan"),
    "overflow": (
        lambda: make_case(torch.float16, [(3, 4)], [2], alpha=1e6), ValueError,
        r"the update of weights\[0\] may leave the range of torch.float16"),
    "weight requires grad": (
        lambda: spoil(two(), "weights", 1, torch.randn(5, 6, requires_grad=True)), RuntimeError,
        r"weights\[1\] requires grad.*under torch.no_grad"),
    "u requires grad": (
        lambda: spoil(two(), "u", 0, torch.randn(2, 4, requires_grad=True)), RuntimeError,
        r"u\[0\] requires grad, and rank_update is not differentiable"),
}  # fmt: skip


def make_same() -> Case:
    case = make_case(torch.float32, [(3, 4), (3, 4)], [2, 2])
    case.weights[1] = case.weights[0]
    return case


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name):
    make, kind, message = REFUSED[name]
    case = make()
    before = [w.detach().clone() for w in case.weights]
    with pytest.raises(kind, match=message):
        op.rank_update(*case.arguments())
    assert all(torch.equal(a, b) for a, b in zip(case.weights, before, strict=True))


def test_weight_with_grad_is_written_under_no_grad():
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    with torch.no_grad():
        op.rank_update([weight], [torch.ones(1, 4)], [torch.ones(1, 3)], torch.ones(1))
    assert torch.equal(weight, -torch.ones(3, 4)) and weight.requires_grad


NATIVE_REFUSED = {
    "u": (lambda c: spoil(c, "u", 0, torch.randn(2, 5)),
          r"u\[0\] has shape \[2, 5\], expected \[any, 4\]"),
    "delta": (lambda c: spoil(c, "delta", 0, torch.randn(1, 3)),
              r"delta\[0\] has shape \[1, 3\], expected \[2, 3\]"),
    "dtype": (lambda c: spoil(c, "u", 0, torch.randn(2, 4).double()),
              r"u\[0\] has dtype Double, expected Float"),
    "strides": (lambda c: spoil(c, "u", 0, with_strides(torch.randn(2, 4))),
                r"u\[0\] is not contiguous"),
    "list": (lambda c: Case(c.weights, c.u, [], c.alpha, c.transposed),
             r"delta has 0 entries for 1 weights"),
    "float64": (lambda c: spoil(c, "weights", 0, torch.randn(3, 4).double()),
                r"weights\[0\] has dtype Double, expected Float, BFloat16 or Half on a CPU"),
}  # fmt: skip


@needs_binary
@pytest.mark.parametrize("name", NATIVE_REFUSED)
def test_native_checks_stand_alone(name):
    """The op itself refuses too: it can be called without the wrapper."""
    change, message = NATIVE_REFUSED[name]
    case = change(make_case(torch.bfloat16, [(3, 4)], [2]))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymend.rank_update.default(*case.arguments(), [])
