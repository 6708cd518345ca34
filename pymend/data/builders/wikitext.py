"""Generation: a passage's beginning, and ten tokens that a small language model continues it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymend.config import EditRequest, Probe, setting
from pymend.data.builders.claims import statements
from pymend.data.builders.sets import LOCALITY, SPLITS, Splits, ordered, partition
from pymend.data.choices import draw, hashed, pick
from pymend.data.facts import Split, load_relations, split_of
from pymend.data.readers import read_rows, read_text

# Prompts and a seed for each -> continuations of some tokens, None where none could be had.
Sampler = Callable[[Sequence[str], Sequence[int]], list[str | None]]


@dataclass(frozen=True)
class Cuts:
    """Lengths; the paper gives those of passages and targets, and does not cut locality text."""

    min_words: int = setting(50, "shortest passage")
    prompt_tokens: int = setting(64, "longest prompt")
    target_tokens: int = setting(10, "length of a sampled target")
    crops: int = setting(3, "rephrases: the prompt without some of its first tokens")
    locality_tokens: int = setting(0, "longest locality text; 0: not cut")

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 2, "locality_tokens": 0}
        for name, value in vars(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"{name} is {value}; it must be at least {least.get(name, 1)}")


def read_passages(path: Path, min_words: int = Cuts.min_words) -> dict[Split, list[str]]:
    """Paragraphs of a file that are long enough and plain ASCII, each once, in splits.

    Args:
        path: text with a paragraph a line, or a Parquet table with the column ``text``.

    Raises:
        ValueError: a file that cannot be read, or has no such paragraph.
    """
    if path.suffix == ".parquet":
        # Blank paragraphs are usual, so the column may be empty in a row, but not missing.
        lines = [row.optional("text") or "" for row in read_rows(path)]
    else:
        lines = read_text(path).split("\n")
    stripped = (line.strip() for line in lines)
    kept = [x for x in stripped if len(x.split()) >= min_words and x.isascii()]
    if not kept:
        raise ValueError(f"{path}: no paragraph has {min_words} words in ASCII; lower min_words")
    return partition(dict.fromkeys(kept), lambda passage: passage)


def fact_passages(split: Split, seed: int = 0) -> list[str]:
    """A short text for every built-in fact of a split: its statements, in mixed order."""
    texts = []
    for relation in load_relations():
        for subject, truth in relation.facts.items():
            if split_of(subject) == split:
                said = [f"{p.format(subject)} {truth}." for p in statements(relation)]
                texts.append(" ".join(pick(said, len(said), "passage", seed, subject)))
    return texts


def wikitext(
    texts: Mapping[Split, Sequence[str]],
    tokenizer: Any,
    sample: Sampler,
    cuts: Cuts = Cuts(),
    seed: int = 0,
) -> Splits:
    """The beginnings of passages with sampled continuations.

    Args:
        texts: the passages of each split.
        tokenizer: the sampler's, a fast one.
        sample: gives continuations of ``cuts.target_tokens`` tokens.

    Raises:
        ValueError: a tokenizer that does not tell where its tokens lie in the text.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; take another sampler")
    return {split: _records(texts[split], tokenizer, sample, cuts, seed) for split in SPLITS}


def _records(
    texts: Sequence[str], tokenizer: Any, sample: Sampler, cuts: Cuts, seed: int
) -> list[EditRequest]:
    crops: dict[str, tuple[str, ...]] = {}  # text -> the prompt and its rephrases
    for text in texts:
        spans = _spans(tokenizer, text)
        count = _whole_words(text, spans, cuts.prompt_tokens)
        if count > 1:
            # The paper's rule counts ten tokens of the target and takes ten off again.
            drops = draw(range(count // 2 + 1), cuts.crops, lambda drop: True, "crop", seed, text)
            end = spans[count - 1][1]
            crops[text] = tuple(text[spans[d][0] : end].strip() for d in (0, *drops))
    prompts = [parts[0] for parts in crops.values()]
    targets = sample(prompts, [hashed("sample", seed, text) for text in crops])

    def locality(text: str) -> tuple[Probe, ...]:
        others = draw(texts, LOCALITY, lambda other: other != text, "locality", seed, text)
        return tuple(Probe(_cut(tokenizer, other, cuts.locality_tokens)) for other in others)

    return ordered(
        (
            EditRequest(prompt, target, rephrases=tuple(rephrases), locality=locality(text))
            for (text, (prompt, *rephrases)), target in zip(crops.items(), targets, strict=True)
            if target is not None
        ),
        seed,
    )


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where each token lies in the text."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded.offset_mapping)


def _whole_words(text: str, spans: Sequence[tuple[int, int]], limit: int) -> int:
    """How many tokens, at most ``limit``, end with a word and leave some text over; 0: none."""
    ends = (
        count
        for count in range(min(limit, len(spans) - 1), 0, -1)
        if text[spans[count - 1][1]].isspace()
    )
    return next(ends, 0)


def _cut(tokenizer: Any, text: str, tokens: int) -> str:
    """The first ``tokens`` of a text; 0: all."""
    spans = _spans(tokenizer, text) if tokens else []
    return text[: spans[tokens - 1][1]].strip() if len(spans) > tokens else text
