"""What a person reads of an edit, against plain generation and scores written down by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_encoders import data_of, model_of, words
from tiny import facts, gpt2, seasoned_mend, tiny_mend, tokenizer

from pymend.commands import main
from pymend.data import write_jsonl
from pymend.evaluation import read
from pymend.evaluation.reads import entropy


def said(model: Any, text: Any, prompt: str, tokens: int = 20) -> list[int]:
    ids = text(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=tokens, pad_token_id=3)
    return out[0, ids.shape[1] :].tolist()


def test_answers_are_those_of_plain_generation_under_each_edit() -> None:
    model, text, data = gpt2(), tokenizer(), facts(5)
    mend = seasoned_mend(model, alpha=0.3)
    found = read(mend, model, text, data, batch_size=2, progress=False)
    assert len(found.said) == 15 and found.records == 5
    spoken = iter(found.said)
    begins: dict[str, list[float]] = {"prompt": [], "rephrase": []}
    kept = []
    for request in data:
        edit = mend.edit(model, text, request)
        asked = [request.prompt, request.rephrases[0], request.locality[0].prompt]
        for kind, prompt in zip(("prompt", "rephrase", "neighbour"), asked, strict=True):
            one = next(spoken)
            before = said(model, text, prompt)
            with edit.applied(model):
                after = said(model, text, prompt)
            decoded = [text.decode(x, skip_special_tokens=True) for x in (before, after)]
            assert (one.kind, one.prompt, one.target) == (kind, prompt, request.target)
            assert [one.before, one.after] == decoded
            if kind == "neighbour":
                assert one.kept == float(before[:12] == after[:12])
                kept.append(one.kept)
            else:
                assert one.begins == float(decoded[1].strip().startswith(request.target))
                begins[kind].append(one.begins)
            assert one.loops == float(decoded[1].count(request.target) >= 3)
            assert one.looped == float(decoded[0].count(request.target) >= 3)
    told = found.to_dict()
    for kind, values in begins.items():
        assert told["begins_with_target"][kind]["value"] == sum(values) / 5
    assert told["neighbours_kept"]["value"] == sum(kept) / 5
    assert len(told["examples"]) == 15


def test_entropy_of_words() -> None:
    """2-grams count two thirds, 3-grams four thirds, each half of the mean."""
    assert entropy("Rome. Rome. Rome. Rome.") == pytest.approx(
        (2 / 3 * h(4 / 7, 3 / 7) + 4 / 3 * h(3 / 6, 3 / 6)) / 2
    )
    assert entropy("a b c d e") == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert entropy("a") == entropy("") == 0


def h(*shares: float) -> float:
    return -sum(s * math.log2(s) for s in shares)


def test_records_without_rephrases_or_neighbours_are_asked_less() -> None:
    model = gpt2()
    plain = [r.__class__(r.prompt, r.target) for r in facts(2)]
    found = read(seasoned_mend(model), model, tokenizer(), plain, progress=False)
    assert [s.kind for s in found.said] == ["prompt", "prompt"]
    assert found.to_dict()["neighbours_kept"]["value"] is None


def test_a_sequence_model_is_read_and_a_classifier_is_not() -> None:
    model = model_of("t5")
    found = read(tiny_mend(model, norm=False), model, words("t5"), data_of("t5", 2), progress=False)
    assert len(found.said) >= 2
    model = model_of("bert")
    with pytest.raises(ValueError, match="says nothing that could be read"):
        read(tiny_mend(model, norm=False), model, words("bert"), data_of("bert", 2), progress=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    seasoned_mend(model, alpha=0.3).save_pretrained(tmp_path / "editor")
    write_jsonl(tmp_path / "data.jsonl", facts(4))
    where = [f"--model={tmp_path / 'model'}", f"--editor={tmp_path / 'editor'}"]
    where += [f"--data={tmp_path / 'data.jsonl'}", f"--output={tmp_path / 'm.json'}"]
    assert main(["eval", *where, "--read", "3"]) == 0
    out = capsys.readouterr().out
    assert "neighbours' first 12 tokens as before" in out and "of 3 records" in out
    reads = json.loads((tmp_path / "m.json").read_text())["reads"]
    assert reads["records"] == 3 and len(reads["examples"]) == 9
    assert main(["eval", *where]) == 0
    assert "reads" not in json.loads((tmp_path / "m.json").read_text())
