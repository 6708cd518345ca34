"""The replayed model is the model: same logits from kept prefix states, and only what is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILY, assert_close, gpt2, logits_of, replayed_logits
from torch import Tensor, nn

from pymend.models import EditedWeight, find_weights, frozen, lowest_block
from pymend.replay import Replay
from pymend.tokens import Batch, Row

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


def test_the_head_sees_label_rows_only() -> None:
    model = gpt2()
    widths = []
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
