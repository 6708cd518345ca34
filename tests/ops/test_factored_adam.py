"""factored_adam against pymend.reference in float64, and its optimiser."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import factors, seeds, sizes, with_strides
from tiny import gpt2, tiny_mend
from tolerances import assert_accurate
from torch import Tensor

from pymend import _lib, reference
from pymend.config import TrainConfig
from pymend.ops import factored_adam as op
from pymend.training import optim
from pymend.training.optim import EditorOptimizer

BACKENDS = ("eager", "cpu")
DTYPES = (torch.float64, torch.float32)
NAMES = ("param", "exp_avg", "exp_avg_sq")
needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")


@dataclass
class Case:
    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    left: Tensor
    right: Tensor
    scale: Tensor
    settings: dict[str, Any] = field(default_factory=dict)

    def tensors(self):
        return self.param, self.exp_avg, self.exp_avg_sq, self.left, self.right, self.scale

    def numbers(self):
        """lr, beta1, beta2, eps, step: positions of the native op and of eager."""
        return tuple({**SETTINGS, **self.settings}.values())


SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3}


def make_case(dtype, rows, cols, n, seed=0, scale=0.7, **numbers) -> Case:
    """In the middle of training: the moments are not zero, so no sign hangs on a rounding."""
    g = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(rows, cols, generator=g).to(dtype),
        torch.randn(rows, cols, generator=g).to(dtype),
        (torch.rand(rows, cols, generator=g) + 0.1).to(dtype),
        torch.randn(n, rows, generator=g),
        torch.randn(n, cols, generator=g),
        torch.tensor(scale),
        numbers,
    )


def samples(dtype) -> dict[str, Case]:
    strided = make_case(dtype, 33, 40, 5)
    strided.left, strided.right = with_strides(strided.left), strided.right.t().contiguous().t()
    views = make_case(dtype, 20, 30, 3)
    views.param, views.exp_avg = views.param.t().contiguous().t(), with_strides(views.exp_avg)
    return {
        "one": make_case(dtype, 48, 80, 8),
        "tails": make_case(dtype, 67, 101, 35),
        "wide": make_case(dtype, 9, 1011, 3),
        "tall": make_case(dtype, 300, 1, 17, step=1),
        "no rows": make_case(dtype, 5, 7, 0),
        "empty": make_case(dtype, 0, 5, 3),
        "empty too": make_case(dtype, 5, 0, 3),
        "strides": strided,
        "strided param": views,
        "unclipped": make_case(dtype, 17, 19, 4, scale=1.0, step=1000),
        "other settings": make_case(
            dtype, 17, 19, 4, lr=0.1, beta1=0.0, beta2=0.5, eps=1e-3, step=2
        ),
    }


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The truth: float64 from end to end."""
    param, exp_avg, exp_avg_sq, left, right, scale = (t.double() for t in case.tensors())
    numbers = {**SETTINGS, **case.settings}
    return reference.adam(param, exp_avg, exp_avg_sq, scale * (left.T @ right), **numbers)


def run(backend: str, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """New param and moments; the case's own are left alone."""
    case = copy.deepcopy(case)
    if backend == "reference":
        return tuple(t.to(case.param.dtype) for t in expected(case))  # type: ignore[return-value]
    if backend == "eager":
        wide = [t.to(case.param.dtype) for t in case.tensors()[3:]]
        op.eager(*case.tensors()[:3], *wide, *case.numbers())
    else:
        case = Case(*(t.to(backend) for t in case.tensors()), case.settings)
        op.factored_adam(*case.tensors(), **{**SETTINGS, **case.settings})
    return tuple(t.cpu() for t in case.tensors()[:3])  # type: ignore[return-value]


def assert_right(backend: str, case: Case) -> None:
    new, eager = run(backend, case), run("eager", case)
    for ours, theirs, exact in zip(new, eager, expected(case), strict=True):
        assert_accurate(ours, theirs, exact, length=len(case.left) + 8)


def assert_same(a, b) -> None:
    for name, x, y in zip(NAMES, a, b, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", samples(torch.float32))
def test_forward(backend, name, dtype):
    assert_right(backend, samples(dtype)[name])


def test_by_hand(backend_or_reference):
    """Adam's first step is lr * sign(gradient), apart from eps."""
    zeros = torch.zeros(3, 2, 3)
    left, right = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0, 0.0]])
    case = Case(*zeros, left, right, torch.tensor(0.5), {"lr": 0.25, "step": 1})
    param, exp_avg, exp_avg_sq = run(backend_or_reference, case)
    gradient = torch.tensor([[1.5, -2.0, 0.0], [3.0, -4.0, 0.0]])
    torch.testing.assert_close(param, -0.25 * gradient.sign())
    torch.testing.assert_close(exp_avg, 0.1 * gradient)
    torch.testing.assert_close(exp_avg_sq, 0.001 * gradient**2)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    rows, cols, n = (data.draw(sizes) for _ in range(3))
    dtype = data.draw(st.sampled_from(DTYPES))
    case = make_case(dtype, rows, cols, n, data.draw(seeds), step=data.draw(st.integers(1, 99)))
    case.left, case.right = data.draw(factors(n, rows)), data.draw(factors(n, cols))
    assert_right(backend, case)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_torch_over_several_steps(backend_or_reference, dtype, fused):
    """From zero moments, as training begins."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(30, 50, generator=g).to(dtype)
    zero = torch.zeros_like(start)
    case = Case(start.clone(), zero, zero.clone(), zero, zero, torch.tensor(0.25))
    theirs = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([theirs], lr=1e-2, fused=fused)
    for step in range(1, 6):
        case.left, case.right = torch.randn(4, 30, generator=g), torch.randn(4, 50, generator=g)
        case.settings = {"step": step}
        case.param, case.exp_avg, case.exp_avg_sq = run(backend_or_reference, case)
        theirs.grad = (0.25 * case.left.to(dtype).T @ case.right.to(dtype)).detach()
        adam.step()
    rtol, atol = (1e-9, 1e-10) if dtype == torch.float64 else (1e-4, 2e-6)
    torch.testing.assert_close(case.param, theirs.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(case.exp_avg, adam.state[theirs]["exp_avg"], rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------- the Gram norm


@pytest.mark.parametrize("n", [1, 7, 40, 300])
def test_gram_norm_is_the_dense_norm(n):
    g = torch.Generator().manual_seed(n)
    left, right = torch.randn(n, 90, generator=g) + 0.3, torch.randn(n, 70, generator=g) * 1e-3
    exact = torch.linalg.vector_norm(left.double().T @ right.double())
    norm = op.gram_norm(left, right)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1.0, 1e-25, 1e15])
def test_gram_norm_of_rows_that_cancel(factor):
    """Float32 would leave nothing, or a negative square; it would also leave its range."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(8, 90, generator=g), torch.randn(8, 70, generator=g)
    left = torch.cat([left, left]) * factor
    right = torch.cat([right, -right * (1 + 1e-3)]) * factor
    exact = torch.linalg.vector_norm(left.double().T @ right.double())
    torch.testing.assert_close(op.gram_norm(left, right), exact, rtol=1e-6, atol=0)


def test_gram_norm_of_nothing_and_of_what_is_not_finite():
    assert op.gram_norm(torch.ones(0, 3), torch.ones(0, 4)) == 0
    assert op.gram_norm(torch.zeros(2, 3), torch.ones(2, 4)) == 0
    for bad in (torch.nan, torch.inf):
        left = torch.ones(2, 3)
        left[1, 2] = bad
        assert not op.gram_norm(left, torch.ones(2, 4)).isfinite()


# ---------------------------------------------------------------------------------- the optimiser


class Keep(torch.autograd.Function):
    """x @ p.T, whose backward leaves factors of p's gradient on p, in place of a gradient."""

    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x)
        ctx.p = p
        return x @ p.detach().T

    @staticmethod
    def backward(ctx, *gradients):
        ctx.p.factors.append((gradients[0], *ctx.saved_tensors))
        return None, None


def editors(count: int, dtype=torch.float32, **config):
    """Equal editors, each with an optimiser; their matrices are not zero, unlike at the start."""
    result = []
    for _ in range(count):
        torch.manual_seed(0)
        mend = tiny_mend(gpt2(dtype=dtype))
        for p in mend.editor.nets_parameters():
            p.data += 0.1 * torch.randn_like(p)
        result.append(EditorOptimizer(mend, TrainConfig(lr=1e-3, **config)))
    return result


def backward(optimizer: EditorOptimizer, step: int, rows: int, passes: int, factored: bool) -> None:
    """Some loss of every parameter; matrices through factors where they take them."""
    g = torch.Generator().manual_seed(step)
    loss = torch.zeros(())
    for p in optimizer.parameters:
        x = [torch.randn(rows, p.shape[-1], generator=g).to(p) for _ in range(passes)]
        if p.dim() == 2 and hasattr(p, "factors"):
            through = Keep.apply if factored else lambda x, p: x @ p.T
            loss = loss + sum(through(part, p).square().sum() for part in x)
        else:
            loss = loss + (p * x[0][0]).square().sum()
    loss.backward()


def train(optimizer: EditorOptimizer, steps=4, rows=6, passes=1, factored=True, first=0):
    norms = []
    for step in range(first, first + steps):
        backward(optimizer, step, rows, passes, factored)
        norms.append(optimizer.step(step))
        assert all(p.grad is None for p in optimizer.parameters)
        assert not any(getattr(p, "factors", None) for p in optimizer.parameters)
    return norms


def matrices(optimizer: EditorOptimizer) -> list[Tensor]:
    return [p for p in optimizer.parameters if hasattr(p, "factors")]


@pytest.mark.parametrize("clip", [0.5, 1e9])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_train_as_gradients_do(dtype, passes, clip, monkeypatch):
    """Fused and dense, with and without clipping, against ordinary gradients and torch's Adam."""
    fused, dense, plain, theirs = editors(4, dtype, clip=clip)
    assert len(matrices(fused)) >= 4
    calls = counted(monkeypatch)
    norms = [train(fused, passes=passes)]
    assert calls == ([4 * len(matrices(fused))] if dtype == torch.float32 and native() else [0])
    monkeypatch.setattr(optim, "fused_rows", lambda p: 0)
    norms += [train(dense, passes=passes), train(plain, passes=passes, factored=False)]
    assert set(dense.buffers) and not plain.buffers

    adam = torch.optim.Adam(
        [{"params": theirs.parameters[:-1], "lr": 1e-3}, {"params": theirs.parameters[-1:]}],
        lr=theirs.rates[-1],
    )
    norms.append([])
    for step in range(4):
        backward(theirs, step, 6, passes, factored=False)
        norms[-1].append(float(torch.nn.utils.clip_grad_norm_(theirs.parameters, clip)))
        adam.step()
        adam.zero_grad()
    tight = dtype == torch.float64
    for other in (fused, dense, plain):
        for p, q in zip(other.parameters, theirs.parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-10 if tight else 2e-6)
    for other in norms[:3]:
        assert other == pytest.approx(norms[3], rel=1e-9 if tight else 1e-5)


def native() -> bool:
    return op.fused_rows(torch.zeros(1, 1)) > 0


def counted(monkeypatch) -> list[int]:
    """How often the optimiser takes the op."""
    calls = [0]

    def count(*arguments, **settings):
        calls[0] += 1
        op.factored_adam(*arguments, **settings)

    monkeypatch.setattr(optim, "factored_adam", count)
    return calls


@needs_binary
def test_the_number_of_rows_alone_decides(monkeypatch):
    (optimizer,) = editors(1)
    calls = counted(monkeypatch)
    monkeypatch.setattr(optim, "fused_rows", lambda p: 12)
    for rows, passes, fused in ((12, 1, True), (13, 1, False), (4, 3, True), (5, 3, False)):
        calls[0] = 0
        train(optimizer, 1, rows, passes)
        assert calls[0] == fused * len(matrices(optimizer)), (rows, passes)


def test_only_plain_float32_on_a_kernel_goes_through_the_op(monkeypatch):
    assert op.fused_rows(torch.zeros(2, 3, dtype=torch.float64)) == 0
    assert op.fused_rows(torch.zeros(3, 2).t()) == 0
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    assert op.fused_rows(torch.zeros(2, 3)) == 0


def test_only_the_matrices_take_factors():
    mend = tiny_mend(gpt2())
    EditorOptimizer(mend, TrainConfig())
    for name, p in mend.editor.named_parameters():
        assert hasattr(p, "factors") == name.endswith((".u", ".v")), name


def test_a_parameter_with_both_gets_the_sum():
    both, plain = editors(2)
    for optimizer, factored in ((both, True), (plain, False)):
        backward(optimizer, 0, 6, 1, factored)
        backward(optimizer, 1, 6, 1, False)
    norms = [both.step(0), plain.step(0)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for p, q in zip(both.parameters, plain.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)


def test_a_parameter_without_a_gradient_is_left_out():
    (optimizer,) = editors(1)
    train(optimizer, 1)
    before = [p.detach().clone() for p in optimizer.parameters]
    backward(optimizer, 1, 6, 1, True)
    left_out = matrices(optimizer)[0]
    left_out.factors.clear()
    optimizer.step(1)
    for p, old in zip(optimizer.parameters, before, strict=True):
        assert torch.equal(p, old) == (p is left_out)
    i = next(i for i, p in enumerate(optimizer.parameters) if p is left_out)
    assert {key: int(optimizer.state()[f"{key}.step"]) for key in (i, i + 1)} == {i: 1, i + 1: 2}


def test_nothing_to_do():
    (optimizer,) = editors(1)
    assert optimizer.step(0) == 0 and not optimizer.state()


def test_factors_that_are_not_finite_change_nothing():
    for bad in (torch.nan, torch.inf):
        (optimizer,) = editors(1)
        train(optimizer, 1)
        before = copy.deepcopy([*optimizer.parameters, *optimizer.state().values()])
        backward(optimizer, 1, 6, 1, True)
        matrices(optimizer)[-1].factors[0][0][2, 1] = bad
        assert not torch.tensor(optimizer.step(1)).isfinite()
        after = [*optimizer.parameters, *optimizer.state().values()]
        assert all(torch.equal(p, old) for p, old in zip(after, before, strict=True))
        assert not any(p.factors for p in matrices(optimizer))


def test_discard_forgets_factors():
    (optimizer,) = editors(1)
    backward(optimizer, 0, 6, 1, True)
    lists = [p.factors for p in matrices(optimizer)]
    assert all(lists)
    optimizer.discard()
    assert not any(lists) and optimizer.step(0) == 0


@pytest.mark.parametrize("rows", [6, 1000], ids=["fused", "dense"])
def test_resuming_is_exact(rows, tmp_path):
    whole, half, resumed = editors(3)
    train(whole, 4, rows)
    train(half, 2, rows)
    for p, q in zip(resumed.parameters, half.parameters, strict=True):
        p.data.copy_(q)
    resumed.load({k: v.clone() for k, v in half.state().items()}, tmp_path)
    train(resumed, 2, rows, first=2)
    assert whole.state().keys() == resumed.state().keys()
    for key, value in whole.state().items():
        assert torch.equal(resumed.state()[key], value), key
    for p, q in zip(resumed.parameters, whole.parameters, strict=True):
        assert torch.equal(p, q)


def test_starts_from_u_zero():
    """The editor's own start: u is 0, so the gradient of v is 0, and v must stay where it is."""
    optimizer = EditorOptimizer(tiny_mend(gpt2()), TrainConfig(lr=1e-3))
    u, v = matrices(optimizer)[:2]
    u.data.zero_()
    before = v.detach().clone()
    u.factors.append((torch.ones(3, len(u)), torch.ones(3, u.shape[1])))
    v.factors.append((torch.zeros(3, len(v)), torch.ones(3, v.shape[1])))
    assert optimizer.step(0) == pytest.approx(3 * u.numel() ** 0.5, rel=1e-6)
    torch.testing.assert_close(u.detach(), torch.full_like(u, -1e-3))
    assert torch.equal(v, before)


# ------------------------------------------------------------------------------ the op as an op


def test_threads_do_not_change_a_bit():
    case = make_case(torch.float32, 200, 1100, 37)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("cpu", case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, results[0])


@needs_binary
@pytest.mark.parametrize("name", ["one", "tails", "no rows", "empty"])
def test_opcheck(name):
    case = samples(torch.float32)[name]
    arguments = (*case.tensors(), *case.numbers())
    torch.library.opcheck(torch.ops.pymend.factored_adam.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_whole(dtype):
    case = make_case(dtype, 20, 30, 3)
    new = run("cpu", case)
    compiled = torch.compile(op.factored_adam, fullgraph=True, backend="aot_eager")
    compiled(*case.tensors(), **SETTINGS)
    for ours, theirs in zip(case.tensors(), new, strict=False):
        torch.testing.assert_close(ours, theirs)  # torch splits its own ops up, and rounds anew


def test_autocast_and_inference_mode_change_nothing():
    for dtype in DTYPES:
        case = make_case(dtype, 20, 30, 3)
        new = run("cpu", case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(run("cpu", case), new)
        with torch.inference_mode():
            assert_same(run("cpu", case), new)


def test_backward_notices_the_write():
    """A tensor saved for backward and then updated must not give silent wrong gradients."""
    case = make_case(torch.float32, 4, 4, 1)
    for written in case.tensors()[:3]:
        x = torch.randn(4, 4, requires_grad=True)
        y = (x @ written).sum()
        op.factored_adam(*case.tensors(), **SETTINGS)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_without_the_kernel(monkeypatch):
    case = make_case(torch.float32, 20, 30, 3)
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    assert_same(run("cpu", case), run("eager", case))


def with_grad(case: Case) -> Case:
    return replace(case, param=case.param.requires_grad_())


def two() -> Case:
    return make_case(torch.float32, 3, 4, 2)


REFUSED = {
    "left": (lambda: replace(two(), left=torch.randn(2, 4)), ValueError,
             r"left has shape \[2, 4\], expected \[n, 3\] for param \[3, 4\]"),
    "right": (lambda: replace(two(), right=torch.randn(3, 4)), ValueError,
              r"right has shape \[3, 4\], expected \[2, 4\] for param \[3, 4\] and left \[2, 3\]"),
    "moment": (lambda: replace(two(), exp_avg_sq=torch.randn(4, 3)), ValueError,
               r"exp_avg_sq has shape \[4, 3\], expected \[3, 4\]"),
    "scale": (lambda: replace(two(), scale=torch.ones(1)), ValueError,
              r"scale has shape \[1\], expected \[\]"),
    "vector": (lambda: replace(two(), param=torch.randn(3)), ValueError,
               r"param has shape \[3\], expected a matrix"),
    "scalar left": (lambda: replace(two(), left=torch.ones(())), ValueError,
                    r"left has shape \[\], expected \[n, 3\]"),
    "param dtype": (lambda: replace(two(), param=torch.randn(3, 4).half()), TypeError,
                    "param has dtype torch.float16, expected float32 or float64"),
    "moment dtype": (lambda: replace(two(), exp_avg=torch.randn(3, 4).double()), TypeError,
                     "exp_avg has dtype torch.float64, expected param's torch.float32"),
    "left dtype": (lambda: replace(two(), left=torch.ones(2, 3, dtype=torch.int64)), TypeError,
                   "left has dtype torch.int64, expected a floating dtype"),
    "device": (lambda: replace(two(), right=torch.empty(2, 4, device="meta")), ValueError,
               "right is on meta, param is on cpu"),
    "step": (lambda: replace(two(), settings={"step": 0}), ValueError, "step is 0, expected 1"),
    "beta1": (lambda: replace(two(), settings={"beta1": 1.0}), ValueError, "beta1 is 1.0"),
    "beta2": (lambda: replace(two(), settings={"beta2": -0.1}), ValueError, "beta2 is -0.1"),
    "eps": (lambda: replace(two(), settings={"eps": float("nan")}), ValueError, "eps is nan"),
    "overlap": (lambda: (lambda c: replace(c, exp_avg=c.param))(two()), ValueError,
                "param and exp_avg share memory"),
    "factor in param": (lambda: (lambda c: replace(c, right=c.param[1:]))(two()), ValueError,
                        "param and right share memory"),
    "requires grad": (lambda: with_grad(two()), RuntimeError,
                      r"param requires grad.*under torch.no_grad"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name):
    make, kind, message = REFUSED[name]
    case = make()
    before = [t.detach().clone() for t in case.tensors()[:3]]
    with pytest.raises(kind, match=message):
        op.factored_adam(*case.tensors(), **{**SETTINGS, **case.settings})
    assert all(torch.equal(a, b) for a, b in zip(case.tensors(), before, strict=False))


NATIVE_REFUSED = {
    "dtype": ({"param": torch.randn(3, 4).double()}, "param has dtype Double, expected Float"),
    "matrix": ({"param": torch.randn(12)}, r"param has shape \[12\], expected \[any, any\]"),
    "moment": ({"exp_avg": torch.randn(4, 3)}, r"exp_avg has shape \[4, 3\], expected \[3, 4\]"),
    "left": ({"left": torch.randn(2, 4)}, r"left has shape \[2, 4\], expected \[any, 3\]"),
    "right": ({"right": torch.randn(1, 4)}, r"right has shape \[1, 4\], expected \[2, 4\]"),
    "scale": ({"scale": torch.ones(1)}, r"scale has shape \[1\], expected \[\]"),
    "strides": ({"right": with_strides(torch.randn(2, 4))}, "right is not contiguous"),
    "step": ({"settings": {"step": 0}}, "step is 0, expected 1 or more"),
}


@needs_binary
@pytest.mark.parametrize("name", NATIVE_REFUSED)
def test_native_checks_stand_alone(name):
    """The op itself refuses too: it can be called without the wrapper."""
    change, message = NATIVE_REFUSED[name]
    case = replace(two(), **change)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymend.factored_adam.default(*case.tensors(), *case.numbers())
