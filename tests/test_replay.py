"""The replayed model is the model: same logits from kept prefix states, and only what is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import (
    CONTEXT,
    FAMILY,
    HIDDEN,
    INNER,
    assert_close,
    build,
    gpt2,
    llama,
    logits_of,
    random_episodes,
    replayed_logits,
    tiny_mend,
)
from torch import Tensor, nn

import pymend.engine.replay
from pymend.engine.hooks import frozen
from pymend.engine.losses import LabelRows
from pymend.engine.replay import Replay
from pymend.engine.tokens import Batch, Row
from pymend.models.structure import EditedWeight, find_weights, lowest_block
from pymend.ops import head_losses
from pymend.ops.token_losses import token_losses
from pymend.training.episodes import run_episodes

EQUAL = [Row((5, 9, 30, 7), 0, False), Row((6, 3, 8, 4), 0, False), Row((7, 7, 7, 9), 0, False)]
MIXED = [Row((5, 9, 30, 7, 11), 2), Row((8, 6), 0), Row((40, 41, 42), 0, False), Row((5,) * 12, 4)]


@torch.no_grad()
def replayed(model: Any, rows: list[Row], keep: bool = False) -> Tensor:
    with frozen(model):
        replay = Replay(model, find_weights(model), keep)
        replay.load(rows)
        return replayed_logits(replay, Batch.of(rows))


@pytest.mark.parametrize("family", FAMILY)
def test_equal_lengths_give_the_same_bits(family: str) -> None:
    model = FAMILY[family]()
    plain = logits_of(model, EQUAL).flatten(0, 1)
    assert torch.equal(replayed(model, EQUAL), plain)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("keep", [False, True])
def test_label_rows_of_mixed_lengths(family: str, keep: bool) -> None:
    model = FAMILY[family](dtype=torch.float64)
    plain = logits_of(model, MIXED)
    expected = torch.cat([plain[i, list(r.positions())] for i, r in enumerate(MIXED)])
    assert_close(replayed(model, MIXED, keep), expected, "logits", 1e-12)


def test_any_loaded_rows_in_any_order_and_shape() -> None:
    model = gpt2(dtype=torch.float64)
    with frozen(model), torch.no_grad():
        replay = Replay(model, find_weights(model))
        replay.load(MIXED)
        for rows in ([MIXED[2]], [MIXED[3], MIXED[0]], [MIXED[1], MIXED[1]]):
            plain = logits_of(model, rows)
            expected = torch.cat([plain[i, list(r.positions())] for i, r in enumerate(rows)])
            assert_close(replayed_logits(replay, Batch.of(rows)), expected, "logits", 1e-12)


def test_how_often_each_block_runs() -> None:
    model = gpt2()
    calls = [0] * 4
    for i, block in enumerate(model.transformer.h):

        def count(*_: Any, i: int = i) -> None:
            calls[i] += 1

        block.mlp.register_forward_hook(count)
    with frozen(model), torch.no_grad():
        Replay(model, find_weights(model)).load(EQUAL)  # the trial of the model, once
        calls[:] = [0] * 4
        replay = Replay(model, find_weights(model), keep=True)
        replay.load(EQUAL)
        assert calls == [1, 0, 0, 0], "the prefix only"
        replay.load(EQUAL)
        assert calls == [1, 0, 0, 0], "kept"
        for _ in range(3):
            replayed_logits(replay, Batch.of(EQUAL))
        assert calls == [1, 3, 3, 3], "never the prefix again"
        forgetful = Replay(model, find_weights(model))
        forgetful.load(EQUAL[:1])
        forgetful.load(EQUAL[1:])
        with pytest.raises(KeyError):
            replayed_logits(forgetful, Batch.of(EQUAL[:1]))


def test_a_watched_head_sees_label_rows_only() -> None:
    model = gpt2()
    widths: list[torch.Size] = []
    replayed(model, EQUAL)  # the trial of the model, once
    model.lm_head.register_forward_hook(lambda _m, args, _y: widths.append(args[0].shape[:-1]))
    rows = [Row((5, 9, 30, 7, 11), 1), Row((8, 6, 9, 9, 9), 2)]
    replayed(model, rows)
    assert [w.numel() for w in widths] == [0, 5]


def test_gradients_stop_at_the_cut() -> None:
    model = gpt2()
    with frozen(model):
        replay = Replay(model, find_weights(model))
        replay.load(EQUAL)
        model.transformer.h[1].mlp.c_fc.weight.requires_grad_(True)
        replayed_logits(replay, Batch.of(EQUAL)).sum().backward()
    assert model.transformer.h[1].mlp.c_fc.weight.grad is not None
    assert all(p.grad is None for p in model.transformer.h[0].parameters())


@pytest.mark.parametrize(
    ("patterns", "cut"),
    [
        ([], 1),
        (["*h.3.mlp.c_fc.weight"], 3),
        (["*h.0.mlp.c_fc.weight", "*h.2.mlp.c_fc.weight"], 0),
        (["*h.2.attn.c_attn.weight"], 2),
    ],
)
def test_where_the_cut_lies(patterns: list[str], cut: int) -> None:
    model = gpt2()
    blocks, lowest = lowest_block(model, find_weights(model, patterns))
    assert blocks is model.transformer.h and lowest == cut


def test_a_weight_outside_the_blocks_means_no_prefix() -> None:
    model = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    weights = find_weights(model, ["lm_head.weight", "*h.3.mlp.c_fc.weight"])
    assert [type(w) for w in weights] == [EditedWeight] * 2
    assert lowest_block(model, weights) == (None, 0)
    with frozen(model), torch.no_grad():
        replay = Replay(model, weights)
        replay.load(EQUAL)
        plain = logits_of(model, EQUAL).flatten(0, 1)
        assert torch.equal(replayed_logits(replay, Batch.of(EQUAL)), plain)


# ------------------------------------------------------------------------------ rows before a head


def gemma2(cap: float | None) -> Any:
    """A model that caps its logits, or one that does not."""
    return build(
        "gemma2",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=CONTEXT,
        final_logit_softcapping=cap,
    )


def rows_of(model: Any, patterns: tuple[str, ...] = ()) -> LabelRows:
    """The label rows of MIXED as a replay of ``model`` hands them to the losses."""
    with frozen(model), torch.no_grad():
        replay = Replay(model, find_weights(model, patterns))
        replay.load(MIXED)
        return replay.label_rows(Batch.of(MIXED))


def scaled(model: Any, in_place: bool) -> Any:
    """``model`` with its logits halved after the head."""
    forward = model.forward

    def halved(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits.mul_(0.5) if in_place else output.logits * 0.5
        return output

    model.forward = halved
    return model


PLAIN = {
    "gpt2": gpt2,
    "llama": llama,
    "bfloat16": lambda: llama(dtype=torch.bfloat16),
    "a cap that is off": lambda: gemma2(None),
    "bias": lambda: build("phi", hidden_size=24, intermediate_size=INNER, num_hidden_layers=4,
                          num_attention_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_rows_before_a_plain_head(name: str) -> None:
    model = PLAIN[name]()
    rows = rows_of(model)
    head = model.get_output_embeddings()
    assert rows.head is head and (head.bias is not None) == (name == "bias")
    labels = sum(len(r.positions()) for r in MIXED)
    assert rows.values.shape == (labels, head.in_features)
    plain = logits_of(model, MIXED)
    expected = torch.cat([plain[i, list(r.positions())] for i, r in enumerate(MIXED)])
    target = Batch.of(MIXED).target
    ours, wanted = rows.losses(target, rows), token_losses(expected, target, expected)
    tolerance = 0.02 if name == "bfloat16" else 1e-5
    assert_close(ours.nll, wanted.nll, "nll", tolerance)
    assert (ours.kl == 0).all() and torch.equal(ours.best, ours.base_best)


class OtherLinear(nn.Linear):
    """Not known to be a linear layer and nothing else."""


def other_head() -> Any:
    model = llama()
    model.lm_head.__class__ = OtherLinear
    return model


def wrapped_head() -> Any:
    model = llama()
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * forward(x)
    return model


def hooked_head() -> Any:
    model = llama()
    model.lm_head.register_forward_hook(lambda _m, _args, y: 2 * y)
    return model


NOT_PLAIN = {
    "capped": lambda: gemma2(5.0),
    "scaled": lambda: scaled(gpt2(), in_place=False),
    "scaled in place": lambda: scaled(gpt2(), in_place=True),
    "of another class": other_head,
    "wrapped": wrapped_head,
    "hooked": hooked_head,
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_a_head_that_is_not_plain_gives_logits(name: str) -> None:
    model = NOT_PLAIN[name]()
    rows = rows_of(model)
    plain = logits_of(model, MIXED)
    expected = torch.cat([plain[i, list(r.positions())] for i, r in enumerate(MIXED)])
    assert rows.head is None
    assert_close(rows.values, expected, "logits", 1e-5)
    target = Batch.of(MIXED).target
    wanted = token_losses(expected, target, expected)
    ours = rows.losses(target, rows)
    assert_close(ours.nll, wanted.nll, "nll", 1e-5)
    assert torch.equal(ours.best, wanted.best)


def test_without_a_prefix_the_head_is_not_looked_at() -> None:
    assert rows_of(gpt2(), ("*h.0.mlp.c_fc.weight",)).head is None


def test_a_hook_set_later_is_respected() -> None:
    model = gpt2()
    with frozen(model), torch.no_grad():
        replay = Replay(model, find_weights(model))
        replay.load(MIXED)
        batch = Batch.of(MIXED)
        assert replay.label_rows(batch).head is model.lm_head
        handle = model.lm_head.register_forward_hook(lambda _m, _args, y: 2 * y)
        logits = replay.label_rows(batch)
        handle.remove()
        assert logits.head is None
        assert_close(logits.values, 2 * replayed_logits(replay, batch), "logits", 1e-6)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("official", [False, True])
def test_training_losses_are_the_same_with_and_without_logits(
    family: str, official: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILY[family](dtype=torch.float64)
    results = []
    for plain in (True, False):
        # Chunks of three rows; and a replay that trusts no head.
        monkeypatch.setattr(head_losses, "CHUNK_BYTES", 3 * 61 * 8)
        if not plain:
            monkeypatch.setattr(pymend.engine.replay, "is_plain", lambda _: False)
        mend = tiny_mend(model, n_edits=2, official=official)
        with frozen(model):
            replay = Replay(model, mend.weights)
            scores = run_episodes(mend, replay, random_episodes(3, 2), "both", merge=True)
            assert replay.label_rows(Batch.of(random_episodes(3, 2)[0].edits)).head is (
                model.get_output_embeddings() if plain else None
            )
            (scores.nll + scores.kl).sum().backward()
        grads = [p.grad for p in mend.editor.parameters() if p.grad is not None]
        results.append([scores.nll, scores.kl, scores.locality, *grads])
    assert len(results[0]) > 5
    for ours, wanted in zip(*results, strict=True):
        tolerance = 1e-4 if official else 1e-9  # official moments are float32
        assert_close(ours, wanted, "with and without", tolerance)


@torch.no_grad()
def test_a_hook_on_the_model_sees_whole_rows() -> None:
    model, seen = gpt2(), []
    with frozen(model):
        replay = Replay(model, find_weights(model))
        replay.load(MIXED)
        expected = replayed_logits(replay, Batch.of(MIXED))
        handle = model.register_forward_hook(lambda _m, _a, out: seen.append(out.logits.shape))
        rows = replay.label_rows(Batch.of(MIXED))
        handle.remove()
    assert rows.head is None and seen == [(4, 11, model.config.vocab_size)]
    assert_close(rows.values, expected, "logits", 1e-6)
