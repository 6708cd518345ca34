"""Experts whose matrices are one parameter: edited like any other, each by its own tokens or all
alike. The oracle is autograd on the model as it is.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from test_no_dense import NoDense
from tiny import (
    CONTEXT,
    assert_same_bits,
    exact_norms,
    random_episodes,
    seasoned_mend,
    snapshot,
    tiny_mend,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pymend.algorithms.mend.mend import Mend
from pymend.config import FineTuneConfig, TrainConfig
from pymend.edit import Edit, LowRank
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Row
from pymend.models.structure import EditedWeight, find_weights, left_out, weight_of
from pymend.training.episodes import run_episodes
from pymend.training.optim import EditorOptimizer

f64 = torch.float64
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "max_position_embeddings": CONTEXT,
}
FEW: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEP: dict[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 6},
    "qwen3_moe": {**FEW, "head_dim": 6},
    "qwen3_next": {
        **FEW,
        "head_dim": 8,
        "shared_expert_intermediate_size": 18,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 6,
        # This attention computes in float32, so gradients through it are no exact ones.
        "layer_types": ["linear_attention", *["full_attention"] * 3],
    },
    "olmoe": {"num_experts": 5, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 6},
    "deepseek_v3": {**DEEP, **LATENT, "v_head_dim": 6, "num_key_value_heads": 2},
    "glm4_moe": {**DEEP, "head_dim": 6},
}
# Of a text among others against alone: parts of these models compute in float32 whatever they are.
ALONE = dict.fromkeys(("qwen3_next", "deepseek_v3", "glm4_moe"), 1e-6)
families = pytest.mark.parametrize("family", FAMILIES)
WAYS = ("routed", "shared")
ways = pytest.mark.parametrize("way", WAYS)


def model_of(family: str, dtype: torch.dtype = torch.float32, **sizes: int) -> Any:
    model = tiny.build(family, dtype, **{**SIZES, **FAMILIES[family], **sizes})
    if dtype == f64:
        model.set_experts_implementation("eager")  # grouped_mm, the default, knows no float64
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "expert" in name and "bias" in name:
                p.normal_(0, 0.3)  # or a lost one would not show
    return model


def rows_of(count: int) -> list[Row]:
    return [row for e in random_episodes(count) for row in e.edits]


def loss_of(model: Any, row: Row) -> Tensor:
    """The token mean of a row, as its definition is written down."""
    ids = torch.tensor([row.ids[:-1]])
    logits = model(input_ids=ids, use_cache=False).logits[0, row.first :]
    return cross_entropy(logits, torch.tensor(row.ids[row.first + 1 :]))


def dense(f: Any, w: EditedWeight) -> Tensor:
    """The sum of the outer products of factors, as the parameter lies: [experts, ., .]."""
    total = torch.zeros(w.experts, w.b, w.a, dtype=f.u.dtype)
    for i in range(len(f.u)):
        for e in range(w.experts) if f.expert is None else [int(f.expert[i])]:
            total[e] += torch.outer(f.delta[i], f.u[i])
    return total.mT if w.transposed else total


def edits(model: Any, way: str, rows: Sequence[Row], joint: bool = False) -> tuple[Mend, Edit]:
    mend = seasoned_mend(model, edit=(way,), alpha=0.05)
    with frozen(model):
        replay = Replay(model, mend.weights)
        replay.load(rows)
        return mend, mend.compute(replay, rows, joint)


@torch.no_grad()
def logits(model: Any, rows: Sequence[Row]) -> list[Tensor]:
    return [model(input_ids=torch.tensor([row.ids]), use_cache=False).logits for row in rows]


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return max(tiny.rel_error(a, b) for a, b in zip(found, wanted, strict=True))


# -- which ----------------------------------------------------------------------------------------


@families
def test_weights_of_experts_are_found_in_the_last_blocks(family: str) -> None:
    model = model_of(family)
    weights = find_weights(model, ("routed",))
    assert [re.sub(r".*layers\.(\d)\.mlp\.", r"\1 ", w.name) for w in weights] == [
        f"{i} experts.{key}" for i in (1, 2, 3) for key in ("gate_up_proj", "down_proj")
    ]
    assert {w.shape for w in weights} == {
        (24, 2 * weights[1].a),
        (weights[1].a, 24),
    }
    assert [w.mode for w in weights] == [0, 0, 1, 1, 2, 2]
    assert all(w.routed and w.experts in (5, 6) for w in weights)
    assert {w.transposed for w in weights} == {family == "gpt_oss"}
    alike = find_weights(model, ("shared",))
    assert [w.name for w in alike] == [w.name for w in weights]
    assert not any(w.routed for w in alike)


@families
def test_experts_are_the_mlp_where_a_block_has_no_other(family: str) -> None:
    model = model_of(family)
    names = [w.name for w in find_weights(model)]
    other = family in ("qwen3_next", "deepseek_v3", "glm4_moe")
    assert all((".shared_expert" in n) is other for n in names)
    assert all((".experts." in n) is not other for n in names)
    beside = left_out(model, find_weights(model))
    assert ("experts in one parameter" in beside.values()) is other


def test_rivals_refuse_experts() -> None:
    from pymend.algorithms.finetune import FineTune

    with pytest.raises(ValueError, match=r"gate_up_proj holds the matrices of experts, which only"):
        FineTune.from_config(model_of("mixtral"), FineTuneConfig())


# -- capture --------------------------------------------------------------------------------------


@families
@ways
def test_factors_are_the_gradient(family: str, way: str) -> None:
    model, rows = model_of(family, f64), rows_of(4)
    mend = tiny_mend(model, edit=(way,))
    with frozen(model):
        replay, alone = Replay(model, mend.weights), []
        for row in rows:
            replay.load([row])
            alone.append(mend.capture(replay, [row], 1))
        replay.load(rows)
        together = mend.capture(replay, rows, len(rows))
    parameters = [weight_of(model, w) for w in mend.weights]
    for i, row in enumerate(rows):
        grads = torch.autograd.grad(loss_of(model, row), parameters)
        for w, grad in zip(mend.weights, grads, strict=True):
            wanted = grad if w.routed else grad.sum(0, keepdim=True).expand_as(grad)
            assert grad.flatten(1).norm(dim=1).count_nonzero() >= 2, "several experts were asked"
            assert tiny.rel_error(dense(alone[i][w.name], w), wanted) <= 1e-9, w.name
            many = together[w.name]
            start = sum(many.counts[:i])
            own = slice(start, start + many.counts[i])
            expert = None if many.expert is None else many.expert[own]
            part = LowRank(many.u[own], many.delta[own], torch.ones(()), expert)
            assert tiny.rel_error(dense(part, w), wanted) <= ALONE.get(family, 1e-9), w.name


@ways
def test_factors_do_not_depend_on_how_the_model_computes_its_experts(way: str) -> None:
    """Transformers has several ways, chosen by the configuration."""
    found = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model, rows = model_of("mixtral"), rows_of(2)
        model.set_experts_implementation(implementation)
        mend = tiny_mend(model, edit=(way,))
        with frozen(model):
            replay = Replay(model, mend.weights)
            replay.load(rows)
            found.append(mend.capture(replay, rows, 2))
    for other in found[1:]:
        for w in mend.weights:
            assert tiny.rel_error(dense(other[w.name], w), dense(found[0][w.name], w)) <= 1e-5


# -- edit -----------------------------------------------------------------------------------------


@families
@ways
def test_applied_is_merged_and_undone(family: str, way: str) -> None:
    model, rows = model_of(family, f64), rows_of(3)
    _, many = edits(model, way, rows)
    _, joint = edits(model, way, rows, joint=True)
    before, bits = logits(model, rows), snapshot(model)
    for edit in (many[1], joint, many[0] + many[2]):
        with edit.applied(model):
            applied = logits(model, rows)
        assert worst(applied, before) > 1e-4, "the edit shows"
        assert_same_bits(model, bits)
        name = edit.fingerprint
        edit.merge_(model)
        assert worst(logits(model, rows), applied) <= 1e-12
        assert edit.fingerprint == name
        edit.unmerge_(model)
        assert_same_bits(model, bits)
    with many.applied(model), torch.no_grad():
        batch = tiny.logits_of(model, rows)
    for i, row in enumerate(rows):
        with many[i].applied(model):
            (alone,) = logits(model, [row])
        size = len(row.ids) - 1  # the last token of an answer is not read
        assert tiny.rel_error(batch[i : i + 1, :size], alone[:, :size]) <= ALONE.get(family, 1e-12)


@ways
def test_edits_stack_and_leave_nothing(way: str) -> None:
    model, rows = model_of("gpt_oss", f64), rows_of(2)
    _, many = edits(model, way, rows)
    first, second = many[0], many[1]
    with (first + second).applied(model):
        wanted = logits(model, rows)
    with first.applied(model), second.applied(model):
        assert worst(logits(model, rows), wanted) <= 1e-12
    first.merge_(model)
    with second.applied(model):
        assert worst(logits(model, rows), wanted) <= 1e-12
    second.merge_(model)
    assert worst(logits(model, rows), wanted) <= 1e-12
    with pytest.raises(RuntimeError, match="unmerge the last one first"):
        first.unmerge_(model)
    second.unmerge_(model)
    first.unmerge_(model)
    assert not any("forward" in vars(m) for m in model.modules())


def test_routed_and_shared_edits_of_one_model() -> None:
    model, rows = model_of("olmoe", f64), rows_of(2)
    (_, routed), (_, shared) = edits(model, "routed", rows[:1]), edits(model, "shared", rows[1:])
    routed, shared = routed[0], shared[0]
    with routed.applied(model), shared.applied(model):
        together = logits(model, rows)
    routed.merge_(model)
    shared.merge_(model)
    assert worst(logits(model, rows), together) <= 1e-12


@ways
def test_files(way: str, tmp_path: Path) -> None:
    model, rows = model_of("mixtral"), rows_of(2)
    mend, many = edits(model, way, rows)
    edit = many[0]
    edit.save_pretrained(tmp_path / "edit")
    mend.save_pretrained(tmp_path / "editor")
    loaded = Edit.from_pretrained(tmp_path / "edit")
    assert loaded.weights == edit.weights
    with edit.applied(model):
        wanted = logits(model, rows)
    with loaded.applied(model):
        assert all(torch.equal(a, b) for a, b in zip(logits(model, rows), wanted, strict=True))
    assert Mend.from_pretrained(tmp_path / "editor").weights == mend.weights
    with pytest.raises(ValueError, match=r"has no 5 experts .* made for another model"):
        loaded.check(model_of("gpt_oss"))
    if way == "routed":
        name = edit.weights[0].name
        edit.factors[name].expert[0] = 9
        edit.save_pretrained(tmp_path / "odd")
        with pytest.raises(ValueError, match="has no such experts"):
            Edit.from_pretrained(tmp_path / "odd")


@families
@ways
def test_peft_loads_them(family: str, way: str, tmp_path: Path) -> None:
    model, rows = model_of(family), rows_of(2)
    _, many = edits(model, way, rows)
    many[0].to_peft(tmp_path / "adapter")
    with many[0].applied(model):
        wanted = logits(model, rows)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).eval()
    assert worst(logits(model, rows), wanted) > 1e-3
    assert worst(logits(adapted, rows), wanted) <= 1e-4


# -- size -----------------------------------------------------------------------------------------


class NoStack(NoDense):
    """Fails at tensors of the size of a parameter or of one of its matrices."""

    def __init__(self, model: nn.Module, weights: Sequence[EditedWeight], matrices: bool) -> None:
        super().__init__(model, weights)
        if matrices:
            self.sizes |= {w.a * w.b: w.name for w in weights}


@ways
def test_nothing_of_the_size_of_the_experts(way: str) -> None:
    # Wider than there are rows, or some rows would have the size of a matrix by chance.
    model = model_of("qwen3_moe", hidden_size=128, moe_intermediate_size=60)
    rows, mend = rows_of(2), tiny_mend(model, edit=(way,))
    optimizer = EditorOptimizer(mend, TrainConfig(lr=1e-3))
    with NoStack(model, mend.weights, matrices=True) as mode, frozen(model):
        replay = Replay(model, mend.weights)
        scores = run_episodes(mend, replay, random_episodes(1), "both", merge=True)
        (0.1 * scores.nll + scores.kl).mean().backward()
        optimizer.step(0)
        replay.load(rows)
        edit = mend.compute(replay, rows)
        with edit.applied(model), torch.no_grad():
            tiny.logits_of(model, rows)
    assert mode.seen > 100
    one = edit[0]
    with NoStack(model, mend.weights, matrices=False) as mode:
        one.merge_(model)
        one.unmerge_(model)
    assert mode.seen > 10


# -- training -------------------------------------------------------------------------------------


@ways
def test_a_training_step_is_that_of_dense_edits(way: str) -> None:
    """The outer loss and alpha's gradient, with the edited parameters written out."""
    model = exact_norms(model_of("mixtral", f64))
    mend = seasoned_mend(model, edit=(way,), alpha=0.05)
    (episode,) = random_episodes(1)
    with frozen(model):
        replay = Replay(model, mend.weights)
        scores = run_episodes(mend, replay, [episode], "rephrase", merge=False)
        scores.nll.sum().backward()
        replay.load(episode.edits)
        moved = mend.factors(mend.capture(replay, episode.edits, 1), joint=True)
    found = mend.editor.alpha.grad
    assert found is not None
    alpha = mend.editor.alpha.detach().clone().requires_grad_()
    changed = {
        w.name: weight_of(model, w).detach() - alpha[i] * dense(moved[w.name], w).detach()
        for i, w in enumerate(mend.weights)
    }
    (row,) = episode.rephrases
    out = torch.func.functional_call(model, changed, (torch.tensor([row.ids]),)).logits[0]
    wanted = cross_entropy(out[row.first : -1], torch.tensor(row.ids[row.first + 1 :]))
    assert abs(float(scores.nll.sum()) - float(wanted)) <= 1e-9 * abs(float(wanted))
    wanted.backward()
    assert alpha.grad is not None and tiny.rel_error(found, alpha.grad) <= 1e-8


def test_a_replaced_forward_is_refused_by_name() -> None:
    model = model_of("mixtral")
    mend = seasoned_mend(model, edit=("routed",))
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.forward = module.forward
    with pytest.raises(ValueError, match="MixtralExperts is replaced by another tool"):
        mend.edit(model, tiny.tokenizer(), tiny.facts(1)[0])


@ways
def test_contexts_may_end_in_any_order(way: str) -> None:
    model, rows = model_of("mixtral", f64), rows_of(2)
    _, many = edits(model, way, rows)
    before = logits(model, rows)
    first, second = many[0].applied(model), many[1].applied(model)
    with many[1].applied(model):
        alone = logits(model, rows)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert worst(logits(model, rows), alone) <= 1e-12
    second.__exit__(None, None, None)
    assert all(torch.equal(a, b) for a, b in zip(logits(model, rows), before, strict=True))
    assert not any("forward" in vars(m) for m in model.modules())


@ways
def test_a_batch_that_does_not_split_is_refused(way: str) -> None:
    """Experts are given tokens, of which there may be a fitting number."""
    model, rows = model_of("mixtral"), rows_of(2)
    _, many = edits(model, way, rows)
    ids = torch.arange(4, 16).view(3, 4)
    with many.applied(model), torch.no_grad():
        with pytest.raises(ValueError, match="a batch of 3 rows does not split into 2 edits"):
            model(input_ids=ids)
        with pytest.raises(ValueError, match="a batch of 3 rows does not split into 2 edits"):
            model(ids)
        model(input_ids=ids[:2])


def test_a_model_that_wears_an_adapter_of_its_experts() -> None:
    """PEFT wraps the module once for each of its parameters."""
    model, rows = model_of("mixtral"), rows_of(1)
    mend, plain = edits(model, "routed", rows)
    names = [w.name for w in mend.weights]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=names)
    wearing = peft.get_peft_model(copy.deepcopy(model), config).eval()
    assert [w.name for w in find_weights(wearing, ("routed",))] == names
    with frozen(wearing), plain.applied(wearing):
        worn = logits(wearing, rows)
    with plain.applied(model):
        assert worst(worn, logits(model, rows)) <= 1e-5  # a new adapter adds nothing
