"""Every decoder family: weights found by structure, trained, applied, merged, replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    CONTEXT,
    assert_same_bits,
    build,
    facts,
    logits_of,
    rel_error,
    replayed_logits,
    seasoned_mend,
    snapshot,
    tiny_mend,
    tokenizer,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from pymend import Trainer
from pymend.config import TrainConfig
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Batch, Row
from pymend.models.structure import find_blocks, find_weights

LAYERS = 5
LLAMA = {
    "hidden_size": 22,
    "intermediate_size": 38,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": CONTEXT,
}
PLAIN = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "num_key_value_heads")}
PLAIN |= {"hidden_size": 24, "num_key_value_heads": 2}
GPT2 = {"n_embd": 22, "n_inner": 38, "n_head": 2, "n_positions": CONTEXT}
SLIDING = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
GATED = ("model.layers", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))

# name -> (model_type, configuration, (path of the blocks, the MLP's matrices in order))
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, tuple[str, ...]]]] = {
    "llama": ("llama", LLAMA, GATED),
    "qwen2": ("qwen2", PLAIN, GATED),
    "qwen3": ("qwen3", LLAMA, GATED),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 6}, GATED),
    "gemma": ("gemma", LLAMA, GATED),
    "gemma2": ("gemma2", {**LLAMA, "sliding_window": 6, "layer_types": SLIDING}, GATED),
    "gemma3": ("gemma3_text", {**LLAMA, "sliding_window": 6, "layer_types": SLIDING}, GATED),
    "olmo2": ("olmo2", PLAIN, GATED),
    "gpt2": ("gpt2", {**GPT2, "n_layer": LAYERS}, ("transformer.h", ("mlp.c_fc", "mlp.c_proj"))),
    "distilgpt2": ("gpt2", {**GPT2, "n_layer": 4}, ("transformer.h", ("mlp.c_fc", "mlp.c_proj"))),
    "gpt-neo": (
        "gpt_neo",
        {
            "hidden_size": 22,
            "intermediate_size": 38,
            "num_layers": LAYERS,
            "num_heads": 2,
            "max_position_embeddings": CONTEXT,
            "attention_types": [[["global", "local"], 2], [["global"], 1]],
            "window_size": 6,
        },
        ("transformer.h", ("mlp.c_fc", "mlp.c_proj")),
    ),
    "gpt-j": (
        "gptj",
        {
            "n_embd": 24,
            "n_inner": 38,
            "n_layer": LAYERS,
            "n_head": 2,
            "rotary_dim": 4,
            "n_positions": CONTEXT,
        },
        ("transformer.h", ("mlp.fc_in", "mlp.fc_out")),
    ),
    "opt": (
        "opt",
        {
            "hidden_size": 22,
            "ffn_dim": 38,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 22,
            "init_std": 0.3,
            "max_position_embeddings": CONTEXT,
        },
        ("model.decoder.layers", ("fc1", "fc2")),
    ),
    "pythia": (
        "gpt_neox",
        PLAIN,
        ("gpt_neox.layers", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    ),
    "phi": ("phi", PLAIN, ("model.layers", ("mlp.fc1", "mlp.fc2"))),
    # Gate and up are one matrix, and so are query, key and value, which make 56 = 2 * 28 features
    # here: attention looks like a narrower MLP.
    "phi3": (
        "phi3",
        {**PLAIN, "num_key_value_heads": 1, "head_dim": 14, "sliding_window": None},
        ("model.layers", ("mlp.gate_up_proj", "mlp.down_proj")),
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", ["mlp", "attention"])


def model_of(family: str) -> Any:
    model_type, config, _ = FAMILIES[family]
    return build(model_type, **config)


@families
def test_default_weights_are_the_mlp_matrices_of_the_last_three_blocks(family: str) -> None:
    model = model_of(family)
    _, config, (path, matrices) = FAMILIES[family]
    count = len(find_blocks(model)[1])
    assert find_blocks(model)[0] == path and count in config.values()
    expected = [
        f"{path}.{i}.{matrix}.weight" for i in range(count - 3, count) for matrix in matrices
    ]
    weights = find_weights(model)
    assert [w.name for w in weights] == expected
    for w in weights:
        shape = model.get_parameter(w.name).shape
        assert tuple(shape) == ((w.a, w.b) if w.transposed else (w.b, w.a))
        inner = 76 if w.name.endswith("gate_up_proj.weight") else 38
        assert {w.a, w.b} == {config.get("hidden_size", config.get("n_embd")), inner}
    # A gate and an up matrix share one network, so its modes go to five.
    modes = [[w.mode for w in weights if w.shape == s] for s in {w.shape for w in weights}]
    assert sorted(map(tuple, modes)) == sorted(
        [tuple(range(3)), tuple(range(3 * (len(matrices) - 1)))]
    )


@pytest.mark.parametrize(
    ("family", "matrices"),
    [
        ("gpt2", ("attn.c_attn", "attn.c_proj")),
        ("pythia", ("attention.query_key_value", "attention.dense")),
        ("phi3", ("self_attn.o_proj", "self_attn.qkv_proj")),
        ("qwen3", tuple(f"self_attn.{m}_proj" for m in "qkvo")),
    ],
)
def test_attention_with_and_without_fused_matrices(family: str, matrices: tuple[str, ...]) -> None:
    path = FAMILIES[family][2][0]
    names = [w.name for w in find_weights(model_of(family), ("attention",), blocks=2)]
    assert names == [f"{path}.{i}.{m}.weight" for i in (LAYERS - 2, LAYERS - 1) for m in matrices]


# Query, key and value in one matrix or three, stored as Linear or Conv1D.
ATTENTION = ("gpt2", "pythia", "phi3", "qwen3")


@pytest.mark.parametrize(
    ("family", "kind"),
    [*((f, "mlp") for f in FAMILIES), *((f, "attention") for f in ATTENTION)],
)
def test_a_training_step_runs(family: str, kind: str, tmp_path: Path) -> None:
    model = model_of(family)
    before = snapshot(model)
    mend = tiny_mend(model, edit=(kind,))
    start = {k: v.clone() for k, v in mend.editor.state_dict().items()}
    config = TrainConfig(steps=1, batch_size=2, lr=1e-3, eval_records=2)
    data = facts(4)
    trained = Trainer(
        mend, model, tokenizer(), data, data[:2], config=config, output=tmp_path, progress=False
    ).train()
    for name, value in trained.editor.state_dict().items():
        assert value.isfinite().all(), name
        assert not torch.equal(value, start[name]), f"{name} did not move"
    assert_same_bits(model, before)


@families
@kinds
def test_applied_equals_merged(family: str, kind: str) -> None:
    model = model_of(family)
    mend = seasoned_mend(model, edit=(kind,))
    edit = mend.edit(model, tokenizer(), facts(1)[0])
    rows = [Row((5, 9, 30, 7, 11)), Row((8, 6, 12)), Row(tuple(range(10, 22)))]
    plain = logits_of(model, rows)
    with edit.applied(model):
        applied = logits_of(model, rows)
    edit.merge_(model)
    merged = logits_of(model, rows)
    edit.unmerge_(model)
    assert torch.equal(logits_of(model, rows), plain)
    assert rel_error(applied, plain) > 1e-2, "the edit does something"
    assert rel_error(applied, merged) < 1e-4


@families
def test_replayed_logits_are_plain_logits_bit_for_bit(family: str) -> None:
    model = model_of(family)
    rows = [Row(tuple(range(4 + i, 14 + i)), 0, answer=False) for i in range(3)]
    plain = logits_of(model, rows).flatten(0, 1)
    with frozen(model), torch.no_grad():
        replay = Replay(model, find_weights(model))
        blocks = find_blocks(model)[1]
        assert replay.cut == len(blocks) - 3
        replay.load(rows)
        assert torch.equal(replayed_logits(replay, Batch.of(rows)), plain)
        # And with one weight of the last block, so that nearly all is prefix.
        replay = Replay(model, find_weights(model)[-1:])
        assert replay.cut == len(blocks) - 1
        replay.load(rows)
        assert torch.equal(replayed_logits(replay, Batch.of(rows)), plain)


@families
def test_no_block_below_the_cut_runs_again(family: str) -> None:
    """Not even the first, though GPT-J's returns attention weights beside its states."""
    model = model_of(family)
    rows = [Row((4, 5, 6, 7), 0, answer=False)]
    ran = []
    with frozen(model), torch.no_grad():
        replay = Replay(model, find_weights(model))
        replay.load(rows)
        for number, block in enumerate(find_blocks(model)[1]):
            for module in block.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    module.register_forward_hook(lambda *_, number=number: ran.append(number))
        replayed_logits(replay, Batch.of(rows))
    assert sorted(set(ran)) == [replay.cut + i for i in range(3)]


def test_patterns_choose_weights_in_the_order_of_the_model() -> None:
    model = model_of("gpt2")
    weights = find_weights(model, ["*.mlp.c_proj.weight", "transformer.h.1.mlp.c_fc.weight"])
    names = [w.name for w in weights]
    assert names[:3] == [
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.1.mlp.c_fc.weight",
        "transformer.h.1.mlp.c_proj.weight",
    ]
    assert len(names) == LAYERS + 1


def test_fewer_blocks_than_asked_for_are_all_edited() -> None:
    model = model_of("gpt2")
    assert len(find_weights(model, blocks=100)) == 2 * LAYERS
    assert len(find_weights(model, blocks=1)) == 2
