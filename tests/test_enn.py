"""ENN: its gradients are those of the definition, its base is a copy, and it trains and edits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_encoders import data_of, model_of, words
from test_ke import KINDS, case, kinds, logits_at, train
from test_trainer import SMALL, assert_same_run, log_of, stop_at
from tiny import (
    assert_close,
    assert_same_bits,
    build,
    facts,
    gpt2,
    llama,
    random_episodes,
    rel_error,
    snapshot,
    tokenizer,
    traceless,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pymend import evaluate
from pymend.algorithms.enn import Enn, EnnEdit
from pymend.algorithms.registry import load_editor
from pymend.config import EnnConfig, TrainConfig
from pymend.engine.hooks import frozen
from pymend.engine.tokens import Batch, Encoder
from pymend.training.episodes import Episode, Sampler, run_episodes
from pymend.training.optim import EditorOptimizer

orders = pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])


def tiny_enn(model: nn.Module, moved: float = 0.0, **config: Any) -> Enn:
    """An ENN whose base lies off the model by ``moved``."""
    torch.manual_seed(3)
    enn = Enn.from_config(model, EnnConfig(**config))
    with torch.no_grad():
        for p in enn.editor.base.values():
            p += moved * torch.randn_like(p)
    if next(model.parameters()).dtype == torch.float64:
        enn.editor.alpha.data = enn.editor.alpha.data.double()
    return enn


# ---------------------------------------------------------------------------- the definition


def definition(
    enn: Enn, model: Any, episode: Episode, second_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, KL and penalty of an episode, from dense gradients of plain calls; differentiable."""
    params = dict(enn.editor.named_base())

    def run(rows: Any, values: dict[str, Tensor] | None) -> tuple[Tensor, Batch]:
        batch = Batch.of(rows)
        with sdpa_kernel(SDPBackend.MATH):
            output = functional_call(model, values or {}, (), batch.inputs)
        return logits_at(output.logits, batch), batch

    def nll(rows: Any, values: dict[str, Tensor]) -> Tensor:
        logits, batch = run(rows, values)
        return F.cross_entropy(logits, batch.target)

    def kl(base: Tensor, edited: Tensor) -> Tensor:
        p, q = base.log_softmax(-1), edited.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    names = [w.name for w in enn.weights]
    inner = torch.stack([nll([row], params) for row in episode.edits]).sum()
    grads = torch.autograd.grad(inner, [params[n] for n in names], create_graph=second_order)
    edited = dict(params)
    for name, grad, alpha in zip(names, grads, enn.editor.alpha, strict=True):
        edited[name] = params[name] - alpha * grad
    with torch.no_grad():
        original, _ = run(list(episode.locality), None)
    outer = nll(episode.rephrases, edited)
    kept = kl(original, run(list(episode.locality), edited)[0])
    drift = kl(original, run(list(episode.locality), params)[0])
    return outer, kept, enn.config.c_base * drift


def episodes_of(kind: str, model: Any, text: Any, data: Any, n_edits: int) -> list[Episode]:
    records = Encoder.for_model(model, text).requests(data)
    return Sampler(records, n_edits, 3, seed=0).step(0)


@orders
@pytest.mark.parametrize(
    ("kind", "n_edits"), [("gpt2", 1), ("gpt2", 2), ("llama", 1), ("bert, one logit", 1)]
)
def test_losses_and_gradients_are_the_definition(
    kind: str, n_edits: int, second_order: bool
) -> None:
    model, text, data = case(kind, torch.float64)
    settings = {"alpha": 0.3, "second_order": second_order, "c_base": 0.7, "n_edits": n_edits}
    enn = tiny_enn(model, moved=0.02, **settings)
    episodes = episodes_of(kind, model, text, data, n_edits)
    with frozen(model):
        scores = run_episodes(enn, enn.replay(model), episodes, "rephrase", merge=True)
        assert scores.penalty is not None
        losses = torch.stack([scores.nll, scores.kl, scores.penalty])
        (0.1 * losses[0] + losses[1] + losses[2]).sum().backward()
    ours = {n: p.grad for n, p in enn.editor.named_parameters()}
    enn.editor.zero_grad()
    parts = zip(*(definition(enn, model, e, second_order) for e in episodes), strict=True)
    wanted = torch.stack([torch.stack(part) for part in parts])
    (0.1 * wanted[0] + wanted[1] + wanted[2]).sum().backward()
    assert_close(losses, wanted, "losses", 1e-10)
    assert (losses > 0).all()
    largest = max(float(p.grad.norm()) for p in enn.editor.parameters())
    for name, p in enn.editor.named_parameters():
        # No attention depends on a bias of its keys: that gradient is 0 but for rounding.
        scale = max(float(p.grad.norm()), 1e-6 * largest)
        assert (ours[name] - p.grad).norm() <= 1e-8 * scale, f"gradient of {name}"


def test_the_orders_differ() -> None:
    model = gpt2(dtype=torch.float64)
    gradients = []
    for second_order in (True, False):
        enn = tiny_enn(model, alpha=0.3, second_order=second_order)
        with frozen(model):
            scores = run_episodes(
                enn, enn.replay(model), random_episodes(2), "rephrase", merge=True
            )
            scores.nll.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in enn.editor.base.values()]))
    assert rel_error(*gradients) > 1e-3


@orders
def test_layers_large_enough_for_fast_products(second_order: bool) -> None:
    """Products of frozen layers can be differentiated once only; those of the base are not them."""
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.1}
    model = build("llama", max_position_embeddings=32, **sizes)
    enn = tiny_enn(model, second_order=second_order)
    with frozen(model):
        scores = run_episodes(enn, enn.replay(model), random_episodes(2), "both", merge=True)
        scores.nll.sum().backward()
    for name, p in enn.editor.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


# ---------------------------------------------------------------------------- the base is a copy


@kinds
def test_a_new_base_is_the_model_itself(kind: str) -> None:
    model, text, data = case(kind)
    enn = tiny_enn(model)
    row = Encoder.for_model(model, text).request(data[0]).edit
    inputs = Batch.of([row]).inputs
    with torch.no_grad():
        plain = model(**inputs).logits
        with enn.adapted(model):
            assert torch.equal(model(**inputs).logits, plain)
    copies = {p.untyped_storage().data_ptr() for p in enn.editor.parameters()}
    assert not copies & {p.untyped_storage().data_ptr() for p in model.parameters()}


@kinds
@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_parameters_come_back(kind: str, fails: bool) -> None:
    model, text, data = case(kind)
    enn = tiny_enn(model, moved=0.1)
    edit = enn.edit(model, text, data[0])
    own = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    before = snapshot(model)
    failure = pytest.raises(KeyError) if fails else nullcontext()
    with traceless(model), failure, edit.applied(model):
        assert not {id(p) for p in model.parameters()} & set(own.values())
        if fails:
            raise KeyError
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == own
    assert_same_bits(model, before)


def test_a_batch_that_does_not_split_leaves_no_trace() -> None:
    model = gpt2()
    edits = tiny_enn(model).edit_many(model, tokenizer(), facts(2))
    ids = torch.arange(4, 12)[None]
    with (
        traceless(model),
        pytest.raises(ValueError, match="a batch of 1 rows does not split into 2 edits"),
        edits.applied(model),
    ):
        model(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@orders
def test_models_of_low_precision(dtype: torch.dtype, second_order: bool) -> None:
    """The copy is float32, and acts in the model's own precision."""
    model = llama(dtype=dtype)
    enn = tiny_enn(model, second_order=second_order)
    assert {p.dtype for p in enn.editor.parameters()} == {torch.float32}
    ids = torch.arange(4, 12)[None]
    with torch.no_grad(), enn.adapted(model):
        assert model(ids).logits.dtype == dtype
    with frozen(model):
        scores = run_episodes(enn, enn.replay(model), random_episodes(2), "both", merge=True)
        (scores.nll + scores.kl).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in enn.editor.parameters())


def test_another_model_is_refused() -> None:
    enn = tiny_enn(gpt2())
    with pytest.raises(ValueError, match=r"has the foreign parameter transformer\.h\.4"):
        enn.edit(gpt2(layers=5), tokenizer(), facts(1)[0])
    wide = gpt2()
    wide.resize_token_embeddings(70)
    edit = enn.edit(gpt2(), tokenizer(), facts(1)[0])
    wrong = r"wte.weight is \(70, 22\) in this model, expected \(61, 22\)"
    with pytest.raises(ValueError, match=wrong), edit.applied(wide):
        pass


def test_a_quantised_model_is_refused() -> None:
    model = gpt2()
    model.transformer.wpe.weight = nn.Parameter(torch.zeros(32, 22, dtype=torch.int8), False)
    with pytest.raises(ValueError, match=r"transformer.wpe.weight is quantised"):
        Enn.from_config(model)


# ---------------------------------------------------------------------------- training, editing


@pytest.mark.parametrize(
    ("kind", "second_order"), [*((kind, True) for kind in KINDS), ("gpt2", False)]
)
def test_training_lowers_the_loss(kind: str, second_order: bool, tmp_path: Path) -> None:
    config = replace(SMALL, steps=12, batch_size=12, lr=1e-3, alpha_lr=1e-3, eval_every=30)
    model, text, data = case(kind)
    run = train(lambda m: tiny_enn(m, second_order=second_order), kind, tmp_path, config)
    before = {k: v.clone() for k, v in run.algorithm.editor.state_dict().items()}
    with traceless(run.model):
        trained = run.train()
    log = [x for x in log_of(tmp_path) if "loss" in x]
    losses = [x["loss"] for x in log]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    assert abs(log[0]["penalty"]) < 1e-6 < log[-1]["penalty"], "the base has moved"
    for name, value in trained.editor.state_dict().items():
        assert not torch.equal(value, before[name]), name
    with traceless(model):
        metrics = evaluate(trained, model, text, data[:5], batch_size=3, progress=False)
    outcomes = trained.edit_many(model, text, data[:5]).outcomes
    assert [r.edit_success for r in metrics.records] == [o.success for o in outcomes]


def test_resuming_is_exact(tmp_path: Path) -> None:
    train(tiny_enn, "gpt2", tmp_path / "a", SMALL).train()
    stop_at(train(tiny_enn, "gpt2", tmp_path / "b", SMALL), 5)
    train(tiny_enn, "gpt2", tmp_path / "b", SMALL, resume=True).train()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_parameter_that_nothing_depends_on_does_not_hinder_a_resume(tmp_path: Path) -> None:
    enn = tiny_enn(gpt2())
    optimizer = EditorOptimizer(enn, TrainConfig())
    for p in optimizer.parameters[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step(0)
    again = EditorOptimizer(enn, TrainConfig())
    again.load(optimizer.state(), tmp_path)
    assert again.steps == dict(enumerate([0] + [1] * (len(optimizer.parameters) - 1)))


def test_independent_edits_equal_single_ones() -> None:
    model, data = gpt2(dtype=torch.float64), facts(3)
    enn = tiny_enn(model, moved=0.02, alpha=0.3)
    many = enn.edit_many(model, tokenizer(), data)
    assert len(many) == 3 and isinstance(many, EnnEdit)
    ids = torch.arange(4, 12)[None]
    for i, request in enumerate(data):
        one = enn.edit(model, tokenizer(), request)
        assert one.fingerprint == many[i].fingerprint == many.fingerprint != ""
        assert many[i].outcomes[0].answer_after == one.outcomes[0].answer_after
        with torch.no_grad():
            with one.applied(model):
                expected = model(ids).logits
            with many[i].applied(model):
                assert_close(model(ids).logits, expected, f"edit {i}", 1e-9)


def test_an_edit_is_made_on_an_edited_model() -> None:
    """The second step starts where the first one ended."""
    model, text = gpt2(dtype=torch.float64), tokenizer()
    enn = tiny_enn(model, alpha=0.3)
    first, second = facts(2)
    one = enn.edit(model, text, first)
    apart = enn.edit(model, text, second)
    with one.applied(model):
        then = enn.edit(model, text, second)
    name = enn.weights[0].name
    assert rel_error(then.step.factors[name].delta, apart.step.factors[name].delta) > 1e-4


def test_several_facts_at_once_are_one_step_on_the_sum_of_their_losses() -> None:
    model, text = gpt2(dtype=torch.float64), tokenizer()
    enn = tiny_enn(model, n_edits=2)
    joint = enn.edit(model, text, facts(2)).step.factors
    apart = enn.edit_many(model, text, facts(2)).step.factors
    for name, f in joint.items():
        assert_close(f.delta.mT @ f.u, (apart[name].delta.mT @ apart[name].u).sum(0), name, 1e-10)


def test_generation_with_an_edit() -> None:
    model, text = model_of("t5"), words("t5")
    edit = tiny_enn(model, alpha=1.0).edit(model, text, data_of("t5", 1)[0])
    inputs = text(["ba be bi"], return_tensors="pt", return_token_type_ids=False)
    unedited = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    with edit.applied(model):
        edited = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    again = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(again, unedited) and not torch.equal(edited, unedited)


# ---------------------------------------------------------------------------- files


def test_files_bring_it_back(tmp_path: Path) -> None:
    model, text = llama(), tokenizer()
    enn = tiny_enn(model, moved=0.02)
    enn.save_pretrained(tmp_path)
    loaded = load_editor(tmp_path)
    assert isinstance(loaded, Enn) and loaded.config == enn.config
    for name, value in enn.editor.state_dict().items():
        assert torch.equal(loaded.editor.state_dict()[name], value), name
    request = facts(1)[0]
    assert loaded.edit(model, text, request).outcomes == enn.edit(model, text, request).outcomes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_edits": 0}, "n_edits is 0"),
        ({"c_base": -1.0}, "c_base is -1.0; it must be at least 0"),
        ({"alpha": float("nan")}, "alpha is nan; it must be finite"),
        ({"blocks": -1}, "blocks is -1"),
    ],
    ids=str,
)
def test_bad_settings_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnnConfig(**setting)
