"""moments on its back ends against pymend.reference in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import blocks, dtypes, factors, seeds, sizes, with_strides
from tolerances import assert_accurate, largest
from torch import Tensor

from pymend import _lib, reference
from pymend.ops import moments as op

BACKENDS = ("eager", "cpu", "emu", "cuda")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")


@dataclass
class Case:
    u: list[Tensor]
    delta: list[Tensor]
    counts: list[int]
    mean: Tensor
    m2: Tensor
    count: Tensor
    merge: bool = True
    dtype: torch.dtype | None = None

    def arguments(self):
        return tuple(vars(self).values())

    def on(self, device: str) -> Case:
        """A copy whose tensors lie on ``device``."""
        lists = ([t.to(device, copy=True) for t in ts] for ts in (self.u, self.delta))
        state = (t.to(device, copy=True) for t in (self.mean, self.m2, self.count))
        return Case(*lists, self.counts, *state, self.merge, self.dtype)


Result = tuple[Tensor, Tensor, Tensor, Tensor]  # z, mean, m2, count


def fresh(d: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(d).double(), torch.zeros(d).double(), torch.zeros((), dtype=torch.int64)


def make_case(dtype, a, b, counts, weights=1, seed=0, seen=0, merge=True, shift=0.0) -> Case:
    """Rows of ``weights`` weights; ``seen``: rows that the moments claim to have seen."""
    g = torch.Generator().manual_seed(seed)
    rows = [sum(counts[i::weights]) for i in range(weights)]
    u = [(torch.randn(n, a, generator=g) + shift).to(dtype) for n in rows]
    delta = [(1e-3 * torch.randn(n, b, generator=g)).to(dtype) for n in rows]
    state = fresh(a + b)
    if seen:
        state = (
            torch.randn(a + b, generator=g).double(),
            torch.rand(a + b, generator=g).double() * seen,
            torch.tensor(seen),
        )
    return Case(u, delta, counts, *state, merge)


def with_dead_rows(case: Case) -> Case:
    """A whole segment without u, single rows without delta or u, and NaN opposite a zero row."""
    case.u[0][: case.counts[0]] = 0
    case.delta[-1][-1] = 0
    case.u[-1][-1, 0] = math.nan
    case.u[1][1] = 0
    for part, place in ((case.u[0], 31), (case.delta[0], -1)):  # one element: a live row
        part[-1] = 0
        part[-1, place] = 1
    return case


def samples(dtype) -> dict[str, Case]:
    strided = make_case(dtype, 33, 40, [5, 2, 0, 3], 2)
    strided.u = [with_strides(t) for t in strided.u]
    strided.delta = [t.t().contiguous().t() for t in strided.delta]
    return {
        "one": make_case(dtype, 48, 80, [20]),
        "weights and episodes": make_case(dtype, 65, 70, [3, 1, 4, 0, 5, 2], 3),
        "dead rows": with_dead_rows(make_case(dtype, 65, 33, [2, 3, 4, 5], 2)),
        "all dead": make_case(dtype, 5, 0, [2, 3]),
        "narrow": make_case(dtype, 1, 1, [4, 1, 6]),
        "nothing": make_case(dtype, 7, 5, [0, 0], 2),
        "no episode": make_case(dtype, 7, 5, [], 2),
        "one row": make_case(dtype, 7, 5, [1]),
        "goes on": make_case(dtype, 130, 31, [6, 7, 1, 4], 2, seen=100),
        "large mean": make_case(dtype, 20, 9, [9, 30], shift=3e4),
        "only normalised": with_dead_rows(
            make_case(dtype, 65, 70, [3, 1, 4, 2], 2, seen=9, merge=False)
        ),
        "strides": strided,
        "many": make_case(dtype, 3, 4, [1 + i % 3 for i in range(130)], 2),
    }


def run(backend: str, case: Case, **emulation) -> Result:
    """z and the moments after it; the case itself is left alone."""
    case = case.on("cpu" if backend in ("reference", "eager", "emu") else backend)
    if backend == "reference":
        z, *state = expected(case)
        return z.to(dtype_of(case)), *state
    if backend == "eager":
        z, _ = op.eager(*case.arguments()[:-1], dtype_of(case))
    elif backend == "emu":
        z = emulate(case, **emulation)
    else:
        z, _ = op.moments(*case.arguments())
    return tuple(t.cpu() for t in (z, case.mean, case.m2, case.count))


def dtype_of(case: Case) -> torch.dtype:
    return case.dtype or case.u[0].dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def emulate(case: Case, **options) -> Tensor:
    """The CUDA kernels' own source on fibers; z is rounded to 16 bits afterwards."""
    import _emu

    rows, out = wide(case.u[0].dtype), wide(dtype_of(case))
    u, delta = ([t.to(rows).contiguous() for t in ts] for ts in (case.u, case.delta))
    a, b, weights = u[0].shape[1], delta[0].shape[1], len(u)
    segments, at = [], [0] * weights
    for s, n in enumerate(case.counts):
        i = s % weights
        segments.append((u[i][at[i] :].data_ptr(), delta[i][at[i] :].data_ptr(), n))
        at[i] += n
    z = torch.full((sum(case.counts), a + b), math.nan, dtype=out)
    state = (t.data_ptr() for t in (case.mean, case.m2, case.count, z))
    names = (str(dtype).removeprefix("torch.") for dtype in (rows, out))
    _emu.moments(*names, segments, a, b, *state, case.merge, **options)
    return z.to(dtype_of(case))


def expected(case: Case) -> Result:
    """The oracle, a segment at a time, on live rows in float64."""
    a, b, weights = case.u[0].shape[1], case.delta[0].shape[1], len(case.u)
    oracle = reference.Moments(a, b)
    oracle.k = case.count.clone()
    oracle.u_mean, oracle.delta_mean = case.mean.split([a, b])
    oracle.u_s, oracle.delta_s = case.m2.split([a, b])
    z, at = [], [0] * weights
    for s, n in enumerate(case.counts):
        rows = slice(at[s % weights], at[s % weights] + n)
        u, delta = case.u[s % weights][rows].double(), case.delta[s % weights][rows].double()
        at[s % weights] += n
        live = (u != 0).any(1) & (delta != 0).any(1)
        if case.merge:
            oracle.update(u[live], delta[live])
        z.append(torch.zeros(n, a + b).double())
        z[-1][live] = torch.cat(oracle.normalise(u[live], delta[live]), 1)
    mean = torch.cat([oracle.u_mean, oracle.delta_mean])
    m2 = torch.cat([oracle.u_s, oracle.delta_s])
    return torch.cat([torch.zeros(0, a + b).double(), *z]), mean, m2, oracle.k


def assert_right(backend: str, case: Case, **emulation) -> None:
    ours, eager, exact = run(backend, case, **emulation), run("eager", case), expected(case)
    assert torch.equal(ours[3], exact[3]), "count"
    length = sum(case.counts) + 1
    _, mean, m2, count = exact
    spread = (m2 / (count - 1).clamp(min=1)).sqrt()
    # Where a mean is large beside the spread, x less the mean has lost so many digits.
    lost = (mean.abs() / spread)[m2 > 0].amax().item() if m2.any() else 0.0
    for actual, theirs, truth in zip(ours[:3], eager[:3], exact[:3], strict=True):
        assert_accurate(actual, theirs, truth, length, size=lost * largest(truth))
    dead = (exact[0] == 0).all(1)
    assert not ours[0][dead].any(), "a dead row is zero throughout"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", samples(torch.float32))
def test_forward(backend, name, dtype):
    assert_right(backend, samples(dtype)[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", samples(torch.float32))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("kernels", ["all", "off"])
def test_which_rows_are_live(kernels, device, name, dtype, monkeypatch):
    """Those whose u and delta both hold something else than zero, in the order of z."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("PYMEND_KERNELS", kernels)
    case = samples(dtype)[name].on(device)
    z, live = op.moments(*case.arguments())
    x = op.joined(case.u, case.delta, case.counts)
    a = case.u[0].shape[1]
    assert live.dtype == torch.bool and live.shape == (len(z),)
    assert torch.equal(live, (x[:, :a] != 0).any(1) & (x[:, a:] != 0).any(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [torch.float64, torch.float32], ids=str)
def test_dtype_of_the_result(backend, rows, dtype):
    case = replace(samples(rows)["dead rows"], dtype=dtype)
    assert run(backend, case)[0].dtype == dtype
    assert_right(backend, case)


def test_by_hand(backend_or_reference):
    """u = 1, 3 then 5; delta = 2 throughout, a constant."""
    u, delta = [torch.tensor([[1.0], [3.0], [5.0]])], [torch.full((3, 1), 2.0)]
    z, mean, m2, count = run(backend_or_reference, Case(u, delta, [2, 1], *fresh(2)))
    first, second = 1 / (math.sqrt(2) + 1e-7), 2 / (2 + 1e-7)
    torch.testing.assert_close(z, torch.tensor([[-first, 0.0], [first, 0.0], [second, 0.0]]))
    assert mean.tolist() == [3.0, 2.0] and m2.tolist() == [8.0, 0.0] and count == 3


def test_a_constant_dimension_gives_zero(backend_or_reference):
    """A spread of 1e-7 of the mean is constant, one of 1e-4 is not; nor is one around zero."""
    u = [torch.tensor([[1e4, 1e4, -1e-9], [1e4 + 2e-3, 1e4 + 2, 1e-9]]).double()]
    z = run(backend_or_reference, Case(u, [torch.ones(2, 1).double()], [2], *fresh(4)))[0]
    assert z[:, 0].tolist() == [0, 0] and z[:, 3].tolist() == [0, 0]
    assert z[:, 1:3].abs().min() > 0


def test_without_merge_nothing_is_written(backend):
    case = samples(torch.float32)["only normalised"]
    _, *state = run(backend, case)
    for after, before in zip(state, (case.mean, case.m2, case.count), strict=True):
        assert torch.equal(after, before)


def test_later_rows_do_not_reach_back(backend):
    case = make_case(torch.float32, 40, 30, [4, 4, 3, 6], 2)
    head = Case([t[:4] for t in case.u], [t[:4] for t in case.delta], [4, 4], *fresh(70))
    assert torch.equal(run(backend, case)[0][:8], run(backend, head)[0])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(backend, data):
    dtype, a, b = data.draw(dtypes), data.draw(sizes), data.draw(sizes)
    weights, episodes = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    counts = [data.draw(st.sampled_from((0, 1, 2, 9, 33))) for _ in range(weights * episodes)]
    rows = [sum(counts[i::weights]) for i in range(weights)]
    case = make_case(
        torch.float32,
        a,
        b,
        counts,
        weights,
        data.draw(seeds),
        seen=data.draw(st.sampled_from((0, 1, 1000))),
        merge=data.draw(st.booleans()),
    )
    case.u = [data.draw(factors(n, a)).to(dtype) for n in rows]
    case.delta = [data.draw(factors(n, b)).to(dtype) for n in rows]
    case.dtype = wide(dtype)
    assert_right(backend, case)


def test_mixed_dtypes_give_what_the_widest_gives():
    case = make_case(torch.float16, 9, 12, [3, 4, 2, 2], 2)
    mixed = case.on("cpu")
    mixed.u[1], mixed.delta[0] = mixed.u[1].double(), mixed.delta[0].float()
    wide_case = replace(
        case, u=[t.double() for t in case.u], delta=[t.double() for t in case.delta]
    )
    for x, y in zip(run("cpu", mixed), run("cpu", wide_case), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize(
    ("rows", "dtype", "tiny"),
    [(torch.float32, torch.float16, 1e-30), (torch.float64, torch.float32, 1e-60)],
    ids=str,
)
def test_rows_are_not_narrowed_before_the_mask(backend, rows, dtype, tiny):
    """A row that is zero only in the dtype of the result is live."""
    case = Case([torch.full((2, 3), tiny, dtype=rows)], [torch.ones(2, 3).to(rows)], [2], *fresh(6))
    assert run(backend, replace(case, dtype=dtype))[3] == 2


def test_threads_do_not_change_a_bit():
    case = make_case(torch.float32, 200, 300, [7, 40, 3, 5], 2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run("cpu", case))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("block", [32, 256])
def test_emulated_block_sizes_are_bit_equal(block):
    pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")
    case = samples(torch.float32)["dead rows"]
    pairs = zip(run("emu", case, block=block), run("emu", case, block=64), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@blocks
def test_emulated_schedules_and_splits_are_bit_equal(block):
    """Any order of threads and blocks, any number of segments in a launch: the same bits."""
    pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")
    for name in ("weights and episodes", "dead rows", "only normalised"):
        case = samples(torch.float32)[name]
        plain = run("emu", case)
        options = [{"order": "reversed"}] + [{"order": "random", "seed": s} for s in range(3)]
        options += [{"segments_per_launch": n} for n in (1, 2, 3)]
        for option in options:
            other = run("emu", case, block=block, **option)
            assert all(torch.equal(x, y) for x, y in zip(other, plain, strict=True)), option


@needs_binary
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["one", "dead rows", "no episode", "only normalised"])
def test_opcheck(name, dtype):
    case = replace(samples(dtype)[name], dtype=torch.float32)
    torch.library.opcheck(torch.ops.pymend.moments.default, case.arguments())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dead rows", "only normalised"])
def test_compiles_whole(name, dtype):
    case = samples(dtype)[name]
    plain = run("cpu", case)
    compiled = torch.compile(op.moments, fullgraph=True, backend="aot_eager")
    z, _ = compiled(*case.arguments())
    for x, y in zip((z, case.mean, case.m2, case.count), plain, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_autocast_and_inference_mode_change_nothing(backend):
    case = make_case(torch.float32, 20, 30, [3, 4])
    plain = run(backend, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(backend, case)
    with torch.inference_mode():
        inference = run(backend, case)
    for result in (cast, inference):
        assert all(torch.equal(x, y) for x, y in zip(result, plain, strict=True))


@pytest.mark.parametrize("merge", [True, False])
def test_backward_notices_the_write(merge):
    """A tensor saved for backward and then updated must not give silent wrong gradients."""
    case = make_case(torch.float32, 2, 3, [4], seen=9, merge=merge)
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    y = (x * case.mean).sum()
    op.moments(*case.arguments())
    if merge:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    else:
        y.backward()


def test_gate_and_missing_binary(monkeypatch):
    case = samples(torch.float32)["dead rows"]
    eager = run("eager", case)
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    off = run("cpu", case)
    assert all(torch.equal(x, y) for x, y in zip(off, eager, strict=True))
    monkeypatch.setenv("PYMEND_KERNELS", "default")
    monkeypatch.setattr(_lib, "_C", None)
    monkeypatch.setattr(_lib, "_warned", True)
    missing = run("cpu", case)
    assert all(torch.equal(x, y) for x, y in zip(missing, eager, strict=True))


def two() -> Case:
    return make_case(torch.float32, 4, 3, [2, 1, 3, 2], 2, seen=5)


def spoil(case: Case, **changes) -> Case:
    for name, value in changes.items():
        if isinstance(value, dict):
            for i, part in value.items():
                getattr(case, name)[i] = part
        else:
            setattr(case, name, value)
    return case


SHARED = torch.zeros(7).double()
REFUSED = {
    "no weight": (dict(u=[], delta=[]), ValueError, "u is empty"),
    "list lengths": (dict(delta=[torch.randn(5, 3)]), ValueError,
                     "delta has 1 entries for 2 in u"),
    "counts": (dict(counts=[2, 1, 3]), ValueError,
               "counts has 3 entries, not a multiple of 2 weights"),
    "negative": (dict(counts=[6, 1, -1, 2]), ValueError, r"counts\[2\] is -1"),
    "rows": (dict(counts=[2, 1, 3, 3]), ValueError,
             r"u\[1\] has shape \[3, 4\], expected \[4, 4\]: the sum of counts\[1::2\]"),
    "width": (dict(delta={1: torch.randn(3, 4)}), ValueError,
              r"delta\[1\] has shape \[3, 4\], expected \[3, 3\]"),
    "vector": (dict(u={0: torch.randn(5)}), ValueError, r"u\[0\] has shape \[5\]"),
    "number": (dict(u={0: torch.randn(())}), ValueError, r"u\[0\] has shape \[\]"),
    "row dtype": (dict(u={1: torch.ones(3, 4, dtype=torch.int64)}), TypeError,
                  r"u\[1\] has dtype torch.int64, expected float64 or float32 or"),
    "dtype": (dict(dtype=torch.int32), TypeError, "dtype is torch.int32, expected one of float64"),
    "device": (dict(delta={0: torch.empty(5, 3, device="meta")}), ValueError,
               r"delta\[0\] is on meta, mean is on cpu"),
    "mean shape": (dict(mean=torch.zeros(6).double()), ValueError,
                   r"mean has shape \[6\], expected \[7\]"),
    "m2 dtype": (dict(m2=torch.zeros(7)), TypeError,
                 "m2 has dtype torch.float32, expected float64"),
    "strides": (dict(mean=torch.zeros(14).double()[::2]), ValueError,
                r"mean has strides \(2,\), expected contiguous"),
    "count shape": (dict(count=torch.zeros(1, dtype=torch.int64)), ValueError,
                    r"count has shape \[1\], expected \[\]"),
    "count dtype": (dict(count=torch.zeros(())), TypeError, "count has dtype torch.float32"),
    "same": (dict(mean=SHARED, m2=SHARED), ValueError, "mean and m2 are the same tensor"),
    "requires grad": (dict(delta={1: torch.randn(3, 3, requires_grad=True)}), RuntimeError,
                      r"delta\[1\] requires grad, and moments is not differentiable"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name):
    changes, kind, message = REFUSED[name]
    case = spoil(two(), **copy.copy(changes))
    before = [t.clone() for t in (case.mean, case.m2, case.count)]
    with pytest.raises(kind, match=message):
        op.moments(*case.arguments())
    assert all(map(torch.equal, before, (case.mean, case.m2, case.count)))


def test_rows_with_grad_are_taken_under_no_grad():
    case = two()
    plain = run("cpu", case)
    case.u = [t.requires_grad_() for t in case.u]
    with torch.no_grad():
        z, _ = op.moments(*case.arguments())
    assert torch.equal(z, plain[0]) and not z.requires_grad


NATIVE_REFUSED = {
    "no weight": (dict(u=[], delta=[]), "u is empty"),
    "list": (dict(delta=[]), "delta has 0 entries for 2 in u"),
    "counts": (dict(counts=[2, 1, 3]), "counts has 3 entries, not a multiple of 2"),
    "negative": (dict(counts=[6, 1, -1, 2]), r"counts\[2\] is -1"),
    "rows": (dict(counts=[2, 1, 3, 3]), r"u\[1\] has shape \[3, 4\], expected \[4, 4\]"),
    "vector": (dict(u={0: torch.randn(5)}), r"u\[0\] and delta\[0\] have shapes \[5\] and"),
    "strides": (dict(u={0: with_strides(torch.randn(5, 4))}), r"u\[0\] is not contiguous"),
    "mixed": (dict(u={1: torch.randn(3, 4).double()}), r"u\[1\] has dtype Double, expected Float"),
    "half": (dict(u=[torch.randn(5, 4).half()] * 2), r"u\[0\] has dtype Half, expected Float or"),
    "z": (dict(dtype=torch.float16), "dtype is Half, expected Float or Double"),
    "mean": (dict(mean=torch.zeros(7)), "mean has dtype Float, expected Double"),
    "m2": (dict(m2=torch.zeros(6).double()), r"m2 has shape \[6\], expected \[7\]"),
    "count": (dict(count=torch.zeros(())), "count has dtype Float, expected Long"),
}  # fmt: skip


@needs_binary
@pytest.mark.parametrize("name", NATIVE_REFUSED)
def test_native_checks_stand_alone(name):
    """The op itself refuses too: it can be called without the wrapper."""
    changes, message = NATIVE_REFUSED[name]
    case = spoil(replace(two(), dtype=torch.float32), **copy.copy(changes))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pymend.moments.default(*case.arguments())
