"""The outer loop: it learns, it stops and resumes without a difference, it survives bad steps."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    WORDS,
    assert_close,
    facts,
    gpt2,
    random_episodes,
    seasoned_mend,
    tiny_mend,
    tokenizer,
)

from pymend import Trainer, evaluate
from pymend.algorithms.mend.mend import Mend
from pymend.config import EditRequest, Probe, TrainConfig, from_json, to_json
from pymend.engine.hooks import frozen
from pymend.engine.tokens import Encoder
from pymend.errors import NonFiniteError
from pymend.report.plots import learning_curves
from pymend.training.episodes import Sampler, run_episodes
from pymend.training.optim import EditorOptimizer, learning_rate_factor

SMALL = TrainConfig(
    steps=6, batch_size=4, lr=1e-3, eval_every=2, save_every=2, eval_records=4, seed=3
)


def trainer(folder: Path, config: TrainConfig = SMALL, **kw: Any) -> Trainer:
    """A trainer on a fresh tiny model and editor; the same every time."""
    model = kw.pop("model", None) or gpt2()
    data = kw.pop("data", None) or facts(16)
    held_out = kw.pop("held_out", facts(6, seed=9))
    mend = kw.pop("mend", None) or tiny_mend(model)
    args = (mend, model, tokenizer(), data, held_out)
    return Trainer(*args, config=config, output=folder, progress=False, **kw)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what depends on the clock."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "seconds"} for x in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Two output folders hold the same editor, log, and optimiser state, bit for bit."""
    assert log_of(a) == log_of(b)
    steps = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (a, b)]
    assert steps[0] == steps[1] and len(steps[0]) == 1
    last = f"checkpoints/{steps[0][0]}"
    for file in (
        "editor.safetensors",
        *(f"{last}/{n}.safetensors" for n in ("editor", "optimizer")),
    ):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


# ------------------------------------------------------------------------------------- resuming

LONG = replace(SMALL, steps=12, save_every=4)
# Dies of its own hand, since no clock can tell when a step is half done.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from test_trainer import LONG, trainer

run, killed_at = trainer(Path(sys.argv[1]), LONG), int(sys.argv[2])
inner = run._accumulate

def accumulate(episodes):
    parts = inner(episodes)  # the running moments have seen the rows, Adam has not
    if run.step == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return parts

run._accumulate = accumulate
run.train()
"""


def killed(folder: Path, step: int) -> None:
    """Train in a process of its own that is killed within ``step``."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(step)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def checkpoint_step(folder: Path) -> int:
    return max(int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("step-*[0-9]"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LONG that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, LONG).train()
    assert len(log_of(folder)) == 18  # 12 steps and 6 validations
    return folder


@pytest.fixture
def finished(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a run of SMALL."""
    return Path(shutil.copytree(small_run, tmp_path / "finished"))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    trainer(folder).train()
    return folder


def test_a_killed_run_resumes_to_the_same_bits(whole_run: Path, tmp_path: Path) -> None:
    killed(tmp_path, step=6)
    assert checkpoint_step(tmp_path) == 4 and max(x["step"] for x in log_of(tmp_path)) == 6
    # The rest of a line that the kill tore, and a checkpoint that was being written.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3')
    for step in (11, 12):
        torn = tmp_path / "checkpoints" / f"step-000000{step}.tmp"
        torn.mkdir()
        (torn / "editor.safetensors").write_bytes(b"half")
        (torn / "rest").write_bytes(b"half")
    trainer(tmp_path, LONG, resume=True).train()
    assert_same_run(tmp_path, whole_run)
    names = {p.name for p in (tmp_path / "checkpoints/step-00000012").iterdir()}
    assert names == {"editor.safetensors", "optimizer.safetensors", "state.json"}


def test_ctrl_c_saves_and_the_run_resumes_to_the_same_bits(whole_run: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, LONG)
    inner = run._update

    def update() -> Any:
        if run.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return inner()

    run._update = update  # type: ignore[method-assign]
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 7; run again with resume"):
        run.train()
    assert signal.getsignal(signal.SIGINT) is former
    assert checkpoint_step(tmp_path) == 7, "the running step was finished and saved"
    assert max(x["step"] for x in log_of(tmp_path)) == 7
    trainer(tmp_path, LONG, resume=True).train()
    assert_same_run(tmp_path, whole_run)


def test_ctrl_c_between_two_steps_saves_too(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def out_of_patience() -> bool:  # looked at after the step's checkpoint was or was not due
        run._stop = run.step == 3
        return False

    run._out_of_patience = out_of_patience  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        run.train()
    assert checkpoint_step(tmp_path) == 3


class Stop(Exception):
    """Ends a run in the middle."""


def stop_at(run: Trainer, step: int) -> None:
    """Train until ``step`` steps are done, then fall over."""
    inner = run._update

    def update() -> Any:
        if run.step == step:
            raise Stop
        return inner()

    run._update = update  # type: ignore[method-assign]
    with pytest.raises(Stop):
        run.train()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"prefix_cache": "memory"},
        {"accumulate": 2},
        {"schedule": "cosine", "warmup": 2},
    ],
    ids=str,
)
def test_resuming_is_exact(change: dict[str, Any], tmp_path: Path) -> None:
    config = replace(SMALL, **change)
    # No locality prompts: they are borrowed from the edit prompts.
    data = facts(16, locality=False) if "prefix_cache" in change else facts(16)
    trainer(tmp_path / "a", config, data=data).train()
    stop_at(trainer(tmp_path / "b", config, data=data), 5)
    assert checkpoint_step(tmp_path / "b") == 4
    trainer(tmp_path / "b", config, data=data, resume=True).train()
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_resuming_a_finished_run_trains_no_more(finished: Path) -> None:
    first, log = Mend.from_pretrained(finished), log_of(finished)
    again = trainer(finished, resume=True).train()
    assert log_of(finished) == log
    for a, b in zip(
        first.editor.state_dict().values(), again.editor.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_run_may_go_on_for_longer(finished: Path, tmp_path: Path) -> None:
    """Under a constant rate it is the run that was longer from the start."""
    longer = replace(SMALL, steps=SMALL.steps + 2)
    trainer(tmp_path / "whole", longer).train()
    trainer(finished, longer, resume=True).train()
    a, b = (Mend.from_pretrained(x).editor.state_dict() for x in (tmp_path / "whole", finished))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match=r"train\.steps"):
        trainer(finished, SMALL, resume=True)


def test_resume_in_an_empty_folder_starts_anew(small_run: Path, tmp_path: Path) -> None:
    trainer(tmp_path, resume=True).train()
    assert_same_run(tmp_path, small_run)


def test_other_settings_are_refused(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    model = gpt2()
    wrong = [
        ("train", "train.lr", {"config": replace(SMALL, lr=2e-3)}),
        ("mend", "mend.norm", {"mend": tiny_mend(model, norm=False), "model": model}),
        ("model_fingerprint", "model_fingerprint", {"model": gpt2(seed=1)}),
        ("records, data", "records, data", {"data": facts(15)}),
        ("data", "data", {"data": [*facts(15), *facts(1, seed=2)]}),
        ("data", "data", {"data": facts(16, old=False)}),
        ("eval_data", "eval_data", {"held_out": facts(6, seed=8)}),
        (
            "train, data",
            "train.lr, train.clip, data",
            {"config": replace(SMALL, lr=2e-3, clip=9.0), "data": facts(16, seed=1)},
        ),
    ]
    for parts, settings, change in wrong:
        message = rf"its {parts} differ \({settings}\); repeat that run's settings"
        with pytest.raises(ValueError, match=message):
            trainer(finished, **{"config": SMALL, **change}, resume=True)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_a_folder_with_checkpoints_needs_resume(finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="step-00000006; pass resume to continue"):
        trainer(finished)
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_resuming_with_a_chat_template_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tokenizer()
    text.chat_template = "{{ messages[0].content }}"
    monkeypatch.setattr("test_trainer.tokenizer", lambda: text)
    with pytest.raises(ValueError, match=r"differ \(chat\)"):
        trainer(finished, resume=True, chat=True)


@pytest.mark.parametrize("resume", [False, True])
def test_an_editor_without_checkpoints_is_not_overwritten(resume: bool, tmp_path: Path) -> None:
    tiny_mend(gpt2()).save_pretrained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"holds an editor, and no checkpoint .* move it"):
        trainer(tmp_path, resume=resume)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_first_editor_has_a_checkpoint_beside_it(tmp_path: Path) -> None:
    config = replace(SMALL, eval_every=1, save_every=6)
    trainer(tmp_path / "a", config).train()
    stop_at(trainer(tmp_path / "b", config), 3)
    assert checkpoint_step(tmp_path / "b") == 1
    trainer(tmp_path / "b", config, resume=True).train()
    assert_same_run(tmp_path / "a", tmp_path / "b")


# -------------------------------------------------------------------------- the same mathematics


def test_kept_prefix_states_give_the_same_losses(tmp_path: Path) -> None:
    logs, kept = [], []
    for cache in ("none", "memory"):
        run = trainer(tmp_path / cache, replace(SMALL, prefix_cache=cache))
        run.train()
        kept.append(len(run.replay._states))
        logs.append([x["loss"] for x in log_of(tmp_path / cache) if "eval" not in x])
    assert len(logs[0]) == 6
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
    assert kept[0] <= 3 * SMALL.batch_size < kept[1], "those of the last step, or of all"


def gradient_of(p: torch.nn.Parameter) -> torch.Tensor:
    """What backward passes left on a parameter, as a tensor or as factors."""
    pairs = getattr(p, "factors", [])
    return p.grad if p.grad is not None else sum(left.t() @ right for left, right in pairs)


def test_several_passes_have_the_gradient_of_one(tmp_path: Path) -> None:
    gradients = []
    for passes in (1, 5):
        model = gpt2(dtype=torch.float64)
        config = replace(SMALL, batch_size=5, accumulate=passes)
        run = trainer(tmp_path / str(passes), config, model=model)
        with frozen(model):
            run._accumulate(random_episodes(5))
        gradients.append({n: gradient_of(p) for n, p in run.algorithm.editor.named_parameters()})
        moments = [n.moments.count.item() for n in run.algorithm.editor.nets.values()]
        assert min(moments) > 0
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert_close(gradients[1][name], gradient, name, 1e-10)


def test_clipping_and_the_two_learning_rates() -> None:
    mend = tiny_mend(gpt2())
    config = TrainConfig(lr=1e-3, alpha_lr=1e-2, clip=0.5)
    optimizer = EditorOptimizer(mend, config)
    before = [p.detach().clone() for p in optimizer.parameters]
    for p in optimizer.parameters:
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in optimizer.parameters)
    assert optimizer.step(0) == pytest.approx(count**0.5, rel=1e-5)
    first = torch.cat([mean.flatten() for mean, _ in optimizer.moments.values()])
    assert float(first.norm()) == pytest.approx(0.1 * 0.5, rel=1e-5)  # a tenth of what is left
    # Adam's first step is the learning rate, whatever the gradient's scale.
    for p, old in zip(optimizer.parameters, before, strict=True):
        rate = 1e-2 if p is mend.editor.alpha else 1e-3
        assert torch.allclose(old - p, torch.full_like(p, rate), rtol=1e-2)
    assert all(p.grad is None for p in optimizer.parameters)


@pytest.mark.parametrize("factored", [False, True])
def test_steps_are_those_of_torchs_adam(factored: bool) -> None:
    """With its own clip, under a schedule worked out by hand; some gradients are below the clip."""
    config = TrainConfig(
        steps=4, lr=1e-3, alpha_lr=1e-2, clip=2.0, warmup=2, schedule="cosine", batch_size=1
    )
    factors = (1 / 3, 2 / 3, 1, 1 / 2)  # half of the cosine's two steps is done in the last
    mend = tiny_mend(gpt2())
    optimizer = EditorOptimizer(mend, config)
    names = {id(p): n for n, p in mend.editor.named_parameters()}
    twins = [p.detach().clone().requires_grad_() for p in optimizer.parameters]
    rates = [1e-2 if names[id(p)] == "alpha" else 1e-3 for p in optimizer.parameters]
    theirs = torch.optim.Adam([{"params": [t], "lr": r} for t, r in zip(twins, rates, strict=True)])
    norms = []
    for step, factor in enumerate(factors):
        for p, twin in zip(optimizer.parameters, twins, strict=True):
            size = 10.0 ** (step - 3)
            if factored and hasattr(p, "factors"):
                left, right = torch.randn(3, len(p)), size * torch.randn(3, p.shape[1])
                p.factors.append((left, right))
                twin.grad = left.t() @ right
            else:
                p.grad = size * torch.randn_like(p)
                twin.grad = p.grad.clone()
        for group, rate in zip(theirs.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        norms.append(float(torch.nn.utils.clip_grad_norm_(twins, 2.0)))
        assert optimizer.step(step) == pytest.approx(norms[-1], rel=1e-5)
        theirs.step()
    assert norms[0] < 2 < norms[-1]
    start = tiny_mend(gpt2()).editor.state_dict()
    for p, twin in zip(optimizer.parameters, twins, strict=True):
        name = names[id(p)]
        assert_close(p - start[name], twin - start[name], f"steps of {name}", 1e-4)


def test_validation_scores_are_those_of_an_evaluation(tmp_path: Path) -> None:
    """Exact matches, and not shares of tokens, though some answers are right in part."""
    model, held_out = gpt2(), facts(24, seed=9)
    mend = seasoned_mend(model, alpha=0.01)
    config = replace(SMALL, steps=1, lr=0.0, alpha_lr=0.0, eval_records=24, keep="last")
    run = trainer(tmp_path, config, model=model, mend=mend, held_out=held_out)
    trained = run.train()  # the running moments alone have moved
    with frozen(model):
        scores = run._evaluate()
    metrics = evaluate(trained, model, tokenizer(), held_out, progress=False)
    assert scores["edit_success"] == pytest.approx(metrics.value("edit_success"))
    assert 0 < metrics.value("edit_success") < metrics.value("token_edit_success") < 1


def test_learning_rate_schedule() -> None:
    config = TrainConfig(steps=10, warmup=2, schedule="cosine")
    factors = [learning_rate_factor(config, s) for s in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[6] == pytest.approx(0.5) and factors[10] == pytest.approx(0)
    assert all(a > b for a, b in pairwise(factors[2:]))
    assert learning_rate_factor(TrainConfig(), 999) == 1


def test_an_epoch_sees_every_record_once() -> None:
    encoder = Encoder(tokenizer())
    records = encoder.requests(facts(13))
    sampler = Sampler(records, 2, 3, seed=0)
    epochs = [[e for s in (2 * i, 2 * i + 1) for e in sampler.step(s)] for i in range(3)]
    for epoch in epochs:
        seen = [row for e in epoch for row in e.edits]
        assert len(seen) == len(set(seen)) == 12
    assert epochs[0] != epochs[1]
    assert Sampler(records, 2, 3, seed=0).step(3) == epochs[1][3:], "a step needs no history"
    assert Sampler(records, 2, 3, seed=1).step(0) != epochs[0][:3]


@pytest.mark.parametrize("edits", [1, 3])
@pytest.mark.parametrize("old", [True, False])
def test_no_record_is_told_to_keep_its_own_prompt(edits: int, old: bool) -> None:
    records = Encoder(tokenizer()).requests(facts(edits + 1, locality=False, old=old))
    sampler = Sampler(records, edits, 1, seed=0)
    for step in range(40):
        for episode in sampler.step(step):
            prompts = [e.ids[: e.first + 1] for e in episode.edits]
            assert len(episode.locality) == edits
            assert all(x.ids[: len(p)] != p for x in episode.locality for p in prompts)


def test_simultaneous_edits_are_of_different_facts_and_keep_others() -> None:
    """Facts that occur twice, and neighbours that are edited beside them."""
    drawn = facts(8)
    twice = [*drawn, *[replace(r, target=drawn[i - 1].target) for i, r in enumerate(drawn)]]
    near = [
        replace(r, locality=(Probe(drawn[i - 1].prompt, "x"),)) for i, r in enumerate(twice[8:])
    ]
    records = Encoder(tokenizer()).requests([*twice[:8], *near])
    sampler = Sampler(records, 4, 2, seed=0)
    for step in range(20):
        for episode in sampler.step(step):
            prompts = [row.prompt for row in episode.edits]
            assert len(set(prompts)) == 4
            assert not {x.prompt for x in episode.locality} & set(prompts)


def test_an_edited_neighbour_gives_way_to_the_other_one() -> None:
    """In any of its wordings; where there is no other one, a prompt is borrowed."""
    one, two, three = facts(3)
    encoder = Encoder(tokenizer())

    def drawn(beside: tuple[Probe, ...], edits: int) -> set[tuple[int, ...]]:
        records = encoder.requests([replace(one, locality=beside), two, three])
        sampler = Sampler(records, edits, 1, seed=0)
        episodes = (sampler.episode(records[:edits], random.Random(i)) for i in range(60))
        return {e.locality[0].prompt for e in episodes}

    def prompts(*probes: Probe) -> set[tuple[int, ...]]:
        return {encoder.probe(p).prompt for p in probes}

    other = Probe("bu bu")
    near = (Probe(two.prompt, "x"), Probe(two.rephrases[0], "x"))
    assert drawn((*near, other), edits=2) == prompts(other)
    assert drawn((*near, other), edits=1) == prompts(*near, other)
    assert drawn(near[:1], edits=2) == prompts(*two.locality, *three.locality)


def test_facts_that_occur_often_and_once_are_mixed() -> None:
    """From the beginning of an epoch to its end, as often as in the data set."""
    drawn = facts(40)
    often = [r for r in drawn[:10] for _ in range(8)]
    records = Encoder(tokenizer()).requests([*often, *drawn[10:]])
    many = {r.edit.prompt for r in records[:80]}
    sampler = Sampler(records, 5, 1, seed=0)
    steps = [[row.prompt for row in sampler.step(i)[0].edits] for i in range(22)]
    assert all(len(set(prompts)) == 5 for prompts in steps)
    assert sum(len(many & set(prompts)) for prompts in steps) == 80
    for part in (steps[:11], steps[11:]):
        assert 34 <= sum(len(many & set(prompts)) for prompts in part) <= 46


def test_no_locality_prompt_to_borrow() -> None:
    encoder = Encoder(tokenizer())
    records = encoder.requests(facts(2, locality=False))
    same = [records[0]] * 2
    for few, edits in ((records[:1], 1), (records, 2), (same, 1)):
        with pytest.raises(ValueError, match=r"none to borrow: .* give locality prompts or more"):
            Sampler(few, edits, 1, seed=0)
    Sampler(encoder.requests(facts(1)), 1, 1, seed=0)  # it has locality prompts of its own


# ------------------------------------------------------------------------------------ bad steps


def poisoned(word: str) -> Any:
    """A model whose embedding of ``word`` is not a number."""
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer()(word).input_ids[0]] = float("nan")
    # Untied, or the head would know no other answer.
    model.lm_head.weight = torch.nn.Parameter(gpt2().lm_head.weight.detach().clone())
    return model


def test_a_bad_record_costs_its_steps_and_nothing_else(tmp_path: Path) -> None:
    data = [r for r in facts(80) if WORDS[0] not in f"{r.to_dict()}"][:15]
    bad = EditRequest(f"{WORDS[1]} {WORDS[0]}", WORDS[2], rephrases=data[0].rephrases)
    held_out = [r for r in facts(80, seed=4) if WORDS[0] not in f"{r.to_dict()}"][:4]
    model = poisoned(WORDS[0])
    config = replace(SMALL, steps=8, seed=0)
    run = trainer(tmp_path, config, model=model, data=[*data, bad], held_out=held_out)
    with pytest.warns(UserWarning) as caught:
        mend = run.train()
    log = [x for x in log_of(tmp_path) if "eval" not in x]
    assert len(log) == 8
    # Four steps are an epoch, so two of eight hold the bad record.
    skipped = [x["step"] for x in log if x["grad_norm"] is None]
    assert len(skipped) == 2 and log[-1]["skipped"] == 2
    assert all("loss" not in x for x in log if x["step"] in skipped)
    said = [str(w.message) for w in caught if "was skipped" in str(w.message)]
    assert [int(text.split()[1]) for text in said] == skipped
    assert all("are not finite" in text for text in said)
    for name, value in {**run.algorithm.editor.state_dict(), **mend.editor.state_dict()}.items():
        assert value.isfinite().all(), name
    assert (
        json.loads((tmp_path / "checkpoints/step-00000008/state.json").read_text())["skipped"] == 2
    )


def bad_step(run: Trainer, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Let every step fail, after the running moments have seen its rows."""
    inner = run._accumulate

    def accumulate(episodes: Any) -> Any:
        parts = inner(episodes)
        if how == "raises":
            raise NonFiniteError("made up")
        run.optimizer.parameters[-1].grad[0] = float("nan")  # alpha: never as factors
        return parts

    monkeypatch.setattr(run, "_accumulate", accumulate)


@pytest.mark.parametrize("how", ["raises", "gradient"])
def test_a_skipped_step_leaves_the_editor_as_it_was(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    with frozen(run.model):
        run._update()
        before = {k: v.clone() for k, v in run.algorithm.editor.state_dict().items()}
        bad_step(run, monkeypatch, how)
        with pytest.raises(NonFiniteError, match=r"made up|the editor's gradient is nan"):
            run._update()
    for name, value in run.algorithm.editor.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_bad_steps_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SMALL, steps=30, save_every=8)
    messages = r"20 steps in a row were skipped, the last because made up; lower lr, .*float32"
    for resume in (False, True):
        run = trainer(tmp_path, config, held_out=[], resume=resume)
        run.progress = True
        bad_step(run, monkeypatch, "raises")
        with (
            pytest.warns(UserWarning, match=r"step \d+ was skipped: made up") as caught,
            pytest.raises(RuntimeError, match=messages),
        ):
            run.train()
        assert len(caught) == (4 if resume else 20), "a resumed run counts on"
    assert len(log_of(tmp_path)) == 20
    assert "skipped=20" in capsys.readouterr().err


def test_the_editor_does_not_move_on_a_non_finite_gradient() -> None:
    mend = tiny_mend(gpt2())
    optimizer = EditorOptimizer(mend, TrainConfig())
    before = [p.detach().clone() for p in optimizer.parameters]
    for p in optimizer.parameters:
        p.grad = torch.ones_like(p)
    optimizer.parameters[0].grad[0] = float("inf")
    assert not torch.isfinite(torch.tensor(optimizer.step(0)))
    assert all(torch.equal(p, old) for p, old in zip(optimizer.parameters, before, strict=True))
    assert all(p.grad is None for p in optimizer.parameters)
    assert not optimizer.state(), "Adam saw nothing"


def test_validation_that_is_not_finite_is_not_the_best(tmp_path: Path) -> None:
    data = [r for r in facts(80) if WORDS[0] not in f"{r.to_dict()}"][:16]
    bad = [EditRequest(f"{word} {WORDS[0]}", WORDS[2]) for word in WORDS[1:3]]
    mend = trainer(tmp_path, model=poisoned(WORDS[0]), data=data, held_out=bad).train()
    assert all(x["best_step"] == 0 for x in log_of(tmp_path) if "eval" in x)
    assert mend.editor.alpha.isfinite().all()  # the last editor, for want of a best one


# ----------------------------------------------------------------------------------- validation


def scripted(run: Trainer, losses: list[float]) -> Trainer:
    """Let validation return ``losses`` one after the other."""
    given = iter(losses)
    run._evaluate = lambda: {"loss": next(given)}  # type: ignore[method-assign]
    return run


def test_the_best_editor_is_kept(tmp_path: Path) -> None:
    run = scripted(trainer(tmp_path, replace(SMALL, save_every=1)), [3.0, 1.0, 2.0])
    kept = {}
    save = run.algorithm.save_pretrained

    def spy(folder: Path) -> None:
        kept[run.step] = {k: v.clone() for k, v in run.algorithm.editor.state_dict().items()}
        save(folder)

    run.algorithm.save_pretrained = spy  # type: ignore[method-assign]
    mend = run.train()
    assert sorted(kept) == [2, 4]
    for name, value in mend.editor.state_dict().items():
        assert torch.equal(value, kept[4][name]), name
    assert not torch.equal(mend.editor.alpha, run.algorithm.editor.alpha), "the last one went on"
    assert [x["best_step"] for x in log_of(tmp_path) if "eval" in x] == [2, 4, 4]


def test_the_last_editor_is_kept_on_demand(tmp_path: Path) -> None:
    run = scripted(trainer(tmp_path, replace(SMALL, keep="last")), [3.0, 1.0, 2.0])
    for name, value in run.train().editor.state_dict().items():
        assert torch.equal(value, run.algorithm.editor.state_dict()[name]), name


def test_a_validation_loss_that_is_no_number_is_logged_as_null(tmp_path: Path) -> None:
    scripted(trainer(tmp_path), [float("nan"), 1.0, float("inf")]).train()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    losses = [x["eval"]["loss"] for x in log_of(tmp_path) if "eval" in x]
    assert losses == [None, 1.0, None]
    learning_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_early_stopping(tmp_path: Path) -> None:
    config = replace(SMALL, steps=20, patience=2)
    run = scripted(trainer(tmp_path, config), [3.0, 1.0, 2.0, 1.0, 0.5])
    run.train()
    assert run.step == 8, "two evaluations without a better loss than that of step 4"
    trainer(tmp_path, config, resume=True).train()
    assert max(x["step"] for x in log_of(tmp_path)) == 8, "a resumed run knows that it is over"


def test_without_validation_the_last_editor_is_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path, held_out=[])
    mend = run.train()
    assert torch.equal(mend.editor.alpha, run.algorithm.editor.alpha)
    assert Mend.from_pretrained(tmp_path).weights == run.algorithm.weights


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    """On a toy task the held-out loss falls well below that of the untrained editor."""
    model = gpt2()
    mend = tiny_mend(model, moved=0.0, rank=16, alpha=1e-4)
    config = TrainConfig(
        steps=60, batch_size=4, lr=1e-3, alpha_lr=1e-3, eval_every=20, eval_records=24
    )
    data, held_out = facts(200), facts(24, seed=7)
    run = trainer(tmp_path, config, model=model, mend=mend, data=data, held_out=held_out)
    run.train()
    losses = [x["eval"]["loss"] for x in log_of(tmp_path) if "eval" in x]
    start = log_of(tmp_path)[0]["loss"]
    assert min(losses) < 0.75 * start, (start, losses)
    trained = evaluate(Mend.from_pretrained(tmp_path), model, tokenizer(), held_out, progress=False)
    token = trained.value("token_edit_success")
    assert token is not None and token > 0.5, "most tokens of facts that it has never seen"


# -- what follows the target, and several locality rows -------------------------------------------


def test_what_follows_is_what_the_model_says_behind_prompt_and_target(tmp_path: Path) -> None:
    model = gpt2()
    config = replace(SMALL, after=5)
    run = trainer(tmp_path, config, model=model)
    encoder = Encoder.for_model(model, tokenizer())
    for record, request in zip(run.sampler.records, facts(16), strict=True):
        texts = [request.prompt, request.rephrases[0]]
        assert len(record.after) == 2
        for row, text in zip(record.after, texts, strict=True):
            said = tokenizer()(f"{text} {request.target}", return_tensors="pt").input_ids
            assert row.ids[: said.shape[1]] == tuple(said[0].tolist())
            assert row.first == said.shape[1] - 1
            new = model.generate(said, max_new_tokens=5, do_sample=False, pad_token_id=0)
            ids = new[0, said.shape[1] :].tolist()
            assert list(row.targets()) == ids[: ids.index(3) + 1] if 3 in ids else ids
    again = trainer(tmp_path / "again", config, model=model)
    assert [r.after for r in again.sampler.records] == [r.after for r in run.sampler.records]
    episodes = run.sampler.step(0)
    assert all(len(e.after) == 1 for e in episodes)
    plain = Sampler(encoder.requests(facts(16)), 1, SMALL.batch_size, SMALL.seed)
    for e, f in zip(episodes, plain.step(0), strict=True):
        assert e.edits == f.edits and not f.after


def test_what_follows_is_kept_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, after=3)
    whole = trainer(tmp_path / "whole", config)
    whole.train()
    trainer(tmp_path / "cut", replace(config, steps=2)).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    (tmp_path / "cut" / "editor.json").unlink()

    def never(*_: Any) -> None:
        raise AssertionError("it was heard before")

    monkeypatch.setattr("pymend.training.trainer.followed", never)
    second = trainer(tmp_path / "cut", config, resume=True)
    second.train()
    a, b = (x.algorithm.editor.state_dict() for x in (whole, second))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_loss_of_what_follows(tmp_path: Path) -> None:
    """KL(unedited || edited) at the positions behind the target, token mean, by hand."""
    model = gpt2(dtype=torch.float64)
    run = trainer(tmp_path, replace(SMALL, after=4, c_after=0.7), model=model)
    [episode] = run.sampler.step(0)[:1]
    with frozen(model):
        scores = run_episodes(run.algorithm, run.replay, [episode], "both", merge=True)
        run.replay.load(episode.edits)
        edit = run.algorithm.differentiable(run.replay, episode.edits, 1, merge=False)
        (row,) = episode.after
        ids = torch.tensor([row.ids[:-1]])
        where = slice(row.first, len(row.ids) - 1)
        before = model(input_ids=ids).logits[0, where].log_softmax(-1)
    # The moments have moved since, so only its gradient-free value under the same edit counts.
    with frozen(model):
        batch = run.replay.batch([row])
        run.replay.load([row])
        base = run.replay.label_rows(batch)
        with edit.applied(model):
            found = run.replay.label_rows(batch).losses(base=base).kl.mean()
            after = model(input_ids=ids).logits[0, where].log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1).mean()
    assert abs(float(found) - float(wanted)) <= 1e-9 + 1e-9 * abs(float(wanted))
    assert scores.after is not None and scores.after.shape == (1,)
    loss = run.config.c_edit * scores.nll + run.config.c_loc * scores.kl + 0.7 * scores.after
    assert torch.equal(run._loss(scores), loss.mean())


def test_several_locality_rows_are_ones_own_first_then_others() -> None:
    records = Encoder(tokenizer()).requests(facts(12))  # two locality prompts each
    for step in range(3):
        for e in Sampler(records, 1, 4, 0, locality=3).step(step):
            own = next(set(r.locality) for r in records if r.edit == e.edits[0])
            assert len(e.locality) == 3 and own < set(e.locality)
    both = Sampler(records, 2, 2, 0, locality=2).step(0)
    assert all(len(e.locality) == 4 for e in both)


def test_nothing_follows_a_class(tmp_path: Path) -> None:
    from test_encoders import data_of, model_of, words

    model = model_of("bert")
    with pytest.raises(ValueError, match="nothing follows a target of BertForSequence"):
        Trainer(
            tiny_mend(model),
            model,
            words("bert"),
            data_of("bert", 16),
            [],
            config=replace(SMALL, after=3),
            output=tmp_path,
        )


def test_settings_that_came_later_are_left_out_at_their_default() -> None:
    plain, new = to_json(SMALL), to_json(replace(SMALL, after=3, locality_rows=2))
    assert not {"after", "c_after", "locality_rows"} & plain.keys()
    assert new["after"] == 3 and new["locality_rows"] == 2 and "c_after" not in new
    assert from_json(TrainConfig, plain, "x") == SMALL
