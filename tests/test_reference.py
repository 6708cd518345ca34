"""``pymend/reference.py`` against hand-computed values, autograd, and recorded outputs.

The fixtures of the official implementation are looked for in ``$PYMEND_PARITY``, else in
``../shared/data/parity`` beside the repository; a test that needs one skips when it is absent.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.official_order import OfficialOrder
from pymend import reference as ref

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
PARITY = Path(os.environ.get("PYMEND_PARITY", ROOT.parent / "shared" / "data" / "parity"))

TRANSFORMS = ["default", "no_norm", "xavier", "separate", "one_sided", "x_only", "delta_only"]
VARIANT = ("combine", "one_sided", "x_only", "delta_only", "norm", "init")

f64 = torch.float64


def rel_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; absolute where expected is 0."""
    assert actual.shape == expected.shape, f"shape {actual.shape} for {expected.shape}"
    difference = (actual.double() - expected.double()).norm().item()
    scale = expected.double().norm().item()
    return difference / scale if scale else difference


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    error = rel_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=f64)


# ------------------------------------------------------------------------------- small models


class Conv1D(nn.Module):
    """A layer that stores W as [in, out], as GPT-2's does."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Toy(nn.Module):
    """A causal toy: embedding, running mean over time, Linear, tanh, Conv1D, head.

    ``down`` is called twice, so its rows come from two calls.
    """

    def __init__(self, width: int = 5, inner: int = 7, vocab: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.up = nn.Linear(width, inner)
        self.down = Conv1D(width, inner)
        self.unused = nn.Linear(width, inner)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Any:
        h = self.embed(input_ids) * attention_mask[..., None]
        h = h.cumsum(1) / torch.arange(1, h.shape[1] + 1)[:, None]
        h = h + self.down(torch.tanh(self.up(h)))
        h = h + self.down(torch.tanh(self.up(input=h)))
        return SimpleNamespace(logits=self.head(h))


NAMES = ["up.weight", "down.weight"]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().double().eval().requires_grad_(False)


def batch_of(
    lengths: list[int], answers: list[int], seed: int = 0, vocab: int = 11
) -> dict[str, Tensor]:
    """Right-padded rows whose last ``answers[i]`` tokens carry labels."""
    g = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(1, vocab, (len(lengths), longest), generator=g)
    at = torch.arange(longest)
    mask = at < torch.tensor(lengths)[:, None]
    asked = mask & (at >= torch.tensor(lengths)[:, None] - torch.tensor(answers)[:, None])
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~asked, ref.IGNORED),
    }


def row(batch: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Example ``i`` of a batch as a batch of its own, without padding."""
    length = int(batch["attention_mask"][i].sum())
    return {k: v[i : i + 1, :length] for k, v in batch.items()}


# ------------------------------------------------------------------------------------- losses


def test_nll_by_hand() -> None:
    # vocabulary of 2; position 0 has p = (1/4, 3/4), position 1 has p = (1/2, 1/2)
    logits = tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, -9.0]]])
    both = torch.tensor([[0, 1, 0]])  # asks for token 1 (p = 3/4) and then for token 0 (p = 1/2)
    assert ref.nll(logits, both).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)
    second = torch.tensor([[-100, -100, 0]])
    assert ref.nll(logits, second).item() == pytest.approx(math.log(2))


def test_nll_equals_cross_entropy() -> None:
    logits = torch.randn(3, 6, 11, dtype=f64)
    labels = batch_of([6, 5, 3], [3, 2, 1])["labels"]
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert_close(ref.nll(logits, labels), expected, "nll", 1e-14)


def test_edit_loss_sums_the_token_means_of_the_examples() -> None:
    logits = torch.randn(2, 6, 11, dtype=f64)
    labels = batch_of([6, 6], [4, 1])["labels"]
    single = [ref.nll(logits[i : i + 1], labels[i : i + 1]) for i in range(2)]
    assert_close(ref.edit_loss(logits, labels), single[0] + single[1], "sum", 1e-14)
    weighted = (4 * single[0] + single[1]) / 5  # one mean over 4 + 1 tokens
    assert_close(ref.edit_loss(logits, labels, official=True), weighted, "official", 1e-14)


def test_nll_refuses_an_example_without_labels() -> None:
    with pytest.raises(ValueError, match="example 1 of the batch has no label"):
        ref.nll(torch.randn(2, 3, 5), torch.tensor([[-100, 1, 2], [4, -100, -100]]))


def test_kl_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = (log 2 + log(2/3)) / 2 at the one counted position
    base = tensor([[[0.0, 0.0], [5.0, 0.0]]])
    edited = tensor([[[0.0, math.log(3)], [0.0, 5.0]]])
    expected = (math.log(2) + math.log(2 / 3)) / 2
    assert ref.kl(base, edited, torch.tensor([[1, 0]])).item() == pytest.approx(expected)


def test_kl_equals_torch() -> None:
    base, edited = torch.randn(2, 2, 5, 11, dtype=f64).unbind()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()
    p, q = base.log_softmax(-1)[mask], edited.log_softmax(-1)[mask]
    expected = F.kl_div(q, p, log_target=True, reduction="batchmean")
    assert_close(ref.kl(base, edited, mask), expected, "kl", 1e-14)
    assert ref.kl(base, base, mask) == 0


def test_kl_holds_the_base_constant() -> None:
    base, edited = (torch.randn(1, 2, 3, requires_grad=True) for _ in range(2))
    ref.kl(base, edited, torch.ones(1, 2)).backward()
    assert base.grad is None
    assert edited.grad is not None


def test_locality_mask() -> None:
    batch = batch_of([4, 3], [2, 0])
    # the answer of row 0 is at 2 and 3, so 1 and 2 predict it; row 1 asks for nothing
    assert ref.locality_mask(batch).int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert ref.locality_mask(batch, official=True).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    del batch["labels"]
    assert ref.locality_mask(batch).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_exact_match_needs_every_token() -> None:
    logits = F.one_hot(torch.tensor([[1, 2, 0], [1, 0, 0]]), 3).double()
    labels = torch.tensor([[0, 1, 2], [0, 1, 2]])  # row 0 right twice, row 1 once
    assert ref.exact_match(logits, labels) == 0.5
    labels[1, 2] = -100
    assert ref.exact_match(logits, labels) == 1


# ------------------------------------------------------------------------------------ capture


@pytest.mark.parametrize("official", [False, True])
def test_outer_products_sum_to_the_dense_gradient(toy: Toy, official: bool) -> None:
    batch = batch_of([6, 4], [2, 3])
    factors = ref.capture(toy, NAMES, batch)
    toy.requires_grad_(True)
    ref.edit_loss(ref.logits_of(toy, batch), batch["labels"]).backward()
    for name in NAMES:
        u, delta = factors[name]
        zero = torch.zeros_like(toy.get_parameter(name))
        dense = -ref.rank_update(zero, u, delta, 1.0, ref.is_transposed(toy, name))
        assert_close(dense, toy.get_parameter(name).grad, name, 1e-13)
    if official:
        last = ref.capture(toy, NAMES, batch, official=True)
        assert all(len(last[n][0]) < len(factors[n][0]) for n in NAMES), "only the last call"


def test_capture_of_a_batch_is_the_captures_of_its_examples(toy: Toy) -> None:
    batch = batch_of([6, 4], [2, 3])
    together = ref.capture(toy, NAMES, batch)
    alone = [ref.capture(toy, NAMES, row(batch, i)) for i in range(2)]
    for name in NAMES:
        zero = torch.zeros_like(toy.get_parameter(name))
        flip = ref.is_transposed(toy, name)
        summed = ref.rank_update(zero, *alone[0][name], 1.0, flip)
        summed = ref.rank_update(summed, *alone[1][name], 1.0, flip)
        assert_close(ref.rank_update(zero, *together[name], 1.0, flip), summed, name, 1e-13)


def test_capture_keeps_rows_up_to_the_last_label_only(toy: Toy) -> None:
    # position 5 predicts nothing; the embedding row of position 0 feeds every later position
    u, delta = ref.capture(toy, ["up.weight"], batch_of([6], [1]))["up.weight"]
    assert len(u) == len(delta) == 2, "one row per call: only position 4 predicts a label"


def test_kept_rows_drops_rows_where_either_side_is_zero() -> None:
    u = tensor([[[1, 0], [0, 0], [2, 2]]])
    delta = tensor([[[0, 3], [1, 1], [0, 0]]])
    kept = ref.kept_rows(u, delta)
    assert [x.tolist() for x in kept] == [[[1, 0]], [[0, 3]]]


def test_capture_leaves_no_trace_even_after_an_error(toy: Toy) -> None:
    before = {k: v.clone() for k, v in toy.state_dict().items()}
    bad = batch_of([4], [0])
    for call in (
        lambda: ref.capture(toy, NAMES, bad),  # no labels
        lambda: ref.capture(toy, ["unused.weight"], batch_of([4], [1])),
        lambda: ref.capture(toy, NAMES, batch_of([4], [1])),
    ):
        with contextlib.suppress(ValueError, RuntimeError):
            call()
        assert not any(p.requires_grad or p.grad is not None for p in toy.parameters())
        assert not any(m._forward_hooks for m in toy.modules())
    assert all(torch.equal(v, before[k]) for k, v in toy.state_dict().items())


def test_capture_says_what_is_wrong(toy: Toy) -> None:
    batch = batch_of([4], [1])
    with pytest.raises(RuntimeError, match=r"unused\.weight: its module takes no part"):
        ref.capture(toy, ["unused.weight"], batch)
    with pytest.raises(ValueError, match=r"embed\.weight: its module is Embedding"):
        ref.capture(toy, ["embed.weight"], batch)
    with pytest.raises(AttributeError):
        ref.capture(toy, ["nowhere.weight"], batch)


# ------------------------------------------------------------------------------------ moments


def test_welford_by_hand() -> None:
    # 1, 3, 8: means 1, 2, 4; s = 0, 0 + 2 * 1 = 2, 2 + 6 * 4 = 26; sigma = sqrt(26 / 2)
    moments = ref.Moments(1, 1)
    for x, mean, s in ((1, 1, 0), (3, 2, 2), (8, 4, 26)):
        moments.update(tensor([[x]]), tensor([[-x]]))
        assert (moments.u_mean.item(), moments.u_s.item()) == (mean, s)
        assert (moments.delta_mean.item(), moments.delta_s.item()) == (-mean, s)
    assert moments.k == 3
    assert moments.u_std.item() == pytest.approx(math.sqrt(13))
    u_bar, delta_bar = moments.normalise(tensor([[8]]), tensor([[-4]]))
    assert u_bar.item() == pytest.approx(4 / (math.sqrt(13) + 1e-7), rel=1e-14)
    assert delta_bar.item() == 0


def test_welford_equals_mean_and_std() -> None:
    u, delta = torch.randn(50, 4, dtype=f64) + 3, torch.randn(50, 6, dtype=f64) * 1e-4
    moments = ref.Moments(4, 6)
    for part in torch.arange(50).split([1, 0, 19, 30]):
        moments.update(u[part], delta[part])
    assert moments.k == 50
    assert_close(moments.u_mean, u.mean(0), "u mean", 1e-13)
    assert_close(moments.u_std, u.std(0), "u std", 1e-13)
    assert_close(moments.delta_mean, delta.mean(0), "delta mean", 1e-13)
    assert_close(moments.delta_std, delta.std(0), "delta std", 1e-13)


def test_a_constant_dimension_normalises_to_zero() -> None:
    u = tensor([[5.0, 1e4], [5.0, 1e4 + 1e-4]])  # never moves; moves by 1e-8 of its mean
    moments, official = ref.Moments(2, 1), ref.Moments(2, 1, official=True, dtype=f64)
    for m in (moments, official):
        m.update(u, tensor([[1.0], [2.0]]))
    assert moments.normalise(u + 1, tensor([[1.0]]))[0].abs().max() == 0
    # the official code divides by 0 + 1e-7
    assert official.normalise(u + 1, tensor([[1.0]]))[0][0, 0].item() == pytest.approx(1e7)


def test_one_row_normalises_to_zero() -> None:
    for official in (False, True):
        moments = ref.Moments(2, 2, official=official)
        x = torch.tensor([[1.0, -2.0]])
        moments.update(x, x)
        assert all(y.abs().max() == 0 for y in moments.normalise(x, x))


def test_official_moments_are_float32_and_their_count_saturates() -> None:
    moments = ref.Moments(1, 1, official=True)
    assert moments.u_mean.dtype == torch.float32
    moments.k = torch.tensor(2.0**24)
    moments.update(torch.ones(1, 1), torch.ones(1, 1))
    assert moments.k == 2**24


# ------------------------------------------------------------------------- the editor network


def test_transform_by_hand() -> None:
    # D = 2, r = 1. V x = 1*1 + 2*3 = 7; U V x + b = (7, -7) + (1, 0) = (8, -7);
    # scale (1/2, 1), shift (0, 2): p = (4, -5); y = (1 + 4, 3 + 0). Without the residual: (4, 0).
    layer = {
        "u": tensor([[1], [-1]]),
        "v": tensor([[1, 2]]),
        "bias": tensor([1, 0]),
        "mode_scale.weight": tensor([[9, 9], [0.5, 1]]),
        "mode_shift.weight": tensor([[9, 9], [0, 2]]),
    }
    z = tensor([[1, 3]])
    assert ref.transform(z, [layer], 1).tolist() == [[5, 3]]
    assert ref.transform(z, [layer], 1, residual=False).tolist() == [[4, 0]]
    assert ref.transform(z, [layer], None).tolist() == [[9, 3]]


def test_identity_start_is_the_identity_and_yet_trains() -> None:
    g = torch.Generator().manual_seed(0)
    params = ref.init_params(3, 4, 2, 2, generator=g, dtype=f64)
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    z = torch.randn(5, 7, dtype=f64)
    y = ref.transform(z, ref.layers_of(leaves, "mlp"), 1)
    assert torch.equal(y, z)
    y.sum().backward()
    # the derivative of max(p, 0) at p = 0 is 1, so bias and shift see all 5 rows ...
    assert torch.equal(leaves["mlp.layers.0.bias"].grad, torch.full((7,), 5.0, dtype=f64))
    expected = tensor([[0.0] * 7, [5.0] * 7])  # ... the shift in its own mode only
    assert torch.equal(leaves["mlp.layers.1.mode_shift.weight"].grad, expected)
    # ... and U moves, while V waits for it
    assert leaves["mlp.layers.0.u"].grad.abs().min() > 0
    assert leaves["mlp.layers.0.v"].grad.abs().max() == 0


@pytest.mark.parametrize(
    ("a", "b", "variant", "nets"),
    [
        (3, 4, {}, {"mlp": 7}),
        (3, 4, {"combine": False}, {"mlp1": 3, "mlp2": 4}),
        (3, 4, {"combine": False, "one_sided": True}, {"mlp1": 3}),
        (4, 4, {"combine": False, "one_sided": True}, {"mlp1": 4}),
        (4, 3, {"combine": False, "one_sided": True}, {"mlp2": 3}),
        (3, 4, {"combine": False, "x_only": True}, {"mlp1": 3}),
        (3, 4, {"combine": False, "delta_only": True}, {"mlp2": 4}),
    ],
)
def test_variants_pass_the_other_side_through_normalised(
    a: int, b: int, variant: dict[str, bool], nets: dict[str, int]
) -> None:
    assert ref.nets_of(a, b, **variant) == nets
    params = ref.init_params(a, b, 2, 1, init="xavier", dtype=f64, **variant)
    moments = ref.Moments(a, b)
    u, delta = torch.randn(6, a, dtype=f64), torch.randn(6, b, dtype=f64)
    moments.update(u, delta)
    out = ref.editor_forward(u, delta, params, moments, 0, init="xavier", **variant)
    for y, x, net in zip(out, moments.normalise(u, delta), ("mlp1", "mlp2"), strict=True):
        assert torch.equal(y, x) == (net not in nets and "mlp" not in nets)
    plain = ref.editor_forward(u, delta, params, None, 0, norm=False, init="xavier", **variant)
    assert plain[0].shape == u.shape


# --------------------------------------------------------------------------- edit and training


def test_rank_update_by_hand() -> None:
    # (1, 2)^T (3, 0) + (0, 1)^T (1, 1) = [[3, 0], [7, 1]], times 1/2, off the identity
    delta, u = tensor([[1, 2], [0, 1]]), tensor([[3, 0], [1, 1]])
    W = torch.eye(2, dtype=f64)
    assert ref.rank_update(W, u, delta, 0.5).tolist() == [[-0.5, 0], [-3.5, 0.5]]
    assert ref.rank_update(W, u, delta, 0.5, transposed=True).tolist() == [[-0.5, -3.5], [0, 0.5]]


def test_an_untrained_editor_adds_the_outer_products_of_the_normalised_rows(toy: Toy) -> None:
    params, alphas, moments = ref.init_editor(toy, NAMES, 4, alpha=0.01)
    factors = ref.capture(toy, NAMES, batch_of([6], [3]))
    _, edited = ref.edited_weights(toy, NAMES, params, alphas, moments, factors, train=True)
    for name in NAMES:
        u, delta = moments[ref.layer_shape(toy, name)].normalise(*factors[name])
        dense = delta.T @ u if name == "up.weight" else u.T @ delta
        expected = toy.get_parameter(name) - alphas[0] * dense
        assert_close(edited[name], expected, name, 1e-13)


def test_official_adds_what_the_default_subtracts(toy: Toy) -> None:
    params, alphas, moments = ref.init_editor(toy, NAMES, 4, alpha=0.01)
    factors = ref.capture(toy, NAMES, batch_of([6], [3]))
    for m, name in zip(moments.values(), NAMES, strict=True):
        m.update(*factors[name])
    args = (toy, NAMES, params)
    _, minus = ref.edited_weights(*args, alphas, moments, factors)
    _, plus = ref.edited_weights(*args, -alphas, moments, factors, official=True)
    assert all(torch.equal(minus[n], plus[n]) for n in NAMES)


def test_modes_count_the_weights_of_one_shape() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3), nn.Linear(2, 3))
    names = [f"{i}.weight" for i in (3, 1, 0, 2)]
    nets = ref.nets_for(model, names)
    assert nets == [((2, 3), 0), ((3, 2), 0), ((2, 3), 1), ((2, 3), 2)]
    assert ref.nets_for(model, names, shared=False) == [(name, None) for name in names]


@pytest.mark.parametrize("shared", [True, False])
def test_train_step_gradients_are_those_of_finite_differences(toy: Toy, shared: bool) -> None:
    g = torch.Generator().manual_seed(1)
    params, alphas, _ = ref.init_editor(toy, NAMES, 3, alpha=0.02, shared=shared, generator=g)
    params = {
        key: {k: p + 0.1 * torch.randn(p.shape, generator=g) for k, p in net.items()}
        for key, net in params.items()
    }
    inner, loc = batch_of([6], [3]), batch_of([5, 4], [2, 0], seed=1)
    outer = [inner, batch_of([5], [3], seed=2)]

    def step() -> dict[str, Any]:
        moments = ref.init_editor(toy, NAMES, 3, shared=shared)[2]
        return ref.train_step(toy, NAMES, params, alphas, moments, inner, outer, loc)

    r = step()
    assert r["total"].dtype == f64
    assert_close(r["total"], 0.1 * r["nll"] + r["kl"], "total", 1e-14)
    single = [ref.nll(y, o["labels"]) for y, o in zip(r["outer_logits"], outer, strict=True)]
    assert_close(r["nll"], (single[0] + single[1]) / 2, "mean of the outer losses", 1e-14)

    key = next(iter(params))
    probes = [(alphas, r["alpha_grads"], 1)]
    probes += [
        (params[key][n], r["grads"][key][n], 2) for n in ("mlp.layers.0.v", "mlp.layers.1.u")
    ]
    for values, gradient, i in probes:
        h, totals = 1e-6, []
        for sign in (1, -1):
            values.view(-1)[i] += sign * h
            totals.append(step()["total"])
            values.view(-1)[i] -= sign * h
        slope = ((totals[0] - totals[1]) / (2 * h)).item()
        assert gradient.flatten()[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-10)


def test_train_step_changes_the_moments_and_nothing_else(toy: Toy) -> None:
    before = {k: v.clone() for k, v in toy.state_dict().items()}
    params, alphas, moments = ref.init_editor(toy, NAMES, 3)
    batch = batch_of([6], [3])
    ref.train_step(toy, NAMES, params, alphas, moments, batch, batch, batch)
    assert all(torch.equal(v, before[k]) for k, v in toy.state_dict().items())
    assert not any(p.requires_grad for p in toy.parameters())
    assert not any(p.requires_grad for net in params.values() for p in net.values())
    assert all(m.k > 0 for m in moments.values())


# ------------------------------------------------------------------------- recorded outputs


def parity(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a fixture of the official implementation, or a skip."""
    for path in (PARITY / "parity.json", PARITY / f"{case}.safetensors"):
        if not path.exists():
            pytest.skip(f"{path} is absent; set PYMEND_PARITY to the folder that holds it")
    settings = json.loads((PARITY / "parity.json").read_text())["cases"][case]
    return settings, load_file(PARITY / f"{case}.safetensors")


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def editors(tensors: dict[str, Tensor], prefix: str = "editor.") -> dict[ref.Key, ref.Params]:
    """``(a, b).name`` tensors as key -> name -> tensor."""
    nets: dict[ref.Key, ref.Params] = {}
    for name, value in under(tensors, prefix).items():
        key, _, parameter = name.partition(").")
        a, b = key.strip("(").split(",")
        nets.setdefault((int(a), int(b)), {})[parameter] = value
    return nets


def tiny_model(config: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The transformers model of ``config`` with ``weights`` (a tied head may be left out)."""
    transformers = pytest.importorskip("transformers")
    config = dict(config)
    built = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    model = transformers.AutoModelForCausalLM.from_config(built)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return model.eval()


def assert_moments(
    moments: ref.Moments, expected: dict[str, Tensor], what: str, tol: float
) -> None:
    """``expected`` carries the official names: v means delta."""
    assert moments.k.item() == expected["k"].item(), what
    assert_close(moments.u_mean, expected["u_mean"], f"{what} u mean", tol)
    assert_close(moments.u_std, expected["u_std"], f"{what} u std", tol)
    assert_close(moments.delta_mean, expected["v_mean"], f"{what} delta mean", tol)
    assert_close(moments.delta_std, expected["v_std"], f"{what} delta std", tol)


def check_transform(
    tensors: dict[str, Tensor],
    moments: ref.Moments,
    train_modes: list[int],
    eval_mode: int,
    tol: float,
    **variant: Any,
) -> None:
    """Replay recorded training calls, then the evaluation call with its gradients."""
    params = {name: p.requires_grad_() for name, p in under(tensors, "param.").items()}
    for i, mode in enumerate(train_modes):
        call = under(tensors, f"train{i}.")
        rows = ref.kept_rows(call["u"], call["delta"])
        moments.update(*rows)
        u_out, delta_out = ref.editor_forward(*rows, params, moments, mode, **variant)
        assert_moments(moments, call, f"call {i}", tol)
        assert_close(u_out, call["u_out"], f"call {i} u", tol)
        assert_close(delta_out, call["delta_out"], f"call {i} delta", tol)

    call = under(tensors, "eval.")
    rows = ref.kept_rows(call["u"], call["delta"])
    u_out, delta_out = ref.editor_forward(*rows, params, moments, eval_mode, **variant)
    assert_close(u_out, call["u_out"], "eval u", tol)
    assert_close(delta_out, call["delta_out"], "eval delta", tol)
    total = (u_out * call["cot_u"]).sum() + (delta_out * call["cot_delta"]).sum()
    gradients = torch.autograd.grad(total, list(params.values()), materialize_grads=True)
    expected = under(call, "grad.")
    assert set(expected) == set(params)
    for name, gradient in zip(params, gradients, strict=True):
        assert_close(gradient, expected[name], f"gradient of {name}", tol)


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transform_parity_with_the_official_code(case: str) -> None:
    settings, tensors = parity(f"transform-{case}")
    moments = ref.Moments(settings["x_dim"], settings["delta_dim"], official=True)
    check_transform(
        tensors,
        moments,
        settings["train_modes"],
        settings["eval_mode"],
        tol=1e-5,
        **{k: settings[k] for k in VARIANT},
    )


@pytest.mark.parametrize("case", ["edit-gpt2", "edit-llama"])
def test_training_step_parity_with_the_official_code(case: str) -> None:
    settings, tensors = parity(case)
    model = tiny_model(settings["config"], under(tensors, "model."))
    names, params = settings["inner_params"], editors(tensors)
    moments = {key: ref.Moments(*key, official=True) for key in params}
    for i in range(settings["steps"]):
        expected = under(tensors, f"step{i}.")
        inner, outer, loc = (under(expected, f"{kind}.") for kind in ("inner", "outer", "loc"))
        r = ref.train_step(
            model,
            names,
            params,
            tensors["edit_lrs"],
            moments,
            inner,
            outer,
            loc,
            c_edit=settings["cedit"],
            c_loc=settings["cloc"],
            official=True,
        )
        for name in names:
            rows = ref.kept_rows(expected[f"u.{name}"], expected[f"delta.{name}"])
            assert_close(r["factors"][name][0], rows[0], f"step {i} u {name}", 1e-5)
            assert_close(r["factors"][name][1], rows[1], f"step {i} delta {name}", 1e-5)
            assert_close(r["edited"][name], expected[f"new_weight.{name}"], f"W' {name}", 1e-5)
        assert_close(r["base_logits"], expected["base_logits"], "base logits", 1e-5)
        assert_close(r["outer_logits"][0], expected["edited_outer_logits"], "outer logits", 1e-5)
        assert_close(r["loc_logits"], expected["edited_loc_logits"], "locality logits", 1e-5)
        assert_close(r["nll"], expected["nll"], f"step {i} nll", 1e-5)
        assert_close(r["kl"], expected["kl"], f"step {i} kl", 1e-5)
        assert_close(r["alpha_grads"], expected["grad.edit_lrs"], "edit_lrs", 1e-5)
        gradients = under(expected, "grad.")
        del gradients["edit_lrs"]
        for key, net in editors(gradients, "").items():
            for name, gradient in net.items():
                assert_close(r["grads"][key][name], gradient, f"step {i} {key} {name}", 1e-5)
    for key, final in editors(tensors, "final.").items():
        assert_moments(moments[key], final, f"final {key}", 1e-5)


ABOUT = json.loads((FIXTURES / "fixtures.json").read_text())


@pytest.mark.parametrize("case", ABOUT["transform"])
def test_own_transform_fixtures(case: str) -> None:
    settings = ABOUT["transform"][case]
    moments = ref.Moments(settings["a"], settings["b"], official=settings["official"])
    check_transform(
        load_file(FIXTURES / f"{case}.safetensors"),
        moments,
        settings["train_modes"],
        settings["eval_mode"],
        tol=1e-6 if settings["official"] else 1e-9,  # official moments are float32
    )


@pytest.mark.parametrize("case", ABOUT["step"])
def test_own_training_step_fixtures(case: str) -> None:
    settings = ABOUT["step"][case]
    tol = 1e-6 if settings["official"] else 1e-9  # official moments are float32
    tensors = load_file(FIXTURES / f"{case}.safetensors")
    model = tiny_model(settings["config"], under(tensors, "model.")).double()
    names = settings["names"]
    params = {key: {k: p.double() for k, p in net.items()} for key, net in editors(tensors).items()}
    moments = {key: ref.Moments(*key, official=settings["official"]) for key in params}
    for i in range(settings["steps"]):
        expected = under(tensors, f"step{i}.")
        r = ref.train_step(
            model,
            names,
            params,
            tensors["alpha"].double(),
            moments,
            under(expected, "inner."),
            [under(expected, f"{kind}.") for kind in settings["outer"]],
            under(expected, "loc."),
            c_edit=settings["c_edit"],
            c_loc=settings["c_loc"],
            official=settings["official"],
        )
        for name in names:
            actual = (*r["factors"][name], *r["tilde"][name], r["edited"][name])
            kinds = ("u", "delta", "u_tilde", "delta_tilde", "edited")
            for kind, value in zip(kinds, actual, strict=True):
                assert value.dtype == f64
                assert_close(value, expected[f"{kind}.{name}"], f"step {i} {kind} {name}", tol)
        for kind in ("nll", "kl", "total", "loc_logits"):
            assert_close(r[kind], expected[kind], f"step {i} {kind}", tol)
        assert_close(r["alpha_grads"], expected["grad.alpha"], f"step {i} alpha", tol)
        for key, net in r["grads"].items():
            for name, gradient in net.items():
                assert_close(gradient, expected[f"grad.{key}.{name}"], f"step {i} {name}", tol)
            assert_moments(moments[key], under(expected, f"moments.{key}."), f"step {i}", tol)


def test_own_fixtures_stay_small() -> None:
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 300_000


# --------------------------------------------------------------------------------- the rival


@pytest.fixture
def single_call_toy(toy: Toy) -> Toy:
    """A float32 toy whose edited modules are called once, as the rival expects."""

    def forward(input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        h = toy.embed(input_ids).cumsum(1)
        return SimpleNamespace(logits=toy.head(h + toy.down(torch.tanh(toy.up(h)))))

    toy.forward = forward  # type: ignore[method-assign]
    return toy.float()


def test_the_rival_computes_what_the_reference_says(single_call_toy: Toy) -> None:
    model = single_call_toy
    rival = OfficialOrder(model, NAMES, rank=3, alpha=0.01, accumulate=2)
    moments = {key: ref.Moments(*key, official=True) for key in rival.params}
    summed = [torch.zeros_like(p) for p in rival.outer_parameters()]
    for seed in range(2):
        edit, outer, loc = (batch_of([6], [3], seed=3 * seed + i) for i in range(3))
        expected = ref.train_step(
            model, NAMES, rival.params, rival.alphas, moments, edit, outer, loc, official=True
        )
        log = rival.micro_step(edit, outer, loc)
        assert log["total"] == pytest.approx(expected["total"].item(), rel=1e-6)
        gradients = [g for net in expected["grads"].values() for g in net.values()]
        for total, gradient in zip(summed, [*gradients, expected["alpha_grads"]], strict=True):
            total += gradient / 2
    for p, gradient in zip(rival.outer_parameters(), summed, strict=True):
        assert_close(p.grad, gradient, "accumulated gradient", 1e-5)

    edited = rival.edit(edit)
    factors = ref.capture(model, NAMES, edit, official=True)
    _, weights = ref.edited_weights(
        model, NAMES, rival.params, rival.alphas, moments, factors, official=True
    )
    for name, p in edited.named_parameters():
        assert_close(p, weights.get(name, model.get_parameter(name)), name, 1e-6)

    before = rival.alphas.detach().clone()
    assert rival.optimiser_step() > 0
    assert not torch.equal(rival.alphas, before)
    assert rival.alphas.grad is None


def test_the_rival_drops_a_micro_step_with_a_non_finite_gradient(single_call_toy: Toy) -> None:
    rival = OfficialOrder(single_call_toy, NAMES, rank=3)
    with torch.no_grad():
        rival.alphas[0] = math.inf
    batch = batch_of([6], [3])
    rival.micro_step(batch, batch, batch)
    assert rival.skipped == 1
    assert all(p.grad is None for p in rival.outer_parameters())
