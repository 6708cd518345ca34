"""side_path against the dense product of pymend.reference in float64, gradients included.

A Python autograd function over torch's own products: its ``cpu`` and ``cuda`` are one code, and
there is no kernel to emulate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import factors, sizes, with_strides
from tolerances import assert_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pymend import reference
from pymend.ops import side_path as op

BACKENDS = ("eager", "cpu", "cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "u", "delta", "alpha")


@dataclass
class Case:
    x: Tensor
    u: Tensor
    delta: Tensor
    alpha: Tensor
    cotangent: Tensor  # gradient of the result

    def arguments(self):
        return self.x, self.u, self.delta, self.alpha

    def map(self, change) -> Case:
        return Case(*(change(t) for t in vars(self).values()))


def make_case(dtype, t, n, a, b, episodes=None, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)
    first = () if episodes is None else (episodes,)
    shapes = (*first, t, a), (*first, n, a), (*first, n, b), (), (*first, t, b)
    return Case(*(torch.randn(shape, generator=g).to(dtype) for shape in shapes))


def samples(dtype) -> dict[str, Case]:
    strided = make_case(dtype, 9, 5, 33, 40)
    strided.x, strided.u = with_strides(strided.x), strided.u.t().contiguous().t()
    strided.delta, strided.cotangent = with_strides(strided.delta), strided.cotangent[:1]
    strided.cotangent = strided.cotangent.expand(9, -1)  # as sum().backward() gives it
    padded = make_case(dtype, 6, 4, 20, 30, episodes=3)
    padded.u[1, 2:] = padded.delta[1, 2:] = 0
    return {
        "one edit": make_case(dtype, 20, 8, 48, 80),
        "independent edits": make_case(dtype, 7, 4, 33, 31, episodes=5),
        "padded": padded,
        "strides": strided,
        "many rows": make_case(dtype, 90, 80, 24, 40),
        "many rows, independent": make_case(dtype, 50, 40, 16, 9, episodes=3),
        "one of each": make_case(dtype, 1, 1, 1, 1),
        "no rows of factors": make_case(dtype, 4, 0, 6, 7),
        "no inputs": make_case(dtype, 0, 3, 6, 7),
        "no edits": make_case(dtype, 4, 3, 6, 7, episodes=0),
        "no columns": make_case(dtype, 4, 3, 0, 7),
    }


def run(backend: str, case: Case) -> list[Tensor]:
    """The result, then the gradients of all four arguments."""
    if backend == "reference":
        dtype = case.x.dtype
        return [t.to(dtype) for t in results(dense, case.map(Tensor.double))]
    if backend == "eager":
        return results(op.eager, case)
    return [t.cpu() for t in results(op.side_path, case.map(lambda t: t.to(backend)))]


def results(layer, case: Case) -> list[Tensor]:
    arguments = [t.detach().requires_grad_() for t in case.arguments()]
    y = layer(*arguments)
    return [y.detach(), *torch.autograd.grad(y, arguments, case.cotangent)]


def dense(x: Tensor, u: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """What the reference's edit of a weight [b, a] of zeros takes off: x times the change."""
    if x.dim() == 3:
        edits = [dense(*of, alpha) for of in zip(x, u, delta, strict=True)]
        return torch.stack(edits) if edits else x @ u.mT @ delta * alpha
    zero = x.new_zeros(delta.shape[1], u.shape[1])
    return -x @ reference.rank_update(zero, u, delta, alpha, False).t()


def assert_right(backend: str, case: Case) -> None:
    exact = results(dense, case.map(Tensor.double))
    t, (n, a), b = case.x.shape[-2], case.u.shape[-2:], case.delta.shape[-1]
    lengths = (a + n, b + n, b + t, a + t, math.prod(case.x.shape[:-1]) * n + b)
    for ours, theirs, truth, length in zip(
        run(backend, case), run("eager", case), exact, lengths, strict=True
    ):
        assert_accurate(ours, theirs, truth, length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", samples(torch.float32))
def test_value_and_gradients(backend, name, dtype):
    assert_right(backend, samples(dtype)[name])


def test_by_hand(backend_or_reference):
    """alpha = 1/2, x = (1, 2), u = (3, 4), delta = (5, 6, 7): x u = 11."""
    values = [[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0, 7.0]], 0.5, [[1.0, 0.0, 10.0]]
    y, x, u, delta, alpha = run(backend_or_reference, Case(*map(torch.tensor, values)))
    assert y.tolist() == [[27.5, 33.0, 38.5]]
    assert x.tolist() == [[112.5, 150.0]] and u.tolist() == [[37.5, 75.0]]
    assert delta.tolist() == [[5.5, 0.0, 55.0]] and alpha.item() == 825.0


def assert_bounded(backend: str, case: Case) -> None:
    """Within the rounding of sums as long as these, of terms that do not cancel.

    Where they do, luck decides whose error is the smaller, ours or eager's.
    """
    exact, size = (results(dense, case.map(f)) for f in (Tensor.double, lambda t: t.double().abs()))
    kind = torch.finfo(case.x.dtype)
    terms = case.x.shape[0] + sum(case.u.shape) + case.delta.shape[1] + 4
    for ours, truth, most in zip(run(backend, case), exact, size, strict=True):
        allowed = terms * (kind.eps * most + kind.tiny)
        assert ours.dtype == case.x.dtype
        assert ((ours.double() - truth).abs() <= allowed).all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    t, n, a, b = (data.draw(sizes) for _ in range(4))
    x, u, delta, cotangent = (data.draw(factors(*s)) for s in ((t, a), (n, a), (n, b), (t, b)))
    alpha = torch.tensor(data.draw(st.sampled_from((0.0, 1e-3, -2.0))))
    dtype = data.draw(st.sampled_from(DTYPES[:3]))  # float16 has no room for these scales
    assert_bounded(backend, Case(x, u, delta, alpha, cotangent).map(lambda t: t.to(dtype)))


@pytest.mark.parametrize("name", [n for n in samples(torch.float64) if n != "no edits"])
def test_gradcheck(name):
    case = samples(torch.float64)[name]
    case = case.map(lambda t: t[..., :6].clone() if t.dim() else t)
    assert torch.autograd.gradcheck(op.side_path, [t.requires_grad_() for t in case.arguments()])


def test_independent_edits_are_each_their_own():
    """A batch of edits has the values of one call each, and no episode reaches another."""
    case = samples(torch.float64)["padded"]
    y, *gradients = run("cpu", case)
    for i in range(3):
        one = Case(case.x[i], case.u[i], case.delta[i], case.alpha, case.cotangent[i])
        alone = run("cpu", one)
        for whole, part in zip((y, *gradients[:3]), alone[:4], strict=True):
            torch.testing.assert_close(whole[i], part)
    for padding in (gradients[1][1, 2:], gradients[2][1, 2:]):
        assert not padding.any(), "padding gets no gradient"


class NoDense(TorchDispatchMode):
    """Fails where an op returns as many elements as a weight [b, a] has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.seen += 1
                assert x.numel() % self.size or not x.numel(), f"{func} made {list(x.shape)}"
        return result


@pytest.mark.parametrize("rows", [(5, 3), (90, 80)], ids=["few", "many"])
@pytest.mark.parametrize("episodes", [None, 3])
def test_no_tensor_of_a_weights_size(episodes, rows):
    case = make_case(torch.float32, *rows, 22, 38, episodes)
    with NoDense(22 * 38) as mode:
        results(op.side_path, case)
    assert mode.seen > 10, "the mode saw the work"
    with pytest.raises(AssertionError, match=r"made \[38, 22\]"), NoDense(22 * 38):
        dense(*make_case(torch.float32, 5, 3, 22, 38).arguments())


def test_many_rows_keep_no_product_of_rows():
    """Streamed, memory does not grow with inputs times rows of factors."""
    case = make_case(torch.float32, 90, 80, 22, 38)
    with NoDense(90 * 80):
        results(op.side_path, case)
    with pytest.raises(AssertionError, match=r"made \[90, 80\]"), NoDense(90 * 80):
        results(op.eager, case)


@pytest.mark.parametrize("rows", [(5, 3), (90, 80)], ids=["few", "many"])
@pytest.mark.parametrize("wanted", NAMES)
def test_only_what_is_wanted_has_a_gradient(wanted, rows):
    case = make_case(torch.float32, *rows, 7, 9)
    full = dict(zip(NAMES, run("cpu", case)[1:], strict=True))
    getattr(case, wanted).requires_grad_()
    op.side_path(*case.arguments()).backward(case.cotangent)
    for name in NAMES:
        grad = getattr(case, name).grad
        assert torch.equal(grad, full[name]) if name == wanted else grad is None


def test_no_second_derivative():
    x, *rest = make_case(torch.float32, 5, 3, 7, 9).arguments()
    total = op.side_path(x.requires_grad_(), *rest).square().sum()
    (grad,) = torch.autograd.grad(total, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("rows", [(5, 3), (90, 80)], ids=["few", "many"])
def test_backward_notices_a_changed_factor(rows):
    case = make_case(torch.float32, *rows, 7, 9)
    y = op.side_path(case.x.requires_grad_(), *case.arguments()[1:])
    case.u.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["one edit", "independent edits", "many rows", "no rows of factors"]
)
def test_compiles_whole(name, dtype):
    torch.compiler.reset()  # each case has shapes of its own, and dynamo counts
    case = samples(dtype)[name]
    plain = results(op.side_path, case)
    compiled = results(torch.compile(op.side_path, fullgraph=True, backend="aot_eager"), case)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("rows", [(20, 8), (300, 200)], ids=["few", "many"])
def test_autocast_and_inference_mode_change_nothing(rows):
    case = make_case(torch.float32, *rows, 48, 80)
    plain = run("cpu", case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run("cpu", case)
    assert all(torch.equal(x, y) for x, y in zip(cast, plain, strict=True))
    with torch.inference_mode():
        inside = case.map(Tensor.clone)
        assert torch.equal(op.side_path(*inside.arguments()), plain[0])


@pytest.mark.parametrize("rows", [(65, 9), (700, 900)], ids=["few", "many"])
def test_threads_do_not_change_a_bit(rows):
    case = make_case(torch.float32, *rows, 200, 300, episodes=2)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append([run("cpu", case) for _ in range(2)])
    finally:
        torch.set_num_threads(threads)
    for first, second in runs:
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_alpha_may_be_of_another_precision():
    case = make_case(torch.float32, 90, 80, 24, 40)  # streamed: the parts of a sum are not rounded
    case.alpha = case.alpha.bfloat16()
    exact = results(dense, case.map(Tensor.double))[4]
    assert run("cpu", case)[4].double() == pytest.approx(float(exact), rel=2**-8)
    case = make_case(torch.bfloat16, 4, 3, 6, 7)
    case.alpha = torch.tensor(0.5).double()
    y, *gradients = run("cpu", case)
    assert y.dtype == torch.bfloat16 and gradients[3].dtype == torch.float64


TWO = make_case(torch.float32, 4, 3, 6, 7)
REFUSED = {
    "x shape": (dict(x=torch.ones(6)), ValueError,
                r"x has shape \[6\], expected \[t, a\] or \[episodes, t, a\]"),
    "u width": (dict(u=torch.ones(3, 5)), ValueError,
                r"u has shape \[3, 5\], expected \[3, 6\] for x \[4, 6\]"),
    "u dims": (dict(u=torch.ones(1, 3, 6)), ValueError,
               r"u has shape \[1, 3, 6\], expected \[0, 6\] for x \[4, 6\]"),
    "episodes": (dict(x=torch.ones(2, 4, 6), u=torch.ones(3, 3, 6)), ValueError,
                 r"u has shape \[3, 3, 6\], expected \[2, 3, 6\] for x \[2, 4, 6\]"),
    "delta rows": (dict(delta=torch.ones(2, 7)), ValueError,
                   r"delta has shape \[2, 7\], expected \[3, 7\] for x \[4, 6\] and u \[3, 6\]"),
    "alpha shape": (dict(alpha=torch.ones(1)), ValueError, r"alpha has shape \[1\], expected \[\]"),
    "x dtype": (dict(x=torch.ones(4, 6).long()), TypeError,
                "x has dtype torch.int64, expected a floating dtype"),
    "u dtype": (dict(u=torch.ones(3, 6).double()), TypeError,
                "u has dtype torch.float64, expected x's torch.float32"),
    "alpha dtype": (dict(alpha=torch.tensor(1)), TypeError, "alpha has dtype torch.int64"),
    "device": (dict(delta=torch.empty(3, 7, device="meta")), ValueError,
               "delta is on meta, x is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, kind, message = REFUSED[name]
    arguments = {**dict(zip(NAMES, TWO.arguments(), strict=True)), **change}
    with pytest.raises(kind, match=message):
        op.side_path(**arguments)
