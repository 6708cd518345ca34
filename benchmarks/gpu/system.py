"""Whole edits and optimiser steps on models built from their configurations, weights random.

Ours has a bfloat16 base and a float32 editor; the official order of work is float32 throughout. An
episode is an edit, a rephrase and a locality row of 32 tokens; a step has ten of them. "cached"
keeps the states below the edited blocks in memory; an "evaluate" is one edit with its scores. A
call with "tf32" is the same while torch may take float32 products, here the editor's, in TF32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import harness
import torch
import transformers
from official_order import OfficialOrder

from gpu import measure
from gpu.measure import Call, Device, Run, error, in_tf32
from pymend.algorithms.mend.mend import Mend
from pymend.config import MendConfig, TrainConfig
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.models.structure import find_weights, weight_of
from pymend.training.episodes import Sampler, run_episodes
from pymend.training.optim import EditorOptimizer

SEEN = 1000  # rows that the moments claim to have seen
LIMIT = 0.3  # seconds of timing for one rival
MODELS = {  # configuration class, its settings, the same for a rehearsal, whether official too
    "GPT-J 6B": (
        "GPTJConfig",
        {},
        {"n_embd": 32, "n_layer": 4, "n_head": 2, "rotary_dim": 8},
        False,
    ),
    "GPT-Neo 2.7B": (
        "GPTNeoConfig",
        {"hidden_size": 2560, "num_layers": 32, "num_heads": 20}
        | {"attention_types": [[["global", "local"], 16]]},
        {"hidden_size": 32, "num_layers": 4, "num_heads": 2}
        | {"attention_types": [[["global", "local"], 2]]},
        True,
    ),
    "GPT-2 small": ("GPT2Config", {}, {"n_embd": 32, "n_layer": 4, "n_head": 2}, True),
}
SAME = 1e-3  # relative error of our change of the weights against the official one, float32
ALPHA = 1e3  # of that comparison: lifts the change above the rounding of the weights
TINY = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True)
class Amounts:
    """How much of everything."""

    tokens: int = 32
    episodes: int = 10  # of a step
    evaluated: int = 32  # edits in one pass
    alone: int = 8  # edits evaluated one after the other
    rank: int = 1920


def build(name: str, dtype: torch.dtype, device: Device, dry: bool) -> Any:
    """The model, in evaluation mode, made where it runs."""
    kind, settings, tiny, _ = MODELS[name]
    options = {**tiny, **TINY} if dry else settings
    config = getattr(transformers, kind)(**options)
    torch.manual_seed(0)
    with torch.device(device.name):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def mend_for(model: Any, device: Device, config: MendConfig) -> Mend:
    """An untrained editor that claims to have seen rows."""
    with torch.device(device.name):
        mend = Mend.from_config(model, config)
    for net in mend.editor.nets.values():
        net.moments.count.fill_(SEEN)
        net.moments.m2.fill_(SEEN)
    return mend


def ours(model: Any, device: Device, amounts: Amounts) -> dict[str, tuple[Call, int]]:
    """Our calls by name, and of how many edits or steps each is."""
    mend = mend_for(model, device, MendConfig(rank=amounts.rank))
    optimizer = EditorOptimizer(mend, TrainConfig(batch_size=amounts.episodes))
    records = harness.random_records(model, amounts.evaluated, amounts.tokens)
    row = records[0].edit
    fresh, kept = Replay(model, mend.weights), Replay(model, mend.weights, keep=True)
    with frozen(model):
        kept.load([x for r in records for x in (r.edit, *r.rephrases, *r.locality)])
    episodes = Sampler(records, 1, amounts.evaluated, seed=0).step(0)

    def edit(replay: Replay) -> Any:
        with frozen(model):
            replay.load([row])
            return mend.compute(replay, [row], joint=True)

    def merge() -> None:
        made = edit(fresh)
        made.merge_(model)
        made.unmerge_(model)

    def passes(count: int, batched: bool) -> list[Any]:
        return [episodes[:count]] if batched else [[e] for e in episodes[:count]]

    def step(replay: Replay, batched: bool) -> None:
        config = optimizer.config
        with frozen(model), torch.enable_grad():
            for part in passes(amounts.episodes, batched):
                scores = run_episodes(mend, replay, part, "rephrase", merge=True)
                loss = config.c_edit * scores.nll + config.c_loc * scores.kl
                (loss.sum() / amounts.episodes).backward()
            optimizer.step(0)

    def evaluate(replay: Replay, batched: bool) -> None:
        with frozen(model):
            for part in passes(amounts.evaluated if batched else amounts.alone, batched):
                run_episodes(mend, replay, part, "both", merge=False)

    calls: dict[str, tuple[Call, int]] = {
        "edit": (lambda: edit(fresh), 1),
        "edit, cached": (lambda: edit(kept), 1),
        "edit, merged": (merge, 1),
        "step, sequential": (lambda: step(fresh, False), 1),
        "step, batched": (lambda: step(fresh, True), 1),
        "step, cached": (lambda: step(kept, True), 1),
        "evaluate, sequential": (lambda: evaluate(fresh, False), amounts.alone),
        "evaluate, batched": (lambda: evaluate(fresh, True), amounts.evaluated),
        "evaluate, cached": (lambda: evaluate(kept, True), amounts.evaluated),
    }
    for what in ("step, cached", "evaluate, cached"):
        call, count = calls[what]
        calls[f"{what}, tf32"] = in_tf32(call), count
    return calls


def official(model: Any, device: Device, amounts: Amounts) -> dict[str, tuple[Call, int]]:
    """The rival's."""
    dense = _dense(model, amounts)
    records = harness.random_records(model, amounts.episodes, amounts.tokens)
    batches = [
        [_on(device, harness.dense_batch(x)) for x in (r.edit, r.rephrases[0], r.locality[0])]
        for r in records
    ]

    def step() -> None:
        with torch.enable_grad():
            for batch in batches:
                dense.micro_step(*batch)
            dense.optimiser_step()

    def edit() -> Any:
        with torch.enable_grad():
            return dense.edit(batches[0][0])

    return {"edit": (edit, 1), "step": (step, 1)}


def _dense(model: Any, amounts: Amounts, alpha: float = 1e-4) -> OfficialOrder:
    names = [w.name for w in find_weights(model)]
    dense = OfficialOrder(model, names, amounts.rank, alpha=alpha, accumulate=amounts.episodes)
    for moments in dense.moments.values():
        moments.k.fill_(SEEN)
        moments.u_s.fill_(SEEN)
        moments.delta_s.fill_(SEEN)
    return dense


def _on(device: Device, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.to(device.name) for key, tensor in batch.items()}


def same_edit(name: str, device: Device, dry: bool, amounts: Amounts) -> float:
    """Our edit against the official one on one float32 model: error of the change of its weights.

    Both editors are the identity, so their random parts do not matter.
    """
    model = build(name, torch.float32, device, dry)
    row = harness.random_records(model, 1, amounts.tokens)[0].edit
    config = MendConfig(rank=amounts.rank, alpha=ALPHA, official=True)
    mend = mend_for(model, device, config)
    before = [weight_of(model, w).detach().clone() for w in mend.weights]
    with frozen(model):
        replay = Replay(model, mend.weights)
        replay.load([row])
        made = mend.compute(replay, [row], joint=True)
        changes = [-f.alpha * f.delta.t() @ f.u for f in made.factors.values()]
        changes = [c.t() if w.transposed else c for c, w in zip(changes, mend.weights, strict=True)]
    with torch.enable_grad():
        edited = _dense(model, amounts, alpha=ALPHA).edit(_on(device, harness.dense_batch(row)))
    truth = [weight_of(edited, w).detach() for w in mend.weights]
    moved = [t - b for t, b in zip(truth, before, strict=True)]
    return error(changes, moved)


@torch.no_grad()
def system(run: Run) -> None:
    """Edits, steps, evaluations and their memory."""
    device = Device(run.dry)
    amounts = Amounts(6, 2, 3, 2, 8) if run.dry else Amounts()
    # Random weights: what a merge loses to bfloat16 says nothing here.
    warnings.filterwarnings("ignore", message="only .* of the wanted change survived")
    found = same_edit("GPT-2 small", device, run.dry, amounts)
    run.save(same_edit={"error": found, "tolerance": SAME})
    if not found <= SAME:
        raise ArithmeticError(f"our edit differs from the official one by {found:.2g}")
    rows: list[dict[str, Any]] = []
    for name, (*_, with_official) in MODELS.items():
        # The rival first: without it our times are half a comparison.
        sides = [("official", torch.float32, official), ("ours", torch.bfloat16, ours)]
        for side, dtype, calls_of in sides[0 if with_official else 1 :]:
            if run.left < 10:
                run.save(rows=rows, cut=f"before {side}, {name}")
                return
            model = build(name, dtype, device, run.dry)
            for what, (call, count) in calls_of(model, device, amounts).items():
                peak = device.peak(call)
                result = measure.timed(device, {what: [call]}, limit=LIMIT)[what]
                row = {"model": name, "side": side, "what": what, "peak bytes": peak, **result}
                rows.append({**row, "per second": count / result["seconds"]})
                run.save(rows=rows)
                print(f"  {name}, {side}, {what}: {result['seconds'] * 1e3:.1f} ms", flush=True)
            del model, call
            device.free()
