"""Models of every kind and in every wrapper: edited right, or refused by name."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import architectures
import peft
import pytest
import tiny
import torch
from tiny import HIDDEN, INNER
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)
from transformers.initialization import no_init_weights

from pymend import EditRequest, MendConfig
from pymend.algorithms.cache import Cache
from pymend.algorithms.mend.mend import Mend
from pymend.config import CacheConfig
from pymend.engine.capture import BESIDE, LIVE, _live
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Row
from pymend.models.structure import find_weights, left_out, unwrapped

ROWS = [Row((5, 9, 30, 7, 11), 2), Row((8, 6, 12), 1), Row((40, 41, 42, 43, 44, 45), 3)]
LLAMA = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 1, "head_dim": 6, "num_hidden_layers": 4}
BART = {f"{side}_{n}": v for side in ("encoder", "decoder")
        for n, v in (("ffn_dim", INNER), ("attention_heads", 2), ("layers", 3))}  # fmt: skip


def classifier(model_type: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    ids = {"vocab_size": tiny.VOCAB, "bos_token_id": 2, "eos_token_id": 3, "num_labels": 3}
    config = AutoConfig.for_model(model_type, **ids, **sizes)
    return AutoModelForSequenceClassification.from_config(config).eval()


def claims() -> list[EditRequest]:
    """Of unequal length."""
    rng = random.Random(0)
    texts = [" ".join(rng.sample(tiny.WORDS, n)) for n in (3, 9, 6)]
    return [EditRequest(text, str(i)) for i, text in enumerate(texts)]


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llama", {**LLAMA, "initializer_range": 0.3}),
        ("bart", {**BART, "d_model": HIDDEN, "init_std": 0.3, "decoder_start_token_id": 3}),
    ],
)
def test_classes_do_not_depend_on_batch_mates(
    model_type: str, sizes: dict[str, Any], pad: int
) -> None:
    """A decoder finds the last token of a text by the padding's id, whatever that is."""
    model, text = classifier(model_type, pad_token_id=pad, **sizes), tiny.tokenizer(end=True)
    mend, requests = tiny.tiny_mend(model, norm=False), claims()
    many = mend.edit_many(model, text, requests)
    for i, request in enumerate(requests):
        ids = torch.tensor([text(request.prompt).input_ids])
        with torch.no_grad():
            probability = float(model(ids).logits.softmax(-1)[0, i])
        alone = mend.edit(model, text, request)
        assert alone.outcomes[0].probability_before == pytest.approx(probability, rel=1e-4)
        assert many.outcomes[i].probability_before == pytest.approx(probability, rel=1e-4)
        after = alone.outcomes[0].probability_after
        assert many.outcomes[i].probability_after == pytest.approx(after, rel=1e-3)


def test_a_classifier_without_a_padding_id_takes_one_text_at_a_time() -> None:
    """Transformers cannot find the ends of several texts then, even of equal length."""
    sizes = {**LLAMA, "initializer_range": 0.3}
    model, text = classifier("llama", **sizes), tiny.tokenizer(end=True)
    assert model.config.pad_token_id is None
    mend = tiny.tiny_mend(model, norm=False)
    alike = [EditRequest("da de di", "0"), EditRequest("fe fi fo", "1")]
    assert mend.edit(model, text, alike[0]).outcomes
    for requests in (alike, claims()):
        with pytest.raises(ValueError, match=r"LlamaFor.* takes one text at a time .*pad_token_id"):
            mend.edit_many(model, text, requests)
    model.config.pad_token_id = 0
    assert len(mend.edit_many(model, text, claims()).outcomes) == 3


# -- the frozen prefix proves itself ---------------------------------------------------------------


class Peeking(nn.Module):
    """The last block reads what the first was given: no prefix can hand that over."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.inner, self.seen = blocks[-1], []  # type: ignore[var-annotated]
        blocks[0].mlp.register_forward_pre_hook(lambda _m, args: self.seen.append(args[0]))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x + self.seen[-1].mean(1, keepdim=True), *args, **kwargs)


def labels(model: Any, prefix: bool) -> torch.Tensor:
    """Logits at the label positions of ROWS, each alone."""
    with frozen(model), torch.no_grad():
        replay = Replay(model, find_weights(model), prefix=prefix)
        replay.load(ROWS)
        found = [replay.label_rows(replay.batch([row])) for row in ROWS]
        return torch.cat([x.values if x.head is None else x.head(x.values) for x in found])


def test_a_model_without_a_prefix_is_run_whole_and_says_so() -> None:
    model = tiny.llama()
    model.model.layers[-1] = Peeking(model.model.layers)
    exact = labels(model, prefix=False)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM keeps no frozen prefix .*would change"):
        found = labels(model, prefix=True)
    assert torch.equal(found, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # tried once, said once
        assert torch.equal(labels(model, prefix=True), exact)


def test_blocks_that_run_several_times_keep_no_prefix() -> None:
    """With one state for all turns HRM's answers would hardly change, its gradients would."""
    config = {**architectures.OVERRIDES.get("hrm_text", {}), "H_cycles": 1, "L_bp_cycles": [2]}
    with mock.patch.dict(architectures.OVERRIDES, {"hrm_text": config}):
        model = architectures.build("causal", "hrm_text")
    mend = tiny.tiny_mend(model, norm=False)
    with pytest.warns(UserWarning, match="no frozen prefix .*run several times"):
        mend.edit(model, tiny.tokenizer(), tiny.facts(1)[0])


def test_rows_too_short_for_a_trial_prove_nothing() -> None:
    """They are run whole, and a model that was seen on them alone is tried later."""
    model = tiny.llama()
    model.model.layers[-1] = Peeking(model.model.layers)
    with frozen(model), torch.no_grad():
        replay = Replay(model, find_weights(model))
        replay.load([Row((5, 9), 0)])
        assert replay.cut == 0
    with pytest.warns(UserWarning, match="keeps no frozen prefix"):
        assert torch.equal(labels(model, prefix=True), labels(model, prefix=False))


def test_an_ordinary_model_keeps_its_prefix() -> None:
    model = tiny.llama()
    with frozen(model):
        replay = Replay(model, find_weights(model))
        replay.load(ROWS)
    assert replay.cut == 1


class Mixing(nn.Module):
    """A block that adds the mean over all positions, padding too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(x + x.mean(1, keepdim=True), *args, **kwargs)


def test_a_model_that_padding_changes_takes_facts_of_one_length() -> None:
    model = tiny.llama()
    model.model.layers[0] = Mixing(model.model.layers[0])
    mend, text = tiny.seasoned_mend(model), tiny.tokenizer()
    first, other, longer = (
        EditRequest(prompt, "ba") for prompt in ("da de di do du fa", "fe fi fo fu ga ge", "gi go")
    )
    both = mend.edit_many(model, text, [first, other])
    alone = mend.edit(model, text, first)
    assert both.outcomes[0].probability_after == pytest.approx(
        alone.outcomes[0].probability_after, rel=1e-4
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no texts of unequal length"):
        mend.edit_many(model, text, [first, longer])


def test_what_padding_does_is_asked_again_where_texts_are_longer() -> None:
    """CANINE pools four characters, so of five and seven it shows nothing."""
    model, text = architectures.build("classification", "canine"), tiny.tokenizer(end=True)
    mend = tiny.tiny_mend(model, norm=False)
    assert mend.edit(model, text, EditRequest("da de di do du fa", "0")).outcomes
    with pytest.raises(ValueError, match=r"CanineFor.* takes no texts of unequal length"):
        mend.edit_many(model, text, claims())


def test_a_head_that_is_not_given_rows_of_tokens_gets_whole_rows() -> None:
    """ProphetNet's is given what predicts one token ahead beside what predicts two."""
    model, text = architectures.build("seq2seq", "prophetnet"), tiny.tokenizer(end=True)
    requests = [EditRequest("da de di do du", "fa"), EditRequest("fe fi fo fu ga", "go")]
    mend = tiny.tiny_mend(model, norm=False)
    outcomes = mend.edit_many(model, text, requests).outcomes
    for request, outcome in zip(requests, outcomes, strict=True):
        source, answer = (text(x).input_ids for x in (request.prompt, request.target))
        ids = torch.tensor([[model.config.decoder_start_token_id, *answer[:-1]]])
        with torch.no_grad():
            logits = model(torch.tensor([source]), decoder_input_ids=ids).logits[0]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        wanted = float(chosen.mean().exp())
        assert outcome.probability_before == pytest.approx(wanted, rel=1e-4)
    longer = EditRequest("fe fi fo fu ga", "go gu")
    with pytest.raises(ValueError, match="takes no texts of unequal length"):
        mend.edit_many(model, text, [requests[0], longer])  # its decoder looks at padding


# -- rows ------------------------------------------------------------------------------------------


def test_rounding_is_no_live_row() -> None:
    """Two episodes of three rows; a row counts by the largest of its own episode."""
    eps = LIVE[torch.float32]
    u = torch.tensor([1.0, 1, 1, 1, 1, 0])
    delta = torch.tensor([1.0, eps / 2, 2 * eps, 100, 50 * eps, 1])
    live = _live([torch.stack([u, delta])], 2, eps)
    assert live.tolist() == [True, False, True, True, False, False]
    delta[1] = torch.nan  # is looked at, so that it is refused
    assert _live([torch.stack([u, delta])], 2, eps)[1]


def test_rounding_is_told_by_other_weights_too() -> None:
    """A query's whole gradient may be little more than what rounding leaves of the value's."""
    eps = LIVE[torch.float32]
    query = torch.tensor([[1.0, 1, 1], [BESIDE * eps / 2, BESIDE * eps * 2, 0]])
    value = torch.tensor([[1.0, 1, 1], [1, 1, 1]])
    live = _live([query, value], 1, eps)
    assert live.tolist() == [False, True, False, True, True, True]


def test_attention_rows_do_not_depend_on_batch_mates() -> None:
    """The first token attends to itself alone: its query has no gradient but rounding."""
    model, text, requests = tiny.llama(), tiny.tokenizer(), tiny.facts(4)
    mend = tiny.seasoned_mend(model, edit=("attention",))
    many = mend.edit_many(model, text, requests)
    for i, request in enumerate(requests):
        alone, beside = mend.edit(model, text, request), many[i]
        for name, f in alone.factors.items():
            assert len(f.u) == len(beside.factors[name].u), name
            torch.testing.assert_close(beside.factors[name].delta, f.delta, rtol=1e-3, atol=1e-5)


class Routed(nn.Module):
    """Runs ``inner`` on every other token of a text, as an expert is run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sent = x[:, 1::2]
        out = torch.zeros_like(x)
        out[:, 1::2] = self.inner(sent.flatten(0, 1)).view(sent.shape)
        return out


def test_modules_that_see_some_of_the_tokens_are_not_mixed() -> None:
    model, text = tiny.llama(), tiny.tokenizer()
    model.model.layers[-1].mlp = Routed(model.model.layers[-1].mlp)
    mend = tiny.tiny_mend(model, edit=("*.3.mlp.*",), norm=False)
    requests = [EditRequest("da de di do du", "ba"), EditRequest("fe fi fo fu fa", "be")]
    assert mend.edit(model, text, requests[0]).outcomes
    with pytest.raises(ValueError, match=r"layers\.3\.mlp.* is given .* edits would be mixed"):
        mend.edit_many(model, text, requests)


def test_as_many_texts_as_tokens_are_not_mixed_where_time_comes_first() -> None:
    """XLNet's layers are given [tokens, texts, width], here of the same shape as the other way."""
    model, text = architectures.build("causal", "xlnet"), tiny.tokenizer()
    mend, draw = tiny.tiny_mend(model, norm=False), random.Random(0)
    requests = [EditRequest(" ".join(draw.sample(tiny.WORDS, 5)), "ba") for _ in range(5)]
    assert mend.edit(model, text, requests[0]).outcomes
    with pytest.raises(ValueError, match=r"is given token after token, .* edits would be mixed"):
        mend.edit_many(model, text, requests)


class Twice(nn.Module):
    """Runs ``inner`` a second time, on what nobody looks at."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        self.inner(2 * x)
        return y


def test_a_call_that_nobody_hears_adds_nothing() -> None:
    model, text, request = tiny.llama(), tiny.tokenizer(), tiny.facts(1)[0]
    plain = tiny.tiny_mend(model, edit=("*.3.mlp.*",), norm=False).edit(model, text, request)
    model.model.layers[-1].mlp = Twice(model.model.layers[-1].mlp)
    twice = tiny.tiny_mend(model, edit=("*.3.mlp.*",), norm=False).edit(model, text, request)
    for f, g in zip(plain.factors.values(), twice.factors.values(), strict=True):
        torch.testing.assert_close(f.u, g.u)
        torch.testing.assert_close(f.delta, g.delta)


class Silent(nn.Module):
    """An MLP that has no say."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * self.inner(x)


def test_where_there_is_no_gradient_there_is_no_change() -> None:
    model, text, request = tiny.llama(), tiny.tokenizer(), tiny.facts(1)[0]
    model.model.layers[-1].mlp = Silent(model.model.layers[-1].mlp)
    mend = tiny.seasoned_mend(model, edit=("*.3.*_proj.weight",))
    edit = mend.edit(model, text, request)
    assert [len(f.u) for name, f in edit.factors.items() if ".mlp." in name] == [0, 0, 0]
    assert edit.rank > 0


# -- which weights ---------------------------------------------------------------------------------


def skeleton(name: str) -> Any:
    """At full size, on the meta device."""
    with torch.device("meta"), no_init_weights():
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name]())


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("qwen3_next", "mlp.shared_expert."),
        ("glm4_moe", "mlp.shared_experts."),
        ("jamba", "feed_forward."),
        ("modernbert-decoder", "mlp.W"),
        ("qwen3_5_moe_text", "mlp.shared_expert."),
        ("opt", "fc"),
    ],
)
def test_attention_is_never_taken_for_an_mlp(name: str, inside: str) -> None:
    model = skeleton(name)
    weights = find_weights(model)
    assert weights and all(f".{inside}" in w.name for w in weights)
    beside = left_out(model, weights)
    assert any("attn" in n or "attention" in n or "mamba" in n for n in beside)
    assert not {w.module for w in weights} & beside.keys()


def test_a_layer_that_returns_more_than_its_product_is_refused_by_name() -> None:
    """Llama 4's routers are linear layers that return a pair."""
    model = tiny.llama()

    class Pair(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return y, y

    mlp = model.model.layers[-1].mlp
    mlp.router = Pair(HIDDEN, 4, bias=False)
    mlp.register_forward_pre_hook(lambda module, args: module.router(args[0]) and None)
    mend = tiny.tiny_mend(model, edit=("*.3.mlp.*",), norm=False)
    with pytest.raises(ValueError, match=r"router\.weight returns more than its product"):
        mend.edit(model, tiny.tokenizer(), tiny.facts(1)[0])


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "minimax_m2", "olmoe"])
def test_experts_are_the_mlp_where_there_is_no_other(name: str) -> None:
    model = skeleton(name)
    keys = [w.name.rpartition(".experts.")[2] for w in find_weights(model)]
    assert keys == ["gate_up_proj", "down_proj"] * 3
    attention = find_weights(model, ("attention",))
    assert {w.name.rpartition(".")[0].rpartition(".")[2] for w in attention} >= {"q_proj", "o_proj"}
    assert "experts in one parameter" in left_out(model, attention).values()


# -- wrappers --------------------------------------------------------------------------------------


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


WRAPPERS: list[Callable[[Any], Any]] = [compiled, compiled_in_place, compiled_blocks]


@pytest.mark.parametrize("called", [False, True], ids=["", "called before"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_edit_acts_on_a_compiled_model(wrap: Callable[[Any], Any], called: bool) -> None:
    torch.compiler.reset()
    plain, text, request = tiny.llama(), tiny.tokenizer(), tiny.facts(1)[0]
    model = wrap(copy.deepcopy(plain))
    ids = torch.tensor([text(request.prompt).input_ids])

    @torch.no_grad()
    def logits(model: Any) -> torch.Tensor:
        return model(input_ids=ids).logits

    if called:
        logits(model)
    mend = tiny.seasoned_mend(plain)
    edit, expected = mend.edit(model, text, request), mend.edit(plain, text, request)
    with expected.applied(plain), edit.applied(model):
        wanted, found = logits(plain), logits(model)
    assert not torch.allclose(wanted, logits(plain), atol=1e-3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    edit.merge_(model)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    edit.unmerge_(model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)


def test_a_model_in_a_wrapper_of_several_devices_is_edited() -> None:
    plain, text, request = tiny.llama(), tiny.tokenizer(), tiny.facts(1)[0]
    mend, model = tiny.seasoned_mend(plain), nn.DataParallel(plain)
    assert unwrapped(model) is plain
    edit = mend.edit(model, text, request)
    assert edit.outcomes == mend.edit(plain, text, request).outcomes
    edit.merge_(model)
    edit.unmerge_(plain)


@pytest.mark.parametrize("targets", [["up_proj", "down_proj"], ["q_proj", "v_proj"]])
def test_a_model_with_lora_is_edited_below_its_adapter(targets: list[str]) -> None:
    """The base's own matrices, under their own names: an editor fits with and without."""
    plain, text, request = tiny.llama(), tiny.tokenizer(), tiny.facts(1)[0]
    names = [w.name for w in find_weights(plain)]
    mend = tiny.seasoned_mend(plain)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    assert [w.name for w in find_weights(model)] == names
    ids = torch.tensor([text(request.prompt).input_ids])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        edit = mend.edit(model, text, request)
        with edit.applied(model):
            beside = model(input_ids=ids).logits
        edit.merge_(model)
        merged = model(input_ids=ids).logits
        edit.unmerge_(model)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(beside, before, atol=1e-3)
    torch.testing.assert_close(merged, beside, rtol=0, atol=1e-4)


def test_an_adapter_of_prompts_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(tiny.llama(), config)
    with pytest.raises(ValueError, match="PEFT adapter of prompts"):
        Mend.from_config(model, MendConfig(rank=3))


def test_an_editor_has_float32_whatever_the_default_is() -> None:
    """In bfloat16 hardly a parameter would move."""
    model = tiny.llama()
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        mend = Mend.from_config(model, MendConfig(rank=3))
    finally:
        torch.set_default_dtype(former)
    assert {p.dtype for p in mend.editor.parameters()} == {torch.float32}


def test_a_sequence_model_says_what_its_decoder_starts_from() -> None:
    sizes = {**BART, "d_model": HIDDEN, "vocab_size": tiny.VOCAB}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes)).eval()
    model.config.decoder_start_token_id = None
    mend = Mend.from_config(model, MendConfig(rank=3))
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        mend.edit(model, tiny.tokenizer(end=True), tiny.facts(1)[0])


def test_peft_would_take_shared_experts_for_experts() -> None:
    """It would load such an adapter without an error, and the edit would be gone."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "num_hidden_layers": 4, "num_experts": 4}
    sizes |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    model = tiny.build("qwen2_moe", num_experts_per_tok=2, max_position_embeddings=32, **sizes)
    mend = tiny.tiny_mend(model, norm=False)
    edit = mend.edit(model, tiny.tokenizer(), tiny.facts(1)[0])
    with pytest.raises(ValueError, match="PEFT takes down_proj, gate_proj, up_proj of a model"):
        edit.to_peft("adapter")


def test_peft_would_take_longcats_mlp_for_experts() -> None:
    """Some of its experts do nothing and have no way down."""
    model = architectures.build("causal", "longcat_flash")
    edit = tiny.seasoned_mend(model).edit(model, tiny.tokenizer(), tiny.facts(1)[0])
    with pytest.raises(ValueError, match="PEFT takes down_proj, gate_proj, up_proj of a model"):
        edit.to_peft("adapter")


def test_peft_loads_no_adapter_of_mambas_way_out() -> None:
    model = architectures.build("causal", "mamba")
    edit = tiny.seasoned_mend(model).edit(model, tiny.tokenizer(), tiny.facts(1)[0])
    with pytest.raises(ValueError, match="no adapter of out_proj of a model of the type mamba;"):
        edit.to_peft("adapter")


def test_a_cache_reads_the_mask_of_a_compiled_model() -> None:
    """Left padding, or the mean would be over other tokens."""
    torch.compiler.reset()
    plain, text, request = tiny.llama(), tiny.tokenizer(), tiny.facts(1)[0]
    edit = Cache(CacheConfig(eps=1e-3)).edit(plain, text, request)
    ids = torch.tensor([[0, 0, *text(request.prompt).input_ids]])
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    model = compiled(plain)
    with torch.no_grad():
        with edit.applied(plain):
            wanted = plain(**given).logits
        with edit.applied(model):
            found = model(**given).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert wanted[0, -1].max() == 20  # the remembered token
