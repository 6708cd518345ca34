"""Plain text tables and the greedy answers that go into them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from pymend.losses import class_logits
from pymend.models import frozen
from pymend.tokens import Batch, Encoder, Row

GENERATE_TOGETHER = 16  # prompts in one call of generate


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int] | None = None
) -> str:
    """A text table; cells longer than their column's ``widths`` are wrapped."""
    limits = widths or [60] * len(headers)
    lines = [
        [_wrapped(cell, limit) for cell, limit in zip(row, limits, strict=True)]
        for row in (headers, *rows)
    ]
    used = [max(len(part) for row in lines for part in row[i]) for i in range(len(headers))]
    out = []
    for row in lines:
        for k in range(max(map(len, row))):
            cells = (cell[k] if k < len(cell) else "" for cell in row)
            out.append("  ".join(c.ljust(w) for c, w in zip(cells, used, strict=True)).rstrip())
    head = max(map(len, lines[0]))
    return "\n".join([*out[:head], "  ".join("-" * w for w in used), *out[head:]])


def _wrapped(cell: str, width: int) -> list[str]:
    """The lines of a cell; a line break in it would break the table and is shown as a slash."""
    return textwrap.wrap(cell.replace("\n", " / "), width) or [""]


def number(value: float | None, digits: int = 3) -> str:
    """A score, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def blockwise(names: Sequence[str]) -> list[str]:
    """Weight names, those of consecutive blocks that else agree as one: ``h.9-11.mlp.c_fc``."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for name in names:
        head, block, rest = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        blocks.setdefault((head, rest), []).append(block)
    return [
        f"{head}{'-'.join(dict.fromkeys((found[0], found[-1])))}{rest}"
        for (head, rest), found in blocks.items()
    ]


def memory(count: float) -> str:
    """A number of bytes in a unit that reads well."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def metrics_table(metrics: Mapping[str, Any], extra: Sequence[tuple[str, str]] = ()) -> str:
    """The table that ends an evaluation, from what ``Metrics.to_dict`` gives.

    Args:
        extra: further rows (what, value).
    """
    rows = []
    for name in ("edit_success", "generality", "locality", "accuracy_drawdown"):
        bounds = metrics["intervals_95"][name]
        spread = "" if bounds is None else f"95 %: {bounds[0]:.3f} to {bounds[1]:.3f}"
        rows.append((name.replace("_", " "), number(metrics[name]), spread))
    text = metrics["perplexity"]
    change = "-" if text["before"] is None else f"{text['before']:.2f} -> {text['after']:.2f}"
    rows.append(("perplexity drawdown", number(metrics["perplexity_drawdown"]), change))
    rows.append(("edits", str(metrics["n"]), ""))
    rows.append(("edits per second", number(metrics["edits_per_second"], 2), ""))
    rows.append(("evaluation, seconds", number(metrics["seconds"], 1), ""))
    rows += [(what, value, "") for what, value in extra]
    rows.append(("peak memory", memory(metrics["peak_memory_bytes"]), ""))
    return table(("measure", "value", ""), rows)


@torch.no_grad()
def greedy(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[str], tokens: int
) -> list[str]:
    """The first line of the model's greedy answer to every prompt; a classifier's class."""
    answers = []
    for i in range(0, len(prompts), GENERATE_TOGETHER):
        rows = [encoder.row(p) for p in prompts[i : i + GENERATE_TOGETHER]]
        with frozen(model):
            if rows[0].label is not None:
                logits = class_logits(model(**Batch.of(rows, model.device).inputs).logits)
                answers += [encoder.text(best) for best in logits.argmax(-1, keepdim=True)]
            else:
                answers += _generated(model, encoder, rows, tokens)
    return answers


def _generated(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[Row], tokens: int
) -> list[str]:
    """The first line of what the model generates from every row, as far as its context goes."""
    tokenizer, device = encoder.tokenizer, model.device
    pad = tokenizer.eos_token_id or 0
    if rows[0].source:
        inputs = Batch.of(rows, device).inputs
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
            return ["" for _ in rows]
    out = model.generate(  # type: ignore[operator]
        **given, do_sample=False, max_new_tokens=tokens, pad_token_id=pad
    )
    texts = tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
    return [next(iter(text.strip().splitlines()), "") for text in texts]
