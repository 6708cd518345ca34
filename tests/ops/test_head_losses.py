"""head_losses against token_losses of whole logits, and against pymend.reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import test_token_losses as whole
import torch
from strategies import with_strides
from tolerances import assert_accurate, error
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pymend.engine.tokens import IGNORE
from pymend.ops import head_losses as op
from pymend.ops.token_losses import TokenLosses

D, V, ROWS = 6, 300, 7  # rows of a chunk
KINDS = {"nll": (True, False), "kl": (False, True), "both": (True, True)}
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", whole.DTYPES, ids=str)


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor | None
    base_hidden: Tensor | None
    grad_nll: Tensor
    grad_kl: Tensor

    def operands(self):
        return self.hidden, self.weight, self.bias, self.target, self.base_hidden


def make_case(dtype, k, kind="both", bias=True, vocabulary=V, seed=0) -> Case:
    """Random rows, every third without a target; the base is a little beside them."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(k, D, generator=g)
    base = hidden + 0.3 * torch.randn(k, D, generator=g)
    weight = torch.randn(vocabulary, D, generator=g)
    offset = torch.randn(vocabulary, generator=g) if bias else None
    target = torch.randint(vocabulary, (k,), generator=g)
    target[2::3] = IGNORE
    grads = torch.randn(2, k, generator=g, dtype=torch.float64).to(whole.wide(dtype))
    with_target, with_base = KINDS[kind]
    return Case(
        hidden.to(dtype),
        weight.to(dtype),
        None if offset is None else offset.to(dtype),
        target if with_target else None,
        base.to(dtype) if with_base else None,
        *grads,
    )


@pytest.fixture(params=["all", "off"], autouse=True)
def kernels(request, monkeypatch):
    """With token_losses' kernel and with its eager form."""
    monkeypatch.setenv("PYMEND_KERNELS", request.param)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of ROWS rows of a vocabulary of V."""

    def set_for(dtype):
        monkeypatch.setattr(op, "CHUNK_BYTES", ROWS * V * dtype.itemsize)

    return set_for


def truth(*operands) -> TokenLosses:
    """Row by row, through the whole logits; float64 operands give the truth."""
    hidden, weight, bias, target, base = operands
    base = None if base is None else F.linear(base, weight, bias)
    grads = (hidden.new_empty(0),) * 2
    return whole.expected(whole.Case(F.linear(hidden, weight, bias), target, base, *grads))


def run(losses_of, case: Case) -> tuple[TokenLosses, Tensor]:
    hidden = case.hidden.detach().requires_grad_()
    losses = losses_of(*replace(case, hidden=hidden).operands())
    pairs = ((losses.nll, case.grad_nll), (losses.kl, case.grad_kl))
    total = sum((x * g).sum() for x, g in pairs if x is not None and x.shape == g.shape)
    return losses, torch.autograd.grad(total, hidden)[0]


def assert_right(case: Case) -> None:
    double = Case(*(t.double() if t is not None and t.is_floating_point() else t
                    for t in vars(case).values()))  # fmt: skip
    (ours, grad), (eager, eager_grad) = run(op.head_losses, case), run(op.eager, case)
    exact, exact_grad = run(truth, double)
    for name, operand in (("nll", case.target), ("kl", case.base_hidden)):
        actual, yardstick, wanted = (getattr(x, name) for x in (ours, eager, exact))
        if operand is None:
            assert actual.shape == (0,) and actual.dtype == yardstick.dtype, name
        else:
            # Beside 1: a loss near 0 is a difference of numbers of that order.
            beside_one = (x.detach() + 1 for x in (actual, yardstick, wanted))
            assert_accurate(*beside_one, D + V, through=case.hidden.dtype)
    assert ours.best.shape == (len(case.hidden),)
    if case.hidden.dtype == torch.float64:  # in others a rounding of the logits may make equals
        assert torch.equal(ours.best, exact.best)
        if case.base_hidden is not None:
            assert torch.equal(ours.base_best, exact.base_best)
    assert grad.dtype == case.hidden.dtype
    assert_accurate(grad, eager_grad, exact_grad, D + V)


@dtypes
@kinds
@pytest.mark.parametrize("k", [1, 2, 3, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 1])
def test_forward_and_backward(small_chunks, k, kind, dtype):
    small_chunks(dtype)
    assert_right(make_case(dtype, k, kind, bias=k % 2 == 0, seed=k))


@dtypes
def test_one_chunk_and_odd_strides(dtype):
    case = make_case(dtype, 9)
    assert_right(case)
    assert_right(replace(
        case, hidden=with_strides(case.hidden), base_hidden=with_strides(case.base_hidden),
        weight=case.weight.t().contiguous().t(),
    ))  # fmt: skip


@kinds
def test_no_rows(kind):
    case = make_case(torch.float32, 0, kind)
    losses, grad = run(op.head_losses, case)
    for ours, whole_ones in zip(losses, op.eager(*case.operands()), strict=True):
        assert ours.shape == whole_ones.shape == (0,) and ours.dtype == whole_ones.dtype
    assert grad.shape == (0, D)


def test_no_operands_and_no_gradient():
    """Only the argmax; a gradient of nothing is nothing."""
    case = replace(make_case(torch.float64, 7), target=None, base_hidden=None)
    losses = op.head_losses(case.hidden.requires_grad_(), *case.operands()[1:])
    assert torch.equal(losses.best, truth(*case.operands()).best)
    (losses.nll.sum() + losses.kl.sum()).backward()
    assert case.hidden.grad is None or not case.hidden.grad.any()


def test_equal_rows_have_no_kl(small_chunks):
    """Exactly none: rows that an edit leaves alone do not drift."""
    small_chunks(torch.float32)
    case = make_case(torch.float32, 12)
    losses, _ = run(op.head_losses, replace(case, base_hidden=case.hidden.clone()))
    assert (losses.kl == 0).all() and torch.equal(losses.best, losses.base_best)


def test_an_ignored_row_has_no_gradient(small_chunks):
    small_chunks(torch.float32)
    case = make_case(torch.float32, 12, "nll")
    losses, grad = run(op.head_losses, case)
    ignored = case.target == IGNORE
    assert (losses.nll[ignored] == 0).all() and (grad[ignored] == 0).all()
    assert grad[~ignored].any(1).all()


def test_float16_keeps_the_gradient_of_small_probabilities():
    """q - p of a vocabulary of 50,000 lies below float16's smallest number."""
    g = torch.Generator().manual_seed(0)
    hidden, change = torch.randn(2, 4, D, generator=g, dtype=torch.float64) / 64
    weight = torch.randn(50_000, D, generator=g, dtype=torch.float64)
    operands = [x.half() for x in (hidden, weight, hidden + change / 64)]
    grads = []
    for losses_of, dtype in ((op.head_losses, torch.float16), (op.eager, torch.float64)):
        h, w, b = (x.to(dtype) for x in operands)
        kl = losses_of(h.requires_grad_(), w, None, None, b).kl
        grads.append(torch.autograd.grad(1024 * kl.sum(), h)[0])
    assert error(*grads) < 0.05


def test_gradcheck(small_chunks):
    """The backward pass against finite differences, with and without each operand."""
    small_chunks(torch.float64)
    for kind in KINDS:
        _, *rest = make_case(torch.float64, 7, kind).operands()
        hidden = make_case(torch.float64, 7).hidden.requires_grad_()

        def losses(h, rest=rest):
            return tuple(x for x in op.head_losses(h, *rest)[:2] if x.numel())

        torch.autograd.gradcheck(losses, (hidden,))


@kinds
def test_no_second_derivative(kind):
    case = make_case(torch.float64, 4, kind)
    losses = op.head_losses(case.hidden.requires_grad_(), *case.operands()[1:])
    total = losses.nll.sum() + losses.kl.sum()
    (first,) = torch.autograd.grad(total, case.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


# ------------------------------------------------------------------------------ what it costs


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@kinds
def test_the_logits_of_all_rows_are_never_there(small_chunks, kind):
    small_chunks(torch.float32)
    case = make_case(torch.float32, 12 * ROWS, kind)
    largest = {}
    for losses_of in (op.head_losses, op.eager):
        with Largest() as mode:
            run(losses_of, case)
        largest[losses_of] = mode.elements
    assert largest[op.head_losses] == ROWS * V
    assert largest[op.eager] == 12 * ROWS * V, "the mode would see them"


@pytest.mark.parametrize("k", [0, 1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 6 * ROWS + 1])
def test_chunks_are_equal_and_within_the_budget(small_chunks, monkeypatch, k):
    small_chunks(torch.float32)
    rows = []

    def spy(logits, *rest):
        rows.append(len(logits))
        return losses(logits, *rest)

    losses = op.op.token_losses
    monkeypatch.setattr(op.op, "token_losses", spy)
    monkeypatch.setattr(op, "spare_rows", lambda *_: 0)
    op.head_losses(*make_case(torch.float32, k).operands())
    assert sum(rows) == k and len(rows) == max(1, -(-k // ROWS))
    assert max(rows) <= ROWS and max(rows) - min(rows) <= 1


def test_a_row_larger_than_the_budget_is_a_chunk(monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", 7)
    assert_right(make_case(torch.float32, 5))


@kinds
@pytest.mark.parametrize("wanted", [True, False])
def test_products_towards_hidden(monkeypatch, kind, wanted):
    """One for each loss, and none where no gradient will be asked for."""
    seen = []

    def spy(x, w):
        seen.append(x.shape)
        return product(x, w)

    product = op.product
    monkeypatch.setattr(op, "product", spy)
    case = make_case(torch.float32, 8, kind)
    hidden = case.hidden.requires_grad_(wanted)
    op.head_losses(hidden, *case.operands()[1:])
    with torch.no_grad():
        op.head_losses(hidden.detach().requires_grad_(), *case.operands()[1:])
    assert len(seen) == (sum(KINDS[kind]) if wanted else 0)


def test_the_losses_keep_no_logits(small_chunks):
    """What waits for the backward pass is rows as wide as the head's input."""
    small_chunks(torch.float32)
    case = make_case(torch.float32, 12)
    kept = []

    def keep(x):
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        op.head_losses(case.hidden.requires_grad_(), *case.operands()[1:])
    assert kept.count((12, D)) == 2
    assert all(len(shape) < 2 or shape[-1] != V or shape[0] <= ROWS for shape in kept)


# -------------------------------------------------------------------------------- surroundings


def test_inference_mode_changes_nothing():
    case = make_case(torch.float32, 9)
    plain = op.head_losses(*case.operands())
    with torch.inference_mode():
        inside = op.head_losses(*case.operands())
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_autocast():
    """The head multiplies in the reduced dtype, as it would alone; the weight may have it."""
    case = make_case(torch.float32, 9)
    for weight in (case.weight, case.weight.bfloat16()):
        mixed = replace(case, weight=weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (ours, grad), (eager, eager_grad) = run(op.head_losses, mixed), run(op.eager, mixed)
        assert ours.nll.dtype == ours.kl.dtype == grad.dtype == torch.float32
        exact, exact_grad = run(truth, Case(*(
            t.double() if t is not None and t.is_floating_point() else t
            for t in vars(case).values()
        )))  # fmt: skip
        for got, yardstick, wanted in (
            (ours.nll, eager.nll, exact.nll),
            (ours.kl + 1, eager.kl + 1, exact.kl + 1),
            (grad, eager_grad, exact_grad),
        ):
            assert error(got, wanted) <= 2 * error(yardstick, wanted) + 2**-9
    assert error(ours.nll, exact.nll) > 1e-5, "it was cast"


CASE = make_case(torch.float32, 3)
REFUSED = {
    "hidden dtype": ({"hidden": CASE.hidden.long()}, TypeError,
                     r"hidden has dtype torch.int64, expected one of float64"),
    "hidden shape": ({"hidden": CASE.hidden[0]}, ValueError,
                     r"hidden has shape \[6\], expected \[k, d\]"),
    "weight width": ({"weight": CASE.weight[:, :5]}, ValueError,
                     r"weight has shape \[300, 5\], expected \[V, 6\] with V above 0 for hidden "
                     r"\[3, 6\]"),
    "no vocabulary": ({"weight": CASE.weight[:0]}, ValueError,
                      r"weight has shape \[0, 6\], expected \[V, 6\] with V above 0"),
    "weight dtype": ({"weight": CASE.weight.double()}, TypeError,
                     r"weight has dtype torch.float64, hidden has torch.float32"),
    "weight device": ({"weight": CASE.weight.to("meta")}, ValueError,
                      r"weight is on meta, hidden is on cpu"),
    "weight gradient": ({"weight": CASE.weight.clone().requires_grad_()}, ValueError,
                        r"weight requires a gradient, which it would not get; freeze it"),
    "bias shape": ({"bias": CASE.bias[:7]}, ValueError,
                   r"bias has shape \[7\], expected \[300\] for hidden \[3, 6\]"),
    "bias dtype": ({"bias": CASE.bias.half()}, TypeError,
                   r"bias has dtype torch.float16, hidden has torch.float32"),
    "target dtype": ({"target": CASE.target.int()}, TypeError,
                     r"target has dtype torch.int32, expected int64"),
    "target shape": ({"target": CASE.target[:2]}, ValueError,
                     r"target has shape \[2\], expected \[3\] for hidden \[3, 6\]"),
    "target value": ({"target": torch.tensor([1, 2, 300])}, ValueError,
                     r"target\[2\] is 300, expected 0 to 299, or -100"),
    "base shape": ({"base_hidden": CASE.base_hidden[:2]}, ValueError,
                   r"base_hidden has shape \[2, 6\], expected \[3, 6\] for hidden \[3, 6\]"),
    "base dtype": ({"base_hidden": CASE.base_hidden.double()}, TypeError,
                   r"base_hidden has dtype torch.float64, hidden has torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    changed, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        op.head_losses(*replace(CASE, **changed).operands())
