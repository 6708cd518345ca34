"""Train an editor for a model on records of your own, and measure it on records it never saw.

    python examples/train_your_own.py records.jsonl runs/mine --model MODEL --steps 1000

A record is a line such as {"prompt": ..., "target": ..., "rephrases": [...], "locality": [...]}.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse

import pymend
from pymend import Mend, MendConfig, TrainConfig, Trainer


def main() -> None:
    """Split, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", help="CounterFact, zsRE, KnowEdit, or JSON lines")
    parser.add_argument("output", help="receives the editor")
    parser.add_argument("--model", default="smollm2", help="a folder, a hub name, or smollm2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=10, help="edits in a step")
    parser.add_argument("--rank", type=int, default=512, help="width of the editor's layers")
    options = parser.parse_args()

    model, tokenizer = pymend.load(options.model)
    records = pymend.load_records(options.records)
    tenth = max(1, len(records) // 10)
    train, held_out, test = records[: -2 * tenth], records[-2 * tenth : -tenth], records[-tenth:]
    config = TrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=3e-5,
        alpha_lr=3e-5,
        schedule="cosine",
        warmup=min(50, options.steps // 10),
        keep="last",
    )
    mend = Mend.from_config(model, MendConfig(rank=options.rank))
    trainer = Trainer(
        mend, model, tokenizer, train, held_out, config=config, output=options.output, resume=True
    )
    trainer.train()

    mend = Mend.from_pretrained(options.output)
    scores = pymend.evaluate(mend, model, tokenizer, test).to_dict()
    for name in ("edit_success", "generality", "locality"):
        print(f"{name}: {scores[name]}")


if __name__ == "__main__":
    main()
