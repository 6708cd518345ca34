"""What cannot be done is refused before anything changed; the message names culprit and remedy."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    CONTEXT,
    WORDS,
    build,
    facts,
    gpt2,
    llama,
    seasoned_mend,
    tiny_mend,
    tokenizer,
    traceless,
)

from pymend import Edit, EditRequest, MendConfig, Probe, TrainConfig, Trainer, evaluate, load
from pymend.algorithms.mend.mend import Mend
from pymend.engine.generate import greedy
from pymend.engine.tokens import Encoder
from pymend.models.structure import find_weights

FC = "transformer.h.3.mlp.c_fc.weight"


@pytest.fixture
def model() -> Any:
    return gpt2()


@pytest.fixture
def mend(model: Any) -> Mend:
    return seasoned_mend(model)


def edit_of(mend: Mend, model: Any) -> Edit:
    return mend.edit(model, tokenizer(), facts(1)[0])


# -------------------------------------------------------------------------------------- weights


def test_unknown_weight_name(model: Any) -> None:
    with pytest.raises(ValueError, match=r"no parameter is called 'h\.9\.weight'; names look like"):
        find_weights(model, [FC, "h.9.weight"])


@pytest.mark.parametrize("kind", ["attention", "paper"])
def test_a_kind_of_matrices_among_names(model: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f"'{kind}' stands alone; leave out the other names"):
        find_weights(model, [FC, kind])


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.3.mlp.c_fc.bias"])
def test_a_name_that_is_no_matrix_of_a_linear_layer(model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not the matrix of a linear layer; leave it"):
        Mend.from_config(model, MendConfig(edit=(name,)))


def test_a_model_without_blocks() -> None:
    with pytest.raises(
        ValueError, match=r"Linear has no list of blocks .* name the weights to edit"
    ):
        find_weights(torch.nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"the paper names no weights for this model \(unknown, "):
        find_weights(torch.nn.Linear(3, 4), ("paper",))


# --------------------------------------------------------------------------------------- requests

LONG = " ".join(WORDS[:CONTEXT])
REQUESTS = [
    (EditRequest(WORDS[0], ""), "target '' of prompt 'ba' has no tokens; give a word"),
    (EditRequest("", WORDS[0]), "the prompt is empty; give at least one word"),
    (EditRequest(LONG, WORDS[0]), f"33 tokens, the model's context is {CONTEXT}; shorten 'ba be"),
]


@pytest.mark.parametrize(("request_", "message"), REQUESTS, ids=["target", "prompt", "context"])
@pytest.mark.parametrize("where", ["edit", "edit_many", "evaluate", "train"])
def test_a_request_that_cannot_be_used(
    where: str, request_: EditRequest, message: str, model: Any, mend: Mend, tmp_path: Path
) -> None:
    text, data = tokenizer(), [*facts(3), request_]
    folder = tmp_path / "out"
    calls = {
        "edit": lambda: mend.edit(model, text, request_),
        "edit_many": lambda: mend.edit_many(model, text, data),
        "evaluate": lambda: evaluate(mend, model, text, data, progress=False),
        "train": lambda: Trainer(
            mend, model, text, data, [], config=TrainConfig(batch_size=1), output=folder
        ),
    }
    with traceless(model), pytest.raises(ValueError) as error:
        calls[where]()
    assert message in str(error.value)
    if where in ("evaluate", "train"):
        assert str(error.value).startswith("record 3: ")
    assert not folder.exists()


def test_a_locality_prompt_beyond_the_context(model: Any, mend: Mend) -> None:
    data = [EditRequest(WORDS[0], WORDS[1], locality=(Probe(LONG, WORDS[2]),))]
    with pytest.raises(ValueError, match=r"record 0: .*33 tokens"):
        evaluate(mend, model, tokenizer(), data, progress=False)


def test_an_answer_that_is_shown_ends_with_the_context(model: Any) -> None:
    encoder = Encoder.for_model(model, tokenizer())
    nearly, full = (" ".join(WORDS[:n]) for n in (CONTEXT - 2, CONTEXT))
    assert greedy(model, encoder, [nearly], 2) == greedy(model, encoder, [nearly], 300) != [""]
    assert greedy(model, encoder, [full], 5) == [""]


def test_no_data(model: Any, mend: Mend, tmp_path: Path) -> None:
    text = tokenizer()
    for call in (mend.edit, mend.edit_many):
        with pytest.raises(ValueError, match="no request to edit; give at least one"):
            call(model, text, [])
    with pytest.raises(ValueError, match="0 records to evaluate; give at least 1"):
        evaluate(mend, model, text, [], progress=False)
    folder = tmp_path / "out"
    for data in ([], facts(3)):
        with pytest.raises(
            ValueError, match=rf"one step needs 4 records, the data set has {len(data)}; give more"
        ):
            Trainer(mend, model, text, data, [], config=TrainConfig(batch_size=4), output=folder)
    assert not folder.exists()


def test_an_editor_that_saw_no_training_example(model: Any) -> None:
    with traceless(model), pytest.raises(RuntimeError, match="no training example; train it"):
        edit_of(tiny_mend(model), model)


# ------------------------------------------------------------------------- editors and edits


@pytest.mark.parametrize("use", ["edit", "evaluate", "train"])
def test_an_editor_for_another_architecture(use: str, mend: Mend, tmp_path: Path) -> None:
    other, text, data = llama(), tokenizer(), facts(4)
    calls = {
        "edit": lambda: mend.edit(other, text, data[0]),
        "evaluate": lambda: evaluate(mend, other, text, data, progress=False),
        "train": lambda: Trainer(
            mend, other, text, data, [], config=TrainConfig(batch_size=2), output=tmp_path / "out"
        ),
    }
    with traceless(other), pytest.raises(ValueError) as error:
        calls[use]()
    assert "LlamaForCausalLM has no linear layer transformer.h.1.mlp.c_fc" in str(error.value)
    assert "made for another model" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_editor_for_other_shapes(mend: Mend) -> None:
    other = build("gpt2", n_embd=24, n_inner=38, n_head=2, n_layer=4, n_positions=CONTEXT)
    message = (
        r"transformer\.h\.1\.mlp\.c_fc\.weight is \(24, 38\) in this model, expected \(22, 38\)"
    )
    with traceless(other), pytest.raises(ValueError, match=message):
        edit_of(mend, other)


def test_an_editor_trained_on_other_values_warns(model: Any, mend: Mend) -> None:
    with pytest.warns(UserWarning, match="trained on another model.* train it on this model"):
        edit_of(mend, gpt2(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit = edit_of(mend, model)
        edit.merge_(model)  # an edited model is still the same model
        edit_of(mend, model)
        edit_of(mend, gpt2(dtype=torch.bfloat16))


def test_an_edit_made_on_another_model(model: Any, mend: Mend) -> None:
    edit = edit_of(mend, model)
    for other, message in (
        (gpt2(seed=1), "made for another model: the edited weights differ; load the model it was"),
        (llama(), "has no linear layer transformer.h.1.mlp.c_fc; this editor or edit was made"),
    ):
        with traceless(other):
            for use in (edit.merge_, lambda m: edit.applied(m).__enter__()):
                with pytest.raises(ValueError) as error:
                    use(other)
                assert message in str(error.value)


def test_merging_out_of_order(model: Any, mend: Mend) -> None:
    first, second = (mend.edit(model, tokenizer(), r) for r in facts(2))
    first.merge_(model)
    second.merge_(model)
    with traceless(model), pytest.raises(RuntimeError) as error:
        first.unmerge_(model)
    assert "1 later edit(s) are merged on top of this one; unmerge the last one" in str(error.value)


# ---------------------------------------------------------------------------------------- files


def damage_truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_foreign(file: Path) -> None:
    rewrite(file, lambda t: t | {"odd.u": torch.zeros(2)})


def damage_missing(file: Path) -> None:
    rewrite(file, lambda t: dict(list(t.items())[1:]))


def damage_shape(file: Path) -> None:
    rewrite(file, lambda t: {k: v[..., :-1] if k.endswith("bias") else v for k, v in t.items()})


def rewrite(file: Path, change: Any) -> None:
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    tensors = {k: v.contiguous() for k, v in change(load_file(file)).items()}
    save_file(tensors, file, metadata=metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "may be truncated"),
        (damage_empty, "may be truncated"),
        (damage_foreign, "odd.u"),
        (damage_missing, "lacks|missing"),
        (Path.unlink, "does not exist"),
    ],
    ids=lambda d: getattr(d, "__name__", ""),
)
@pytest.mark.parametrize("kind", ["editor", "edit", "checkpoint"])
def test_a_damaged_tensor_file(
    kind: str, damage: Any, message: str, model: Any, mend: Mend, tmp_path: Path
) -> None:
    data, config = facts(4), TrainConfig(steps=1, batch_size=2)
    args = (model, tokenizer(), data, [])
    how: dict[str, Any] = {"config": config, "output": tmp_path, "progress": False}

    def train(resume: bool) -> None:
        Trainer(tiny_mend(model), *args, resume=resume, **how).train()

    if kind == "editor":
        mend.save_pretrained(tmp_path)
        file, load = tmp_path / "editor.safetensors", lambda: Mend.from_pretrained(tmp_path)
    elif kind == "edit":
        edit_of(mend, model).save_pretrained(tmp_path)
        file, load = tmp_path / "edit.safetensors", lambda: Edit.from_pretrained(tmp_path)
    else:
        train(resume=False)
        file = tmp_path / "checkpoints/step-00000001/editor.safetensors"
        load = lambda: train(resume=True)  # noqa: E731
    damage(file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load()
    assert file.name in str(error.value)


def damage_optimizer_shape(file: Path) -> None:
    rewrite(file, lambda t: t | {"0.exp_avg": t["0.exp_avg"][..., :-1]})


def damage_no_tensors(file: Path) -> None:
    rewrite(file, lambda t: {})


def damage_tie(file: Path) -> None:
    save_file(load_file(file), file, metadata={"tie": "another"})


def without(*keys: str) -> Any:
    def damage(file: Path) -> None:
        values = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in values.items() if k not in keys}))

    return damage


def damage_step(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": 0}))


def damage_run(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run": None}))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("optimizer.safetensors", damage_truncate, "may be truncated"),
        ("optimizer.safetensors", damage_foreign, "has the foreign key odd.u"),
        ("optimizer.safetensors", damage_missing, r"lacks \d+\.(step|exp_avg)"),
        ("optimizer.safetensors", damage_no_tensors, r"lacks 0\.exp_avg"),
        ("optimizer.safetensors", damage_optimizer_shape, r"0\.exp_avg is \(.*\), expected \("),
        ("optimizer.safetensors", damage_tie, "does not belong to the JSON"),
        ("optimizer.safetensors", Path.unlink, "does not exist"),
        ("editor.safetensors", damage_tie, "does not belong to the JSON"),
        ("editor.safetensors", damage_shape, "bias is"),
        ("state.json", damage_truncate, "may be truncated"),
        ("state.json", without("run"), "lacks run"),
        ("state.json", without("best_loss", "step"), "lacks best_loss"),
        ("editor.safetensors", lambda f: damage_step(f.with_name("state.json")), "not belong"),
        ("editor.safetensors", lambda f: damage_run(f.with_name("state.json")), "not belong"),
    ],
)
def test_a_damaged_checkpoint(
    name: str, damage: Any, message: str, model: Any, tmp_path: Path
) -> None:
    args, config = (model, tokenizer(), facts(4), []), TrainConfig(steps=1, batch_size=2)
    how: dict[str, Any] = {"config": config, "output": tmp_path, "progress": False}
    Trainer(tiny_mend(model), *args, **how).train()
    file = tmp_path / "checkpoints/step-00000001" / name
    damage(file)
    fresh = tiny_mend(model)
    before = {k: v.clone() for k, v in fresh.editor.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Trainer(fresh, *args, resume=True, **how)
    assert name in str(error.value)
    for key, value in fresh.editor.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_tensors_of_other_shapes(mend: Mend, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path)
    damage_shape(tmp_path / "editor.safetensors")
    with pytest.raises(ValueError, match=r"bias is \(59,\), expected \(60,\)"):
        Mend.from_pretrained(tmp_path)


def test_a_tensor_file_beside_a_foreign_json(model: Any, mend: Mend, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path / "a")
    seasoned_mend(model, norm=False).save_pretrained(tmp_path / "b")
    (tmp_path / "b/editor.json").replace(tmp_path / "a/editor.json")
    with pytest.raises(ValueError, match="does not belong to the JSON file beside it; copy both"):
        Mend.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=99), "format_version 99; this pymend reads 1"),
        (lambda d: d.pop("config"), "does not belong|is no editor"),
        (lambda d: d["config"].update(rnak=3), "does not belong|unknown setting 'rnak'"),
    ],
    ids=["version", "missing", "unknown"],
)
def test_a_foreign_json(change: Any, message: str, mend: Mend, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path)
    file = tmp_path / "editor.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        Mend.from_pretrained(tmp_path)


def test_a_json_that_is_cut_off(mend: Mend, tmp_path: Path) -> None:
    mend.save_pretrained(tmp_path)
    file = tmp_path / "editor.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(ValueError, match=r"editor\.json is not valid JSON .* may be truncated"):
        Mend.from_pretrained(tmp_path)


def test_no_such_folder(tmp_path: Path) -> None:
    for cls, kind in ((Mend, "editor"), (Edit, "edit")):
        with pytest.raises(FileNotFoundError, match=rf"nowhere does not exist; .* an {kind}$"):
            cls.from_pretrained(tmp_path / "nowhere")


def test_an_output_folder_that_cannot_be_written(model: Any, mend: Mend, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "out"  # permission bits would not stop a superuser
    edit = edit_of(mend, model)
    state = {k: v.clone() for k, v in mend.editor.state_dict().items()}
    calls = [
        lambda: mend.save_pretrained(folder),
        lambda: edit.save_pretrained(folder),
        lambda: Trainer(
            mend, model, tokenizer(), facts(4), [], config=TrainConfig(batch_size=2), output=folder
        ),
    ]
    for call in calls:
        with traceless(model), pytest.raises(PermissionError) as error:
            call()
        assert f"cannot write to {folder}" in str(error.value)
        assert "choose another output folder" in str(error.value)
    assert (tmp_path / "file").read_text() == "in the way"
    assert all(torch.equal(v, state[k]) for k, v in mend.editor.state_dict().items())


# ------------------------------------------------------------------------------- not finite


def test_an_edit_of_a_model_that_is_not_finite(model: Any, mend: Mend) -> None:
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with traceless(model), pytest.raises(ValueError, match=r"gradients of .* are not finite"):
        edit_of(mend, model)


@pytest.mark.parametrize("side", [0, -1], ids=["u", "delta"])
def test_an_editor_that_is_not_finite(side: int, model: Any, mend: Mend) -> None:
    with torch.no_grad():
        mend.editor.nets["38x22"].joint[1].bias[side] = float("inf")
    message = r"factors of transformer\.h\.1\.mlp\.c_proj\.weight are not finite"
    with traceless(model), pytest.raises(ValueError, match=message):
        edit_of(mend, model)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of a model would be tried again and again, for a minute."""
    asked: list[dict[str, Any]] = []

    def tokenizer(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise OSError("not in the cache")

    monkeypatch.setattr("pymend.zoo.load.AutoTokenizer.from_pretrained", tokenizer)
    with pytest.raises(RuntimeError, match=r"cannot be fetched from the hub \(not in the cache\)"):
        load("nobody/nothing")
    assert asked == [{"local_files_only": True}]


def test_what_the_hub_does_not_have_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    class Missing(RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404 not found")

        def __str__(self) -> str:
            return "404 not found"

    def missing(_: Any, name: str, timeout: float) -> None:
        assert name == "nobody/nothing" and timeout <= 10
        raise Missing

    monkeypatch.setattr(HfApi, "model_info", missing)
    with pytest.raises(RuntimeError, match="no model 'nobody/nothing' that you may read; 404"):
        load("nobody/nothing")
