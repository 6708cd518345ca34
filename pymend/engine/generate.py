"""What a model says: greedy answers, and continuations drawn from a random stream of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from pymend.engine.hooks import frozen
from pymend.engine.losses import class_logits
from pymend.engine.tokens import Batch, Encoder, Row, padding_of
from pymend.progress import tqdm

TOP = 50  # likeliest tokens of which one is drawn: the default of transformers, too
TOGETHER = 32  # prompts that are sampled in one pass
HEARD_TOGETHER = 128  # texts that are gone on from in one call: a token is a walk of the weights
ANSWERED_TOGETHER = 16  # prompts in one call of generate
ATTEMPTS = 8  # samples that may fail to read back before a prompt is given up


@torch.no_grad()
def greedy(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[str], tokens: int
) -> list[str]:
    """The first line of the model's greedy answer to every prompt; a classifier's class."""
    answers = []
    for i in range(0, len(prompts), ANSWERED_TOGETHER):
        rows = [encoder.row(p) for p in prompts[i : i + ANSWERED_TOGETHER]]
        with frozen(model):
            if rows[0].label is not None:
                for row in rows:  # alone: padding changes some classifiers
                    logits = class_logits(model(**Batch.of([row], model.device).inputs).logits)
                    answers.append(encoder.text(logits.argmax(-1)))
            else:
                answers += _generated(model, encoder, rows, tokens)
    return answers


def _generated(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[Row], tokens: int
) -> list[str]:
    """The first line of what the model generates from every row."""
    texts = encoder.tokenizer.batch_decode(
        spoken(model, encoder, rows, tokens), skip_special_tokens=True
    )
    return [next(iter(text.strip().splitlines()), "") for text in texts]


@torch.no_grad()
def spoken(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[Row], tokens: int
) -> list[list[int]]:
    """What the model generates greedily from every row, in one call, as far as its context goes.

    A text that ended is filled with tokens that mean nothing.
    """
    tokenizer, device = encoder.tokenizer, model.device
    pad = tokenizer.eos_token_id or 0
    if rows[0].source:
        inputs = Batch.of(rows, device, padding_of(model)).inputs
        given, start = {n: inputs[n] for n in ("input_ids", "attention_mask")}, 1
    else:
        # Padding on the left: what is generated follows the prompt at once.
        start = max(len(r.ids) for r in rows)
        ids = torch.tensor([[*[pad] * (start - len(r.ids)), *r.ids] for r in rows], device=device)
        length = torch.tensor([[len(r.ids)] for r in rows], device=device)
        mask = (torch.arange(start, device=device) >= start - length).long()
        given = {"input_ids": ids, "attention_mask": mask}
        tokens = min(tokens, encoder.limit - start) if encoder.limit else tokens
        if tokens < 1:
            return [[] for _ in rows]
    out = model.generate(  # type: ignore[operator]
        **given, do_sample=False, max_new_tokens=tokens, pad_token_id=pad
    )
    said: list[list[int]] = out[:, start:].tolist()
    return said


@torch.no_grad()
def followed(
    model: Any, encoder: Encoder, rows: Sequence[Row], tokens: int, progress: bool = True
) -> list[Row]:
    """Every text of a decoder with what the model says behind it, greedily, as its answer.

    Args:
        tokens: that many at most; fewer at the end of a text or of the model's context.
    """
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    end, found = encoder.tokenizer.eos_token_id, list(rows)
    bar = tqdm(total=len(rows), desc="what follows", disable=not progress)
    with frozen(model), bar:
        for start in range(0, len(rows), HEARD_TOGETHER):
            batch = by_length[start : start + HEARD_TOGETHER]
            longest = max(len(rows[i].ids) for i in batch)
            room = min(tokens, encoder.limit - longest) if encoder.limit else tokens
            said = _generate(model, [rows[i].ids for i in batch], room) if room > 0 else []
            for i, ids in zip(batch, said, strict=False):
                found[i] = rows[i].followed(ids[: ids.index(end) + 1] if end in ids else ids)
            bar.update(len(batch))
    return found


@torch.no_grad()
def continuations(
    model: Any,
    encoder: Encoder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tokens: int,
    progress: bool = True,
) -> list[str | None]:
    """A continuation of every prompt by ``tokens`` tokens, each one of the ``TOP`` likeliest.

    They are drawn at temperature 1. It starts a new word, has no special tokens, and reads back:
    joined to the prompt by a space, it has the tokens that were sampled. What does not is
    drawn again; None after some attempts.

    Args:
        model: a decoder-only language model.
        seeds: one for each prompt, of its own random stream.

    Raises:
        ValueError: a prompt that leaves no room for the continuation.
    """
    width = model.get_output_embeddings().weight.shape[0]
    ordinary, starts = _vocabulary(encoder.tokenizer, width)
    rows = [encoder.row(prompt).ids for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if encoder.limit and len(row) + tokens > encoder.limit:
            raise ValueError(
                f"a prompt of {len(row)} tokens and {tokens} sampled ones exceed the model's "
                f"context of {encoder.limit}; shorten {prompt[:60]!r}"
            )
    streams = [torch.Generator().manual_seed(seed % 2**63) for seed in seeds]
    found: list[str | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(rows[i]))  # little padding
    bar = tqdm(total=len(prompts), desc="sample", disable=not progress)
    with frozen(model), bar:
        for attempt in range(ATTEMPTS):
            waiting = [i for i in by_length if found[i] is None]
            for start in range(0, len(waiting), TOGETHER):
                batch = waiting[start : start + TOGETHER]
                draws = torch.stack(
                    [torch.rand(tokens, generator=streams[i], dtype=torch.float64) for i in batch]
                )
                choice = _Choice(draws, ordinary, starts)
                new = _generate(model, [rows[i] for i in batch], tokens, choice)
                for i, ids in zip(batch, new, strict=True):
                    found[i] = _read_back(encoder, prompts[i], rows[i], ids)
                    bar.update(found[i] is not None or attempt == ATTEMPTS - 1)
    return found


class _Choice(LogitsProcessor):
    """Leaves of all tokens the one that a random number of the step points at.

    Args:
        draws: numbers in [0, 1), [rows, tokens] float64.
        ordinary: which tokens may be chosen, [vocabulary] bool.
        starts: which of them may be chosen first.
    """

    def __init__(self, draws: Tensor, ordinary: Tensor, starts: Tensor) -> None:
        self.draws, self.ordinary, self.starts = draws, ordinary, starts
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.double().cpu()
        allowed = self.ordinary if self.step else self.starts
        logits = logits.masked_fill(~allowed, -torch.inf)
        least = logits.topk(min(TOP, logits.shape[1]), 1).values[:, -1:]
        share = logits.masked_fill(logits < least, -torch.inf).softmax(1).cumsum(1)
        # Scaled by the sum, which rounding leaves a little off 1.
        place = self.draws[:, self.step, None] * share[:, -1:]
        token = torch.searchsorted(share, place, right=True)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token.to(scores.device), 0)


def _generate(
    model: Any, rows: Sequence[Sequence[int]], tokens: int, choice: _Choice | None = None
) -> list[list[int]]:
    """The tokens that the model, or a ``choice`` among its own, puts behind each row."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(r)), *r] for r in rows], device=model.device)
    length = torch.tensor([[len(r)] for r in rows], device=model.device)
    mask = (torch.arange(width, device=model.device) >= width - length).long()
    out: Tensor = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
        logits_processor=[] if choice is None else [choice],
    )
    return out[:, width:].tolist()


def _read_back(encoder: Encoder, prompt: str, ids: Sequence[int], new: Sequence[int]) -> str | None:
    """The text of ``new``, if behind the prompt it is these tokens."""
    text = encoder.text(torch.tensor(new)).strip()
    if not text:
        return None
    return text if encoder.row(prompt, text, " ").ids == (*ids, *new) else None


def _vocabulary(tokenizer: Any, width: int) -> tuple[Tensor, Tensor]:
    """Which of ``width`` tokens are ordinary, and which of these start a new word, [width] bool."""
    word = tokenizer("a", add_special_tokens=False).input_ids[-1]
    before = tokenizer.decode([word])
    pairs = tokenizer.batch_decode([[word, i] for i in range(min(width, len(tokenizer)))])
    special = set(tokenizer.all_special_ids)
    ordinary, starts = torch.zeros(2, width, dtype=torch.bool)
    for i, text in enumerate(pairs):
        ordinary[i] = i not in special
        starts[i] = i not in special and text.startswith(f"{before} ") and text != f"{before} "
    return ordinary, starts
