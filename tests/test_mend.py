"""The engine against the float64 oracle and against recorded outputs (training episodes)."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    FAMILY,
    VARIANTS,
    assert_close,
    assert_moments,
    gpt2,
    llama,
    load_reference_params,
    logits_of,
    official_name,
    random_episodes,
    reference_batch,
    reference_key,
    reference_moments,
    reference_params,
    rel_error,
    seasoned_mend,
    tiny_mend,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from pymend import reference as ref
from pymend.algorithms.mend.mend import Mend
from pymend.config import MendConfig
from pymend.edit import Edit
from pymend.engine.capture import Factors
from pymend.engine.hooks import frozen
from pymend.engine.losses import mean_of_seen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Batch, Row
from pymend.training.episodes import Episode, run_episodes

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
PARITY = Path(os.environ.get("PYMEND_PARITY", ROOT.parent / "shared" / "data" / "parity"))
f64 = torch.float64

C_EDIT, C_LOC = 0.1, 1.0


def rows_of(factors: Factors) -> tuple[Tensor, Tensor]:
    return factors.u, factors.delta


def reference_steps(
    model: Any, mend: Mend, episodes: list[Episode], outer: str, **variant: Any
) -> tuple[list[dict[str, Any]], dict[ref.Key, ref.Moments]]:
    """One call of the oracle per episode, all on the same moments."""
    params, moments = reference_params(mend), reference_moments(mend)
    names = [w.name for w in mend.weights]
    steps = []
    for e in episodes:
        inner, rephrase = reference_batch(e.edits), reference_batch(e.rephrases)
        steps.append(
            ref.train_step(
                model,
                names,
                params,
                mend.editor.alpha.detach(),
                moments,
                inner,
                {"both": [inner, rephrase], "rephrase": rephrase, "prompt": inner}[outer],
                reference_batch(e.locality),
                c_edit=C_EDIT,
                c_loc=C_LOC,
                **variant,
            )
        )
    return steps, moments


def in_float64(model: Any, mend: Mend) -> tuple[Any, Mend]:
    """Copies that compute in float64."""
    exact = copy.deepcopy(mend)
    exact.editor.nets.double()
    exact.editor.alpha.data = mend.editor.alpha.data.double()
    return copy.deepcopy(model).double(), exact


def check_against_reference(
    model: Any, mend: Mend, episodes: list[Episode], outer: str, tolerance: float, **variant: Any
) -> None:
    """Factors, moments, W', losses and outer gradients of one pass over all ``episodes``.

    The oracle computes in float64, whatever the model's precision.
    """
    expected, moments = reference_steps(*in_float64(model, mend), episodes, outer, **variant)
    n = len(episodes)
    with frozen(model):
        replay = Replay(model, mend.weights)
        rows = [row for e in episodes for row in e.edits]
        replay.load(rows)
        captured = mend.capture(replay, rows, n)
        twin = copy.deepcopy(mend)
        edit = Edit(mend.weights, twin.factors(captured, merge=True))
        scores = run_episodes(mend, replay, episodes, outer, merge=True)
    total = C_EDIT * scores.nll + C_LOC * scores.kl
    total.mean().backward()

    for w in mend.weights:
        us, deltas = (x.split(captured[w.name].counts) for x in rows_of(captured[w.name]))
        for e, r in enumerate(expected):
            what = f"episode {e}, {w.name}"
            assert_close(us[e], r["factors"][w.name][0], f"u of {what}", tolerance)
            assert_close(deltas[e], r["factors"][w.name][1], f"delta of {what}", tolerance)
            own, n_rows = edit.factors[w.name], captured[w.name].counts[e]
            assert_close(own.u[e, :n_rows], r["tilde"][w.name][0], f"u~ of {what}", tolerance)
            assert_close(own.delta[e, :n_rows], r["tilde"][w.name][1], f"d~ of {what}", tolerance)
            assert not own.u[e, n_rows:].any() and not own.delta[e, n_rows:].any(), "padded rows"
    for e, r in enumerate(expected):
        changed = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            edit[e].merge_(changed)
        for w in mend.weights:
            W = changed.get_parameter(w.name)
            assert_close(W, r["edited"][w.name], f"W' of episode {e}, {w.name}", tolerance)
    for key, net in mend.editor.nets.items():
        assert_moments(net, moments[reference_key(mend, key)], key, tolerance)

    for kind, own in (("nll", scores.nll), ("kl", scores.kl), ("total", total)):
        for e, r in enumerate(expected):
            assert_close(own[e], r[kind], f"{kind} of episode {e}", tolerance)
    for key, net in mend.editor.nets.items():
        for name, p in net.named_parameters():
            wanted = [r["grads"][reference_key(mend, key)][official_name(name)] for r in expected]
            assert p.grad is not None, f"{key} {name} has no gradient"
            assert_close(p.grad, sum(wanted) / n, f"gradient of {key} {name}", tolerance)
    wanted = sum(r["alpha_grads"] for r in expected) / n
    assert_close(mend.editor.alpha.grad, wanted, "gradient of alpha", tolerance)


@pytest.mark.parametrize("outer", ["both", "rephrase", "prompt"])
@pytest.mark.parametrize("family", FAMILY)
def test_episodes_in_one_pass_equal_the_reference_one_by_one(family: str, outer: str) -> None:
    model = FAMILY[family](dtype=f64)
    check_against_reference(model, tiny_mend(model), random_episodes(3), outer, 1e-9)


def eager_error(model: Any, mend: Mend, sets: list[list[Episode]]) -> float:
    """The largest error of the oracle run in the model's own precision."""
    errors = []
    for episodes in sets:
        eager, _ = reference_steps(model, mend, episodes, "both")
        exact, _ = reference_steps(*in_float64(model, mend), episodes, "both")
        for ours, true in zip(eager, exact, strict=True):
            for kind in ("factors", "tilde", "grads"):
                pairs = zip(tree_leaves(ours[kind]), tree_leaves(true[kind]), strict=True)
                errors += [rel_error(a, b) for a, b in pairs]
    return max(errors)


@pytest.mark.parametrize("family", FAMILY)
def test_float32(family: str) -> None:
    """The bound is eager PyTorch's: how a model magnifies rounding differs, and so do machines."""
    model = FAMILY[family]()
    mend, sets = seasoned_mend(model), [random_episodes(3, seed=seed) for seed in range(3)]
    tolerance = 2 * eager_error(model, mend, sets)
    assert tolerance < 1e-4
    for episodes in sets:
        check_against_reference(model, copy.deepcopy(mend), episodes, "both", tolerance)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(v))
@pytest.mark.parametrize("family", FAMILY)
def test_variants(family: str, variant: dict[str, Any]) -> None:
    model = FAMILY[family](dtype=f64)
    mend = tiny_mend(model, alpha=0.3 if "norm" in variant else 0.01, **variant)
    if "norm" in variant:
        check_without_moments(model, mend, variant)
        return
    check_against_reference(model, mend, random_episodes(2), "both", 1e-9, **variant)


def check_without_moments(model: Any, mend: Mend, variant: dict[str, Any]) -> None:
    """Without normalisation the engine keeps no moments; all else agrees."""
    episodes = random_episodes(2)
    expected, _ = reference_steps(model, mend, episodes, "both", **variant)
    with frozen(model):
        scores = run_episodes(mend, Replay(model, mend.weights), episodes, "both", merge=True)
    (C_EDIT * scores.nll + C_LOC * scores.kl).mean().backward()
    for key, net in mend.editor.nets.items():
        assert net.moments.count == 0
        for name, p in net.named_parameters():
            wanted = [r["grads"][reference_key(mend, key)][official_name(name)] for r in expected]
            assert_close(p.grad, sum(wanted) / 2, f"gradient of {key} {name}", 1e-9)


@pytest.mark.parametrize("family", FAMILY)
def test_one_network_per_weight(family: str) -> None:
    model = FAMILY[family](dtype=f64)
    mend = tiny_mend(model, shared=False)
    assert len(mend.editor.nets) == len(mend.weights)
    check_against_reference(model, mend, random_episodes(2), "both", 1e-9)


@pytest.mark.parametrize("outer", ["both", "rephrase"])
@pytest.mark.parametrize("family", FAMILY)
def test_simultaneous_edits(family: str, outer: str) -> None:
    model = FAMILY[family](dtype=f64)
    mend = tiny_mend(model, n_edits=3)
    check_against_reference(model, mend, random_episodes(2, edits=3), outer, 1e-9)


def test_every_block_edited() -> None:
    """With nothing below the edited blocks there is no prefix to keep."""
    model = llama(layers=2, dtype=f64)
    check_against_reference(model, tiny_mend(model), random_episodes(2), "both", 1e-9)


def test_official_numerics() -> None:
    model = gpt2(dtype=f64)
    mend = tiny_mend(model, official=True)
    episodes = [
        Episode(e.edits, e.rephrases, tuple(Row(x.ids, 0, answer=False) for x in e.locality))
        for e in random_episodes(2, edits=2)
    ]
    assert (mend.editor.alpha < 0).all()
    with torch.no_grad():
        mend.editor.alpha.neg_()  # the reference adds alpha, the engine subtracts -alpha
        expected, moments = reference_steps(model, mend, episodes, "both", official=True)
        mend.editor.alpha.neg_()
    with frozen(model):
        scores = run_episodes(mend, Replay(model, mend.weights), episodes, "both", merge=True)
    (C_EDIT * scores.nll + C_LOC * scores.kl).mean().backward()
    # The official moments are float32, and their recurrence rounds row by row.
    for key, net in mend.editor.nets.items():
        assert_moments(net, moments[reference_key(mend, key)], key, 1e-5)
        for name, p in net.named_parameters():
            wanted = [r["grads"][reference_key(mend, key)][official_name(name)] for r in expected]
            assert_close(p.grad, sum(wanted) / 2, f"gradient of {key} {name}", 1e-5)
    wanted = -sum(r["alpha_grads"] for r in expected) / 2
    assert_close(mend.editor.alpha.grad, wanted, "gradient of alpha", 1e-5)


def test_only_rows_of_an_edit_shape_its_own_gradient() -> None:
    """An episode's losses do not depend on the others, once the moments are fixed."""
    model = gpt2(dtype=f64)
    mend = tiny_mend(model)
    episodes = random_episodes(3)
    with frozen(model):
        run_episodes(mend, Replay(model, mend.weights), episodes, "both", merge=True)
        count = [net.moments.count.item() for net in mend.editor.nets.values()]
        together = run_episodes(mend, Replay(model, mend.weights), episodes, "both", merge=False)
        for i, e in enumerate(episodes):
            alone = run_episodes(mend, Replay(model, mend.weights), [e], "both", merge=False)
            assert_close(together.nll[i], alone.nll[0], "nll", 1e-12)
            assert_close(together.kl[i], alone.kl[0], "kl", 1e-12)
    assert [net.moments.count.item() for net in mend.editor.nets.values()] == count


def test_scores_of_episodes_are_those_of_plain_calls() -> None:
    """Of the edited model, an episode's share of exact matches; of locality, of equal positions."""
    model = gpt2(dtype=f64)
    mend = seasoned_mend(model, alpha=0.01, n_edits=2)
    # Half of the rephrases are random rows, which the edits hardly reach.
    episodes = [
        Episode(e.edits, (e.edits[0], e.rephrases[1]), e.locality) for e in random_episodes(12, 2)
    ]

    def best(rows: tuple[Row, ...]) -> list[list[int]]:
        logits = logits_of(model, rows)
        return [logits[i, list(r.positions())].argmax(-1).tolist() for i, r in enumerate(rows)]

    def exact(rows: tuple[Row, ...]) -> float:
        return sum(x == r.targets() for x, r in zip(best(rows), rows, strict=True)) / len(rows)

    with frozen(model), torch.no_grad():
        replay = Replay(model, mend.weights)
        scores = run_episodes(mend, replay, episodes, "both", merge=False)
        edits = mend.differentiable(replay, [r for e in episodes for r in e.edits], 12, False)
    wanted: list[tuple[float, float, float]] = []
    parts = 0
    for i, e in enumerate(episodes):
        before = [x for row in best(e.locality) for x in row]
        with edits[i].applied(model):
            after = [x for row in best(e.locality) for x in row]
            same = sum(a == b for a, b in zip(before, after, strict=True)) / len(before)
            wanted.append((exact(e.edits), exact(e.rephrases), same))
            found = zip(best((*e.edits, *e.rephrases)), (*e.edits, *e.rephrases), strict=True)
            parts += sum(x != r.targets() and set(x) & set(r.targets()) != set() for x, r in found)
    columns = zip(*wanted, strict=True)
    for own, column in zip(
        (scores.edit_success, scores.generality, scores.locality), columns, strict=True
    ):
        assert own.tolist() == pytest.approx(column) and len(set(column)) > 1
    assert parts, "some answers are right in part only"


# ------------------------------------------------------------------------- recorded outputs


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def recorded_params(tensors: dict[str, Tensor]) -> dict[ref.Key, ref.Params]:
    """``(a, b).name`` tensors as key -> name -> tensor."""
    nets: dict[ref.Key, ref.Params] = {}
    for name, value in tensors.items():
        key, _, parameter = name.partition(").")
        a, b = key.strip("(").split(",")
        nets.setdefault((int(a), int(b)), {})[parameter] = value
    return nets


def recorded_model(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    config = dict(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return model.to(dtype).eval()


def recorded_rows(batch: dict[str, Tensor]) -> list[Row]:
    """Rows of a recorded batch whose labels, if any, run to the end of the row."""
    rows = []
    for ids, mask, labels in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        length, asked = int(mask.sum()), (labels != ref.IGNORED).nonzero().flatten().tolist()
        assert asked == list(range(length - len(asked), length)), "labels run to the end"
        first = length - len(asked) - 1 if asked else 0
        rows.append(Row(tuple(ids[:length].tolist()), first, bool(asked)))
    return rows


def check_recorded_step(
    model: Any, mend: Mend, step: dict[str, Tensor], outer: list[str], tolerance: float
) -> dict[str, Tensor]:
    """One recorded training step of one episode; returns names of gradients and their values.

    Locality batches of several rows share one token mean, which a trainer's episode never has, so
    the losses are put together here.
    """
    inner, loc = (recorded_rows(under(step, f"{k}.")) for k in ("inner", "loc"))
    if mend.config.official:
        loc = [Row(row.ids, 0, answer=False) for row in loc]
    outers = [recorded_rows(under(step, f"{k}.")) for k in outer]
    with frozen(model):
        replay = Replay(model, mend.weights)
        replay.load([row for rows in (inner, loc, *outers) for row in rows])
        loc_batch = Batch.of(loc)
        with torch.no_grad():
            base = replay.label_rows(loc_batch)
        captured = mend.capture(replay, inner, 1)
        edit = Edit(mend.weights, mend.factors(captured, merge=True))
        with edit.applied(model):
            nll = []
            for rows in outers:
                batch = Batch.of(rows)
                losses = replay.label_rows(batch).losses(batch.target)
                nll.append(mean_of_seen(losses.nll, batch.target, batch.row * 0, 1)[0])
            kl = replay.label_rows(loc_batch).losses(base=base).kl.mean()
    nll_mean = torch.stack(nll).mean()
    assert_close(nll_mean, step["nll"], "nll", tolerance)
    assert_close(kl, step["kl"], "kl", tolerance)
    mend.editor.zero_grad()
    (C_EDIT * nll_mean + C_LOC * kl).backward()

    for w in mend.weights:
        u, delta = (step[f"{kind}.{w.name}"] for kind in ("u", "delta"))
        rows = ref.kept_rows(u, delta)
        for own, wanted, kind in zip(rows_of(captured[w.name]), rows, ("u", "delta"), strict=True):
            assert_close(own, wanted, f"{kind} {w.name}", tolerance)
    with torch.no_grad():
        changed = copy.deepcopy(model)
        edit[0].merge_(changed)
    return {w.name: changed.get_parameter(w.name) for w in mend.weights}


def check_gradients(mend: Mend, wanted: dict[str, Tensor], tolerance: float) -> None:
    """``wanted`` holds ``(a, b).name`` gradients of the networks."""
    recorded = recorded_params(wanted)
    for key, net in mend.editor.nets.items():
        for name, p in net.named_parameters():
            expected = recorded[reference_key(mend, key)][official_name(name)]
            assert_close(p.grad, expected, f"gradient of {key} {name}", tolerance)


def recorded_mend(
    model: Any, names: list[str], params: dict[ref.Key, ref.Params], **config: Any
) -> Mend:
    rank = next(iter(params.values()))["mlp.layers.0.v"].shape[0]
    mend = Mend.from_config(model, MendConfig(rank=rank, edit=tuple(names), **config))
    assert [w.name for w in mend.weights] == names
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    for p in mend.editor.parameters():
        p.data = p.data.to(dtype)
    load_reference_params(mend, params)
    return mend


ABOUT = json.loads((FIXTURES / "fixtures.json").read_text())


@pytest.mark.parametrize("case", ABOUT["step"])
def test_own_training_step_fixtures(case: str) -> None:
    settings, tensors = ABOUT["step"][case], load_file(FIXTURES / f"{case}.safetensors")
    official = settings["official"]
    # Official moments are float32, summed in another order than row by row; Llama's own norms
    # round to float32 even in a float64 model.
    tolerance = 1e-5 if official else 1e-6 if "llama" in case else 1e-9
    model = recorded_model(settings["config"], under(tensors, "model."), f64)
    params = recorded_params(under(tensors, "editor."))
    mend = recorded_mend(model, settings["names"], params, official=official)
    assert (settings["c_edit"], settings["c_loc"]) == (C_EDIT, C_LOC)
    sign = -1 if official else 1
    with torch.no_grad():
        mend.editor.alpha.copy_(sign * tensors["alpha"])
    for i in range(settings["steps"]):
        step = under(tensors, f"step{i}.")
        weights = check_recorded_step(model, mend, step, settings["outer"], tolerance)
        for name, W in weights.items():
            assert_close(W, step[f"edited.{name}"], f"W' {name}", tolerance)
        gradients = under(step, "grad.")
        alpha = gradients.pop("alpha")
        assert_close(mend.editor.alpha.grad, sign * alpha, "gradient of alpha", tolerance)
        check_gradients(mend, gradients, tolerance)
        for key, net in mend.editor.nets.items():
            recorded = under(step, f"moments.{reference_key(mend, key)}.")
            assert_moments(net, recorded, f"step {i} {key}", tolerance)


def parity(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a fixture of the official implementation, or a skip."""
    for path in (PARITY / "parity.json", PARITY / f"{case}.safetensors"):
        if not path.exists():
            pytest.skip(f"{path} is absent; set PYMEND_PARITY to the folder that holds it")
    settings = json.loads((PARITY / "parity.json").read_text())["cases"][case]
    return settings, load_file(PARITY / f"{case}.safetensors")


@pytest.mark.parametrize("case", ["edit-gpt2", "edit-llama"])
def test_training_step_parity_with_the_official_code(case: str) -> None:
    settings, tensors = parity(case)
    model = recorded_model(settings["config"], under(tensors, "model."), torch.float32)
    params = recorded_params(under(tensors, "editor."))
    mend = recorded_mend(model, settings["inner_params"], params, official=True)
    assert (settings["cedit"], settings["cloc"]) == (C_EDIT, C_LOC)
    with torch.no_grad():
        mend.editor.alpha.copy_(-tensors["edit_lrs"])
    for i in range(settings["steps"]):
        step = under(tensors, f"step{i}.")
        weights = check_recorded_step(model, mend, step, ["outer"], 1e-5)
        for name, W in weights.items():
            assert_close(W, step[f"new_weight.{name}"], f"W' {name}", 1e-5)
        gradients = under(step, "grad.")
        alpha = gradients.pop("edit_lrs")
        assert_close(mend.editor.alpha.grad, -alpha, "gradient of alpha", 1e-5)
        check_gradients(mend, gradients, 1e-5)
    for key, net in mend.editor.nets.items():
        final = under(tensors, f"final.{reference_key(mend, key)}.")
        assert_moments(net, final, f"final {key}", 1e-5)


def test_strength_scales_every_step_size() -> None:
    model = gpt2()
    mend = tiny_mend(model)
    before = mend.editor.alpha.detach().clone()
    assert mend.scale_(0.5) is mend
    assert torch.equal(mend.editor.alpha, before / 2)
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="strength"):
            mend.scale_(wrong)
    assert torch.equal(mend.editor.alpha, before / 2)
