"""The story with kernels and without: training step by step, evaluation, and a merge agree."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import log_of, trainer
from tiny import FAMILY, assert_close, facts, seasoned_mend, tiny_mend, tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pymend import Trainer, _lib, evaluate
from pymend.config import TrainConfig
from pymend.models.structure import weight_of

pytestmark = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")

STEPS = 8
CONFIG = TrainConfig(
    steps=STEPS, batch_size=4, lr=3e-3, alpha_lr=1e-2, eval_every=4, save_every=STEPS,
    eval_records=4, seed=3, keep="last",
)  # fmt: skip
# Relative, of the first step and of each one after it: rounding that Adam carries on.
GROWTH = {torch.float64: 1e-13, torch.float32: 1e-6}


@pytest.fixture(params=FAMILY)
def family(request: pytest.FixtureRequest) -> Any:
    return FAMILY[request.param]


def kernels(patch: pytest.MonkeyPatch, value: str) -> None:
    patch.setenv("PYMEND_KERNELS", value)


def run_of(folder: Path, family: Any, dtype: torch.dtype, config: TrainConfig = CONFIG) -> Trainer:
    model = family(dtype=dtype)
    return trainer(folder, config, model=model, mend=tiny_mend(model))


def assert_steps_agree(logs: list[list[dict[str, Any]]], growth: float) -> None:
    """Every number of every step; the bound grows with the steps taken."""
    assert len(logs[0]) == len(logs[1]) == STEPS + STEPS // CONFIG.eval_every
    for ours, theirs in zip(*logs, strict=True):
        allowed = growth * ours["step"]
        pairs = [(k, ours[k], theirs[k]) for k in ours if k != "eval"]
        pairs += [(k, v, theirs["eval"][k]) for k, v in ours.get("eval", {}).items()]
        for name, a, b in pairs:
            assert math.isclose(a, b, rel_tol=allowed, abs_tol=allowed), (
                f"step {ours['step']}, {name}: {a} and {b} differ by more than {allowed:.1g}"
            )


@pytest.mark.parametrize("dtype", GROWTH, ids=str)
def test_training_is_the_same_step_by_step(
    family: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logs, states = [], []
    for value in ("all", "off"):
        kernels(monkeypatch, value)
        run = run_of(tmp_path / value, family, dtype)
        before = copy.deepcopy(run.algorithm.editor.state_dict())
        run.train()
        logs.append(log_of(tmp_path / value))
        states.append(run.algorithm.editor.state_dict())
    losses = [line["loss"] for line in logs[0] if "loss" in line]
    assert min(losses[-3:]) < 0.98 * losses[0], "something was learnt"
    assert_steps_agree(logs, GROWTH[dtype])
    for name, start in before.items():
        ours, theirs = states[0][name], states[1][name]
        if not start.is_floating_point():
            assert torch.equal(ours, theirs), name
            continue
        if ".moments." in name:
            assert_close(ours, theirs, name, 2 * STEPS * GROWTH[dtype])
        assert not torch.equal(ours, start), f"{name} was trained"
    # As one vector: Adam makes a whole step of a gradient that is nothing but rounding.
    ours, theirs = (flat(state) for state in states)
    assert_close(ours, theirs, "the editor", 2 * STEPS * GROWTH[dtype])


def flat(state: dict[str, Tensor]) -> Tensor:
    """All parameters of an editor; the running moments are not among them."""
    parts = [t.flatten() for name, t in state.items() if ".moments." not in name]
    return torch.cat([t.double() for t in parts])


def test_evaluation_is_the_same(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = family(), tokenizer()
    mend = seasoned_mend(model, moved=0.3, alpha=1.0)
    scores = []
    for value in ("all", "off"):
        kernels(monkeypatch, value)
        scores.append(evaluate(mend, model, text, facts(9), batch_size=4, progress=False))
    ours, theirs = scores
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-5)
    assert any(r.locality < 1 for r in ours.records), "the edits do something"
    assert ours.records == theirs.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", [None, 11], ids=["nearest", "random"])
def test_a_merge_is_the_same(
    family: Any, dtype: torch.dtype, seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family(dtype=dtype)
    mend = seasoned_mend(model, alpha=0.05)
    merged: list[dict[str, Tensor]] = []
    fidelities = []
    for value in ("all", "off"):
        kernels(monkeypatch, value)
        edited = copy.deepcopy(model)
        edit = mend.edit(edited, tokenizer(), facts(1)[0])
        fidelities.append(edit.merge_(edited, seed))
        merged.append({w.name: weight_of(edited, w) for w in mend.weights})
    assert fidelities[0] == pytest.approx(fidelities[1], rel=1e-4)
    for w in mend.weights:
        ours, theirs = (m[w.name].detach().double() for m in merged)
        assert not torch.equal(ours, weight_of(model, w).double()), "the edit was merged"
        # The edits differ by rounding; a sum beside the middle of two bfloat16 (beside its draw)
        # then goes either way.
        step = torch.finfo(dtype).eps * theirs.abs() + 1e-6 * theirs.abs().max()
        assert ((ours - theirs).abs() <= step).all(), w.name
        assert dtype == torch.float32 or (ours == theirs).double().mean() > 0.99


# ------------------------------------------------------------------------------ the ops are used


class Calls(TorchDispatchMode):
    """The names of the pymend ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pymend":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


TRAINING = {
    "moments",
    "editor_mlp",
    "editor_mlp_backward",
    "token_losses",
    "token_losses_backward",
    "factored_adam",
}


def calls_of_each_stage(family: Any, folder: Path) -> dict[str, set[str]]:
    """Which ops a training step, an evaluation and a bfloat16 merge call."""
    calls = {}
    with Calls() as seen:
        run = run_of(folder, family, torch.float32, TrainConfig(steps=1, batch_size=2))
        run.train()
    calls["train"] = seen.names
    model = family(dtype=torch.bfloat16)
    mend = seasoned_mend(model, alpha=0.3)
    with Calls() as seen:
        evaluate(mend, model, tokenizer(), facts(2), progress=False)
    calls["evaluate"] = seen.names
    edit = mend.edit(model, tokenizer(), facts(1)[0])
    with Calls() as seen:
        edit.merge_(model)
    calls["merge"] = seen.names
    return calls


def test_every_stage_uses_the_ops(
    family: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = calls_of_each_stage(family, tmp_path / "all")
    assert calls["train"] >= TRAINING
    assert calls["evaluate"] >= {"moments", "editor_mlp", "token_losses"}
    assert calls["merge"] == {"rank_update"}
    kernels(monkeypatch, "off")
    assert not any(calls_of_each_stage(family, tmp_path / "off").values())
