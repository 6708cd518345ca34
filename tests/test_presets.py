"""Known models at full size on the meta device: what is edited in them, and by how large an editor.

Their families run with tiny random weights in ``test_families.py`` and ``test_encoders.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import test_encoders
import test_families
import tiny
import torch
from torch import nn
from transformers import AutoConfig

from pymend import MendConfig, Trainer
from pymend.algorithms.mend.network import Editor
from pymend.commands import main
from pymend.config import TrainConfig
from pymend.engine.tokens import Row
from pymend.models.presets import Preset, preset, presets
from pymend.models.structure import EditedWeight, find_weights

# Millions of parameters of an editor of rank 1920, from the formula 2 (2 r D + D + 2 n D), and
# how many weights it edits: the paper's, else the default ones.
EDITORS = {
    "bert-base-uncased": (59.1, 6),
    "facebook/bart-base": (59.1, 8),
    "distilgpt2": (59.1, 6),
    "gpt2": (59.1, 6),
    "gpt2-xl": (123.1, 6),
    "EleutherAI/gpt-neo-2.7B": (197.0, 6),
    "EleutherAI/gpt-j-6B": (315.1, 6),
    "google/t5-small-ssm-nq": (18.9, 8),
    "google/t5-large-ssm-nq": (78.8, 8),
    "google/t5-xl-ssm-nq": (110.4, 8),
    "google/t5-xxl-ssm-nq": (220.7, 8),
    "meta-llama/Meta-Llama-3-8B": (283.9, 9),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (32.5, 9),
}
INNER = ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim")  # by family


@pytest.fixture(scope="module", params=presets())
def known(request: pytest.FixtureRequest) -> tuple[Preset, Any]:
    """A preset and its model without memory."""
    found = preset(request.param)
    return found, found.skeleton()


def weights_of(known: tuple[Preset, Any]) -> tuple[EditedWeight, ...]:
    """The paper's, else the default ones."""
    found, model = known
    return find_weights(model, ("paper",) if found.weights else ())


def test_the_configuration_gives_the_model_its_known_size(known: tuple[Preset, Any]) -> None:
    found, model = known
    assert {p.device.type for p in model.parameters()} == {"meta"}
    size = sum(p.numel() for p in model.parameters())
    if model.config.model_type == "t5" and not found.config["tie_word_embeddings"]:
        # Every T5 is built with its head tied, which reading the weights undoes.
        size += model.lm_head.weight.numel()
    assert size == found.parameters


def test_values_said_to_be_defaults_are_those() -> None:
    checked = 0
    for found in presets().values():
        if found.source.startswith("defaults of"):
            default = AutoConfig.for_model(found.config["model_type"])
            assert found.source == f"defaults of transformers' {type(default).__name__}"
            assert {k: getattr(default, k) for k in found.config} == found.config, found.name
            checked += 1
    assert checked == 7


def test_a_model_is_known_by_its_structure_alone(known: tuple[Preset, Any]) -> None:
    found, model = known
    config = copy.deepcopy(model.config)
    config.vocab_size += 1  # a token for padding, say
    config.name_or_path = "somewhere/else"
    assert [p.name for p in presets().values() if p.fits(config)] == [found.name]
    config.model_type = "another"
    assert not found.fits(config)


def test_default_weights_are_the_mlp_matrices_of_the_last_blocks(known: tuple[Preset, Any]) -> None:
    found, model = known
    weights = find_weights(model)
    stacks = 2 if model.config.is_encoder_decoder else 1
    hidden = model.config.hidden_size
    inner = next((found.config[k] for k in INNER if found.config.get(k)), 4 * hidden)
    for w in weights:
        shape = tuple(model.get_parameter(w.name).shape)
        assert shape == ((w.a, w.b) if w.transposed else (w.b, w.a))
        widths = {hidden, 2 * inner if w.name.endswith("gate_up_proj.weight") else inner}
        assert {w.a, w.b} == widths
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = max(len(m) for m in lists)
    count = 2 if stacks == 2 else 3
    edited = {next(int(p) for p in w.name.split(".") if p.isdigit()) for w in weights}
    assert edited == set(range(blocks - count, blocks))
    assert len(weights) % (stacks * count) == 0 and len(weights) // (stacks * count) in (2, 3)


def test_attention_is_the_rest_of_the_same_blocks(known: tuple[Preset, Any]) -> None:
    model = known[1]
    mlp, attention, both = (
        {w.name for w in find_weights(model, (k,))} for k in ("mlp", "attention", "all")
    )
    assert mlp | attention == both and not mlp & attention
    assert all("att" in name.lower() for name in attention)
    # Two matrices or four in each of three blocks; cross-attention makes four more in a decoder's.
    assert len(attention) in ((24,) if model.config.is_encoder_decoder else (6, 12))


def test_the_list_of_the_paper_is_kept_in_its_order(known: tuple[Preset, Any]) -> None:
    found, model = known
    if not found.weights:
        what = rf"no weights for this model \({model.config.model_type}, .*bert-base-uncased, "
        with pytest.raises(ValueError, match=what):
            find_weights(model, ("paper",))
        return
    weights = find_weights(model, ("paper",))
    assert tuple(w.name for w in weights) == found.weights
    modes: dict[tuple[int, int], list[int]] = {}
    for w in weights:
        modes.setdefault(w.shape, []).append(w.mode)
    assert all(m == list(range(len(m))) for m in modes.values())
    # It is the default but for the second way up of a gated T5.
    others = {w.name for w in find_weights(model)} - set(found.weights)
    assert all(name.endswith("wi_1.weight") for name in others)
    assert bool(others) == (found.config.get("feed_forward_proj") == "gated-gelu")


def test_size_of_the_editor(known: tuple[Preset, Any]) -> None:
    weights = weights_of(known)
    with torch.device("meta"):
        editor = Editor(weights, MendConfig())
    size = sum(p.numel() for p in editor.nets_parameters())
    nets = {w.shape: sum(v.shape == w.shape for v in weights) for w in weights}
    assert size == sum(
        2 * (2 * min(1920, a + b) + 1 + 2 * modes) * (a + b) for (a, b), modes in nets.items()
    )
    if known[0].name in EDITORS:
        assert (round(size / 1e6, 1), len(weights)) == EDITORS[known[0].name]


def test_every_family_runs_with_tiny_weights() -> None:
    tried = {model_type for model_type, *_ in test_families.FAMILIES.values()}
    tried |= {model_type for model_type, *_ in test_encoders.KINDS.values()}
    assert {p.config["model_type"] for p in presets().values()} <= tried
    assert set(EDITORS) <= set(presets())


def test_weights_in_the_order_of_the_paper_train_and_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.gpt2()
    names = tuple(f"transformer.h.{i}.mlp.{m}.weight" for i in (2, 3) for m in ("c_proj", "c_fc"))
    monkeypatch.setattr("pymend.models.structure.paper_weights", lambda config: names)
    mend = tiny.seasoned_mend(model, edit=("paper",))
    assert tuple(w.name for w in mend.weights) == names
    data, config = tiny.facts(4), TrainConfig(steps=1, batch_size=2, eval_records=2)
    trained = Trainer(
        mend,
        model,
        tiny.tokenizer(),
        data,
        data[:2],
        config=config,
        output=tmp_path,
        progress=False,
    ).train()
    edit = trained.edit(model, tiny.tokenizer(), data[0])
    rows = [Row((5, 9, 30, 7, 11)), Row((8, 6, 12))]
    plain = tiny.logits_of(model, rows)
    with edit.applied(model):
        applied = tiny.logits_of(model, rows)
    edit.merge_(model)
    assert tiny.rel_error(applied, plain) > 1e-2, "the edit does something"
    assert tiny.rel_error(applied, tiny.logits_of(model, rows)) < 1e-4


def test_a_head_of_another_class_is_named() -> None:
    """BERT's list is for a classifier; a bare encoder calls its weights otherwise."""
    model = preset("bert-base-uncased").skeleton().bert
    with pytest.raises(ValueError, match=r"no parameter is called 'bert\.encoder\.layer\.9\."):
        find_weights(model, ("paper",))


def test_the_command_lists_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # a name on each line
    assert main(["models", "list", "google/t5-xl-ssm-nq", "microsoft/phi-2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, last = lines[2].split(), lines[6].split()
    wi = "encoder.block.22-23.layer.1.DenseReluDense.wi_0.weight"
    assert first == ["google/t5-xl-ssm-nq", "paper", wi, "110.4M"]
    assert last == ["microsoft/phi-2", "mlp", "model.layers.29-31.mlp.fc1.weight", "197.0M"]
    assert main(["models", "list", "gpt5"]) == 2
    assert "no preset is called 'gpt5'; known are bert-base-uncased," in capsys.readouterr().err
