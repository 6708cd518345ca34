"""The command ``pymend data``: build a data set from raw files, show what a file holds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pymend.data import builders, load_records
from pymend.data.builders import Cuts, Splits
from pymend.data.builders.sets import EXAMPLES, SPLITS

MODELS = "smollm2, bart-mini, t5-mini, bert-mini, gpt2-mini, a folder, or a hub name"
CUTS = {
    "min_words": "shortest passage",
    "prompt_tokens": "longest prompt",
    "target_tokens": "length of a sampled target",
    "crops": "rephrases: the prompt without some of its first tokens",
    "locality_tokens": "longest locality text; 0: not cut",
}


def add(
    commands: Any,
    machine: Callable[[argparse.ArgumentParser], None],
    load: Callable[[argparse.Namespace], tuple[Any, Any]],
) -> None:
    """Add the command to the parsers of ``pymend``.

    Args:
        machine: adds the flags of a model's machine to a parser.
        load: gives the model and tokenizer that the arguments name.
    """
    data = commands.add_parser("data", help="build data sets, look at data files")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")

    build = actions.add_parser("build", help="make an edit data set, with a card")
    names = build.add_subparsers(dest="name", required=True, metavar="NAME")
    zsre = _builder(names, "zsre", _zsre, "questions; locality from NQ")
    _raw(zsre, "zsRE in MEND's or KnowledgeEditor's fields")
    zsre.add_argument("--nq", metavar="FILE", help="NQ-open questions, for locality")
    hard = _builder(names, "zsre-hard", _zsre_hard, "ours: near locality, far rephrases")
    _raw(hard, "facts (built in), or zsRE as for zsre", default="facts")
    fever = _builder(names, "fever", _fever, "claims whose label is turned over")
    _raw(fever, "FEVER: claim, label, evidence; or KnowledgeEditor's fields")
    _builder(names, "claims", _claims, "built-in facts as claims")
    _builder(names, "qa", _qa, "built-in facts as closed-book questions")
    wikitext = _builder(names, "wikitext", _wikitext, "passages with sampled continuations")
    _raw(wikitext, "facts (built in), or text with a passage a line")
    wikitext.add_argument(
        "--sampler",
        dest="model",
        required=True,
        metavar="MODEL",
        help=MODELS,
    )
    wikitext.set_defaults(load=load)
    for field in fields(Cuts):
        wikitext.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int,
            default=field.default,
            help=f"{CUTS[field.name]} (default: {field.default})",
        )
    machine(wikitext)

    show = actions.add_parser("show", help="counts and examples of a data file")
    show.set_defaults(run=_show)
    show.add_argument("file", metavar="FILE", help="a file of records, or facts (built in)")
    show.add_argument(
        "--examples", type=int, default=EXAMPLES, help=f"how many are shown (default: {EXAMPLES})"
    )


def _builder(names: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = names.add_parser(name, help=text)
    parser.set_defaults(run=run)
    parser.add_argument("--output", required=True, metavar="DIR", help="receives the files")
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice (default: 0)")
    return parser


def _raw(parser: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    parser.add_argument(
        "--raw", metavar="FILE", required=default is None, default=default, help=text
    )


def _write(
    args: argparse.Namespace,
    splits: Splits,
    sources: tuple[str | None, ...] = (),
    settings: dict[str, Any] | None = None,
) -> None:
    """Write the set and print its card. ``sources`` may name files that were not given."""
    files = [Path(s) for s in sources if s and s != "facts"]
    card = builders.write_set(
        args.output, args.name, splits, seed=args.seed, sources=files, settings=settings
    )
    print(card)
    print(f"written to {args.output}")


def _zsre(args: argparse.Namespace) -> None:
    records = builders.read_zsre(Path(args.raw))
    questions = builders.read_questions(Path(args.nq)) if args.nq else []
    _write(args, builders.zsre(records, questions, args.seed), (args.raw, args.nq))


def _zsre_hard(args: argparse.Namespace) -> None:
    if args.raw == "facts":
        splits = builders.zsre_hard_facts(args.seed)
    else:
        splits = builders.zsre_hard(builders.read_zsre(Path(args.raw)), args.seed)
    _write(args, splits, (args.raw,), {"from": Path(args.raw).name})


def _fever(args: argparse.Namespace) -> None:
    _write(args, builders.fever(builders.read_claims(Path(args.raw)), args.seed), (args.raw,))


def _claims(args: argparse.Namespace) -> None:
    _write(args, builders.fact_claims(args.seed))


def _qa(args: argparse.Namespace) -> None:
    _write(args, builders.fact_questions(args.seed))


def _wikitext(args: argparse.Namespace) -> None:
    from pymend.engine.generate import continuations
    from pymend.engine.tokens import Encoder
    from pymend.files import writable_dir

    cuts = Cuts(**{field.name: getattr(args, field.name) for field in fields(Cuts)})
    if args.raw == "facts":
        texts = {split: builders.fact_passages(split, args.seed) for split in SPLITS}
    else:
        texts = builders.read_passages(Path(args.raw), cuts.min_words)
    writable_dir(args.output)  # before hours of sampling
    model, tokenizer = args.load(args)
    encoder = Encoder.for_model(model, tokenizer)
    if not encoder.continues_text:
        raise ValueError(f"{args.model} does not continue texts; name a decoder-only model")

    def sample(prompts: Any, seeds: Any) -> list[str | None]:
        return continuations(model, encoder, prompts, seeds, cuts.target_tokens)

    splits = builders.wikitext(texts, tokenizer, sample, cuts, args.seed)
    sampler = {"sampler": Path(args.model).name, "dtype": str(model.dtype).removeprefix("torch.")}
    settings = {"from": Path(args.raw).name, **sampler, **asdict(cuts)}
    _write(args, splits, (args.raw,), settings)


def _show(args: argparse.Namespace) -> None:
    if args.examples < 0:
        raise ValueError(f"examples is {args.examples}; it must be at least 0")
    print(builders.describe(load_records(args.file), args.examples))
