"""Encoder-decoders and classifiers: what is edited, how rows are read, trained and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    HIDDEN,
    INNER,
    VOCAB,
    assert_close,
    assert_same_bits,
    facts,
    rel_error,
    snapshot,
    tiny_mend,
    tokenizer,
    traceless,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    set_seed,
)

from pymend import Trainer, evaluate
from pymend.config import EditRequest, Probe, TrainConfig
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.engine.tokens import IGNORE, Batch, Encoder, Row
from pymend.models.structure import find_weights, lowest_block

IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "vocab_size": VOCAB}
T5 = {"d_model": HIDDEN, "d_ff": INNER, "d_kv": 6, "num_heads": 2, "num_layers": 4}
T5 |= {"decoder_start_token_id": 0, "initializer_factor": 3.0}
BART = {f"{side}_{n}": v for side in ("encoder", "decoder")
        for n, v in (("ffn_dim", INNER), ("attention_heads", 2), ("layers", 4))}  # fmt: skip
BART |= {"d_model": HIDDEN, "init_std": 0.3, "decoder_start_token_id": 3}
BERT = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2}
BERT |= {"num_hidden_layers": 4, "initializer_range": 0.3}

# name -> (model_type, configuration)
SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5-v1.1": ("t5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", BART),
}
CLASSIFIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, one logit": ("bert", {**BERT, "num_labels": 1}),
    "bert": ("bert", {**BERT, "num_labels": 2}),
    "roberta, 3 classes": ("roberta", {**BERT, "num_labels": 3, "max_position_embeddings": 40}),
}
KINDS = {**SEQUENCES, **CLASSIFIERS}
kinds = pytest.mark.parametrize("kind", KINDS)
sequences = pytest.mark.parametrize("kind", SEQUENCES)


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model_type, config = KINDS[kind]
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if kind in SEQUENCES else AutoModelForSequenceClassification
    return (
        auto.from_config(AutoConfig.for_model(model_type, **{**IDS, **config, **changes}))
        .to(dtype)
        .eval()
    )


def words(kind: str) -> Any:
    return tokenizer(bos=kind in CLASSIFIERS, end=True)


def data_of(kind: str, count: int) -> list[EditRequest]:
    """Made-up facts; for a classifier the targets are classes, and locality claims have one too."""
    if kind in SEQUENCES:
        return facts(count)
    return [
        EditRequest(
            prompt=f.prompt,
            target=str(i % 2),
            ground_truth=str(1 - i % 2),
            rephrases=f.rephrases,
            locality=tuple(Probe(p.prompt, str(i % 2) if i % 3 else None) for p in f.locality),
        )
        for i, f in enumerate(facts(count))
    ]


def rows_of(kind: str, model: Any, count: int) -> list[Row]:
    encoder = Encoder.for_model(model, words(kind))
    return [encoder.request(r).edit for r in data_of(kind, count)]


@torch.no_grad()
def plain(model: Any, rows: Sequence[Row]) -> Tensor:
    """Logits at the label positions, from the model as it is called by anyone."""
    batch = Batch.of(rows)
    logits = model(**batch.inputs).logits
    if logits.dim() == 3:
        return logits[batch.row, batch.position]
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


@torch.no_grad()
def replayed(model: Any, rows: Sequence[Row], patterns: Sequence[str] = ()) -> Tensor:
    with frozen(model):
        replay = Replay(model, find_weights(model, patterns))
        replay.load(rows)
        found = replay.label_rows(Batch.of(rows))
        assert found.head is None, "logits"
        return found.values


def seasoned(kind: str, model: Any, **config: Any) -> Any:
    """An editor whose moments have seen some rows."""
    mend = tiny_mend(model, **config)
    rows = rows_of(kind, model, 12)
    with frozen(model), torch.no_grad():
        replay = Replay(model, mend.weights)
        replay.load(rows)
        mend.factors(mend.capture(replay, rows, len(rows)), merge=True)
    return mend


# ---------------------------------------------------------------------------- what is edited


@sequences
def test_default_weights_are_the_last_two_blocks_of_both_stacks(kind: str) -> None:
    model = model_of(kind)
    weights = find_weights(model)
    places = [w.module.rpartition(".")[0] for w in weights]
    path = "model.{}.layers.{}" if kind == "bart" else "{}.block.{}.layer.{}.DenseReluDense"
    stacks = [("encoder", 1), ("decoder", 2)]
    expected = [path.format(s, i, part) for s, part in stacks for i in (2, 3)]
    per_block = 3 if kind == "t5-v1.1" else 2
    assert places == [p for p in expected for _ in range(per_block)]
    assert [w.name for w in weights] == [n for n, _ in model.named_parameters()
                                         if n in {w.name for w in weights}]  # fmt: skip
    assert lowest_block(model, weights) == (lowest_block(model, weights[:1])[0], 2)
    decoder_only = [w for w in weights if "decoder" in w.name]
    assert lowest_block(model, decoder_only)[1] == 4, "the whole encoder is prefix"


def test_default_weights_of_a_classifier_are_its_last_three_blocks() -> None:
    weights = find_weights(model_of("bert"))
    assert [w.name for w in weights] == [
        f"bert.encoder.layer.{i}.{m}.dense.weight"
        for i in (1, 2, 3)
        for m in ("intermediate", "output")
    ]


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("t5", ["SelfAttention." + x for x in "qkvo"]),
        ("bart", ["self_attn." + x for x in ("k_proj", "v_proj", "q_proj", "out_proj")]),
        ("bert", ["self.query", "self.key", "self.value", "attention.output.dense"]),
    ],
)
def test_attention_can_be_edited(kind: str, ends: list[str]) -> None:
    model = model_of(kind)
    weights = find_weights(model, ("attention",), blocks=1)
    assert [w.module for w in weights[:4]] == [
        next(n for n, _ in model.named_modules() if n.endswith(e) and ".3." in n) for e in ends
    ]
    mlp, both = find_weights(model, ("mlp",), 1), find_weights(model, ("all",), 1)
    assert {w.name for w in both} == {w.name for w in (*weights, *mlp)}


# ---------------------------------------------------------------------------- how rows are read


def test_rows_of_an_encoder_decoder() -> None:
    model = model_of("bart")
    encoder = Encoder.for_model(model, words("bart"))
    row = encoder.row("ba be", "bi bo")
    assert row.source == (4, 5, 3) and row.ids == (3, 6, 7, 3), "start, answer, end"
    assert row.inputs == (3, 6, 7) and row.targets() == [6, 7, 3]
    alone = encoder.row("ba be")
    assert (alone.source, alone.ids, alone.targets()) == ((4, 5, 3), (3,), [IGNORE])
    assert row.without_answer() == alone
    assert encoder.text(torch.tensor([6, 7, 3, 9])) == "bi bo"


def test_rows_of_a_classifier() -> None:
    encoder = Encoder.for_model(model_of("bert, one logit"), words("bert"))
    row = encoder.row("ba be", "true")
    assert row.inputs == row.ids == (2, 4, 5, 3) and row.targets() == [1]
    assert encoder.row("ba be", "0").label == 0 and encoder.row("ba be").targets() == [IGNORE]
    assert row.without_answer() == encoder.row("ba be")
    assert list(row.filler().positions()) == []
    assert encoder.text(torch.tensor([1])) == "true"
    named = Encoder.for_model(model_of("bert"), words("bert"))
    assert named.row("ba", "LABEL_1").label == 1


def test_bad_input_is_named() -> None:
    encoder = Encoder.for_model(model_of("bert"), words("bert"))
    with pytest.raises(ValueError, match=r"'maybe' .* is no class .* label_0, label_1"):
        encoder.row("ba", "maybe")
    for kind, what in (("bert", "a classifier"), ("t5", "an encoder-decoder")):
        model = model_of(kind)
        with pytest.raises(ValueError, match=f"{what} has no chat"):
            Encoder.for_model(model, words(kind), chat=True)
        with pytest.raises(ValueError, match="the prompt is empty"):
            Encoder.for_model(model, words(kind)).row(" ", "0")
    with pytest.raises(ValueError, match="has no tokens"):
        Encoder.for_model(model_of("t5"), words("t5")).row("ba", " ")
    model = model_of("t5")
    with pytest.raises(ValueError, match="ppl_text is for models that continue a text"):
        evaluate(seasoned("t5", model), model, words("t5"), data_of("t5", 1), ppl_text="ba be")


# ---------------------------------------------------------------------------- replay


@kinds
@pytest.mark.parametrize("which", [(), ("attention",), ("*layer*.3*",), ("*.0.*", "*.0.*.wi*")])
def test_replayed_logits_are_plain_logits(kind: str, which: tuple[str, ...]) -> None:
    model = model_of(kind, torch.float64)
    rows = rows_of(kind, model, 5)
    if which and "*" in which[0]:
        names = [w.name for w in find_weights(model, ("all",), blocks=9)]
        block = ".3." if "3" in which[0] else ".0."
        which = tuple(n for n in names if block in n.removeprefix("encoder"))
    assert_close(replayed(model, rows, which), plain(model, rows), "logits", 1e-10)


@kinds
def test_batch_mates_and_padding_change_nothing(kind: str) -> None:
    model = model_of(kind, torch.float64)
    rows = rows_of(kind, model, 4)
    rows.append(rows[0].filler())
    together = replayed(model, rows).split([len(r.positions()) for r in rows])
    for row, logits in zip(rows[:-1], together, strict=False):
        assert_close(logits, plain(model, [row]), "logits", 1e-10)


@kinds
@torch.no_grad()
def test_any_loaded_rows_in_any_order_and_shape(kind: str) -> None:
    """What a block hands to all others, as T5's first its position bias, is of the batch's size."""
    model = model_of(kind, torch.float64)
    rows = rows_of(kind, model, 4)
    read = {"source" if kind in SEQUENCES else "ids": (*rows[0].prefix, 9, 8, 7)}
    longer = replace(rows[0], **read)
    with frozen(model):
        replay = Replay(model, find_weights(model))
        replay.load([*rows, longer])
        for batch in ([rows[2]], [longer, rows[1]], [rows[3], rows[3], rows[0]]):
            found = replay.label_rows(Batch.of(batch)).values
            assert_close(found, plain(model, batch), "logits", 1e-10)


# ---------------------------------------------------------------------------- editing


@kinds
def test_a_training_run_and_its_evaluation(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    mend = tiny_mend(model)
    start = {k: v.clone() for k, v in mend.editor.state_dict().items()}
    data = data_of(kind, 6)
    config = TrainConfig(steps=2, batch_size=3, lr=1e-3, eval_every=1, eval_records=2)
    with traceless(model):
        run = Trainer(
            mend,
            model,
            words(kind),
            data[:4],
            data[4:],
            config=config,
            output=tmp_path,
            progress=False,
        )
        trained = run.train()
        metrics = evaluate(trained, model, words(kind), data, progress=False)
    moved = {n for n, v in trained.editor.state_dict().items() if not torch.equal(v, start[n])}
    assert moved == set(start)
    outcomes = trained.edit_many(model, words(kind), data).outcomes
    assert [r.edit_success for r in metrics.records] == [o.success for o in outcomes]
    assert metrics.value("accuracy_drawdown") is not None
    assert (metrics.perplexity is None) == (kind in CLASSIFIERS)


@kinds
def test_independent_edits_equal_single_ones(kind: str) -> None:
    model = model_of(kind, torch.float64)
    mend = seasoned(kind, model)
    data = data_of(kind, 3)
    many = mend.edit_many(model, words(kind), data)
    rows = rows_of(kind, model, 5)[-2:]
    for i, request in enumerate(data):
        one = mend.edit(model, words(kind), request)
        assert many.outcomes[i].answer_after == one.outcomes[0].answer_after
        with one.applied(model):
            expected = plain(model, rows)
        with many[i].applied(model):
            assert_close(plain(model, rows), expected, f"edit {i}", 1e-9)


@kinds
@pytest.mark.parametrize("edit", ["mlp", "attention", "all"])
def test_applied_equals_merged_and_is_undone(kind: str, edit: str) -> None:
    model = model_of(kind)
    before = snapshot(model)
    mend = seasoned(kind, model, edit=(edit,))
    change = mend.edit(model, words(kind), data_of(kind, 1)[0])
    rows = rows_of(kind, model, 4)
    unedited = plain(model, rows)
    with change.applied(model):
        applied = plain(model, rows)
    change.merge_(model)
    merged = plain(model, rows)
    change.unmerge_(model)
    assert_same_bits(model, before)
    assert rel_error(applied, unedited) > 1e-3, "the edit does something"
    assert rel_error(applied, merged) < 1e-4


@sequences
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True}, {}], ids=str)
def test_generation_with_an_edit(kind: str, how: dict[str, Any]) -> None:
    model = model_of(kind, torch.float64)
    text = words(kind)
    change = seasoned(kind, model).edit(model, text, data_of(kind, 1)[0])
    inputs = text(["ba be bi", "do du di"], return_tensors="pt", return_token_type_ids=False)

    def generate() -> Tensor:
        set_seed(0)
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **how)

    unedited = generate()
    with change.applied(model):
        applied = generate()
    change.merge_(model)
    assert torch.equal(generate(), applied)
    change.unmerge_(model)
    assert torch.equal(generate(), unedited)
    assert not torch.equal(applied, unedited), "the edit does something"
