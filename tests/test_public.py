"""What a Python user meets first: the names of ``pymend``, a call to edit, the list of methods."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import facts, gpt2, llama, seasoned_mend, tokenizer

import pymend
from pymend import Edit, EditRequest, Mend, Trainer, evaluate, load_editor
from pymend.algorithms.base import Algorithm
from pymend.algorithms.enn import Enn
from pymend.algorithms.ke import Ke
from pymend.algorithms.registry import METHODS, RIVALS, TRAINED, Method, trainable
from pymend.algorithms.trained import Trainable
from pymend.config import MendConfig
from pymend.files import digest, read_json, write_json, write_tensors

# ------------------------------------------------------------------------------------- names

LIGHT = """
import sys
import pymend
assert set(pymend.__all__) <= set(dir(pymend))
pymend.EditRequest, pymend.MendConfig, pymend.__version__
from pymend.algorithms import registry
assert "torch" not in sys.modules, "a name that needs no torch brought it in"
pymend.load_records
assert "datasets" not in sys.modules, "datasets is for its own readers"
"""


def test_importing_pymend_imports_neither_torch_nor_datasets() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize("name", pymend.__all__)
def test_a_public_name_is_there_and_described(name: str) -> None:
    value = getattr(pymend, name)
    if name == "__version__":
        assert isinstance(value, str) and value
    else:
        assert value.__name__ == name and value.__module__.startswith("pymend.")
        assert inspect.getdoc(value), "a docstring"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'pymend' has no attribute 'Rome'"):
        pymend.Rome  # noqa: B018
    assert len(set(pymend.__all__)) == len(pymend.__all__)


# ------------------------------------------------------------------------------------- editing


def same(one: Edit, other: Edit) -> bool:
    """Bit for bit."""
    pairs = [(f, other.factors[name]) for name, f in one.factors.items()]
    return one.outcomes == other.outcomes and all(
        torch.equal(f.u, g.u) and torch.equal(f.delta, g.delta) and torch.equal(f.alpha, g.alpha)
        for f, g in pairs
    )


def test_a_prompt_and_its_target_are_a_request() -> None:
    model, text, (fact, other) = gpt2(), tokenizer(), facts(2)
    mend = seasoned_mend(model)
    edit = mend.edit(model, text, fact.prompt, fact.target)
    assert type(edit) is Edit and (edit.outcomes[0].prompt, edit.outcomes[0].target) == (
        fact.prompt,
        fact.target,
    )
    for request in (EditRequest(fact.prompt, fact.target), fact, [fact], (fact,)):
        assert same(mend.edit(model, text, request), edit)
    assert not same(mend.edit(model, text, other.prompt, other.target), edit)
    assert same(mend.edit_many(model, text, [fact])[0], edit)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, *a: m.edit(*a, "ba be"), r"name a fact as edit\(model, tokenizer, \"prompt\""),
        (lambda m, *a: m.edit(*a, EditRequest("ba", "be"), "bi"), "name a fact as edit"),
        (lambda m, *a: m.edit(*a, [EditRequest("ba", "be")], "bi"), "name a fact as edit"),
        (lambda m, *a: m.edit(*a, "ba", 3), "name a fact as edit"),
        (lambda m, *a: m.edit(*a, [("ba", "be")]), r"\('ba', 'be'\) is no EditRequest; give Edit"),
        (lambda m, *a: m.edit(*a, ["ba", "be"]), r"'ba' is no EditRequest"),
        (lambda m, *a: m.edit_many(*a, "ba"), "name a fact as edit"),
        (lambda m, *a: m.edit_many(*a, [EditRequest("ba", "be"), None]), "None is no EditRequest"),
    ],
)
def test_what_is_no_request_is_named(call: Callable[..., Any], message: str) -> None:
    model = gpt2()
    with pytest.raises(TypeError, match=message):
        call(seasoned_mend(model), model, tokenizer())


@pytest.mark.parametrize(
    ("call", "data"),
    [
        (Algorithm.edit, ["self", "model", "tokenizer", "requests", "target"]),
        (Algorithm.edit_many, ["self", "model", "tokenizer", "requests"]),
        (evaluate, ["algorithm", "model", "tokenizer", "data"]),
        (Trainer, ["algorithm", "model", "tokenizer", "train_data", "eval_data"]),
        (pymend.load, ["name"]),
        *[(METHODS[name].load().from_config, ["model", "config"]) for name in METHODS],
    ],
    ids=lambda x: getattr(x, "__qualname__", ""),
)
def test_what_follows_the_data_goes_by_name(call: Callable[..., Any], data: list[str]) -> None:
    kinds = {p.name: p.kind for p in inspect.signature(call).parameters.values()}
    assert [n for n, k in kinds.items() if k is inspect.Parameter.POSITIONAL_OR_KEYWORD] == data
    named = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    assert {k for n, k in kinds.items() if n not in data} <= named


def test_the_kind_of_edit_is_in_the_type() -> None:
    """So that a type checker knows that a MEND edit can be merged, and an ENN's cannot."""
    (base,) = Mend.__orig_bases__  # type: ignore[attr-defined]
    assert base == Trainable[Edit]
    assert not any(x == Trainable[Edit] for x in Enn.__orig_bases__)  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------- methods


def test_the_list_of_methods() -> None:
    assert list(METHODS) == ["mend", "ft", "ft+kl", "enn", "ke", "cache"]
    assert RIVALS == ("ft", "ft+kl", "enn", "ke", "cache") and TRAINED == ("mend", "enn", "ke")
    assert [trainable(kind) for kind in TRAINED] == [Mend, Enn, Ke]
    for kind in TRAINED:
        assert (trainable(kind).kind, trainable(kind).config_type) == (kind, METHODS[kind].config)
    with pytest.raises(ValueError, match="no editor of the kind 'ft'; known are mend, enn, ke"):
        trainable("ft")


@pytest.mark.parametrize("name", ["ft", "ft+kl"])
def test_a_setting_that_the_name_says_is_refused(name: str) -> None:
    method = METHODS[name]
    assert method.settings({"steps": 3}, "here").kl is (name == "ft+kl")  # type: ignore[union-attr]
    for value in (True, False):
        with pytest.raises(ValueError, match=f"here: kl goes by the name {name}".replace("+", ".")):
            method.settings({"kl": value}, "here")
    with pytest.raises(ValueError, match="here: unknown setting 'rnak'"):
        method.settings({"rnak": 3}, "here")


SMALL: dict[str, dict[str, Any]] = {
    "mend": {"rank": 3},
    "ft": {"steps": 2, "lr": 1e-3},
    "ft+kl": {"steps": 2, "lr": 1e-3},
    "ke": {"lstm": 3, "condition": 3, "hidden": 3},
    "cache": {"eps": 1.5},
}


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_every_method_is_made_the_same_way(method: Method) -> None:
    """With its settings, and with those that it has by default; then it edits."""
    model, text, data = llama(), tokenizer(), facts(4)
    cls = method.load()
    for given in (SMALL.get(method.name, {}), {}):
        settings = method.settings(given, "here")
        assert type(settings) is method.config
        made = cls.from_config(model, settings, tokenizer=text, train_data=data[1:])
        assert type(made) is cls and made.prepare(model)
        own = made.identity()
        assert all(own[name] == value for name, value in given.items())
    if method.name != "mend":  # whose moments have seen nothing yet
        assert made.edit(model, text, data[0]).outcomes[0].target == data[0].target


# ------------------------------------------------------------------------------------- old files


@pytest.mark.parametrize("age", ["no kind", "no sizes"])
def test_an_editor_of_an_older_version_is_read(age: str, tmp_path: Path) -> None:
    """The first files named no kind, those after them no sizes: all of both are MEND's."""
    model = gpt2()
    mend = seasoned_mend(model)
    mend.save_pretrained(tmp_path)
    file = tmp_path / "editor.json"
    gone = {"no kind": ("kind", "sizes"), "no sizes": ("sizes",)}[age]
    values = {k: v for k, v in read_json(file).items() if k not in gone}
    values.pop("format_version", None)
    write_json(file, values)
    write_tensors(tmp_path / "editor.safetensors", mend.editor.state_dict(), digest(values))
    loaded = load_editor(tmp_path)
    assert isinstance(loaded, Mend) and loaded.config == mend.config
    request = facts(1)[0]
    assert same(loaded.edit(model, tokenizer(), request), mend.edit(model, tokenizer(), request))


def test_settings_that_an_older_version_did_not_have_take_their_defaults(tmp_path: Path) -> None:
    mend = seasoned_mend(gpt2())
    mend.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "editor.json").read_text())
    assert values["config"].pop("blocks") == 0 and values.pop("format_version") == 1
    write_json(tmp_path / "editor.json", values)
    write_tensors(tmp_path / "editor.safetensors", mend.editor.state_dict(), digest(values))
    assert Mend.from_pretrained(tmp_path).config == mend.config == MendConfig(rank=7, alpha=0.01)
