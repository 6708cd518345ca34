"""How an editor was trained to be asked is part of it: saved, used where nobody says, checked."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny

from pymend.algorithms.mend.mend import Mend
from pymend.algorithms.registry import load_editor
from pymend.commands import main
from pymend.config import EditRequest, TrainConfig
from pymend.data import write_jsonl
from pymend.edit import Edit
from pymend.engine.tokens import Encoder
from pymend.evaluation import evaluate
from pymend.files import digest, read_json, write_json, write_tensors
from pymend.training.trainer import Trainer

A, B, C, D = tiny.WORDS[:4]
# The option's names are words of the template; its texts are words of the tokenizer.
TEMPLATE = (
    f"{D} {{{{ messages[0].content }}}} "
    f"{{% if enable_thinking is not defined or enable_thinking %}}{C}{{% else %}}{B}{{% endif %}} "
)
REQUEST = EditRequest(f"{A} {B}", D)


def talker() -> Any:
    text = tiny.tokenizer(True)
    text.chat_template = TEMPLATE
    return text


def trained(folder: Path, model: Any, chat: Any) -> Mend:
    mend = tiny.tiny_mend(model)
    config = TrainConfig(steps=1, batch_size=2, eval_every=1, keep="last")
    data = tiny.facts(6)
    Trainer(
        mend, model, talker(), data, [], config=config, output=folder, chat=chat, progress=False
    ).train()
    return mend


def rows(edit: Edit) -> list[Any]:
    return [f.u for f in edit.factors.values()]


@pytest.mark.parametrize("chat", [False, True, {"enable_thinking": False}])
def test_an_editor_is_used_as_it_was_trained(tmp_path: Path, chat: Any) -> None:
    model = tiny.llama()
    trained(tmp_path, model, chat)
    mend = load_editor(tmp_path)
    assert mend.chat == chat == json.loads((tmp_path / "editor.json").read_text())["chat"]
    edit = mend.edit(model, talker(), REQUEST)
    said = mend.edit(model, talker(), REQUEST, chat=chat)
    assert all(a.equal(b) for a, b in zip(rows(edit), rows(said), strict=True))
    row = Encoder(talker(), chat=chat).row(REQUEST.prompt, REQUEST.target)
    assert max(map(len, rows(edit))) == len(row.inputs)
    scores = evaluate(mend, model, talker(), [REQUEST], progress=False)
    mend.chat = None  # as of a file that says nothing: then what is asked for counts
    same = evaluate(mend, model, talker(), [REQUEST], progress=False, chat=chat)
    assert scores.to_dict()["edit_success"] == same.to_dict()["edit_success"]


@pytest.mark.parametrize(
    ("own", "asked", "words"),
    [
        (True, False, "on the chat template, and is not used so"),
        (False, True, "on plain prompts, and is not used so"),
        (True, {"enable_thinking": False}, "on the chat template, and is not used so"),
        (
            {"enable_thinking": False},
            True,
            r"on the chat template with \{'enable_thinking': False\}",
        ),
    ],
)
def test_another_way_of_asking_is_refused(tmp_path: Path, own: Any, asked: Any, words: str) -> None:
    model = tiny.llama()
    mend = tiny.seasoned_mend(model)
    mend.chat = own
    with tiny.traceless(model):
        for call in (
            lambda: mend.edit(model, talker(), REQUEST, chat=asked),
            lambda: mend.edit_many(model, talker(), [REQUEST], chat=asked),
            lambda: evaluate(mend, model, talker(), [REQUEST], chat=asked, progress=False),
            lambda: Trainer(
                mend,
                model,
                talker(),
                tiny.facts(4),
                [],
                config=TrainConfig(steps=1),
                output=tmp_path / "o",
                chat=asked,
            ),
        ):
            with pytest.raises(ValueError, match=f"this editor was trained {words}"):
                call()
    assert not (tmp_path / "o").exists() and mend.chat == own


def test_an_editor_of_before_loads_and_is_used_as_asked(tmp_path: Path) -> None:
    model = tiny.llama()
    mend = tiny.seasoned_mend(model)
    mend.save_pretrained(tmp_path)
    description = read_json(tmp_path / "editor.json")
    del description["chat"]
    description = {k: v for k, v in description.items() if k != "format_version"}
    write_tensors(tmp_path / "editor.safetensors", mend.editor.state_dict(), digest(description))
    write_json(tmp_path / "editor.json", description)
    old = load_editor(tmp_path)
    assert old.chat is None
    plain, chat = (old.edit(model, talker(), REQUEST, chat=c) for c in (None, True))
    assert max(map(len, rows(plain))) < max(map(len, rows(chat)))


def test_options_of_the_template_reach_it() -> None:
    text = talker()
    with_thought = Encoder(text, chat=True).row(A, B)
    without = Encoder(text, chat={"enable_thinking": False}).row(A, B)
    assert text.decode(with_thought.ids) == f"{D} {A} {C} {B}"
    assert text.decode(without.ids) == f"{D} {A} {B} {B}"
    assert Encoder(text, chat={}).row(A, B) == with_thought


@pytest.mark.parametrize("name", ["enable_thinkng", "tokenize", "add_generation_prompt"])
def test_an_option_that_the_template_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template has no option '{name}'; leave it out"):
        Encoder(talker(), chat={name: False})


@pytest.mark.parametrize("tag", ["<think>", "<thinking>\n", "[THINK]"])
def test_a_template_that_opens_a_thought_warns(tag: str) -> None:
    text = talker()
    off = "{% if enable_thinking is false %}</think>{% endif %}"
    text.chat_template = "{{ messages[0].content }}" + tag + off
    with pytest.warns(UserWarning, match=r"opens a thought.*--chat-options enable_thinking=false"):
        Encoder(text, chat=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Encoder(text, chat={"enable_thinking": False})
        Encoder(text)


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, text = tiny.llama(), talker()
    model.save_pretrained(tmp_path / "model")
    text.save_pretrained(tmp_path / "model")
    data = tmp_path / "facts.jsonl"
    write_jsonl(data, tiny.facts(12))
    common = ["--model", str(tmp_path / "model")]
    editor = ["--editor", str(tmp_path / "editor")]
    options = ["--chat-options", "enable_thinking=false"]

    def run(*words: str) -> tuple[int, str]:
        code = main([*words])
        return code, capsys.readouterr().err

    train = ["--data", str(data), "--output", str(tmp_path / "editor"), "--steps", "1"]
    code, err = run("train", *common, *train, "--batch-size", "2", "--rank", "4", *options)
    assert code == 0, err
    assert load_editor(tmp_path / "editor").chat == {"enable_thinking": False}
    edit = ["--prompt", REQUEST.prompt, "--target", REQUEST.target, "--tokens", "2"]
    code, err = run("edit", *common, *editor, *edit)
    assert code == 0, err
    assert "through the chat template with {'enable_thinking': False}" in caplog.text
    assert run("edit", *common, *editor, *edit, *options)[0] == 0
    code, err = run("edit", *common, *editor, *edit, "--no-chat")
    assert code == 2 and "this editor was trained on the chat template with" in err
    code, err = run("eval", *common, *editor, "--data", str(data), "--limit", "2", "--chat")
    assert code == 2 and "this editor was trained on the chat template with" in err
    code, err = run("edit", *common, *editor, *edit, *options, "--no-chat")
    assert code == 2 and "--chat-options are for --chat; leave out one of them" in err
    code, err = run("edit", *common, *editor, *edit, "--chat-options", "thinking")
    assert code == 2 and "--chat-options thinking is no NAME=VALUE" in err
    again = ["--config", str(tmp_path / "editor" / "config.yaml"), "--resume"]
    assert run("train", *again)[0] == 0
