"""Products through oneDNN against torch's own, and the rules by which one of them is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from strategies import with_strides
from tiny import llama
from tolerances import assert_accurate
from torch import nn
from transformers.pytorch_utils import Conv1D

from pymend.engine.hooks import frozen
from pymend.ops import products

needs_onednn = pytest.mark.skipif(products._onednn is None, reason="this torch has no oneDNN")


@pytest.fixture
def large():
    """A weight large enough for oneDNN, and its bias."""
    return torch.randn(768, 512) / 16, torch.randn(768)


@pytest.fixture
def calls(monkeypatch):
    """How many products went through oneDNN."""
    seen = []
    through = products._through_onednn

    def count(*args):
        seen.append(args)
        return through(*args)

    monkeypatch.setattr(products, "_through_onednn", count)
    return seen


@needs_onednn
@pytest.mark.parametrize("layout", ["plain", "strided rows", "transposed weight", "three dims"])
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 33])
def test_product(large, calls, rows, layout):
    w, x = large[0], torch.randn(rows, 512)
    if layout == "strided rows":
        x = with_strides(x)
    if layout == "transposed weight":
        w = w.t().contiguous().t()
    if layout == "three dims":
        x = x[:, None].expand(rows, 3, 512)
    got = products.product(x, w)
    assert len(calls) == 1 and got.shape == (*x.shape[:-1], 768)
    exact = x.double() @ w.double().t()
    assert_accurate(got, x @ w.t(), exact, length=512)


@needs_onednn
@pytest.mark.parametrize("with_bias", [True, False])
def test_frozen_linear(large, calls, with_bias):
    """Value and gradient in x; twice: forward and backward both go through oneDNN."""
    w, b = large[0], large[1] if with_bias else None
    x = torch.randn(2, 7, 512, requires_grad=True)
    y = products.frozen_linear(x, w, b)
    torch.testing.assert_close(y, F.linear(x, w, b))
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(got, g @ w)
    assert len(calls) == 2
    with torch.no_grad():
        assert not products.frozen_linear(x, w, b).requires_grad


@needs_onednn
def test_the_usual_way_where_it_must_be(large, calls, monkeypatch):
    """Other dtypes, small or trained weights, reduced precision, autocast and the gate."""
    w, b = large
    x = torch.randn(4, 512)
    products.frozen_linear(x.double(), w.double(), b.double())
    products.frozen_linear(x, w[:100], b[:100])
    trained = w.clone().requires_grad_()
    products.frozen_linear(x, trained, b).sum().backward()
    assert trained.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert products.frozen_linear(x, w, b).dtype == torch.bfloat16
    precision = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        products.product(x, w)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    products.product(x, w)
    assert not calls


@needs_onednn
def test_spare_rows(large, monkeypatch):
    """Only for the products that MKL gets."""
    w, rows = large[0], [torch.randn(k, 512) for k in range(6)]
    assert not any(products.spare_rows(x, w) for x in rows)
    assert not any(products.spare_rows(x.bfloat16(), w.bfloat16()) for x in rows)
    assert [products.spare_rows(x.double(), w.double()) for x in rows] == [0, 0, 2, 1, 0, 0]
    monkeypatch.setenv("PYMEND_KERNELS", "off")
    assert [products.spare_rows(x, w) for x in rows] == [0, 0, 2, 1, 0, 0]


@needs_onednn
def test_inference_mode_and_threads_change_nothing(large, calls):
    """Where nothing may be saved, and for any number of threads twice the same bits."""
    (w, b), x = large, torch.randn(33, 512)
    want = products.frozen_linear(x, w, b)
    with torch.inference_mode():
        assert torch.equal(products.frozen_linear(x.clone(), w.clone(), b.clone()), want)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            twice = [products.frozen_linear(x, w, b) for _ in range(2)]
            assert torch.equal(*twice)
            torch.testing.assert_close(twice[0], want)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == 8


@needs_onednn
def test_compiles_whole(large):
    w, b = large
    x = torch.randn(5, 512, requires_grad=True)
    y = products.frozen_linear(x, w, b)
    compiled = torch.compile(products.frozen_linear, fullgraph=True, backend="aot_eager")(x, w, b)
    torch.testing.assert_close(compiled, y)
    (ours,), (theirs,) = (torch.autograd.grad(t.sum(), x) for t in (compiled, y))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("call", [products.product, products.frozen_linear])
def test_shapes_that_do_not_fit_are_refused(large, call):
    with pytest.raises(RuntimeError, match="4x511 and 512x768"):
        call(torch.randn(4, 511), large[0])


@needs_onednn
def test_frozen_models_use_it_and_are_put_back(calls):
    """Linear and Conv1D by type; subclasses and modules with a forward of their own are left."""

    class Odd(nn.Linear):
        pass

    conv = Conv1D(768, 512)
    own = nn.Linear(512, 512)
    own.forward = lambda x: x  # what a wrapper such as a device map does
    model = nn.Sequential(nn.Linear(512, 512), own, Odd(512, 512), conv)
    x = torch.randn(3, 512)
    with torch.no_grad():
        want = model(x)
    kept = own.forward
    with frozen(model):
        torch.testing.assert_close(model(x), want)
    assert len(calls) == 2
    assert "forward" not in vars(model[0]) and own.forward is kept and "forward" not in vars(conv)
    with pytest.raises(RuntimeError, match="middle"), frozen(model):
        raise RuntimeError("middle")
    assert "forward" not in vars(model[0])


def test_a_tiny_model_gives_the_same_bits():
    model = llama()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        with frozen(model):
            assert torch.equal(model(input_ids=ids).logits, want)
