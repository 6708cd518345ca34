"""(u, delta) per token: what is kept, in which order and precision, and that no trace is left."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import FAMILY, assert_close, exact_norms, gpt2, reference_batch, tiny_mend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pymend import reference as ref
from pymend.engine.capture import capture
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Row
from pymend.errors import NonFiniteError
from pymend.models.structure import EditedWeight, find_weights

f64 = torch.float64
ROWS = [Row((5, 9, 30, 7, 11), 2), Row((8, 6, 12), 1), Row((40, 41, 42, 43, 44, 45), 3)]


def captured(model: Any, rows: list[Row], episodes: int, **config: Any) -> dict[str, Any]:
    mend = tiny_mend(model, **config)
    with frozen(model):
        replay = Replay(model, mend.weights)
        replay.load(rows)
        return mend.capture(replay, rows, episodes)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("official", [False, True])
def test_equals_the_reference_and_the_dense_gradient(family: str, official: bool) -> None:
    model = FAMILY[family](dtype=f64)
    factors = captured(model, ROWS, 1, official=official)
    batch = reference_batch(ROWS)
    expected = ref.capture(model, list(factors), batch, official)
    model.requires_grad_(True)
    ref.edit_loss(ref.logits_of(model, batch), batch["labels"], official).backward()
    for name, f in factors.items():
        assert_close(f.u, expected[name][0], f"u {name}", 1e-9)
        assert_close(f.delta, expected[name][1], f"delta {name}", 1e-9)
        dense = f.delta.T @ f.u
        dense = dense.T if ref.is_transposed(model, name) else dense
        assert_close(dense, model.get_parameter(name).grad, f"gradient {name}", 1e-9)


@pytest.mark.parametrize("family", FAMILY)
def test_independent_rows_equal_single_ones(family: str) -> None:
    model = FAMILY[family](dtype=f64)
    together = captured(model, ROWS, len(ROWS))
    for i, row in enumerate(ROWS):
        alone = captured(model, [row], 1)
        for name, f in together.items():
            u, delta = (x.split(f.counts)[i] for x in (f.u, f.delta))
            assert_close(u, alone[name].u, name, 1e-9)
            assert_close(delta, alone[name].delta, name, 1e-9)


def test_which_rows_are_kept() -> None:
    """Below the last block all tokens up to the last label position; there, label positions."""
    factors = captured(gpt2(), ROWS, len(ROWS))
    for name, f in factors.items():
        if name.startswith("transformer.h.3"):
            assert f.counts == tuple(len(r.positions()) for r in ROWS), name
        else:
            assert f.counts == tuple(len(r.ids) - 1 for r in ROWS), name
        assert sum(f.counts) == len(f.u) == len(f.delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_models_give_float32_factors(dtype: torch.dtype) -> None:
    model = gpt2(dtype=dtype)
    truth = captured(gpt2(dtype=dtype).double(), ROWS, len(ROWS))
    for name, f in captured(model, ROWS, len(ROWS)).items():
        assert f.u.dtype == f.delta.dtype == torch.float32
        assert f.counts == truth[name].counts, name
        assert_close(f.delta, truth[name].delta, name, 0.1)


def test_small_float16_gradients_do_not_underflow() -> None:
    model = gpt2(dtype=torch.float16)
    weights = find_weights(model, ["transformer.h.3.mlp.c_fc.weight"])
    rows = {}
    for factor in (1.0, 2.0**-12):
        with frozen(model), capture(model, weights) as tape:
            # Summed in float32, as a loss is; what flows back from it is float16.
            logits = model(input_ids=torch.tensor([ROWS[0].ids])).logits
            loss = logits.float()[0, 2].log_softmax(-1)[7] * factor
            rows[factor] = tape.backward(loss, 1)[weights[0].name]
    assert rows[1.0].counts == rows[2.0**-12].counts
    assert_close(rows[2.0**-12].delta * 2.0**12, rows[1.0].delta, "delta", 0.02)


class Twice(nn.Module):
    """Calls one layer twice, the second time by keyword, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.up = nn.Linear(5, 7)
        self.down = Conv1D(5, 7)
        self.unused = nn.Linear(5, 7)

    def forward(self, ids: Tensor) -> Any:
        h = self.embed(ids)
        h = h + self.down(torch.tanh(self.up(h)))
        return SimpleNamespace(logits=h + self.down(torch.tanh(self.up(input=h))))


def linear(name: str, a: int, b: int, transposed: bool = False) -> EditedWeight:
    return EditedWeight(f"{name}.weight", name, a, b, transposed, 0)


def test_a_module_called_twice_gives_the_rows_of_both_calls() -> None:
    model = Twice().double()
    weights = [linear("up", 5, 7), linear("down", 7, 5, transposed=True)]
    ids = torch.tensor([[1, 2, 3]])
    with frozen(model), capture(model, weights) as tape:
        factors = tape.backward(model(ids).logits[0, -1].square().sum(), 1)
    model(ids).logits[0, -1].square().sum().backward()
    for w in weights:
        f = factors[w.name]
        assert f.counts == (2,)
        dense = f.u.T @ f.delta if w.transposed else f.delta.T @ f.u
        assert_close(dense, model.get_parameter(w.name).grad, w.name, 1e-12)


def test_blocks_that_share_a_matrix_give_the_rows_of_both() -> None:
    """Episode by episode, and within one call by call."""
    model = gpt2(dtype=f64)
    model.transformer.h[3].mlp = model.transformer.h[2].mlp
    weights = find_weights(model, ["transformer.h.2.mlp.c_fc.weight"])
    name, rows = weights[0].name, ROWS[:2]
    batch = reference_batch(rows)

    def losses() -> Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.stack([ref.edit_loss(logits[i : i + 1], batch["labels"][i : i + 1], False)
                            for i in range(2)])  # fmt: skip

    with frozen(model), capture(model, weights) as tape:
        f = tape.backward(losses().sum(), 2)[name]
    model.requires_grad_(True)
    for i, (u, delta) in enumerate(zip(f.u.split(f.counts), f.delta.split(f.counts), strict=True)):
        (dense,) = torch.autograd.grad(losses()[i], model.get_parameter(name))
        assert_close(u.T @ delta, dense, f"gradient of row {i}", 1e-9)
    # In the lower block all tokens, in the last one those of the labels.
    assert f.counts == tuple(len(r.ids) - 1 + len(r.positions()) for r in rows)


def test_a_module_that_is_never_called_is_named() -> None:
    model = Twice()
    with (
        pytest.raises(ValueError, match=r"unused\.weight has no part in this text"),
        frozen(model),
        capture(model, [linear("up", 5, 7), linear("unused", 5, 7)]) as tape,
    ):
        tape.backward(model(torch.tensor([[1]])).logits.sum(), 1)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_missing_weight_is_named_before_any_hook_is_set() -> None:
    model = Twice()
    for odd in (linear("nowhere", 5, 7), linear("up", 7, 5), linear("down", 7, 5)):
        with (
            pytest.raises(ValueError, match="made for another model"),
            capture(model, [linear("up", 5, 7), odd]),
        ):
            pytest.fail("the block must not run")
        assert not any(m._forward_hooks for m in model.modules())


def test_no_model_gradient_and_nothing_below_the_lowest_weight() -> None:
    model = gpt2()
    seen = []
    model.transformer.h[0].register_full_backward_hook(lambda *_: seen.append("block 0"))
    captured(model, ROWS, 3)
    assert not seen
    assert all(p.grad is None for p in model.parameters())


def test_rows_that_are_not_finite_are_refused_by_name() -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[9] = float("inf")  # the second token of the first row
    with pytest.raises(
        NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight are not finite"
    ):
        captured(model, ROWS, 3)


def test_exact_norms_change_nothing_but_precision() -> None:
    """The float64 Llama of these tests is transformers' own, up to its rounding to float32."""
    model = FAMILY["llama"]()
    ids = torch.tensor([ROWS[0].ids])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        assert_close(exact_norms(model)(input_ids=ids).logits, plain, "logits", 1e-5)
