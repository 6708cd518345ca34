"""An editor trained for a real model on real facts, as long as the plan allows, and its scores.

The folder that PYMEND_GPU_MODEL names holds the model, its tokenizer, and CounterFact as
``counterfact-train.json`` and ``counterfact-val.json``. Records about a subject of the validation
set are not trained on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu.measure import Device, Run, Skipped
from pymend import Mend, MendConfig, TrainConfig, Trainer, evaluate
from pymend.data.readers import load_records

MOST = 2000  # steps, of the settings that the same training had on a CPU
TRIED = (10, 50)  # steps of two trainings whose difference tells how many there is time for
SPARED = 45.0  # seconds for the evaluation and the way there
SCORED = 500  # single edits
RATE = 3e-5
RANK = 512


def training(run: Run) -> None:
    """Episodes per second of training, edits per second of evaluation, scores."""
    folder = Path(os.environ.get("PYMEND_GPU_MODEL", "-"))
    if run.dry or not folder.is_dir():
        raise Skipped("PYMEND_GPU_MODEL names no folder with a model and CounterFact")
    device = Device(run.dry)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device.name).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = load_records(folder / "counterfact-val.json")[:SCORED]
    subjects = {record.subject for record in test}
    train = [
        r for r in load_records(folder / "counterfact-train.json") if r.subject not in subjects
    ]

    def trained(steps: int) -> tuple[Mend, float]:
        torch.manual_seed(0)
        mend = Mend.from_config(model, MendConfig(rank=RANK))
        config = TrainConfig(
            steps=steps,
            lr=RATE,
            alpha_lr=RATE,
            schedule="cosine",
            warmup=min(50, steps // 2),
            keep="last",
            eval_every=steps,
            save_every=steps,
        )
        output = run.out / f"editor-{steps}"
        begin = time.monotonic()
        trainer = Trainer(
            mend, model, tokenizer, train, [], config=config, output=output, progress=False
        )
        mend = trainer.train()
        device.sync()
        return mend, time.monotonic() - begin

    short, long = (trained(steps)[1] for steps in TRIED)
    rate = (long - short) / (TRIED[1] - TRIED[0])
    start = short - TRIED[0] * rate
    steps = max(TRIED[1] + 1, min(MOST, int((run.left - SPARED - start) / rate)))
    run.save(model=folder.name, train=len(train), rank=RANK, steps=steps, step_seconds=rate)
    mend, seconds = trained(steps)
    per_second = steps * TrainConfig().batch_size / seconds
    run.save(train_seconds=seconds, episodes_per_second=per_second)
    print(f"  {steps} steps in {seconds:.0f} s, {per_second:.0f} episodes a second", flush=True)
    begin = time.monotonic()
    metrics = evaluate(mend, model, tokenizer, test, batch_size=32, progress=False)
    device.sync()
    seconds = time.monotonic() - begin
    run.save(metrics=metrics.to_dict(), evaluate_seconds=seconds, edits_per_second=SCORED / seconds)
    print(f"  {metrics.to_dict()}", flush=True)
