"""An edit as a LoRA adapter: PEFT loads it and gives the edited model's logits."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import test_encoders
import test_families
import torch
from safetensors.torch import load_file
from tiny import VOCAB, facts, gpt2, llama, rel_error, seasoned_mend, tokenizer
from torch import Tensor

from pymend.commands import main
from pymend.edit import Edit, LowRank
from pymend.errors import NonFiniteError
from pymend.models.structure import find_weights

MODELS = {
    "llama": llama,
    "gpt2": gpt2,
    "phi3": lambda: test_families.model_of("phi3"),
    "t5": lambda: test_encoders.model_of("t5"),
    "t5-v1.1": lambda: test_encoders.model_of("t5-v1.1"),
    "bert": lambda: test_encoders.model_of("bert"),
}
# The largest relative error of logits. Float32: T5 with random weights magnifies rounding; half
# precision: every layer rounds its output, and PEFT rounds once where we round twice.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
kinds = pytest.mark.parametrize("kind", MODELS)


def edit_of(model: Any, ranks: tuple[int, ...] = (3, 1, 5), dtype: Any = torch.float32) -> Edit:
    """Random factors; ranks that go round over the weights, and an alpha of its own for each."""
    weights = find_weights(model)
    factors = {}
    for i, w in enumerate(weights):
        n = ranks[i % len(ranks)]
        u, delta = torch.randn(n, w.a, dtype=dtype), torch.randn(n, w.b, dtype=dtype)
        factors[w.name] = LowRank(u, delta, torch.tensor(0.02 * (i + 1), dtype=dtype))
    return Edit(weights, factors)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(4, 4 + 2 * 9).view(2, 9) % VOCAB
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(1)
    return model(**inputs).logits


def loaded(model: Any, folder: Path) -> Any:
    """A copy of ``model`` with the adapter; PEFT finds nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()


def check(model: Any, edit: Edit, folder: Path) -> None:
    edit.to_peft(folder)
    before = logits(model)
    with edit.applied(model):
        edited = logits(model)
    tolerance = TOLERANCE[model.dtype]
    assert rel_error(before, edited) > 10 * tolerance, "the edit shows"
    adapted = loaded(model, folder)
    assert rel_error(logits(adapted), edited) <= tolerance
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


@kinds
def test_peft_gives_the_logits_of_the_edited_model(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    check(model, edit_of(model), tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dtypes(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[kind]().to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    check(model, edit_of(model, dtype=wide), tmp_path / "adapter")


def test_an_edit_of_mend_and_a_stack_of_edits(tmp_path: Path) -> None:
    model = llama()
    mend = seasoned_mend(model, alpha=0.05)
    first, second = (mend.edit(model, tokenizer(), request) for request in facts(2))
    check(model, first, tmp_path / "first")
    check(model, first + second, tmp_path / "both")


@kinds
def test_edited_layers_alone_have_an_adapter(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    edit = edit_of(model)
    edit.to_peft(tmp_path)
    adapted = loaded(model, tmp_path)
    with_adapter = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert with_adapter == {w.module for w in edit.weights}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_rank_and_no_pattern(kind: str, tmp_path: Path) -> None:
    """What vLLM's loader reads: one r, lora_alpha, tensors of that rank; it drops patterns."""
    model = MODELS[kind]()
    edit = edit_of(model, ranks=(2, 6))
    edit.to_peft(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6
    assert config["fan_in_fan_out"] is (kind == "gpt2")
    assert not {"rank_pattern", "alpha_pattern", "modules_to_save", "use_dora"} & config.keys()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(edit.weights)
    for w in edit.weights:
        layer = f"base_model.model.{w.module}"
        assert tensors[f"{layer}.lora_A.weight"].shape == (6, w.a)
        assert tensors[f"{layer}.lora_B.weight"].shape == (w.b, 6)


def test_an_edit_without_rows(tmp_path: Path) -> None:
    model = llama()
    edit_of(model, ranks=(0,)).to_peft(tmp_path)
    assert torch.equal(logits(loaded(model, tmp_path)), logits(model))


def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    model = llama()
    edit = edit_of(model)
    both = {n: LowRank(f.u.expand(2, -1, -1), f.delta.expand(2, -1, -1), f.alpha)
            for n, f in edit.factors.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match=r"pick a single edit .* with \[i\]"):
        Edit(edit.weights, both).to_peft(tmp_path / "several")
    next(iter(edit.factors.values())).u[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="are not finite"):
        edit.to_peft(tmp_path / "infinite")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match="is not empty; choose a new folder"):
        edit_of(llama()).to_peft(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_interrupted_export_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pymend.interop.peft.write_tensors", full)
    with pytest.raises(OSError, match="no space"):
        edit_of(llama()).to_peft(tmp_path / "adapter")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, request = llama(), facts(1)[0]
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    seasoned_mend(model, alpha=0.05).save_pretrained(tmp_path / "editor")
    base = ["edit", "--model", tmp_path / "model", "--editor", tmp_path / "editor"]
    base += ["--prompt", request.prompt, "--target", request.target]
    base += ["--output", tmp_path / "edit", "--peft"]
    assert main(list(map(str, [*base, tmp_path / "model"]))) == 2
    assert "is not empty; choose a new folder" in capsys.readouterr().err
    assert main(list(map(str, [*base, tmp_path / "adapter"]))) == 0
    assert f"the adapter is in {tmp_path / 'adapter'}" in capsys.readouterr().out
    with Edit.from_pretrained(tmp_path / "edit").applied(model):
        edited = logits(model)
    adapted = logits(loaded(model, tmp_path / "adapter"))
    assert rel_error(adapted, edited) <= TOLERANCE[torch.float32]
