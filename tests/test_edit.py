"""Edits in use: padding, batch mates, generation, stacking, sequences, files, precision."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    FAMILY,
    WORDS,
    assert_close,
    assert_same_bits,
    build,
    facts,
    gpt2,
    llama,
    logits_of,
    rel_error,
    seasoned_mend,
    snapshot,
    tokenizer,
)
from torch import Tensor

from pymend import Edit, EditRequest
from pymend.algorithms.mend.mend import Mend
from pymend.edit import fingerprint
from pymend.engine.tokens import Encoder, Row
from pymend.models.structure import find_weights

f64 = torch.float64
ROWS = [Row((5, 9, 30, 7, 11), 2), Row((8, 6, 12), 1), Row(tuple(range(20, 28)), 0, False)]


def assert_same_edit(a: Edit, b: Edit, tolerance: float) -> None:
    assert a.weights == b.weights
    for name, f in a.factors.items():
        g = b.factors[name]
        assert_close(f.u, g.u, f"u {name}", tolerance)
        assert_close(f.delta, g.delta, f"delta {name}", tolerance)
        assert torch.equal(f.alpha, g.alpha), name


# -------------------------------------------------------------- what an edit does not depend on


@pytest.mark.parametrize("family", FAMILY)
def test_padding_side_and_batch_mates_do_not_change_an_edit(family: str) -> None:
    model = FAMILY[family](dtype=f64)
    mend = seasoned_mend(model)
    long = EditRequest(" ".join(WORDS[:12]), " ".join(WORDS[12:16]))
    short = EditRequest(WORDS[20], WORDS[21])
    subject = facts(1)[0]
    alone = mend.edit(model, tokenizer(True), subject)
    for side in ("left", "right"):
        text = tokenizer(True, padding_side=side)
        assert_same_edit(mend.edit(model, text, subject), alone, 1e-12)
        many = mend.edit_many(model, text, [long, subject, short])
        assert len(many) == 3
        assert_same_edit(many[1], alone, 1e-9)
        assert many.outcomes[1].probability_after == pytest.approx(
            alone.outcomes[0].probability_after, rel=1e-9
        )


@pytest.mark.parametrize("family", FAMILY)
def test_edit_many_equals_single_edits(family: str) -> None:
    model = FAMILY[family](dtype=f64)
    mend = seasoned_mend(model)
    requests = facts(4)
    many = mend.edit_many(model, tokenizer(), requests)
    for i, request in enumerate(requests):
        alone = mend.edit(model, tokenizer(), request)
        assert_same_edit(many[i], alone, 1e-9)
        assert many[i].outcomes[0].target == request.target
        # Side by side, each group of rows sees its own edit.
        rows = [row for row in ROWS[:2] for _ in range(4)]
        groups = [Row(r.ids[:3], 1) for r in rows]  # 8 rows: 4 groups of 2
        with many.applied(model):
            together = logits_of(model, groups)[2 * i : 2 * i + 2]
        with alone.applied(model):
            assert_close(together, logits_of(model, groups[2 * i : 2 * i + 2]), "logits", 1e-9)
    assert_same_edit(many[-1], many[3], 0)
    with pytest.raises(IndexError, match="index 4 in an edit that holds 4"):
        many[4]


def test_a_joint_edit_is_the_sum_of_the_single_ones() -> None:
    """Captured rows are independent of each other, and so is what becomes of them."""
    model = gpt2(dtype=f64)
    mend = seasoned_mend(model)
    requests = facts(3)
    with pytest.warns(UserWarning, match="n_edits=1 at once, not for 3"):
        joint = mend.edit(model, tokenizer(), requests)
    first, second, third = (mend.edit(model, tokenizer(), r) for r in requests)
    total = first + second + third
    assert joint.rank == total.rank and len(joint) == 1
    with joint.applied(model):
        expected = logits_of(model, ROWS)
    with total.applied(model):
        assert_close(logits_of(model, ROWS), expected, "logits", 1e-9)
    assert [o.target for o in joint.outcomes] == [r.target for r in requests]


# ------------------------------------------------------------------------------------- outcomes


def test_outcomes_tell_what_the_model_says() -> None:
    model, text = gpt2(dtype=f64), tokenizer(True)
    request = facts(2)[1]  # two target tokens
    edit = seasoned_mend(model, alpha=0.02).edit(model, text, request)
    row = Encoder(text).row(request.prompt, request.target)
    (outcome,) = edit.outcomes

    def look() -> tuple[float, str]:
        logits = logits_of(model, [row])[0]
        at = list(row.positions())
        log_p = logits.log_softmax(-1)[at, row.targets()]
        return log_p.mean().exp().item(), text.decode(logits[at].argmax(-1))

    before = look()
    with edit.applied(model):
        after = look()
    assert (outcome.probability_before, outcome.answer_before) == (
        pytest.approx(before[0], rel=1e-9),
        before[1],
    )
    assert (outcome.probability_after, outcome.answer_after) == (
        pytest.approx(after[0], rel=1e-9),
        after[1],
    )
    assert outcome.success == (after[1] == request.target)
    assert after[0] > before[0], "the untrained edit is a gradient step at least"


# ----------------------------------------------------------------------------------- generation


def generate(model: Any, text: Any, prompts: list[str], **kw: Any) -> Tensor:
    batch = text(prompts, return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    return model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=0, **kw)


@pytest.mark.parametrize("family", FAMILY)
def test_generation_with_a_cache_equals_the_merged_model(family: str) -> None:
    model = FAMILY[family]()
    text = tokenizer(True, padding_side="left")
    request = facts(1)[0]
    edit = seasoned_mend(model, alpha=0.02).edit(model, text, request)
    for prompts in ([request.prompt], [request.prompt, WORDS[5], " ".join(WORDS[:9])]):
        plain = generate(model, text, prompts)
        with edit.applied(model):
            cached = generate(model, text, prompts, use_cache=True)
            recomputed = generate(model, text, prompts, use_cache=False)
        edit.merge_(model)
        merged = generate(model, text, prompts)
        edit.unmerge_(model)
        assert torch.equal(cached, merged) and torch.equal(recomputed, merged)
        assert not torch.equal(cached, plain), "the edit shows"
        assert torch.equal(generate(model, text, prompts), plain)


# --------------------------------------------------------------------------- sequences of edits


def retention_curve(
    mend: Mend, model: Any, text: Any, requests: list[EditRequest], every: int
) -> tuple[Edit, list[float], list[int]]:
    """Edit one fact after the other, each on the model as edited so far.

    Returns:
        The sum of all edits; after every ``every`` edits the mean probability that the model gives
        to all targets so far; and the number of rows after every edit.
    """
    encoder = Encoder.for_model(model, text)
    total = mend.edit(model, text, requests[0])
    curve, ranks = [], [total.rank]
    for i, request in enumerate(requests[1:], start=2):
        with total.applied(model):
            edit = mend.edit(model, text, request)
        total = total + edit
        ranks.append(total.rank)
        if i % every == 0:
            rows = [encoder.row(r.prompt, r.target) for r in requests[:i]]
            with total.applied(model):
                log_p = logits_of(model, rows).log_softmax(-1)
            means = [
                log_p[j, list(row.positions()), row.targets()].mean() for j, row in enumerate(rows)
            ]
            curve.append(torch.stack(means).exp().mean().item())
    return total, curve, ranks


def test_a_hundred_edits_one_after_the_other() -> None:
    model, text = gpt2(), tokenizer()
    mend = seasoned_mend(model, alpha=5e-4)
    before, plain = snapshot(model), logits_of(model, ROWS)
    requests = facts(100)
    total, curve, ranks = retention_curve(mend, model, text, requests, every=10)
    assert len(curve) == 10 and all(math.isfinite(x) and 0 < x < 1 for x in curve)
    assert len(ranks) == 100 and all(a < b for a, b in pairwise(ranks))
    assert [o.target for o in total.outcomes] == [r.target for r in requests]
    with total.applied(model):
        assert rel_error(logits_of(model, ROWS), plain) > 1e-3
    total.merge_(model)
    assert logits_of(model, ROWS).isfinite().all()
    total.unmerge_(model)
    assert torch.equal(logits_of(model, ROWS), plain)
    assert_same_bits(model, before)


def test_many_merged_edits_come_off_again() -> None:
    model, text = llama(layers=3), tokenizer()
    mend = seasoned_mend(model, alpha=5e-4)
    before = snapshot(model)
    stack = []
    for request in facts(30):
        stack.append(mend.edit(model, text, request))
        stack[-1].merge_(model)
    assert len({e.fingerprint for e in stack}) == 1, "all are edits of the unedited model"
    for edit in reversed(stack):
        edit.unmerge_(model)
    assert_same_bits(model, before)


def test_a_second_edit_sees_the_first() -> None:
    """Captured on the edited model, and the same whether the first is applied or merged."""
    model, text = gpt2(dtype=f64), tokenizer()
    mend = seasoned_mend(model, alpha=0.02)
    first_request, second_request = facts(2)
    first = mend.edit(model, text, first_request)
    blind = mend.edit(model, text, second_request)
    with first.applied(model):
        beside = mend.edit(model, text, second_request)
    first.merge_(model)
    into = mend.edit(model, text, second_request)
    first.unmerge_(model)
    assert_same_edit(beside, into, 1e-9)
    last = beside.weights[-1].name
    assert rel_error(beside.factors[last].delta, blind.factors[last].delta) > 1e-3
    total = first + beside
    with total.applied(model):
        after = logits_of(model, ROWS)
    first.merge_(model)
    beside.merge_(model)
    assert_close(logits_of(model, ROWS), after, "logits", 1e-9)


def test_an_edit_does_not_follow_the_later_training_of_its_editor() -> None:
    model = gpt2()
    mend = seasoned_mend(model)
    edits = [
        mend.edit(model, tokenizer(), facts(1)[0]),
        mend.edit_many(model, tokenizer(), facts(2)),
    ]
    tensors = [x for e in edits for f in e.factors.values() for x in (f.u, f.delta, f.alpha)]
    assert not any(x.requires_grad for x in tensors)
    before = [x.clone() for x in tensors]
    with torch.no_grad():
        for p in mend.editor.parameters():
            p.mul_(2)
    assert all(torch.equal(x, old) for x, old in zip(tensors, before, strict=True))


# ------------------------------------------------------------------------- sums and selections


def test_the_sum_acts_as_both() -> None:
    model, text = llama(dtype=f64), tokenizer()
    mend = seasoned_mend(model)
    first, second = (mend.edit(model, text, r) for r in facts(2))
    with first.applied(model), second.applied(model):
        expected = logits_of(model, ROWS)
    for total in (first + second, second + first):
        assert total.rank == first.rank + second.rank
        with total.applied(model):
            assert_close(logits_of(model, ROWS), expected, "logits", 1e-12)


def test_sums_of_edits_that_do_not_belong_together_are_refused() -> None:
    text, request = tokenizer(), facts(1)[0]
    model, other = gpt2(), gpt2(seed=1)
    edit = seasoned_mend(model).edit(model, text, request)
    with pytest.raises(ValueError, match="different models or weights"):
        edit + seasoned_mend(other).edit(other, text, request)
    with pytest.raises(ValueError, match="different models or weights"):
        edit + seasoned_mend(model, blocks=2).edit(model, text, request)
    many = seasoned_mend(model).edit_many(model, text, facts(2))
    with pytest.raises(ValueError, match=r"pick single edits out of edit_many with \[i\]"):
        edit + many
    with pytest.raises(TypeError):
        edit + 1  # type: ignore[operator]


def test_independent_edits_refuse_what_needs_one() -> None:
    model = gpt2()
    many = seasoned_mend(model).edit_many(model, tokenizer(), facts(2))
    with pytest.raises(RuntimeError, match=r"pick a single edit .* before merging"):
        many.merge_(model)
    with pytest.raises(RuntimeError, match=r"pick a single edit .* before saving"):
        many.save_pretrained("unused")
    with many.applied(model), pytest.raises(ValueError, match="3 rows does not split into 2"):
        logits_of(model, ROWS)


# ---------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("family", FAMILY)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model = FAMILY[family]()
    edit = seasoned_mend(model).edit(model, tokenizer(), facts(1)[0])
    edit.save_pretrained(tmp_path)
    loaded = Edit.from_pretrained(tmp_path)
    assert loaded.outcomes == edit.outcomes and loaded.fingerprint == edit.fingerprint
    assert_same_edit(loaded, edit, 0)
    with edit.applied(model):
        expected = logits_of(model, ROWS)
    with loaded.applied(model):
        assert torch.equal(logits_of(model, ROWS), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["edit.json", "edit.safetensors"]


def test_an_editor_round_trip_gives_the_same_edits(tmp_path: Path) -> None:
    model = llama()
    mend = seasoned_mend(model, shared=False, n_edits=1)
    mend.save_pretrained(tmp_path)
    loaded = Mend.from_pretrained(tmp_path)
    assert loaded.config == mend.config and loaded.weights == mend.weights
    request = facts(1)[0]
    one, two = (m.edit(model, tokenizer(), request) for m in (mend, loaded))
    assert_same_edit(one, two, 0)


# ------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILY)
def test_low_precision_models(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = FAMILY[family](dtype=dtype)
    wide = FAMILY[family](dtype=dtype).double()  # the same values
    mend = seasoned_mend(wide)
    mend.editor.float()
    request = facts(1)[0]
    edit = mend.edit(model, tokenizer(), request)
    truth = mend.edit(wide, tokenizer(), request)
    assert edit.fingerprint == truth.fingerprint
    assert all(f.u.dtype == torch.float32 for f in edit.factors.values())
    plain = logits_of(wide, ROWS)
    with edit.applied(model):
        applied = logits_of(model, ROWS)
    with truth.applied(wide):
        expected = logits_of(wide, ROWS)
    assert applied.dtype == dtype
    change = rel_error(expected, plain)
    assert rel_error(applied, expected) < 0.5 * change, "the edit acts, up to the model's rounding"
    before = snapshot(model)
    edit.merge_(model)
    assert all(model.get_parameter(w.name).dtype == dtype for w in edit.weights)
    edit.unmerge_(model)
    assert_same_bits(model, before)


def test_random_rounding_keeps_a_small_edit() -> None:
    """Far below half a step, rounding to nearest loses all of it, random rounding nothing."""
    model = gpt2(dtype=torch.bfloat16)
    edit = seasoned_mend(model).edit(model, tokenizer(), facts(1)[0])
    for f in edit.factors.values():
        f.alpha.data.mul_(1e-3)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="survived rounding"):
        assert edit.merge_(model) < 0.5
    edit.unmerge_(model)
    kept = edit.merge_(model, seed=1)
    assert 0.5 < kept < 1.5  # 1 on average
    merged = snapshot(model)
    edit.unmerge_(model)
    assert_same_bits(model, before)
    assert edit.merge_(model, seed=1) == kept
    assert_same_bits(model, merged)
    edit.unmerge_(model)


def test_the_fingerprint_names_the_weights_and_not_their_dtype() -> None:
    model = gpt2(dtype=torch.bfloat16)
    weights = find_weights(model)
    own = fingerprint(model, weights)
    assert fingerprint(gpt2(dtype=torch.bfloat16).float(), weights) == own
    assert fingerprint(gpt2(dtype=torch.bfloat16).half(), weights) == own, "bfloat16 values"
    assert fingerprint(gpt2(), weights) == own, "float32 values, rounded here or there"
    assert fingerprint(gpt2(seed=1, dtype=torch.bfloat16), weights) != own
    assert fingerprint(model, weights[:-1]) != own
    with torch.no_grad():
        model.get_parameter(weights[-1].name)[0, 0] += 1
    assert fingerprint(model, weights) != own


def test_an_edited_head_sees_whole_rows() -> None:
    model = build(
        "gpt2", f64, 0, n_embd=22, n_head=2, n_layer=2, n_positions=40, tie_word_embeddings=False
    )
    mend = seasoned_mend(model, edit=("lm_head.weight",), alpha=1e-3)
    requests = facts(3)  # targets of one and of two tokens
    text = tokenizer()
    many = mend.edit_many(model, text, requests)
    for i, request in enumerate(requests):
        single = mend.edit(model, text, request)
        assert_same_edit(many[i], single, 1e-9)
        assert many.outcomes[i].probability_after == pytest.approx(
            single.outcomes[0].probability_after, rel=1e-9
        )


def test_editing_works_under_inference_mode_and_no_grad() -> None:
    model = gpt2()
    mend = seasoned_mend(model)
    request = facts(1)[0]
    expected = mend.edit(model, tokenizer(), request)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            edit = mend.edit(model, tokenizer(), request)
        assert_same_edit(edit, expected, 0.0)
        assert not any(f.u.is_inference() for f in edit.factors.values())


def test_a_merged_edit_is_not_applied_twice() -> None:
    model = gpt2()
    edit = seasoned_mend(model).edit(model, tokenizer(), facts(1)[0])
    edit.merge_(model)
    with pytest.raises(RuntimeError, match="acts already"), edit.applied(model):
        pass
    edit.unmerge_(model)
    with edit.applied(model):
        pass
