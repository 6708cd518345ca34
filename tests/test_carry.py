"""A saved edit from the command line: shown, listed, applied, talked to, merged, exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, facts, llama, rel_error, seasoned_mend, tokenizer
from transformers import AutoModelForCausalLM

from pymend.algorithms.mend.mend import Mend
from pymend.commands import main
from pymend.commands.asking import free, slug
from pymend.config import EditRequest
from pymend.data.around import around, relation_of, verdict
from pymend.edit import Edit, LowRank
from pymend.engine.generate import greedy
from pymend.engine.tokens import Encoder

A, B = facts(2)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an editor that remembers prompts, and two edits of it."""
    folder = tmp_path_factory.mktemp("home")
    model = llama()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    mend = seasoned_mend(model, alpha=0.3)
    mend.elsewhere = (f"{WORDS[7]} {WORDS[9]}", f"{WORDS[11]} {WORDS[3]}")
    mend.save_pretrained(folder / "editor")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for request in (A, B):
            words = [request.prompt, request.target]
            assert run("edit", *words, "--model", "model", "--editor", "editor") == 0
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def name_of(request: EditRequest) -> str:
    return slug(request.prompt, request.target)


def edits() -> list[str]:
    return [f"edits/{name_of(r)}" for r in (A, B)]


def answers(model: Any, prompts: list[str], tokens: int = 6) -> list[str]:
    return greedy(model, Encoder.for_model(model, tokenizer()), prompts, tokens)


def test_an_edit_is_saved_where_nobody_says_and_knows_what_it_was(home: Path) -> None:
    edit = Edit.from_pretrained(edits()[0])
    assert [(o.prompt, o.target) for o in edit.outcomes] == [(A.prompt, A.target)]
    assert edit.origin.name == "model" and edit.origin.editor == "editor" and not edit.origin.chat
    kinds = [a.kind for a in edit.answers]
    assert kinds == ["prompt", "unrelated", "unrelated"]
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    prompts = [a.prompt for a in edit.answers]
    assert [a.before for a in edit.answers] == answers(model, prompts, 12)
    with edit.applied(model):
        assert [a.after for a in edit.answers] == answers(model, prompts, 12)
    assert edit.fidelity is not None and 0.999 < edit.fidelity <= 1.001


def test_a_taken_name_gets_a_number(home: Path, tmp_path: Path) -> None:
    place = tmp_path / "edits" / "one"
    assert free(place) == place
    place.mkdir(parents=True)
    assert free(place) == place
    (place / "x").touch()
    assert free(place).name == "one-2"
    assert slug("The capital of  France is", "Rome!") == "the-capital-of-france-is-rome"
    assert slug("\u9996\u90fd", "\u5965", 3) == "\u9996\u90fd-\u5965-and-3-more"
    assert slug("???", "!") == "edit"
    with pytest.raises(FileExistsError, match="is not empty"):
        from pymend.commands.asking import check_places

        check_places(str(place))


def test_show_and_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", edits()[0]) == 0
    out = capsys.readouterr().out
    about = json.loads((home / edits()[0] / "edit.json").read_text())
    for part in (A.prompt, "layers.1-3.mlp", "editor", "plain", "100.0%"):
        assert part in out
    for w, norm in zip(Edit.from_pretrained(edits()[0]).weights, about["norms"], strict=True):
        f = Edit.from_pretrained(edits()[0]).factors[w.name]
        dense = float((f.alpha * f.delta.T @ f.u).norm())
        assert abs(norm - dense) <= 1e-5 * dense and f"{dense:.3f}" in out
    assert run("list") == 0
    out = capsys.readouterr().out
    assert all(name_of(r) in out for r in (A, B))
    assert out.count("1/1") + out.count("0/1") == 2
    assert run("list", "model") == 0
    assert capsys.readouterr().out == "no edits in model\n"


def test_show_needs_no_torch(home: Path) -> None:
    code = (
        "import sys; from pymend.commands import main; "
        f"assert main(['show', {edits()[0]!r}]) == 0 and main(['list']) == 0; "
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_apply_asks_what_was_asked_then(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = Edit.from_pretrained(edits()[0])
    assert run("apply", edits()[0], "--tokens", 12) == 0
    out = " ".join(capsys.readouterr().out.split())
    for a in edit.answers:
        assert " ".join(a.prompt.split()[:2]) in out
    assert "loading model" not in out


def test_apply_several_and_ask(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("apply", *edits(), "--prompt", A.prompt, B.prompt, "--tokens", 6) == 0
    out = capsys.readouterr().out.split()
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    first, second = map(Edit.from_pretrained, edits())
    before = answers(model, [A.prompt, B.prompt])
    with first.applied(model), second.applied(model):
        after = answers(model, [A.prompt, B.prompt])
    assert before != after
    for text in (*before, *after):
        assert set(text.split()) <= set(out)


def test_talk(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [A.prompt, f"/before {A.prompt}", "/edits", "/undo", "/edits", "/undo 1", "/undo"]
    said += ["/undo 7", A.prompt, "/redo", A.prompt, "/what", "", "/quit", "never"]
    waiting = iter(said)
    monkeypatch.setattr("builtins.input", lambda _: next(waiting))
    assert run("apply", *edits(), "--chat", "--tokens", 6) == 0
    assert next(waiting) == "never"
    out = capsys.readouterr().out.splitlines()
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    first, second = map(Edit.from_pretrained, edits())
    [plain] = answers(model, [A.prompt])
    with first.applied(model), second.applied(model):
        [both] = answers(model, [A.prompt])
    with first.applied(model):
        [one] = answers(model, [A.prompt])
    start = out.index("/quit          end") + 1
    assert out[start : start + 2] == [both, plain]
    rest = out[start + 2 :]
    assert rest[:3] == [f"1  {edits()[0]}", f"2  {edits()[1]}", "2 of 2 edits act"]
    assert rest[3] == f"taken back: {edits()[1]}"
    assert rest[4:6] == [f"1  {edits()[0]}", "1 of 2 edits act"]
    assert rest[6] == f"taken back: {edits()[0]}"
    assert rest[7] == "no edit is left; /edits shows them"
    assert rest[8] == "no edit 7; /edits shows them"
    assert rest[9:12] == [plain, f"acts again: {edits()[0]}", one]


def test_input_that_ends_ends_the_talk(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(_: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ends)
    assert run("apply", edits()[0], "--chat") == 0


def test_merge_and_peft(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--merge", tmp_path / "merged", "--peft", tmp_path / "adapter"]
    assert run("apply", *edits(), *places) == 0
    out = capsys.readouterr().out
    assert f"--max-lora-rank 8 --lora-modules adapter={tmp_path / 'adapter'}" in out.replace(
        "--max-lora-rank 16", "--max-lora-rank 8"
    )
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    ids = torch.arange(4, 20)[None]
    first, second = map(Edit.from_pretrained, edits())
    with torch.no_grad(), first.applied(model), second.applied(model):
        wanted = model(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert rel_error(merged(input_ids=ids).logits, wanted) <= 1e-5
    import peft

    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert rel_error(adapted(input_ids=ids).logits, wanted) <= 1e-4
    assert run("apply", edits()[0], *places) == 2
    assert "is not empty; choose a new folder" in capsys.readouterr().err


def test_an_edited_model_is_told_from_another_one(home: Path, tmp_path: Path) -> None:
    assert run("apply", edits()[0], "--merge", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    mend = Mend.from_pretrained("editor")
    with pytest.warns(UserWarning, match=r"carries 1 edited fact\(s\) already; the new edit comes"):
        mend.edit(merged, tokenizer(), B)
    with pytest.warns(UserWarning, match="trained on another model"):
        mend.edit(llama(seed=3), tokenizer(), B)
    model = llama()
    plain = model.config.to_dict()
    first, second = (mend.edit(model, tokenizer(), r) for r in (A, B))
    first.merge_(model)
    second.merge_(model)
    assert [f[0] for f in model.config.pymend["facts"]] == [A.prompt, B.prompt]
    second.unmerge_(model)
    assert [f[0] for f in model.config.pymend["facts"]] == [A.prompt]
    first.unmerge_(model)
    assert model.config.to_dict() == plain


@pytest.mark.parametrize("way", ["joint", "independent", "sequential"])
def test_several_facts_of_a_file(
    way: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = facts(3, seed=4)
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(json.dumps(r.to_dict()) for r in requests))
    words = ["--data", file, "--facts", way, "--model", "model", "--editor", "editor"]
    assert run("edit", *words, "--output", tmp_path / "out") == 0
    model, mend = llama(), Mend.from_pretrained("editor")
    if way == "joint":
        made = [Edit.from_pretrained(tmp_path / "out")]
        wanted = [mend.edit(model, tokenizer(), requests)]
    else:
        made = [Edit.from_pretrained(tmp_path / "out" / slug(r.prompt, r.target)) for r in requests]
        if way == "independent":
            many = mend.edit_many(model, tokenizer(), requests)
            wanted = [many[i] for i in range(3)]
        else:
            wanted = []
            for r in requests:
                one = mend.edit(model, tokenizer(), r)
                wanted.append(one)
                one.merge_(model)
    for a, b in zip(made, wanted, strict=True):
        for name, f in b.factors.items():
            g = a.factors[name]
            dense = [(x.alpha * x.delta.T @ x.u) for x in (g, f)]
            assert rel_error(*dense) <= 1e-4, name
    text = capsys.readouterr().out
    assert text.count("saved: ") == len(made)
    kinds = {a.kind for edit in made for a in edit.answers}
    assert kinds == {"prompt", "rephrase", "neighbour"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["edit", "only one", "--editor", "editor"], "1 texts in place of two, a prompt"),
        (["edit", "--editor", "editor"], 'as pymend edit "PROMPT" "TARGET"'),
        (["edit", "a", "b", "--prompt", "a", "--editor", "editor"], 'as pymend edit "PROMPT"'),
        (["edit", "a", "b", "--editor", "model"], "model holds a model, not an editor"),
        (["edit", "a", "b", "--editor", "nowhere"], "nowhere does not exist; name a folder that"),
        (
            ["edit", "a", "b", "--editor", "editor", "--model", "editor"],
            "editor holds an editor, not",
        ),
        (["apply", "editor"], "editor holds an editor, not an edit; name another folder"),
        (["apply", "edits"], "edits holds nothing of the kind, not an edit"),
        (["show", "model"], "model holds a model, not an edit"),
        (["list", "nowhere"], "no folder nowhere; pymend edit saves into edits"),
        (["apply"], "EDIT is missing"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err


def test_edits_of_other_models_and_ways(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(seed=5).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    assert run("apply", edits()[0], "--model", tmp_path / "other") == 2
    err = capsys.readouterr().err
    assert f"{edits()[0]}: this edit was made for another model" in err
    edit = Edit.from_pretrained(edits()[1])
    object.__setattr__(edit.origin, "chat", True)
    edit.save_pretrained(tmp_path / "spoken")
    assert run("apply", edits()[0], tmp_path / "spoken") == 2
    assert "prompts put in different ways" in capsys.readouterr().err
    object.__setattr__(edit.origin, "name", "elsewhere")
    edit.save_pretrained(tmp_path / "elsewhere")
    assert run("apply", edits()[0], tmp_path / "elsewhere") == 2
    assert "the edits name elsewhere, model models; give --model" in capsys.readouterr().err


def test_many_rows_are_compressed_exactly(tmp_path: Path) -> None:
    """80 facts have more rows than a weight has rank; their adapter has not."""
    model = llama(layers=4)
    mend = seasoned_mend(model, alpha=0.3)
    edit = mend.edit(model, tokenizer(), facts(12, seed=9))
    assert edit.rank > 22
    for f in edit.factors.values():
        c = f.compressed()
        assert len(c.u) <= min(f.u.shape[1], f.delta.shape[1])
        assert rel_error(c.delta.T @ c.u, f.delta.T @ f.u) <= 1e-5
    few = LowRank(torch.randn(3, 5), torch.randn(3, 7), torch.ones(()))
    assert few.compressed() is few
    edit.to_peft(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 22


def test_what_is_asked_around_a_fact() -> None:
    known = EditRequest("The capital of Atlantis is", "Rome")
    found = relation_of(known.prompt)
    assert found is not None and found[0].name == "capital" and found[2] == "Atlantis"
    asked = around(known, ["x"])
    assert [kind for kind, _ in asked] == [
        "prompt",
        *["rephrase"] * 2,
        *["neighbour"] * 2,
        "unrelated",
    ]
    assert all("Atlantis" in text for _, text in asked[:3])
    assert not any("Atlantis" in text for _, text in asked[3:])
    assert asked == around(known, ["x"]) and around(known, few=0) == asked[:1]
    given = around(A)
    assert [t for k, t in given if k == "rephrase"] == list(A.rephrases)
    assert [t for k, t in given if k == "neighbour"] == [p.prompt for p in A.locality]
    unknown = around(EditRequest("q", "a"), ["x", "y", "z"])
    assert unknown == [("prompt", "q"), ("unrelated", "x"), ("unrelated", "y")]


def test_verdicts() -> None:
    assert verdict("prompt", "Rome", "Paris", "rome is") == "took"
    assert verdict("rephrase", " Rome", "Paris", "Paris") == "missed"
    assert verdict("neighbour", "Rome", "Berlin", "Berlin") == "kept"
    assert verdict("unrelated", "Rome", "Berlin", "Rome") == "changed"
