"""The demo on a tiny model, in every state its folder can be in, and quickly on SmolLM2."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny

from pymend import demo
from pymend.algorithms.mend.mend import Mend
from pymend.commands import main
from pymend.config import MendConfig, TrainConfig
from pymend.data import load_facts
from pymend.files import read_json
from pymend.report.tables import table
from pymend.zoo import smollm2

TINY = demo.Settings(
    train=TrainConfig(steps=4, batch_size=2, eval_every=2, eval_records=4, save_every=2),
    mend=MendConfig(rank=5, alpha=0.01),
    test_records=6,
    shown=2,
    searched=2,
    tokens=3,
)


def run(output: Path, settings: demo.Settings = TINY) -> dict[str, Any]:
    """The demo on a tiny model and made-up facts."""
    facts = tiny.facts(40)
    parts = facts[:24], facts[24:30], facts[30:]
    return demo.run(tiny.llama(), tiny.tokenizer(), *parts, output, settings)


def test_it_trains_edits_undoes_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(tmp_path)
    assert all((tmp_path / name).exists() for name in demo.MADE)
    saved = read_json(tmp_path / "metrics.json")
    assert saved["n"] == 6 and saved["edit_success"] == metrics["edit_success"]
    assert len(saved["examples"]) == 2
    for example in saved["examples"]:
        assert example["weights_restored"]
        assert all(a["undone"] == a["before"] for a in example["answers"])
        kinds = [a["kind"] for a in example["answers"]]
        assert kinds == ["edited prompt", "paraphrase", "same relation", "other relation"]
    out = capsys.readouterr().out
    for words in ("after undo", "Over-generalisation", "Under-generalisation", "peak memory"):
        assert words in out
    model = tiny.llama()
    mend = Mend.from_pretrained(tmp_path)  # as `pymend edit` does
    assert len(mend.edit(model, tiny.tokenizer(), tiny.facts(1)).outcomes) == 1


def test_twice_uses_the_editor_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path)
    editor = (tmp_path / "editor.safetensors").read_bytes()
    (tmp_path / "notes.txt").write_text("mine")
    capsys.readouterr()
    second = run(tmp_path)
    assert "Using the editor in" in capsys.readouterr().out
    assert (tmp_path / "editor.safetensors").read_bytes() == editor
    assert second["examples"] == first["examples"]
    assert second["demo_seconds"]["training"] == first["demo_seconds"]["training"]

    other = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, seed=1))
    run(tmp_path, other)
    assert "replacing its files" in capsys.readouterr().out
    assert (tmp_path / "editor.safetensors").read_bytes() != editor
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_with_another_editor_is_left_alone(tmp_path: Path) -> None:
    Mend.from_config(tiny.llama(), MendConfig(rank=3)).save_pretrained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="no demo wrote"):
        run(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupted_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    settings = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, save_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(demo.Trainer, "_validate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", settings)
    capsys.readouterr()
    cut = run(tmp_path / "cut", settings)
    assert "from step 1 to step 4" in capsys.readouterr().out
    assert cut["examples"] == whole["examples"]
    assert cut["edit_success"] == whole["edit_success"]


def test_facts_by_name_are_held_out() -> None:
    test = {(r.subject, r.ground_truth) for r in load_facts("test")}
    assert set(demo.BY_NAME) <= test
    assert len(demo.BY_NAME) == demo.FULL.shown


def test_wrong_generalisations_show_the_prompt_that_went_wrong() -> None:
    """A stand-in for the model: record 1 reaches too far, record 2 not far enough."""
    facts = tiny.facts(3)
    scores: list[Any] = [
        _Scores(edit_success=1.0, locality=1.0, generality=1.0),
        _Scores(edit_success=1.0, locality=0.5, generality=1.0),
        _Scores(edit_success=1.0, locality=1.0, generality=0.5),
    ]

    def ask(request: Any, prompts: Any) -> demo.Example:
        answers = []
        for i, (kind, text) in enumerate(prompts):
            inside = kind in ("edited prompt", "paraphrase")
            wrong = i == 1 if request is facts[2] else i == len(prompts) - 1
            verdict = ("missed", "took", "changed", "kept")[2 * (not inside) + (not wrong)]
            answers.append(demo.Answer(kind, text, "a", "b", "a", verdict))
        return demo.Example("s", "t", request.target, True, tuple(answers))

    over, under = demo._wrong_generalisation(ask, facts, scores, 2)  # type: ignore[arg-type]
    assert over is not None and under is not None
    assert over.answers[1].prompt == facts[1].locality[-1].prompt
    assert under.answers[1].prompt == facts[2].rephrases[0]
    assert demo._wrong_generalisation(ask, facts[:1], scores[:1], 2) == (None, None)  # type: ignore[arg-type]


@dataclasses.dataclass
class _Scores:
    edit_success: float
    locality: float
    generality: float


def test_tables_wrap_long_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("one two three", "x"), ("y\nz", "[b]"), ("unbreakable", "")]
    monkeypatch.setenv("COLUMNS", "13")
    wrapped = ["a         b", "-------------", "one two   x", "three", "y / z     [b]"]
    assert table(("a", "b"), rows).splitlines()[:5] == wrapped
    monkeypatch.setenv("COLUMNS", "80")
    assert table(("a", "b"), rows).splitlines()[2] == "one two three  x"


@pytest.mark.skipif(
    not smollm2.is_cached(), reason="SmolLM2 is not in the cache; `make setup` puts it there"
)
def test_quick_demo_on_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a third of its training, and less to look at."""
    less = dataclasses.replace(demo.QUICK, test_records=4, shown=2, searched=0)
    monkeypatch.setattr(demo, "QUICK", less)
    third = ["--steps=8", "--eval-every=8", "--eval-records=4", "--save-every=8"]
    assert main(["demo", "--quick", *third, "--output", str(tmp_path)]) == 0
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["n"] == 4 and metrics["settings"]["train"]["steps"] == 8
    assert metrics["settings"]["train"]["lr"] == demo.QUICK.train.lr
    assert metrics["model"] == smollm2.NOTE
    assert all(e["weights_restored"] for e in metrics["examples"])
    took = [e["answers"][0]["verdict"] for e in metrics["examples"]]
    assert "took" in took
