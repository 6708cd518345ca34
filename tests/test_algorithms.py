"""FT, FT+KL and Cache: against plain loops, on models of every kind, and the model unharmed."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_encoders import CLASSIFIERS, SEQUENCES, data_of, model_of, plain, words
from tiny import (
    FAMILY,
    WORDS,
    assert_close,
    assert_same_bits,
    facts,
    rel_error,
    snapshot,
    tokenizer,
    traceless,
)
from torch import Tensor, nn

from pymend import EditRequest, Probe, evaluate
from pymend.algorithms.base import Algorithm
from pymend.algorithms.cache import Cache, find_eps
from pymend.algorithms.dense import DenseEdit
from pymend.algorithms.finetune import FineTune
from pymend.config import CacheConfig, FineTuneConfig
from pymend.engine.hooks import frozen
from pymend.engine.tokens import Batch, Encoder, Row
from pymend.errors import NonFiniteError
from pymend.models.structure import find_weights, weight_of

KINDS = (*FAMILY, *SEQUENCES, *CLASSIFIERS)
kinds = pytest.mark.parametrize("kind", KINDS)
families = pytest.mark.parametrize("kind", FAMILY)
ONE_EACH = ("gpt2", "t5", "bart", "bert, one logit")


def case(kind: str, dtype: torch.dtype = torch.float32, count: int = 4) -> Any:
    """A model, its tokenizer and records."""
    if kind in FAMILY:
        return FAMILY[kind](dtype=dtype), tokenizer(), facts(count)
    return model_of(kind, dtype), words(kind), data_of(kind, count)


def rows_of(model: Any, text: Any, data: list[EditRequest]) -> list[Row]:
    encoder = Encoder.for_model(model, text)
    return [encoder.row(r.prompt, r.target) for r in data]


def fine_tune(model: Any, text: Any = None, data: Any = (), **config: Any) -> FineTune:
    settings = FineTuneConfig(**{"lr": 1e-3, **config})
    return FineTune.from_config(model, settings, tokenizer=text, train_data=data)


def nll(logits: Tensor, targets: list[int]) -> Tensor:
    return F.cross_entropy(logits, torch.tensor(targets))


def label_logits(model: Any, row: Row) -> Tensor:
    """Logits at the label positions of one row, differentiable, as anyone calls the model."""
    logits = model(**Batch.of([row]).inputs).logits
    if logits.dim() == 3:
        return logits[0, list(row.positions())]
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


# ---------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("kl", [False, True], ids=["ft", "ft+kl"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert, one logit"])
def test_residuals_equal_those_of_a_loop_over_the_weights(kind: str, kl: bool) -> None:
    model, text, data = case(kind, torch.float64)
    # The clip acts; the steps may end before the edit takes.
    lr = 3e-4
    config = {"kl": kl, "c_edit": 0.1, "clip": 0.05, "steps": 9, "lr": lr}
    elsewhere = EditRequest(WORDS[0], data[0].target, locality=data[1].locality[:1])
    edit = fine_tune(model, text, [elsewhere], **config).edit(model, text, data[2:])

    rows = rows_of(model, text, data[2:])
    held = Encoder.for_model(model, text).probe(data[1].locality[0])
    changed = copy.deepcopy(model).requires_grad_(False)
    names = [w.name for w in find_weights(model)]
    parameters = [changed.get_parameter(n).requires_grad_() for n in names]
    optimizer = torch.optim.RMSprop(parameters, lr)
    steps = 0
    while steps < 9:
        looks = [label_logits(changed, row) for row in rows]
        if all(x.argmax(-1).tolist() == r.targets() for x, r in zip(looks, rows, strict=True)):
            break
        loss = sum(nll(x, r.targets()) for x, r in zip(looks, rows, strict=True)) / 2
        if kl:
            base, now = (label_logits(m, held).log_softmax(-1) for m in (model, changed))
            loss = 0.1 * loss + (base.exp() * (base - now)).sum(-1).mean().double()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        steps += 1
    assert edit.steps == (steps,) and steps > 1
    for name, value in zip(names, parameters, strict=True):
        moved = value.detach() - model.get_parameter(name).detach()
        assert_close(edit.residuals[name], moved, name, 1e-6)


@families
def test_an_edit_takes_and_stops_early(kind: str) -> None:
    model, text, data = case(kind)
    with traceless(model):
        edit = fine_tune(model, lr=1e-3).edit_many(model, text, data)
    assert all(o.success for o in edit.outcomes) and not any(
        o.answer_before == o.target for o in edit.outcomes
    )
    assert all(0 < s < 100 for s in edit.steps)
    # One step less does not do: the loop stops as soon as the answer is right.
    short = fine_tune(model, lr=1e-3, steps=max(1, edit.steps[0] - 1)).edit(model, text, data[0])
    assert edit.steps[0] == 1 or not short.outcomes[0].success


def test_an_answer_that_is_right_needs_no_step() -> None:
    model, text, data = case("bert")
    edit = fine_tune(model, lr=0.1).edit_many(model, text, data)
    right = [o.answer_before == o.answer_after for o in edit.outcomes]
    assert 0 in edit.steps and [s == 0 for s in edit.steps] == right
    i = edit.steps.index(0)
    assert all(not r.any() for r in edit[i].residuals.values())


@families
@torch.no_grad()
def test_ft_kl_holds_the_locality_prompt(kind: str) -> None:
    model, text, data = case(kind, torch.float64)
    drift = []
    pool = [EditRequest(WORDS[0], WORDS[1], locality=data[1].locality[:1])]
    row = Encoder.for_model(model, text).probe(data[1].locality[0])
    base = plain(model, [row]).log_softmax(-1)
    for kl in (False, True):
        edit = fine_tune(model, text, pool, lr=3e-4, kl=kl, c_edit=0.1).edit(model, text, data[0])
        assert edit.outcomes[0].success
        with edit.applied(model):
            edited = plain(model, [row]).log_softmax(-1)
        drift.append((base.exp() * (base - edited)).sum().item())
    assert 0 < drift[1] < 0.7 * drift[0]


@families
def test_a_residual_of_low_rank(kind: str) -> None:
    model, text, data = case(kind, torch.float64)
    edit = fine_tune(model, rank=2, lr=1e-2).edit(model, text, data[0])
    assert edit.outcomes[0].success
    for name, residual in edit.residuals.items():
        assert torch.linalg.matrix_rank(residual) == 2, name
    other = fine_tune(model, rank=2, lr=1e-2, seed=1).edit(model, text, data[0])
    assert any(not torch.equal(r, other.residuals[n]) for n, r in edit.residuals.items())
    start = FineTune(FineTuneConfig(rank=2, lr=0.0, steps=1), find_weights(model))
    still = start.edit(model, text, data[0])
    assert not any(r.any() for r in still.residuals.values()), "it starts at zero"


@pytest.mark.parametrize(
    ("kind", "parameters", "lr", "c_edit"),
    [
        ("gpt2", 1e8, 1e-6, 1e-2),
        ("gpt2", 2.7e9, 5e-6, 1e-2),
        ("gpt2", 6e9, 5e-6, 1e-3),
        ("t5", 2.8e9, 1e-4, 1e-2),
        ("t5", 11e9, 1e-4, 1e-2),
        ("bart", 1e8, 1e-6, 1e-2),
        ("bert", 1e8, 1e-6, 1e-2),
    ],
)
def test_the_papers_settings_by_kind_and_size(
    kind: str, parameters: float, lr: float, c_edit: float
) -> None:
    model, *_ = case(kind)
    model.ballast = nn.Parameter(torch.empty(int(parameters), device="meta"))
    config = FineTune.from_config(model).config
    assert (config.lr, config.c_edit, config.steps, config.clip) == (lr, c_edit, 100, 100)
    own = FineTune.from_config(model, FineTuneConfig(lr=0.5, c_edit=2.0)).config
    assert (own.lr, own.c_edit) == (0.5, 2.0)


def test_ft_kl_needs_prompts_that_are_not_edited() -> None:
    model, text, data = case("gpt2")
    with pytest.raises(ValueError, match="kl needs locality prompts"):
        fine_tune(model, text, facts(3, locality=False), kl=True)
    own = [EditRequest(WORDS[0], WORDS[1], locality=(Probe(data[0].prompt, WORDS[2]),))]
    with pytest.raises(ValueError, match="all locality prompts are those of the edit itself"):
        fine_tune(model, text, own, kl=True).edit(model, text, data[0])


def test_a_step_that_overflows_is_named() -> None:
    model, text, data = case("gpt2")
    with traceless(model), pytest.raises(NonFiniteError, match=r"residual of .* is not finite"):
        fine_tune(model, lr=1e38).edit(model, text, data[0])


# ---------------------------------------------------------------------------- cache


def cache(eps: float = 1e-4, **config: Any) -> Cache:
    return Cache(CacheConfig(eps, **config))


def mean_states(model: Any, row: Row) -> Tensor:
    """What Cache compares, from the states that the model itself hands out."""
    out = model(**Batch.of([row]).inputs, output_hidden_states=True)
    if row.source:
        return out.encoder_last_hidden_state[0].mean(0, keepdim=True)
    states = out.hidden_states[-1][0]
    if row.label is not None:
        return states.mean(0, keepdim=True)
    return torch.stack([states[: t + 1].mean(0) for t in row.positions()])


@kinds
@torch.no_grad()
def test_keys_are_mean_final_states(kind: str) -> None:
    model, text, data = case(kind, torch.float64)
    rows = rows_of(model, text, data)
    edit = cache().edit_many(model, text, data)
    for i, row in enumerate(rows):
        assert_close(edit[i].keys, mean_states(model, row), "keys", 1e-10)
        assert edit[i].answers.flatten()[: len(row.targets())].tolist() == row.targets()
    joint = cache().edit(model, text, data)
    assert_close(joint.keys, torch.cat([edit[i].keys for i in range(len(rows))]), "keys", 1e-10)


@kinds
def test_a_remembered_answer_comes_out_and_nothing_else_changes(kind: str) -> None:
    model, text, data = case(kind)
    other = rows_of(model, text, data_of(kind, 9)[5:] if kind in KINDS[2:] else facts(9)[5:])
    before = plain(model, other)
    with traceless(model):
        edit = cache().edit(model, text, data)
    assert all(o.success and o.probability_after > 0.99 for o in edit.outcomes)
    with edit.applied(model):
        after = plain(model, other)
        for row in rows_of(model, text, data):
            assert plain(model, [row])[: len(row.targets())].argmax(-1).tolist() == row.targets()
    assert torch.equal(after, before)


@kinds
@pytest.mark.parametrize("many", [False, True], ids=["joint", "many"])
def test_thresholds_of_nothing_and_everything(kind: str, many: bool) -> None:
    model, text, data = case(kind)
    rows = rows_of(model, text, data)
    unedited = plain(model, rows)
    never, always = (
        (a.edit_many if many else a.edit)(model, text, data) for a in (cache(0.0), cache(math.inf))
    )
    with never.applied(model):
        assert torch.equal(plain(model, rows), unedited)
    said = {t for row in rows for t in row.targets()}
    with always.applied(model):
        found = plain(model, rows)
    if kind not in SEQUENCES:  # whose longest answer may end before a row does
        assert set(found.argmax(-1).tolist()) <= said
        assert found.max() == always.config.scale or kind == "bert, one logit"
    assert not torch.equal(found, unedited)


@pytest.mark.parametrize("kind", [*FAMILY, *SEQUENCES])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_says_the_remembered_answer(kind: str, how: dict[str, Any]) -> None:
    model, text, data = case(kind)
    text.padding_side = "right" if kind in SEQUENCES else "left"
    prompts = [data[1].prompt, f"{WORDS[5]} {data[1].prompt} {WORDS[6]}"]
    inputs = text(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **how}
    if kind in SEQUENCES:
        del settings["min_new_tokens"]  # an answer ends with the end of text
    unedited = model.generate(**inputs, **settings)
    edit = cache().edit(model, text, data)
    used = model.generation_config.use_cache
    with edit.applied(model):
        found = model.generate(**inputs, **settings)
    assert model.generation_config.use_cache == used
    start = 1 if kind in SEQUENCES else inputs.input_ids.shape[1]
    targets = rows_of(model, text, data[1:2])[0].targets()
    assert found[0, start:][: len(targets)].tolist() == targets
    again = model.generate(**inputs, **settings)
    assert torch.equal(again, unedited) and not torch.equal(found, unedited)
    if not how:
        width = min(found.shape[1], unedited.shape[1])
        assert torch.equal(found[1, :width], unedited[1, :width]), "the other text is left alone"


def test_a_key_value_cache_is_refused() -> None:
    model, text, data = case("gpt2")
    edit, ids = cache().edit(model, text, data), torch.arange(4, 9)[None]
    with edit.applied(model), pytest.raises(ValueError, match="use use_cache=False"):
        past = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=past)


def test_positional_arguments_and_the_last_logits_only() -> None:
    model, text, data = case("llama")
    edit = cache().edit(model, text, data)
    (row,) = rows_of(model, text, data[1:2])
    ids = torch.tensor([row.inputs])
    with edit.applied(model):
        assert model(ids, torch.ones_like(ids), logits_to_keep=1).logits.argmax() == row.ids[-1]


def test_eps_is_found_by_bisection() -> None:
    calls = []

    def drawdown(eps: float) -> float:
        calls.append(eps)
        return max(0.0, eps - 1.0)

    eps = find_eps(drawdown, 0.5, start=0.1)
    assert 1.5 / 1.01 <= eps <= 1.5 and max(calls) == pytest.approx(1.6)
    assert find_eps(lambda eps: 1.0, 0.5) == 0.0
    with pytest.raises(ValueError, match=r"no eps up to .* has a drawdown above 0"):
        find_eps(lambda eps: 0.0, 0.0)
    with pytest.raises(ValueError, match="start is 0"):
        find_eps(drawdown, 0.5, start=0)


def test_eps_matches_a_drawdown() -> None:
    model, text, facts = case("bert", count=12)
    encoder = Encoder.for_model(model, text)

    def own(probe: Probe) -> Probe:
        best = plain(model, [encoder.row(probe.prompt, "0")]).argmax(-1)
        return Probe(probe.prompt, encoder.text(best))

    # The model is right about the rest, so that it can only lose.
    data = [replace(r, locality=tuple(map(own, r.locality))) for r in facts]

    def drawdown(eps: float) -> float:
        result = evaluate(cache(eps), model, text, data, progress=False)
        return result.value("accuracy_drawdown") or 0.0

    wanted = drawdown(math.inf) / 2
    assert wanted > 0
    eps = find_eps(drawdown, wanted)
    assert drawdown(eps) <= wanted < drawdown(1.02 * eps)


# ---------------------------------------------------------------------------- both


def algorithms(model: Any, text: Any, data: list[EditRequest]) -> dict[str, Algorithm]:
    return {
        "ft": fine_tune(model, lr=1e-3, steps=3),
        "ft+kl": fine_tune(model, text, data, lr=1e-3, kl=True, steps=3, c_edit=0.1),
        "cache": cache(),
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[("cache", kind) for kind in KINDS],  # reads states in another way for every kind
        *[(name, kind) for name in ("ft", "ft+kl") for kind in ONE_EACH],
    ],
)
def test_an_evaluation_does_not_depend_on_its_batches(kind: str, name: str) -> None:
    model, text, data = case(kind, torch.float64, 4)
    algorithm = algorithms(model, text, data)[name]
    with traceless(model):
        first = evaluate(algorithm, model, text, data, batch_size=1, progress=False)
        other = evaluate(algorithm, model, text, data[::-1], batch_size=3, progress=False)
    assert other.records[::-1] == first.records
    if name == "cache":
        assert first.value("edit_success") == first.value("locality") == 1
    result = first.to_dict()
    assert (result["perplexity_drawdown"] is None) == (kind in CLASSIFIERS)


@pytest.mark.parametrize("kind", ONE_EACH)
@pytest.mark.parametrize("name", ["ft", "cache"])
def test_independent_edits_equal_single_ones(kind: str, name: str) -> None:
    model, text, data = case(kind, torch.float64)
    algorithm = algorithms(model, text, data)[name]
    many = algorithm.edit_many(model, text, data)
    assert len(many) == 4 and many.fingerprint == algorithm.prepare(model)
    rows = rows_of(model, text, data)
    apart = []
    for i, request in enumerate(data):
        one = algorithm.edit(model, text, request)
        assert many[i].outcomes[0].prompt == request.prompt
        assert many[i].outcomes[0].answer_after == one.outcomes[0].answer_after
        with one.applied(model):
            apart.append(plain(model, rows[i : i + 1]))
        with many[i].applied(model):
            assert_close(plain(model, rows[i : i + 1]), apart[-1], f"edit {i}", 1e-9)
    with many.applied(model):
        together = plain(model, rows)
    assert_close(together, torch.cat(apart), "side by side", 1e-9)
    assert many[-1].outcomes == many.outcomes[-1:]
    with pytest.raises(IndexError, match="index 4 in an edit that holds 4"):
        many[4]
    assert one[0] is one and len(one) == 1


@pytest.mark.parametrize("kind", ONE_EACH)
@pytest.mark.parametrize("name", ["ft", "cache"])
def test_a_failure_inside_leaves_no_trace(kind: str, name: str) -> None:
    model, text, data = case(kind)
    edit = algorithms(model, text, data)[name].edit_many(model, text, data)
    with traceless(model):
        with pytest.raises(KeyError), edit.applied(model):
            raise KeyError
        rows = rows_of(model, text, data[:3])
        split = pytest.raises(ValueError, match="a batch of 3 rows does not split into 4 edits")
        with split, frozen(model), edit.applied(model):
            plain(model, rows)


@pytest.mark.parametrize("name", ["ft", "cache"])
def test_an_edit_of_another_model_is_refused(name: str) -> None:
    model, text, data = case("gpt2")
    edit = algorithms(model, text, data)[name].edit(model, text, data[0])
    other = FAMILY["gpt2"](seed=3)
    before = snapshot(other)
    with pytest.raises(ValueError, match="made for another model"), edit.applied(other):
        pass
    assert_same_bits(other, before)


@families
@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_a_dense_edit_acts_as_changed_weights(kind: str, many: bool) -> None:
    model, text, data = case(kind, torch.float64)
    weights = find_weights(model)
    residuals = {
        w.name: 0.1 * torch.randn(2, *weight_of(model, w).shape, dtype=torch.float64)
        for w in weights
    }
    rows = rows_of(model, text, data)
    expected = []
    for i in range(2):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for w in weights:
                weight_of(changed, w).add_(residuals[w.name][i])
        expected.append(plain(changed, rows[2 * i : 2 * i + 2]))
    edit = DenseEdit(weights, residuals)
    for i in range(2):
        with edit[i].applied(model):
            assert_close(plain(model, rows[2 * i : 2 * i + 2]), expected[i], "one", 1e-10)
    with edit.applied(model):
        assert_close(plain(model, rows), torch.cat(expected), "side by side", 1e-10)
    assert rel_error(expected[0], plain(model, rows[:2])) > 1e-3


def test_a_residual_of_another_shape_is_refused() -> None:
    model, *_ = case("gpt2")
    weights = find_weights(model)[:1]
    wrong = DenseEdit(weights, {weights[0].name: torch.zeros(3, 4)})
    refused = pytest.raises(ValueError, match=r"residual of .* is \(3, 4\), the weight")
    with refused, wrong.applied(model):
        pass
