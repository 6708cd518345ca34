"""Prompts and targets as rows: one rule, whatever the tokenizer's BOS and padding side."""

from __future__ import annotations

import pytest
import torch
from tiny import CONTEXT, WORDS, gpt2, tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from pymend.config import EditRequest, Probe
from pymend.engine.tokens import IGNORE, Batch, Encoder, Row, SequenceEncoder

A, B, C, D = WORDS[:4]


def ids(*words: str) -> tuple[int, ...]:
    return tuple(4 + WORDS.index(w) for w in words)


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_target_are_joined_with_one_bos(bos: bool) -> None:
    row = Encoder(tokenizer(bos)).row(f"{A} {B}", f"{C} {D}")
    start = (2,) if bos else ()
    assert row.ids == (*start, *ids(A, B, C, D))
    assert row.targets() == list(ids(C, D)), "the target and no end of sequence"
    assert [row.ids[t] for t in row.positions()] == list(ids(B, C))


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer to which a word behind a space is another one than at the start."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator([f"{w} {w}" for w in WORDS] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="!", pad_token="!")


def test_one_space_stands_between_prompt_and_target() -> None:
    text = byte_level()
    (behind,), (alone,) = text(f" {B}").input_ids, text(B).input_ids
    assert behind != alone
    row = Encoder(text).row(A, B)
    assert row.ids == tuple(text(f"{A} {B}").input_ids) and row.targets() == [behind]
    # Behind a turn of a chat, and at the start of a decoder, stands none.
    text.chat_template = "{{ messages[0].content }}:"
    assert Encoder(text, chat=True).row(A, B).targets() == [alone]
    assert SequenceEncoder(text, 0, start=5).row(A, B).targets() == [alone, text.eos_token_id]


@pytest.mark.parametrize("bos", [False, True])
def test_without_a_target_every_position_counts(bos: bool) -> None:
    row = Encoder(tokenizer(bos)).row(f"{A} {B}")
    assert list(row.positions()) == list(range(2 + bos))
    assert row.targets() == [*ids(A, B)[1 - bos :], IGNORE]


def test_positions_and_targets_by_hand() -> None:
    assert list(Row((7, 8, 9), 1).positions()) == [1] and Row((7, 8, 9), 1).targets() == [9]
    assert list(Row((7,), 0).positions()) == [] == Row((7,), 0).targets()
    assert Row((7,), 0, answer=False).targets() == [IGNORE]


def test_the_prompt_does_not_depend_on_the_target() -> None:
    encoder = Encoder(tokenizer(True))
    rows = [encoder.row(f"{A} {B}", t) for t in (C, D, f"{C} {D}")]
    assert len({r.ids[: r.first + 1] for r in rows}) == 1


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_says() -> None:
    rows = []
    for side in ("left", "right"):
        encoder = Encoder(tokenizer(True, padding_side=side))
        rows.append([encoder.row(f"{A} {B}", C), encoder.row(A, f"{C} {D}"), encoder.row(D)])
    assert rows[0] == rows[1]
    batch = Batch.of(rows[0])
    # The last token of an answer is predicted, never read.
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert batch.inputs["input_ids"].tolist()[:2] == [[2, *ids(A, B)], [2, *ids(A, C)]]
    assert batch.row.tolist() == [0, 1, 1, 2, 2]
    assert batch.position.tolist() == [2, 1, 2, 0, 1]
    assert batch.target.tolist() == [*ids(C), *ids(C, D), *ids(D), IGNORE]
    assert batch.inputs["input_ids"].dtype == torch.long


def test_a_request_as_rows() -> None:
    encoder = Encoder(tokenizer())
    request = EditRequest(
        A,
        B,
        ground_truth=C,
        rephrases=(f"{D} {A}", f"{C} {A}"),
        locality=(Probe(C, D), Probe(D)),
        portability=(Probe(D, A),),
    )
    encoded = encoder.request(request)
    assert encoded.edit == encoder.row(A, B) and encoded.old == encoder.row(A, C)
    assert [r.targets() for r in encoded.rephrases] == [list(ids(B))] * 2
    assert [r.targets() for r in encoded.old_rephrases] == [list(ids(C))] * 2
    assert [r.answer for r in encoded.locality] == [True, False]
    assert encoded.portability == (encoder.row(D, A),)
    bare = encoder.request(EditRequest(A, B, rephrases=(C,)))
    assert bare.old is None and bare.old_rephrases == ()


def test_the_chat_template_is_used_on_request() -> None:
    text = tokenizer(True)
    with pytest.raises(ValueError, match="no chat template; leave out chat"):
        Encoder(text, chat=True)
    text.chat_template = (
        f"{{{{ bos_token }}}} {D} {{% for m in messages %}}{{{{ m.content }}}} {{% endfor %}}{D} "
    )
    row = Encoder(text, chat=True).row(A, B)
    assert row.ids == (2, *ids(D, A, D, B))
    assert row.targets() == list(ids(B))


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="the prompt is empty; give at least one word"):
        Encoder(tokenizer()).row(prompt, A)


@pytest.mark.parametrize("target", ["", "  "])
def test_a_target_without_tokens_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=f"target '{target}' of prompt '{A}' has no tokens"):
        Encoder(tokenizer()).row(A, target)


def test_the_limit_is_the_context_of_the_model() -> None:
    encoder = Encoder.for_model(gpt2(), tokenizer())
    assert encoder.limit == CONTEXT
    assert len(encoder.row(" ".join([A] * (CONTEXT - 1)), B).ids) == CONTEXT
    with pytest.raises(
        ValueError, match=rf"{CONTEXT + 1} tokens, the model's context is {CONTEXT}"
    ):
        encoder.row(" ".join([A] * CONTEXT), B)


def test_a_bad_record_is_named_by_its_number() -> None:
    records = [EditRequest(A, B), EditRequest(A, "")]
    with pytest.raises(ValueError, match=r"record 1: the target '' .* has no tokens"):
        Encoder(tokenizer()).requests(records)
