"""token_losses on its back ends against pymend.reference in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, dtypes, seeds, sizes, with_strides
from tolerances import assert_accurate
from torch import Tensor

from pymend import _lib, reference
from pymend.engine.tokens import IGNORE
from pymend.ops import token_losses as op

BACKENDS = ("eager", "cpu", "emu", "cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INF, NAN = math.inf, math.nan
needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")


@dataclass
class Case:
    logits: Tensor
    target: Tensor | None
    base: Tensor | None
    grad_nll: Tensor
    grad_kl: Tensor

    def operands(self):
        return self.logits, self.target, self.base


@dataclass
class Result:
    nll: Tensor | None
    kl: Tensor | None
    best: Tensor
    base_best: Tensor | None
    grad: Tensor | None


def make_case(dtype, k, vocabulary, scale=3.0, shift=0.0, near=False, seed=0) -> Case:
    """Random rows, every third without a target; ``near``: the base is a little beside them."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(k, vocabulary, generator=g) * scale + shift
    base = torch.randn(k, vocabulary, generator=g) * scale
    if near:
        base = logits + 1e-3 * base
    target = torch.randint(vocabulary, (k,), generator=g)
    target[2::3] = IGNORE
    grads = torch.randn(2, k, generator=g, dtype=torch.float64).to(wide(dtype))
    return Case(logits.to(dtype), target, base.to(dtype), *grads)


def samples(dtype) -> dict[str, Case]:
    plain = make_case(dtype, 5, 300)
    masked = make_case(dtype, 6, 5000)  # on a CPU a span is 2048 elements
    masked.logits[:, 700:4500] = masked.base[:, 700:4500] = -INF
    masked.logits[1, :4900] = masked.base[1, :4900] = -INF
    masked.base[3, :60] = -INF
    masked.target = torch.tensor([5, 4950, IGNORE, 600, 4500, 699])
    strided = make_case(dtype, 7, 33)
    strided.logits, strided.base = with_strides(strided.logits), strided.base.t().contiguous().t()
    apart = make_case(dtype, 8, 40)
    apart.logits = torch.cat([apart.logits, apart.logits], 1)[:, :40]
    apart.base = apart.base[:1].expand(8, -1)
    last = make_case(dtype, 3, 9000)
    last.logits[:, -1] = last.base[:, -1] = 30
    last.target[:] = 8999
    return {
        "one": make_case(dtype, 1, 1),
        "plain": plain,
        "spans and parts": make_case(dtype, 3, 8192 + 2048 + 5),
        "no target": replace(plain, target=None),
        "no base": replace(plain, base=None),
        "neither": replace(plain, target=None, base=None),
        "nothing seen": replace(plain, target=torch.full((5,), IGNORE)),
        "near": make_case(dtype, 4, 3000, near=True),
        "shifted": make_case(dtype, 4, 3000, shift=-500.0),
        "rising": replace(plain, logits=torch.arange(1500.0).view(5, 300).to(dtype) / 8),
        "masked": masked,
        "certain": last,
        "strides": strided,
        "apart": apart,
        "no rows": make_case(dtype, 0, 7),
        "small": make_case(dtype, 6, 40, scale=1e-3),
        "wide": make_case(dtype, 6, 40, scale=100.0),
    }


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(backend: str, case: Case, **emulation) -> Result:
    if backend == "emu":
        return emulate(case, **emulation)
    if backend not in ("reference", "eager"):
        case = Case(*(None if x is None else x.to(backend) for x in vars(case).values()))
    logits = case.logits.detach().requires_grad_()
    if backend == "reference":
        losses = expected(replace(case, logits=logits))
    elif backend == "eager":
        losses = op.eager(logits, case.target, case.base)
    else:
        losses = op.token_losses(logits, case.target, case.base)
    if backend != "reference":
        assert case.target is not None or losses.nll.shape == (0,)
        assert case.base is not None or losses.kl.shape == losses.base_best.shape == (0,)
        losses = op.TokenLosses(
            None if case.target is None else losses.nll,
            None if case.base is None else losses.kl,
            losses.best,
            None if case.base is None else losses.base_best,
        )
    total = [
        (x * g.to(x.dtype)).sum()
        for x, g in ((losses.nll, case.grad_nll), (losses.kl, case.grad_kl))
        if x is not None
    ]
    grad = torch.autograd.grad(sum(total), logits)[0] if total else None
    cast = wide(case.logits.dtype)
    floats = [
        None if x is None else x.detach().to("cpu", cast if backend == "reference" else x.dtype)
        for x in (losses.nll, losses.kl)
    ]
    best = [None if x is None else x.cpu() for x in (losses.best, losses.base_best)]
    return Result(*floats, *best, None if grad is None else grad.cpu())


def expected(case: Case) -> op.TokenLosses:
    """The truth: float64 from end to end, row by row."""
    x = case.logits.double()
    nll = kl = None
    if case.target is not None:
        rows = [
            reference.nll(x[i : i + 1, None].expand(1, 2, -1), torch.tensor([[IGNORE, t]]))
            if t != IGNORE
            else x.new_zeros(())
            for i, t in enumerate(case.target.tolist())
        ]
        nll = torch.stack(rows) if rows else x[:, 0]
    if case.base is not None:
        b, one = case.base.double(), torch.ones(1, 1)
        rows = [reference.kl(b[None, i : i + 1], x[None, i : i + 1], one) for i in range(len(x))]
        kl = torch.stack(rows) if rows else x[:, 0]
    return op.TokenLosses(nll, kl, lowest(case.logits), lowest(case.base))


def lowest(logits: Tensor | None) -> Tensor | None:
    """The definition of the argmax: NaN is largest, the lowest index among equals."""
    if logits is None:
        return None
    keys = [[(math.isnan(v), 0 if math.isnan(v) else v) for v in row] for row in logits.tolist()]
    best = [max(range(len(row)), key=lambda j, r=row: (r[j], -j)) for row in keys]
    return torch.tensor(best, dtype=torch.int64)


def emulate(case: Case, **options) -> Result:
    """The CUDA kernels' own sources on fibers."""
    import _emu

    dtype, (k, vocabulary) = case.logits.dtype, case.logits.shape
    acc = wide(dtype)
    operands = {
        "logits": case.logits.contiguous(),
        "base": None if case.base is None else case.base.contiguous(),
        "target": case.target,
        "grad_nll": None if case.target is None else case.grad_nll,
        "grad_kl": None if case.base is None else case.grad_kl,
    }
    results = {
        "nll": torch.full((k,), NAN, dtype=acc),
        "kl": torch.full((k,), NAN, dtype=acc),
        "best": torch.full((k,), -7),
        "base_best": torch.full((k,), -7),
        "stats": torch.full((k, 4), NAN, dtype=acc),
        "grad": torch.full((k, vocabulary), NAN, dtype=dtype),
    }
    both = {**operands, **results}
    addresses = {name: 0 if t is None else t.data_ptr() for name, t in both.items()}
    _emu.token_losses(str(dtype).removeprefix("torch."), addresses, k, vocabulary, **options)
    for name in ("nll",) * (case.target is None) + ("kl", "base_best") * (case.base is None):
        assert (results[name].isnan() | (results[name] == -7)).all(), "written, though not wanted"
        results[name] = None
    if case.target is None and case.base is None:
        results["grad"] = None
    return Result(*(results[n] for n in ("nll", "kl", "best", "base_best", "grad")))


def assert_right(backend: str, case: Case, **emulation) -> None:
    ours, eager, exact = run(backend, case, **emulation), run("eager", case), run("reference", case)
    truth = expected(case)
    length = case.logits.shape[1]
    for name in ("nll", "kl"):
        actual, yardstick = getattr(ours, name), getattr(eager, name)
        assert (actual is None) == (yardstick is None), name
        if actual is not None:
            # Beside 1: a loss near 0 is a difference of numbers of that order.
            beside_one = (t + 1 for t in (actual, yardstick, getattr(truth, name)))
            # In float32 a chunk's sum of 256 terms errs by the root of their number.
            terms = length if actual.dtype == torch.float64 else 16
            assert_accurate(*beside_one, terms)
    for name in ("best", "base_best"):
        actual, wanted = getattr(ours, name), getattr(truth, name)
        assert actual is wanted is None or torch.equal(actual, wanted), name
    if ours.grad is not None:
        double = Case(*(t.double() if t is not None and t.is_floating_point() else t
                        for t in vars(case).values()))  # fmt: skip
        wanted = run("reference", double).grad
        beside = int(wanted.dtype == ours.grad.dtype)  # the truth is rounded as well
        grads = (x + beside for x in (ours.grad, eager.grad, wanted))
        # A gradient is the difference of two softmaxes, times one of these.
        size = torch.cat([case.grad_nll, case.grad_kl, torch.zeros(1)]).abs().max().item()
        assert_accurate(*grads, length, size)
    assert (ours.grad is None) == (exact.grad is None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", samples(torch.float32))
def test_forward_and_backward(backend, name, dtype):
    assert_right(backend, samples(dtype)[name])


def test_by_hand(backend_or_reference):
    """q = (1/4, 3/4) and p = (1/2, 1/2): nll = log 4, kl = log(2) - log(3) / 2."""
    case = Case(
        torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([0]), torch.zeros(1, 2),
        torch.tensor([1.0]), torch.tensor([10.0]),
    )  # fmt: skip
    result = run(backend_or_reference, case)
    assert result.nll.item() == pytest.approx(math.log(4), rel=1e-6)
    assert result.kl.item() == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert (result.best.item(), result.base_best.item()) == (1, 0)
    torch.testing.assert_close(result.grad, torch.tensor([[-0.75 - 2.5, 0.75 + 2.5]]))


def test_a_kl_of_equals_is_zero(backend):
    """A base equal to the logits up to a shift, at any scale: no cancellation shows."""
    case = make_case(torch.float32, 3, 5000, scale=10.0)
    case.base = case.logits.round()
    case.logits = case.base - 512
    result = run(backend, case)
    assert result.kl.abs().max() < 1e-6


def test_equal_terms_do_not_drift(kernel):
    """The roundings of a long sum of equal numbers point one way; torch's add up, ours do not."""
    rows = torch.linspace(-3, -0.5, 12).bfloat16()[:, None].repeat(1, 20_000)
    rows[:, 7] = 0
    case = Case(rows, torch.full((12,), 7), rows.flip(0), torch.ones(12), torch.ones(12))
    result, truth = run(kernel, case), expected(case)
    for name in ("nll", "kl"):
        actual, exact = getattr(result, name).double(), getattr(truth, name)
        roundings = (actual - exact).abs() / (1 + exact.abs()) * 2**24
        assert roundings.max() < 20, name


def test_ties_and_nans_in_the_argmax(backend):
    """The lowest index of equals; the first NaN is above everything; a row of -inf gives 0."""
    rows = torch.full((6, 9000), -1.0)
    rows[0, [17, 18, 8200]] = 2.0
    rows[1, [8191, 8192]] = 2.0
    rows[2, [40, 8500]], rows[2, 3] = NAN, INF
    rows[3] = -INF
    rows[4, 8999] = 1.0
    rows[5, 100] = INF
    result = run(backend, Case(rows, None, rows.flip(0), torch.zeros(6), torch.zeros(6)))
    assert result.best.tolist() == [17, 8191, 40, 0, 8999, 100]
    assert result.base_best.tolist() == result.best.flip(0).tolist()
    assert torch.equal(result.best, rows.argmax(-1)), "as torch.argmax on a CPU"


def same_special(actual: Tensor, wanted: Tensor) -> bool:
    return torch.equal(actual.isnan(), wanted.isnan()) and torch.equal(
        actual.isinf(), wanted.isinf()
    )


def test_special_values_are_as_in_torch(backend):
    """A target without probability costs infinity; NaN, +inf and rows of -inf give NaN."""
    case = make_case(torch.float32, 6, 3000)
    case.target = torch.tensor([5, 6, 7, 8, 9, 10])
    case.logits[0, 5] = -INF  # nll and kl are inf, the gradient is finite
    case.logits[1, 2500] = NAN
    case.logits[2, 2500] = INF
    case.logits[3] = -INF
    case.base[4] = -INF
    case.base[5, 2999] = NAN
    ours, eager = run(backend, case), run("eager", case)
    for name in ("nll", "kl", "grad"):
        assert same_special(getattr(ours, name), getattr(eager, name)), name
    assert ours.nll[0] == ours.kl[0] == INF
    assert ours.grad[0].isfinite().all()


def test_an_ignored_row_has_no_gradient(kernel):
    """Not even where its logits are not finite, unlike in torch."""
    case = make_case(torch.float32, 2, 40)
    case = replace(case, target=torch.tensor([IGNORE, 3]), base=None)
    case.logits[0, 7] = NAN
    result = run(kernel, case)
    assert result.nll[0] == 0 and (result.grad[0] == 0).all() and result.grad[1].any()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    dtype, k = data.draw(dtypes), data.draw(sizes)
    vocabulary = data.draw(sizes.filter(bool))
    case = make_case(
        dtype, k, vocabulary,
        scale=data.draw(st.sampled_from((1e-3, 1.0, 30.0))),
        near=data.draw(st.booleans()), seed=data.draw(seeds),
    )  # fmt: skip
    case.logits = data.draw(st.sampled_from((case.logits, with_strides(case.logits))))
    case.base = data.draw(st.sampled_from((case.base, case.base.t().contiguous().t(), None)))
    case.target = data.draw(st.sampled_from((case.target, None)))
    assert_right(backend, case)


@needs_binary
def test_exp_is_good_to_two_units():
    """Over the whole range, and at its ends."""
    _emu = pytest.importorskip("_emu", reason="the emulation module is not built")
    x = torch.cat([-torch.logspace(-8, 1.94, 200_000), -torch.linspace(0, 87.2, 200_000)])
    exact = x.double().exp()
    ours = torch.from_numpy(_emu.exp_down(x.numpy())).double()
    unit = 2.0 ** (exact.log2().floor() - 23)
    assert ((ours - exact).abs() / unit).max() <= 2
    ends = torch.from_numpy(_emu.exp_down(torch.tensor([0.0, -0.0, -88, -1e38, -INF, NAN]).numpy()))
    assert ends[:-1].tolist() == [1, 1, 0, 0, 0, 0][:5] and ends[-1].isnan()


@needs_binary
def test_gradcheck():
    """The backward pass against finite differences, with and without each operand."""
    case = make_case(torch.float64, 4, 9)

    def losses(logits, target, base):
        return tuple(x for x in op.token_losses(logits, target, base)[:2] if x.numel())

    logits = case.logits.requires_grad_()
    for target, base in ((case.target, case.base), (case.target, None), (None, case.base)):
        torch.autograd.gradcheck(lambda x, t=target, b=base: losses(x, t, b), (logits,))


@needs_binary
def test_only_one_loss_and_no_second_derivative():
    case = make_case(torch.float32, 4, 50)
    logits = case.logits.requires_grad_()
    both = op.token_losses(*case.operands())
    (grad,) = torch.autograd.grad(both.nll.sum(), logits)
    alone = op.token_losses(logits, case.target)
    assert torch.equal(grad, torch.autograd.grad(alone.nll.sum(), logits)[0])
    again = op.token_losses(logits, case.target)
    (first,) = torch.autograd.grad(again.nll.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@needs_binary
@pytest.mark.parametrize("k", [1, 2, 30])
def test_threads_do_not_change_a_bit(k):
    case = make_case(torch.bfloat16, k, 40_000)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("cpu", case))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, first in zip(vars(result).values(), vars(results[0]).values(), strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@blocks
def test_emulated_schedules_are_bit_equal(block, dtype):
    pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")
    case = make_case(dtype, 3, 1111)
    plain = emulate(case, block=block)
    for order, seed in (("reversed", 0), ("random", 0), ("random", 1)):
        other = emulate(case, block=block, order=order, seed=seed)
        for ours, first in zip(vars(other).values(), vars(plain).values(), strict=True):
            assert torch.equal(ours, first), f"{order} {seed}"
    assert_right("emu", case, block=block)


@pytest.mark.parametrize("block", [32, 256])
def test_emulated_block_sizes(block):
    pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")
    assert_right("emu", make_case(torch.bfloat16, 3, 1111), block=block)


@needs_binary
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "no target", "no base", "no rows"])
def test_opcheck(name, dtype):
    case = samples(dtype)[name]
    operands = (case.logits.requires_grad_(), case.target, case.base)
    torch.library.opcheck(torch.ops.pymend.token_losses.default, operands)
    with torch.no_grad():
        stats = torch.ops.pymend.token_losses.default(*operands)[4]
        grads = (
            None if case.target is None else case.grad_nll,
            None if case.base is None else case.grad_kl,
        )
        torch.library.opcheck(
            torch.ops.pymend.token_losses_backward.default,
            (*grads, case.logits.detach(), *operands[1:], stats),
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_binary
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_whole(dtype):
    case = make_case(dtype, 5, 60)

    def total(logits):
        losses = op.token_losses(logits, case.target, case.base)
        return losses.nll.sum() + losses.kl.sum(), losses.best

    logits = case.logits.requires_grad_()
    loss, best = torch.compile(total, fullgraph=True, backend="aot_eager")(logits)
    plain, plain_best = total(logits)
    assert torch.equal(loss, plain) and torch.equal(best, plain_best)
    assert torch.equal(*(torch.autograd.grad(x, logits)[0] for x in (loss, plain)))


def test_autocast_and_inference_mode_change_nothing():
    case = make_case(torch.float32, 4, 60)
    plain = run("cpu", case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run("cpu", case)
    with torch.inference_mode():
        inference = op.token_losses(*case.operands())
    for name in ("nll", "kl", "best", "base_best"):
        assert torch.equal(getattr(cast, name), getattr(plain, name))
        assert torch.equal(getattr(inference, name), getattr(plain, name))
    assert torch.equal(cast.grad, plain.grad)


@needs_binary
def test_gate(monkeypatch):
    case = make_case(torch.float32, 4, 60)
    calls = []
    monkeypatch.setattr(op, "eager", lambda *a: calls.append(a))
    op.token_losses(*case.operands())
    assert not calls
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    op.token_losses(*case.operands())
    assert len(calls) == 1


PLAIN = make_case(torch.float32, 3, 8)
REFUSED = {
    "logits dtype": ((PLAIN.logits.long(), None, None), TypeError,
                     r"logits has dtype torch.int64, expected one of float64"),
    "logits shape": ((PLAIN.logits[0], None, None), ValueError,
                     r"logits has shape \[8\], expected \[k, V\]"),
    "no vocabulary": ((PLAIN.logits[:, :0], None, None), ValueError,
                      r"logits has shape \[3, 0\], expected \[k, V\] with V above 0"),
    "target dtype": ((PLAIN.logits, PLAIN.target.int(), None), TypeError,
                     r"target has dtype torch.int32, expected int64"),
    "target shape": ((PLAIN.logits, PLAIN.target[:2], None), ValueError,
                     r"target has shape \[2\], expected \[3\] for logits \[3, 8\]"),
    "target too large": ((PLAIN.logits, torch.tensor([1, 8, 2]), None), ValueError,
                         r"target\[1\] is 8, expected 0 to 7, or -100"),
    "target negative": ((PLAIN.logits, torch.tensor([1, 2, -1]), None), ValueError,
                        r"target\[2\] is -1, expected 0 to 7, or -100"),
    "base dtype": ((PLAIN.logits, None, PLAIN.base.bfloat16()), TypeError,
                   r"base has dtype torch.bfloat16, logits has torch.float32"),
    "base shape": ((PLAIN.logits, None, PLAIN.base[:, :7]), ValueError,
                   r"base has shape \[3, 7\], expected \[3, 8\] for logits \[3, 8\]"),
    "base device": ((PLAIN.logits, None, PLAIN.base.to("meta")), ValueError,
                    r"base is on meta, logits is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    operands, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        op.token_losses(*operands)


STATS = torch.zeros(3, 4)
NATIVE_REFUSED = {
    "dtype": ((PLAIN.logits.long(), None, None), r"logits has dtype Long, expected Double, Float"),
    "shape": ((PLAIN.logits[0], None, None), r"logits has shape \[8\], expected \[k, V\]"),
    "strides": ((with_strides(PLAIN.logits), None, None), r"logits has rows that are not contig"),
    "base": ((PLAIN.logits, None, PLAIN.base[:2]), r"base has shape \[2, 8\], expected \[3, 8\]"),
    "base dtype": ((PLAIN.logits, None, PLAIN.base.half()), r"base has dtype Half, expected Float"),
    "target": ((PLAIN.logits, PLAIN.target[:1], None), r"target has shape \[1\], expected \[3\]"),
    "target value": ((PLAIN.logits, torch.tensor([0, 0, 8]), None), r"target\[2\] is 8, expected"),
    "gradient without target": (
        (torch.ones(3), None, PLAIN.logits, None, PLAIN.base, STATS),
        "grad_nll is given without a target"),
    "gradient without base": (
        (None, torch.ones(3), PLAIN.logits, PLAIN.target, None, STATS),
        "grad_kl is given without a base"),
    "gradient dtype": (
        (torch.ones(3).double(), None, PLAIN.logits, PLAIN.target, None, STATS),
        "grad_nll has dtype Double, expected Float"),
    "stats": (
        (torch.ones(3), None, PLAIN.logits, PLAIN.target, None, STATS[:2]),
        r"stats has shape \[2, 4\], expected \[3, 4\]"),
}  # fmt: skip


@needs_binary
@pytest.mark.parametrize("name", NATIVE_REFUSED)
def test_native_checks_stand_alone(name):
    """The ops themselves refuse too: they can be called without the wrapper."""
    operands, message = NATIVE_REFUSED[name]
    ops = torch.ops.pymend
    native = ops.token_losses if len(operands) == 3 else ops.token_losses_backward
    with pytest.raises(RuntimeError, match=message):
        native.default(*operands)
