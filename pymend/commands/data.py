"""``pymend data``: build a data set from raw files, show what a file holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pymend.commands.settings import MODELS, Flag, Machine
from pymend.data import builders, load_records
from pymend.data.builders import Cuts, Splits
from pymend.data.builders.sets import EXAMPLES, SPLITS

Output = Annotated[str, Flag("receives the files", "DIR")]
Seed = Annotated[int, Flag("seed of every choice")]


def zsre(
    raw: Annotated[str, Flag("zsRE in MEND's or KnowledgeEditor's fields", "FILE")],
    output: Output,
    nq: Annotated[str | None, Flag("NQ-open questions, for locality", "FILE")] = None,
    seed: Seed = 0,
) -> None:
    """Questions; locality from NQ."""
    records = builders.read_zsre(Path(raw))
    questions = builders.read_questions(Path(nq)) if nq else []
    _write(output, "zsre", builders.zsre(records, questions, seed), seed, (raw, nq))


def zsre_hard(
    output: Output,
    raw: Annotated[str, Flag("facts (built in), or zsRE as for zsre", "FILE")] = "facts",
    seed: Seed = 0,
) -> None:
    """Ours: near locality, far rephrases."""
    if raw == "facts":
        splits = builders.zsre_hard_facts(seed)
    else:
        splits = builders.zsre_hard(builders.read_zsre(Path(raw)), seed)
    _write(output, "zsre-hard", splits, seed, (raw,), {"from": Path(raw).name})


def fever(
    raw: Annotated[str, Flag("FEVER: claim, label, evidence; or KnowledgeEditor's fields", "FILE")],
    output: Output,
    seed: Seed = 0,
) -> None:
    """Claims whose label is turned over."""
    _write(output, "fever", builders.fever(builders.read_claims(Path(raw)), seed), seed, (raw,))


def claims(output: Output, seed: Seed = 0) -> None:
    """Built-in facts as claims."""
    _write(output, "claims", builders.fact_claims(seed), seed)


def qa(output: Output, seed: Seed = 0) -> None:
    """Built-in facts as closed-book questions."""
    _write(output, "qa", builders.fact_questions(seed), seed)


def wikitext(
    output: Output,
    sampler: Annotated[str, Flag(MODELS, "MODEL")],
    lengths: Cuts,
    machine: Machine,
    raw: Annotated[str, Flag("facts (built in), or text with a passage a line", "FILE")] = "facts",
    seed: Seed = 0,
) -> None:
    """Passages with sampled continuations."""
    from pymend.files import writable_dir

    if raw == "facts":
        texts = {split: builders.fact_passages(split, seed) for split in SPLITS}
    else:
        texts = builders.read_passages(Path(raw), lengths.min_words)
    writable_dir(output, make=False)  # before hours of sampling

    from pymend.engine.generate import continuations
    from pymend.engine.tokens import Encoder

    model, tokenizer = machine.load(sampler)
    encoder = Encoder.for_model(model, tokenizer)
    if not encoder.continues_text:
        raise ValueError(f"{sampler} does not continue texts; name a decoder-only model")

    def sample(prompts: Any, seeds: Any) -> list[str | None]:
        return continuations(model, encoder, prompts, seeds, lengths.target_tokens)

    splits = builders.wikitext(texts, tokenizer, sample, lengths, seed)
    used = {"sampler": Path(sampler).name, "dtype": str(model.dtype).removeprefix("torch.")}
    settings = {"from": Path(raw).name, **used, **asdict(lengths)}
    _write(output, "wikitext", splits, seed, (raw,), settings)


def show(
    file: Annotated[str, Flag("a file of records, or facts (built in)", "FILE", positional=True)],
    examples: Annotated[int, Flag("how many are shown", least=0)] = EXAMPLES,
) -> None:
    """Counts and examples of a data file."""
    print(builders.describe(load_records(file), examples))


def _write(
    output: str,
    name: str,
    splits: Splits,
    seed: int,
    sources: tuple[str | None, ...] = (),
    settings: dict[str, Any] | None = None,
) -> None:
    """Write the set and say what is in it. ``sources`` may name files that were not given."""
    files = [Path(s) for s in sources if s and s != "facts"]
    builders.write_set(output, name, splits, seed=seed, sources=files, settings=settings)
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    print(f"{name}: {counts} records")
    print(f"written to {output}; its card with examples is {Path(output) / 'card.md'}")
