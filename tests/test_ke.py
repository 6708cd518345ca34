"""KnowledgeEditor: its factored edit is the dense formula, and it trains, saves and edits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_encoders import data_of, model_of, words
from test_no_dense import no_dense
from test_trainer import SMALL, assert_same_run, log_of, stop_at
from tiny import (
    FAMILY,
    assert_close,
    assert_same_bits,
    facts,
    gpt2,
    llama,
    snapshot,
    tokenizer,
    traceless,
)
from torch import Tensor, nn

from pymend import Mend, Trainer, evaluate
from pymend.algorithms.ke import Ke, KeEditor
from pymend.algorithms.registry import load_editor
from pymend.config import EditRequest, KeConfig, TrainConfig
from pymend.edit import LowRank
from pymend.engine.hooks import frozen
from pymend.engine.tokens import Batch, Encoder, Row
from pymend.models.structure import EditedWeight, weight_of
from pymend.training.episodes import Sampler, run_episodes
from pymend.training.optim import EditorOptimizer

KINDS = (*FAMILY, "t5", "bert, one logit")
kinds = pytest.mark.parametrize("kind", KINDS)
WIDTHS = {"lstm": 6, "condition": 9, "hidden": 5}


def case(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, list[EditRequest]]:
    """A tiny model, its tokenizer, and facts that it takes."""
    if kind in FAMILY:
        return FAMILY[kind](dtype=dtype), tokenizer(), facts(16)
    # T5 starts with logits so large that a few steps cannot tame them.
    calm = {"initializer_factor": 1.0} if kind == "t5" else {}
    return model_of(kind, dtype, **calm), words(kind), data_of(kind, 16)


def tiny_ke(model: nn.Module, **config: Any) -> Ke:
    """An editor with small widths, in the model's precision."""
    torch.manual_seed(2)
    ke = Ke.from_config(model, KeConfig(**{**WIDTHS, **config}))
    ke.editor.to(next(model.parameters()).dtype)
    return ke


def train(algorithm: Any, kind: str, folder: Path, config: TrainConfig, **kw: Any) -> Trainer:
    """A trainer on a fresh tiny model; the same every time."""
    model, text, data = case(kind)
    held_out = data[12:]
    args = (algorithm(model), model, text, data[:12], held_out)
    return Trainer(*args, config=config, output=folder, progress=False, **kw)


def logits_at(logits: Tensor, batch: Batch) -> Tensor:
    """What a loss looks at, of a model's plain output."""
    if logits.dim() == 3:
        return logits[batch.row, batch.position]
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


# ---------------------------------------------------------------------------- the formula


def by_hand(ke: Ke, model: Any, row: Row) -> dict[str, Tensor]:
    """The dense update [b, a] of every weight, from the sentence that defines it."""
    batch = Batch.of([row])
    parameters = [weight_of(model, w) for w in ke.weights]
    with torch.enable_grad():
        for p in parameters:
            p.requires_grad_(True)
        logits = logits_at(model(**batch.inputs).logits, batch)
        grads = torch.autograd.grad(F.cross_entropy(logits, batch.target), parameters)
        for p in parameters:
            p.requires_grad_(False)
    editor, embed = ke.editor, model.get_input_embeddings()
    marks = editor.marks.weight
    answers = [logits.argmax(-1), batch.target]
    answers = [marks[2 + x] if row.label is not None else embed(x) for x in answers]
    prompt = embed(torch.tensor(row.prompt))
    text = torch.cat([answers[0], marks[:1], answers[1], marks[1:2], prompt])
    states = editor.lstm(text)[0]
    width = editor.lstm.hidden_size
    ends = torch.cat([states[-1, :width], states[0, width:]])  # forth, and back
    h = torch.tanh(editor.linear(ends))
    updates = {}
    for w, grad in zip(ke.weights, grads, strict=True):
        r1, c1, r2, c2, c = editor.nets[w.name.replace(".", "#")](h).split([w.b, w.a, w.b, w.a, 1])
        grad = grad.t() if w.transposed else grad
        mask, offset = torch.outer(r1.softmax(0), c1), torch.outer(r2.softmax(0), c2)
        updates[w.name] = torch.sigmoid(c) * (mask * grad + offset)
    return updates


def dense(factors: LowRank) -> Tensor:
    return factors.alpha * factors.delta.mT @ factors.u


def encoded(model: Any, text: Any, data: Sequence[EditRequest]) -> list[Row]:
    """Rows of different lengths: the first rephrase in place of every other prompt."""
    encoder = Encoder.for_model(model, text)
    requests = [encoder.request(r) for r in data]
    return [r.rephrases[0] if i % 2 else r.edit for i, r in enumerate(requests)]


@kinds
@torch.no_grad()
def test_the_factors_are_the_dense_formula(kind: str) -> None:
    model, text, data = case(kind, torch.float64)
    ke = tiny_ke(model, edit=("all",), blocks=1)
    rows = encoded(model, text, data[:4])
    assert len({len(r.prompt) + len(r.ids) for r in rows}) > 1, "the batch is padded"
    with frozen(model):
        replay = ke.replay(model)
        replay.load(rows)
        many = ke.compute(replay, rows)
    for i, row in enumerate(rows):
        for name, wanted in by_hand(ke, model, row).items():
            assert wanted.norm() > 0
            assert_close(dense(many.factors[name])[i], wanted, f"edit {i}, {name}", 1e-10)
            assert_close(dense(many[i].factors[name]), wanted, f"edit[{i}], {name}", 1e-10)


@kinds
@torch.no_grad()
def test_an_edit_takes_the_update_off_the_weights(kind: str) -> None:
    model, text, data = case(kind, torch.float64)
    ke = tiny_ke(model)
    edit = ke.edit(model, text, data[0])
    (row,) = encoded(model, text, data[:1])
    updates = by_hand(ke, model, row)
    batch = Batch.of([row])
    unedited = model(**batch.inputs).logits
    with edit.applied(model):
        edited = model(**batch.inputs).logits
    for w in ke.weights:
        update = updates[w.name]
        weight_of(model, w).sub_(update.t() if w.transposed else update)
    assert_close(edited, model(**batch.inputs).logits, "edited logits", 1e-9)
    assert (edited - unedited).abs().max() > 1e-6, "the edit does something"


def test_one_fact_at_a_time() -> None:
    model = gpt2()
    with (
        pytest.warns(UserWarning, match="n_edits=1 at once, not for 2"),
        pytest.raises(ValueError, match=r"2 facts in 1 edit\(s\): KE edits one fact at a time"),
    ):
        tiny_ke(model).edit(model, tokenizer(), facts(2))


def test_it_merges_and_is_undone_like_any_edit() -> None:
    model = llama()
    before = snapshot(model)
    edit = tiny_ke(model).edit(model, tokenizer(), facts(1)[0])
    ids = torch.arange(4, 12)[None]
    with torch.no_grad(), edit.applied(model):
        applied = model(ids).logits
    edit.merge_(model)
    with torch.no_grad():
        assert_close(model(ids).logits, applied, "merged logits", 1e-4)
    edit.unmerge_(model)
    assert_same_bits(model, before)


# ---------------------------------------------------------------------------- training


@kinds
def test_gradients_reach_every_parameter(kind: str, tmp_path: Path) -> None:
    run = train(tiny_ke, kind, tmp_path, SMALL)
    with frozen(run.model):
        run._accumulate(run.sampler.step(0))
    for name, p in run.algorithm.editor.named_parameters():
        assert p.grad is not None and p.grad.any(), name
    marks = run.algorithm.editor.marks.weight.grad
    assert marks.any(1).all(), "both separators and every class"


@kinds
def test_training_lowers_the_loss(kind: str, tmp_path: Path) -> None:
    config = replace(SMALL, steps=16, batch_size=12, lr=2e-2, eval_every=50)
    run = train(tiny_ke, kind, tmp_path, config)
    model, text, data = case(kind)
    with traceless(run.model):
        trained = run.train()
    losses = [x["loss"] for x in log_of(tmp_path) if "loss" in x]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3]), losses
    assert "alpha" not in log_of(tmp_path)[0]
    with traceless(model):
        metrics = evaluate(trained, model, text, data[:5], batch_size=3, progress=False)
    outcomes = trained.edit_many(model, text, data[:5]).outcomes
    assert [r.edit_success for r in metrics.records] == [o.success for o in outcomes]


def test_resuming_is_exact(tmp_path: Path) -> None:
    train(tiny_ke, "gpt2", tmp_path / "a", SMALL).train()
    stop_at(train(tiny_ke, "gpt2", tmp_path / "b", SMALL), 5)
    train(tiny_ke, "gpt2", tmp_path / "b", SMALL, resume=True).train()
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("family", FAMILY)
def test_nothing_of_a_weights_size(family: str) -> None:
    model, text, data = case(family)
    ke = tiny_ke(model)
    optimizer = EditorOptimizer(ke, TrainConfig(lr=1e-3))
    records = Encoder.for_model(model, text).requests(data)
    episodes = Sampler(records, 1, 3, seed=0).step(0)
    with no_dense(model, ke), frozen(model):
        scores = run_episodes(ke, ke.replay(model), episodes, "both", merge=True)
        (0.1 * scores.nll + scores.kl).mean().backward()
        assert optimizer.step(0) > 0
    with no_dense(model, ke):
        ke.edit_many(model, text, data[:3])


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["gpt2", "bert, one logit"])
def test_files_bring_it_back(kind: str, tmp_path: Path) -> None:
    model, text, data = case(kind)
    ke = tiny_ke(model)
    ke.save_pretrained(tmp_path)
    loaded = load_editor(tmp_path)
    assert isinstance(loaded, Ke) and loaded.config == ke.config and loaded.weights == ke.weights
    edits = [x.edit(model, text, data[0]) for x in (ke, loaded)]
    assert edits[0].outcomes == edits[1].outcomes
    for name, factors in edits[0].factors.items():
        assert torch.equal(factors.delta, edits[1].factors[name].delta)


def test_a_folder_says_its_kind(tmp_path: Path) -> None:
    tiny_ke(gpt2()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an editor of the kind ke, not mend"):
        Mend.from_pretrained(tmp_path)
    file = tmp_path / "editor.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "kind": "rome"}))
    with pytest.raises(ValueError, match="no editor of the kind 'rome'; known are mend, enn, ke"):
        load_editor(tmp_path)
    file.write_text(json.dumps({**values, "sizes": {"width": 22}}))
    with pytest.raises(ValueError, match="does not belong to the JSON file"):
        load_editor(tmp_path)


def test_the_default_widths_are_those_of_the_paper() -> None:
    weight = EditedWeight("w", "m", 5, 7, False, 0)
    editor = KeEditor([weight], KeConfig(), width=3, classes=0)
    shapes = {n: tuple(p.shape) for n, p in editor.named_parameters()}
    assert shapes["lstm.weight_hh_l0_reverse"] == (4 * 512, 512)
    assert shapes["linear.weight"] == (768, 2 * 512)
    directions = [s for n, s in shapes.items() if n.endswith("weight.original1")]
    assert directions == [(512, 768), (2 * (5 + 7) + 1, 512)]


def test_there_is_no_step_size_to_scale() -> None:
    ke = tiny_ke(gpt2())
    assert ke.scale_(1.0) is ke
    with pytest.raises(ValueError, match=r"strength is 0.5, but ke has no step sizes"):
        ke.scale_(0.5)


@pytest.mark.parametrize("name", ["lstm", "condition", "hidden"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        KeConfig(**{name: 0})
