"""The editor: running moments, the network, and recorded calls of the official implementation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import assert_close, assert_moments, official_name
from torch import Tensor

from pymend import reference as ref
from pymend.algorithms.mend.moments import RunningMoments
from pymend.algorithms.mend.network import Editor, EditorNet
from pymend.config import MendConfig
from pymend.models.structure import EditedWeight

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
PARITY = Path(os.environ.get("PYMEND_PARITY", ROOT.parent / "shared" / "data" / "parity"))
TRANSFORMS = ["default", "no_norm", "xavier", "separate", "one_sided", "x_only", "delta_only"]
VARIANT = ("combine", "one_sided", "x_only", "delta_only", "norm", "init")
f64 = torch.float64


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def check_recorded(
    tensors: dict[str, Tensor], net: EditorNet, modes: list[int], eval_mode: int, tolerance: float
) -> None:
    """Replay recorded training calls, then the evaluation call with its gradients."""
    own = {official_name(name): p for name, p in net.named_parameters()}
    recorded = under(tensors, "param.")
    assert own.keys() == recorded.keys()
    for name, p in own.items():
        p.data = recorded[name].clone()

    def call(prefix: str, mode: int, train: bool) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        values = under(tensors, prefix)
        u, delta = ref.kept_rows(values["u"], values["delta"])
        which = torch.full((len(u),), mode)
        return values, net([u], [delta], [len(u)], which, train)

    for i, mode in enumerate(modes):
        values, (u, delta) = call(f"train{i}.", mode, train=True)
        assert_close(u, values["u_out"], f"call {i} u", tolerance)
        assert_close(delta, values["delta_out"], f"call {i} delta", tolerance)
        if net.norm:
            assert_moments(net, values, f"call {i}", tolerance)
    values, (u, delta) = call("eval.", eval_mode, train=False)
    assert_close(u, values["u_out"], "eval u", tolerance)
    assert_close(delta, values["delta_out"], "eval delta", tolerance)
    total = (u * values["cot_u"]).sum() + (delta * values["cot_delta"]).sum()
    gradients = torch.autograd.grad(total, list(own.values()), materialize_grads=True)
    for name, gradient in zip(own, gradients, strict=True):
        assert_close(gradient, values[f"grad.{name}"], f"gradient of {name}", tolerance)


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transform_parity_with_the_official_code(case: str) -> None:
    name = f"transform-{case}"
    for path in (PARITY / "parity.json", PARITY / f"{name}.safetensors"):
        if not path.exists():
            pytest.skip(f"{path} is absent; set PYMEND_PARITY to the folder that holds it")
    settings = json.loads((PARITY / "parity.json").read_text())["cases"][name]
    config = MendConfig(rank=settings["rank"], official=True, **{k: settings[k] for k in VARIANT})
    net = EditorNet(settings["x_dim"], settings["delta_dim"], settings["n_modes"], config)
    tensors = load_file(PARITY / f"{name}.safetensors")
    check_recorded(tensors, net, settings["train_modes"], settings["eval_mode"], 1e-5)


ABOUT = json.loads((FIXTURES / "fixtures.json").read_text())


@pytest.mark.parametrize("case", ABOUT["transform"])
def test_own_transform_fixtures(case: str) -> None:
    settings = ABOUT["transform"][case]
    config = MendConfig(rank=ABOUT["rank"], official=settings["official"])
    net = EditorNet(settings["a"], settings["b"], settings["n_modes"], config)
    tensors = load_file(FIXTURES / f"{case}.safetensors")
    tolerance = 1e-5 if settings["official"] else 1e-9  # official moments are float32
    check_recorded(tensors, net, settings["train_modes"], settings["eval_mode"], tolerance)


# ------------------------------------------------------------------------------------ moments


def take(moments: RunningMoments, x: Tensor, counts: list[int], merge: bool = True) -> Tensor:
    """Rows of one weight whose u is the first dimension and whose delta is the others."""
    return moments([x[:, :1]], [x[:, 1:]], counts, merge, x.dtype)


def test_moments_equal_mean_and_variance_of_all_rows() -> None:
    x = torch.randn(50, 4, dtype=f64) * torch.tensor([1, 1e-4, 1e3, 1]) + torch.tensor([0, 3, 5, 9])
    moments = RunningMoments(4)
    for part, counts in ((x[:20], [1, 0, 19]), (x[20:], [30])):
        take(moments, part, counts)
    assert moments.count == 50 and moments.count.dtype == torch.int64
    assert_close(moments.mean, x.mean(0), "mean", 1e-14)
    assert_close(moments.m2 / 49, x.var(0), "variance", 1e-14)
    expected = (x - x.mean(0)) / (x.std(0) + 1e-7)
    assert_close(take(moments, x, [50], merge=False), expected, "normalised", 1e-9)


def test_a_segment_is_normalised_with_itself_included_and_no_later_one() -> None:
    x = torch.randn(9, 3, dtype=f64)
    moments = RunningMoments(3)
    out = take(moments, x, [4, 5])
    alone = RunningMoments(3)
    assert torch.equal(out[:4], take(alone, x[:4], [4]))
    assert torch.equal(out[4:], take(alone, x[4:], [5]))


def test_a_dimension_that_never_moved_normalises_to_zero() -> None:
    rows = torch.tensor([[5.0, 1e4], [5.0, 1e4 + 2e-3]]).double()
    moments = RunningMoments(2)
    take(moments, rows, [2])
    sevens = torch.full((1, 2), 7.0)
    assert take(moments, sevens, [1], merge=False).tolist() == [[0.0, 0.0]]
    official = RunningMoments(2, official=True)
    take(official, torch.full((2, 2), 5.0), [2])
    assert take(official, sevens, [1], merge=False).tolist() == [[pytest.approx(2e7)] * 2]


def test_one_row_normalises_to_zero() -> None:
    moments = RunningMoments(2)
    out = take(moments, torch.tensor([[3.0, -4.0]]), [1])
    assert not out.any() and moments.count == 1


@pytest.mark.parametrize("official", [False, True])
def test_normalising_before_any_training_is_refused(official: bool) -> None:
    with pytest.raises(RuntimeError, match="no training example; train it"):
        take(RunningMoments(2, official), torch.ones(1, 2), [1], merge=False)


def test_moments_are_saved_and_loaded_whole() -> None:
    net = EditorNet(3, 4, 1, MendConfig(rank=2))
    net([torch.randn(6, 3)], [torch.randn(6, 4)], [6], torch.zeros(6, dtype=torch.long), True)
    other = EditorNet(3, 4, 1, MendConfig(rank=2))
    other.load_state_dict(net.state_dict())
    rows = [torch.randn(2, 3)], [torch.randn(2, 4)], [2], torch.zeros(2, dtype=torch.long)
    assert all(torch.equal(a, b) for a, b in zip(net(*rows), other(*rows), strict=True))
    assert other.moments.count == 6


# ------------------------------------------------------------------------------------ network


def test_identity_start_returns_its_input_and_yet_trains() -> None:
    net = EditorNet(3, 4, 2, MendConfig(rank=2, norm=False))
    u, delta = torch.randn(5, 3), torch.randn(5, 4)
    out = net([u], [delta], [5], torch.tensor([0, 1, 1, 0, 1]))
    assert torch.equal(out[0], u) and torch.equal(out[1], delta)
    sum(x.sum() for x in out).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    # A ReLU, whose derivative at 0 is 0, would leave all of these at zero.
    assert torch.equal(gradients["joint.0.bias"], torch.full((7,), 5.0))
    assert torch.equal(gradients["joint.1.shift"], torch.tensor([[2.0] * 7, [3.0] * 7]))
    assert gradients["joint.0.u"].abs().min() > 0
    assert not gradients["joint.0.v"].any()


def test_each_row_has_its_own_scale_and_shift() -> None:
    net = EditorNet(1, 1, 2, MendConfig(rank=1, norm=False))
    with torch.no_grad():
        for layer in net.joint:
            layer.v.zero_()
        net.joint[0].shift[1] = torch.tensor([10.0, 20.0])
    out = net([torch.ones(2, 1)], [torch.full((2, 1), 2.0)], [2], torch.tensor([0, 1]))
    assert [x.flatten().tolist() for x in out] == [[1.0, 11.0], [2.0, 22.0]]


@pytest.mark.parametrize(
    ("a", "b", "variant", "sides"),
    [
        (3, 4, {}, ["joint"]),
        (3, 4, {"combine": False}, ["delta_side", "u_side"]),
        (3, 4, {"combine": False, "one_sided": True}, ["u_side"]),
        (4, 4, {"combine": False, "one_sided": True}, ["u_side"]),
        (4, 3, {"combine": False, "one_sided": True}, ["delta_side"]),
        (3, 4, {"combine": False, "x_only": True}, ["u_side"]),
        (3, 4, {"combine": False, "delta_only": True}, ["delta_side"]),
    ],
)
def test_which_networks_a_variant_has(
    a: int, b: int, variant: dict[str, Any], sides: list[str]
) -> None:
    net = EditorNet(a, b, 1, MendConfig(rank=2, **variant))
    assert sorted({name.split(".")[0] for name, _ in net.named_parameters()}) == sides


def weights_of(*shapes: tuple[int, int]) -> list[EditedWeight]:
    return [
        EditedWeight(f"m.{i}.weight", f"m.{i}", a, b, False, shapes[:i].count((a, b)))
        for i, (a, b) in enumerate(shapes)
    ]


def test_weights_of_one_shape_share_a_network_and_keep_their_order() -> None:
    shapes = ((3, 5), (5, 3), (3, 5))
    editor = Editor(weights_of(*shapes), MendConfig(rank=2, norm=False))
    assert sorted(editor.nets) == ["3x5", "5x3"]
    with torch.no_grad():
        for layer in (*editor.nets["3x5"].joint, *editor.nets["5x3"].joint):
            layer.shift.copy_(torch.arange(len(layer.shift))[:, None].expand_as(layer.shift))
    counts = [(2, 1), (1, 3), (1, 2)]
    rows = {
        w.name: (torch.rand(sum(n), w.a), torch.rand(sum(n), w.b), n)
        for w, n in zip(editor.weights, counts, strict=True)
    }
    out = editor(rows)
    for w, (u, delta, _) in zip(editor.weights, rows.values(), strict=True):
        # Two layers add the mode each.
        assert torch.allclose(out[w.name][0], u + 2 * w.mode), w.name
        assert torch.allclose(out[w.name][1], delta + 2 * w.mode), w.name


def test_unshared_networks_have_no_modes() -> None:
    editor = Editor(weights_of((3, 5), (3, 5)), MendConfig(rank=2, shared=False))
    assert sorted(editor.nets) == ["m#0#weight", "m#1#weight"]
    names = {name.split(".")[-1] for name, _ in editor.named_parameters()}
    assert names == {"alpha", "u", "v", "bias"}


def test_rank_is_cut_to_the_width() -> None:
    editor = Editor(weights_of((3, 5)), MendConfig(rank=100))
    assert editor.nets["3x5"].joint[0].u.shape == (8, 8)


def test_official_alpha_is_the_negative_learning_rate() -> None:
    start = {k: Editor(weights_of((3, 5)), MendConfig(rank=1, official=k)).alpha for k in (0, 1)}
    assert start[0].item() == -start[1].item() > 0
