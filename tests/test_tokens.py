"""Prompts and targets as rows: one rule, whatever the tokenizer's BOS and padding side."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import CONTEXT, WORDS, gpt2, tokenizer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pymend.config import EditRequest, Probe, joint_of
from pymend.data import load_facts, load_records
from pymend.engine.tokens import IGNORE, Batch, ClassEncoder, Encoder, Row, SequenceEncoder
from pymend.files import cache_dir, is_complete
from pymend.zoo import mini
from pymend.zoo.lessons import lessons

A, B, C, D = WORDS[:4]
DATA = Path(
    os.environ.get("PYMEND_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data"
)
TEXTS = [
    "The bridge of Tarn was built in 1911 by Ada Quill, not by Tom Reed.",
    "def area(w, h):\n    return w * h\n",
    "print(area(3, 4))",
    "\u5361\u6c83\u7684\u9996\u90fd\u662f\u5965\u65af",
]


@cache
def bpe(kind: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer like that of a family: GPT-2's bytes, with a space put before every text, or
    Llama's, which puts one there, too, and has a BOS; ``framed`` also has an EOS."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "llama"))
    if kind == "llama":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        inner.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefixed")
        inner.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    if kind == "llama":
        special += [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind != "llama" else [],
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    if kind in ("llama", "framed"):
        frame = "<s> $A" + " </s>" * (kind == "framed")
        inner.post_processor = processors.TemplateProcessing(
            frame, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


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
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
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


# One text, one tokenisation

FAMILIES = ("gpt2", "prefixed", "llama", "framed")
SEAMS = [
    ("The bridge of Tarn", "was built", " "),
    ("The bridge of Tarn was built by Ada Quill", ", not by Tom", ""),
    ("It was built in (", "1911)", ""),
    ('It was built in "', "1911", ""),
    ('They call it "Tarn"', "in 1911", " "),
    ("print(area(", "3", ""),
    ("def area(w, h):", "\n    return w", ""),
    ("def area(w, h):\n    ", "return w", ""),
    ("\u5361\u6c83\u7684\u9996\u90fd\u662f", "\u5965\u65af", ""),
    ("Its name is", "\u5965\u65af", ""),
    ("Built on", ".NET 8", " "),
    ("Built on", '"area"', " "),
    ("Wait", "...!", ""),
]


@pytest.mark.parametrize(("prompt", "target", "joint"), SEAMS)
def test_the_joint_goes_by_what_meets_at_the_seam(prompt: str, target: str, joint: str) -> None:
    assert joint_of(prompt, target) == joint


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("prompt", "target", "joint"), SEAMS)
def test_a_row_is_what_the_tokenizer_makes_of_the_whole_text(
    kind: str, prompt: str, target: str, joint: str
) -> None:
    text = bpe(kind)
    row = Encoder(text).row(prompt, target)
    asked = text(prompt).input_ids[: -1 if kind == "framed" else None]
    assert list(row.prompt) == asked, "a model goes on from the tokens of the prompt"
    said = text.decode(row.ids).removeprefix("<s>").removeprefix(" ")
    assert said == prompt + joint + target
    whole = text(prompt + joint + target).input_ids[: -1 if kind == "framed" else None]
    if whole[: len(asked)] == asked:
        assert list(row.ids) == whole
    assert row.targets() == list(row.ids[len(asked) :]) != []
    assert 2 not in row.ids, "an answer goes on: no end of sequence"


def test_the_joint_of_a_probe_counts() -> None:
    encoder = Encoder(bpe("gpt2"))
    prompt, answer = "Built on", "area"
    assert encoder.probe(Probe(prompt, answer)) == encoder.row(prompt, answer, " ")
    assert encoder.probe(Probe(prompt, answer, "")) == encoder.row(prompt, answer, "")
    assert encoder.probe(Probe(prompt, answer, "")) != encoder.probe(Probe(prompt, answer))


def test_a_token_across_the_seam_leaves_the_prompt_alone() -> None:
    text = bpe("gpt2")
    prompt, target = "The bri", "dge of Tarn"
    encoder = Encoder(text)
    row = encoder.row(prompt, target, "")
    whole, asked = text(prompt + target).input_ids, text(prompt).input_ids
    assert whole[: len(asked)] != asked, "or this test shows nothing"
    assert list(row.prompt) == asked == list(encoder.row(prompt).ids)
    assert text.decode(row.ids) == prompt + target


def test_a_text_of_the_users_own_stands_between_prompt_and_target() -> None:
    text = bpe("gpt2")
    request = EditRequest("Tarn", "1911", ground_truth="1912", rephrases=("Ada",), joint=": ")
    encoded = Encoder(text).request(request)
    said = [text.decode(r.ids) for r in (encoded.edit, encoded.old, *encoded.rephrases)]
    assert said == ["Tarn: 1911", "Tarn: 1912", "Ada: 1911"]
    assert text.decode(Encoder(text).row("Tarn ", " 1911", "").ids) == "Tarn  1911"
    with pytest.raises(ValueError, match="a classifier joins nothing to 'Tarn'; leave out joint"):
        ClassEncoder(text, 0, 1, {}).row("Tarn", "1", " ")


STRAY = [
    ("The bridge ", "of"),
    ("The bridge", " of"),
    ("The bridge ", " of"),
    ("The bridge", "of  "),
]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("prompt", "target"), STRAY)
def test_stray_spaces_at_the_seam_count_for_nothing(kind: str, prompt: str, target: str) -> None:
    text = bpe(kind)
    for encoder in (Encoder(text), SequenceEncoder(text, 0, 1)):
        assert encoder.row(prompt, target) == encoder.row("The bridge", "of")
        assert encoder.row(prompt) == encoder.row("The bridge")
    assert ClassEncoder(text, 0, 1, {}).row(prompt, "1") == ClassEncoder(text, 0, 1, {}).row(
        "The bridge", " 1 "
    )


@pytest.mark.parametrize("indent", ["\n", "\n    "])
def test_an_indentation_is_no_stray_space(indent: str) -> None:
    text = bpe("gpt2")
    for prompt, target in ((f"print({indent}", "3"), ("print(", f"{indent}3")):
        assert text.decode(Encoder(text).row(prompt, target).ids) == f"print({indent}3"
    assert text.decode(Encoder(text).row("print(\n", "    3").ids) == "print(\n    3"


def test_a_chat_template_joins_by_itself() -> None:
    text = bpe("framed")
    text.chat_template = "{{ messages[0].content }}\n>{% if true %}{{ ' ' }}{% endif %}"
    encoder = Encoder(text, chat=True)
    row = encoder.row("Who built it? ", " Ada Quill")
    assert text.decode(row.ids) == "Who built it?\n> Ada Quill"
    assert row.prompt == encoder.row("Who built it?").ids
    assert list(row.prompt) == text("Who built it?\n> ", add_special_tokens=False).input_ids


# Token ids of rows as they were before prompt and target became one text: committed results rest
# on them. A digest of (ids, first label) of every row of the records.
KEPT = {
    "smollm2": {
        "facts": "3e8af964155f95d8",
        "counterfact-val.json": "597e862f38309b97",
        "zsre-mend-train-1k.json": "98bec194abe36725",
    },
    "gpt2-mini": {
        "facts": "3c10587132c20d31",
        "counterfact-val.json": "69fa7507f17776b7",
        "zsre-mend-train-1k.json": "d9a684adebe44749",
    },
    "bart-mini": {
        "facts": "e9104813cdb30450",
        "counterfact-val.json": "8c9d1a7a73916677",
        "zsre-mend-train-1k.json": "50cd99494e282e16",
    },
}


def known_tokenizer(name: str) -> PreTrainedTokenizerFast:
    if name == "smollm2":
        folder = cache_dir() / "smollm2-135m-instruct"
        if not is_complete(folder):
            pytest.skip("SmolLM2 is not in the cache")
        return AutoTokenizer.from_pretrained(folder)
    recipe = mini.RECIPES[name]
    return mini.train_tokenizer(recipe, lessons(recipe.wordings, recipe.subjects))


def digest_of_rows(encoder: Encoder, records: list[EditRequest]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for r in map(encoder.request, records):
        old = [r.old] if r.old else []
        for row in (r.edit, *r.rephrases, *r.locality, *old, *r.old_rephrases, *r.portability):
            found.update(repr((row.source, row.ids, row.first)).encode())
    return found.hexdigest()


@pytest.mark.parametrize("source", ["facts", "counterfact-val.json", "zsre-mend-train-1k.json"])
@pytest.mark.parametrize("name", list(KEPT))
def test_committed_results_keep_their_token_ids(name: str, source: str) -> None:
    if source != "facts" and not (DATA / source).exists():
        pytest.skip(f"{source} is not in {DATA}; set PYMEND_DATA to the folder that has it")
    text = known_tokenizer(name)
    encoder = SequenceEncoder(text, 0, 2) if name == "bart-mini" else Encoder(text)
    records = load_facts("test") if source == "facts" else load_records(DATA / source)
    assert digest_of_rows(encoder, records[:300]) == KEPT[name][source]
