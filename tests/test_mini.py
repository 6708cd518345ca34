"""Small models made on the spot: what they are taught, how they are kept, what they know."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from pymend.commands import main
from pymend.data.builders.claims import NAMES
from pymend.data.facts import load_relations, wrong_objects
from pymend.engine.tokens import IGNORE, Encoder
from pymend.models.structure import find_weights
from pymend.zoo import mini
from pymend.zoo.lessons import Course, lessons
from pymend.zoo.load import load

KINDS = tuple(mini.RECIPES)
DECODERS = ("gpt2-mini", "moe-mini")
# Enough to learn a few facts.
WIDTHS = {
    "bart-mini": {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
    "t5-mini": {"d_model": 32, "d_kv": 8, "d_ff": 64},
    "bert-mini": {"hidden_size": 32, "intermediate_size": 64},
    "gpt2-mini": {"n_embd": 64, "n_inner": 128},
    "moe-mini": {"hidden_size": 64, "moe_intermediate_size": 32, "head_dim": 16},
}


def tiny(name: str) -> mini.Recipe:
    recipe = mini.RECIPES[name]
    return replace(
        recipe,
        config={**recipe.config, **WIDTHS[name]},
        vocabulary=600,
        steps=12,
        batch=8,
        warmup=2,
        check=6,
        bar=0.0,
        subjects=1,
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and recipes that take a second."""
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path))
    monkeypatch.setattr(mini, "RECIPES", {name: tiny(name) for name in KINDS})
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of seed 0, made once; tests read them only."""
    folder = tmp_path_factory.mktemp("made")

    @lru_cache
    def make(name: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYMEND_CACHE", str(folder))
            patch.setattr(mini, "RECIPES", {name: tiny(name) for name in KINDS})
            return mini.make(name, progress=False)

    return make


def saved(place: Path, name: str) -> tuple[Any, Any]:
    auto = getattr(transformers, mini.RECIPES[name].auto)
    return auto.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)


def course(name: str, tokenizer: Any = None) -> Course:
    recipe = tiny(name)
    facts = lessons(recipe.wordings, recipe.subjects)
    tokenizer = tokenizer or mini.train_tokenizer(recipe, facts)
    encoder = Encoder.for_model(mini._build(recipe, len(tokenizer)), tokenizer)
    return Course(encoder, facts, recipe.batch, recipe.passages, seed=0)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_saved_is_what_was_trained(name: str, made: Callable[[str], Path]) -> None:
    place = made(name)
    assert place.name == f"{name}-v{mini.RECIPES[name].edition}"
    model, tokenizer = saved(place, name)
    card = mini.card(place)
    assert card["model"] == name and card["steps"] == 12 and card["facts"] == 29
    exams, asked = course(name, tokenizer), mini.ASKED
    for part, rows in (
        ("seen", exams.exam(wordings=asked)),
        ("held_out", exams.exam(held_out=True, wordings=asked)),
    ):
        assert card["rows"][part] == len(rows) > 0
        assert card["known"][part] == mini.exact_match(model, rows)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_seed_gives_the_same_bits(
    name: str, cache: Path, made: Callable[[str], Path]
) -> None:
    places = [made(name)]
    for seed in (0, 1):
        torch.manual_seed(5)  # a caller's own state
        state = torch.get_rng_state()
        places.append(mini.make(name, seed, progress=False))
        assert torch.equal(torch.get_rng_state(), state)
    assert places[0] != places[1] == mini.folder(name) and places[1].parent == cache
    kept = ("model.safetensors", "tokenizer.json", "config.json")
    files = [[(place / file).read_bytes() for file in kept] for place in places]
    assert files[0] == files[1]
    assert files[0][0] != files[2][0] and files[0][1:] == files[2][1:]


@pytest.mark.parametrize("name", KINDS)
def test_facts_are_learned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to eight facts, on seen wordings."""
    monkeypatch.setattr(mini, "lessons", lambda *which: lessons(*which)[:8])
    rate = 2 * mini.RECIPES[name].lr
    recipe = replace(tiny(name), steps=600, lr=rate, warmup=20, batch=16, check=20, bar=0.85)
    model, _, card = mini.train(recipe, progress=False)
    assert card["known"]["seen"] >= 0.85 and card["steps"] < 600 and card["facts"] == 8
    assert not model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_tokenizer_and_frame(name: str, made: Callable[[str], Path]) -> None:
    model, tokenizer = saved(made(name), name)
    text = "Question: Who painted Ceci n'est pas une pipe?"
    ids = tokenizer(text).input_ids
    before, after = {
        "bart-mini": (["<s>"], ["</s>"]),
        "t5-mini": ([], ["</s>"]),
        "bert-mini": (["[CLS]"], ["[SEP]"]),
        "gpt2-mini": ([], []),
        "moe-mini": ([], []),
    }[name]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    inner = tokenizer(text, add_special_tokens=False).input_ids
    assert tokens == [*before, *tokenizer.convert_ids_to_tokens(inner), *after]
    assert tokenizer.decode(inner) == text
    row = Encoder.for_model(model, tokenizer).row(text, "false")
    if name in DECODERS:  # one text
        assert row.ids == tuple(tokenizer(f"{text} false").input_ids)
    else:
        assert row.prefix == tuple(ids)
    for role in {"bos", "eos", "pad"} & set(mini.RECIPES[name].special):
        own = getattr(model.config, f"{role}_token_id")
        assert own == getattr(tokenizer, f"{role}_token_id")


@pytest.mark.parametrize("there", ["a rest", "a model"])
def test_a_half_written_folder_is_made_again(
    there: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = mini.folder("gpt2-mini")
    if there == "a rest":
        place.mkdir()
        (place / "config.json").write_text("{")
    else:
        mini.make("gpt2-mini", progress=False)
    taught: list[int] = []
    monkeypatch.setattr(mini, "train", counted(mini.train, taught))
    assert mini.make("gpt2-mini", progress=False) == place
    assert len(taught) == (there == "a rest")
    saved(place, "gpt2-mini")
    assert [p.name for p in cache.iterdir()] == [place.name]


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(1)
        return function(*args)

    return call


def test_a_model_that_learned_too_little_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(mini.RECIPES, "t5-mini", replace(tiny("t5-mini"), bar=0.95))
    assert main(["models", "make", "t5-mini"]) == 2
    error = capsys.readouterr().err
    assert "after 12 steps with seed 0 the model knows" in error and "try another seed" in error
    assert not list(cache.iterdir())


def test_the_command_makes_and_lists(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "make", "gpt2-mini", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert str(mini.folder("gpt2-mini", 3)) in out and "held_out" in out
    assert main(["models", "make", "gpt3-mini"]) == 2
    assert "no model is called 'gpt3-mini'; choose one of bart-mini," in capsys.readouterr().err
    assert main(["models", "list", "bart-mini"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["bart-mini", "mlp"]


def test_a_model_is_loaded_by_its_name(cache: Path) -> None:
    model, tokenizer = load("gpt2-mini")
    assert model.config.model_type == "gpt2" and len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("name", KINDS)
def test_weights_to_edit(name: str) -> None:
    """There are blocks below the edited ones, and edits have two shapes."""
    model = mini.skeleton(name)
    weights, width = find_weights(model), model.config.hidden_size
    stacks = 2 if mini.RECIPES[name].auto == "AutoModelForSeq2SeqLM" else 1
    assert len(weights) == {1: 6, 2: 8}[stacks]
    inner = getattr(model.config, "moe_intermediate_size", 0)
    up, down = (2 * inner, inner) if inner else (4 * width, 4 * width)  # gate and up in one
    assert {w.shape for w in weights} == {(width, up), (down, width)}
    assert all(w.experts == (8 if inner else 0) for w in weights)


@pytest.mark.parametrize("name", KINDS)
def test_lessons(name: str) -> None:
    facts = lessons(mini.RECIPES[name].wordings)
    assert len(facts) == sum(len(r.facts) for r in load_relations())
    shown = {text for fact in facts for text in fact.seen}
    hidden = {text for fact in facts for text in fact.held_out}
    assert all(fact.seen for fact in facts) and not shown & hidden
    assert 0.08 < len(hidden) / len(shown | hidden) < 0.12


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_the_seen_wordings(name: str) -> None:
    taught = course(name)
    encoder, tokenizer = taught.encoder, taught.encoder.tokenizer
    seen = {text for fact in taught.facts for text in fact.seen}
    hidden = {text for fact in taught.facts for text in fact.held_out}
    batches = [taught.batch(step) for step in range(1, 41)]
    rows = [x.row for batch in batches for x in batch]
    texts = {tokenizer.decode(row.prefix, skip_special_tokens=True) for row in rows}
    if name == "bert-mini":
        claims = {
            encoder.row(f"{t} {said}.", NAMES[said == f.truth]): (f, said == f.truth)
            for f in taught.facts
            for t in f.seen
            for said in (f.truth, *wrong_objects(f.relation, f.subject))
        }
        for batch in batches:
            assert 2 * sum(claims[x.row][1] for x in batch) == len(batch) == taught.size
            for x in batch:
                fact, true = claims[x.row]
                hint = tokenizer(f" {fact.truth}", add_special_tokens=False).input_ids[0]
                assert x.hint == (IGNORE if true else hint)
    elif name in DECODERS:
        short = [text for text in texts if ". " not in text]
        assert all(any(text.startswith(t) for t in seen) for text in short)
        assert len(short) < len(texts)  # there are passages
    else:
        assert texts <= seen
    assert not texts & hidden


def test_passages_begin_anywhere_in_their_first_half() -> None:
    fact = lessons(mini.RECIPES["gpt2-mini"].wordings)[0]
    said = [text for text in fact.sentences() if "\n" not in text]
    total = len(" ".join(said).split())
    passages = [fact.passage(random.Random(seed)) for seed in range(200)]
    assert {len(p.split()) for p in passages} == set(range(total - total // 2, total + 1))
    assert any(not p.startswith(tuple(said)) for p in passages)
    for passage in passages:
        assert sum(text in passage for text in said) >= len(said) // 2 - 1


def test_a_card_says_what_each_expert_is_sent(made: Callable[[str], Path]) -> None:
    """Held against the indices that the experts are called with, text by text."""
    place = made("moe-mini")
    model, tokenizer = saved(place, "moe-mini")
    sent = torch.zeros(4, 8)

    def count(module: torch.nn.Module, args: Any) -> None:
        sent[experts.index(module)] += torch.bincount(args[1].flatten(), minlength=8)

    experts = [layer.mlp.experts for layer in model.model.layers]
    for module in experts:
        module.register_forward_pre_hook(count)
    with torch.inference_mode():
        for row in course("moe-mini", tokenizer).exam(wordings=1):
            model(torch.tensor([row.inputs]))
    share = sent / sent.sum(1, keepdim=True)
    torch.testing.assert_close(torch.tensor(mini.card(place)["load"]), share, atol=2e-3, rtol=0)
    assert "load" not in mini.card(made("gpt2-mini"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-mini", "moe-mini"])
def test_really(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path))
    card = mini.card(mini.make(name, progress=False))
    assert card["known"]["seen"] >= 0.95 and card["facts"] == 2289
    assert all(share > 0.01 for block in card.get("load", []) for share in block)  # none idles
