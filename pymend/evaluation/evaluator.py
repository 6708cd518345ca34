"""Scores single edits of held-out facts: many independent edits in one pass, model untouched."""

from __future__ import annotations

import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pymend.algorithms.base import Algorithm
from pymend.config import EditRequest
from pymend.edit import SAMPLES, BaseEdit
from pymend.engine.hooks import frozen
from pymend.engine.tokens import IGNORE, Batch, Chat, EncodedRequest, Encoder, Row
from pymend.errors import NonFiniteError
from pymend.evaluation.metrics import Metrics, RecordScores, mean
from pymend.evaluation.partial import PartialScores
from pymend.files import digest, digest_of_tensors
from pymend.models.structure import unwrapped
from pymend.ops.token_losses import TokenLosses
from pymend.progress import tqdm

PPL_TOKENS = 256  # of the perplexity text, looked at under every edit


@torch.no_grad()
def evaluate(
    algorithm: Algorithm[Any],
    model: nn.Module,
    tokenizer: Any,
    data: Sequence[EditRequest],
    *,
    batch_size: int = 16,
    ppl_text: str | None = None,
    chat: Chat = None,
    progress: bool = True,
    n_edits: int = 1,
    kept: str | Path | None = None,
) -> Metrics:
    """Edit ``model`` with each record alone, or with so many at once, and measure what changed.

    Args:
        algorithm: computes the edits.
        data: records; rephrases, locality prompts and true answers are used where present.
        batch_size: independent edits computed and looked at together; joint ones go one by one.
        ppl_text: text whose perplexity is compared, as it stands (no chat template) and up to the
            model's context or 256 tokens; without it, the locality texts.
        chat: put prompts through the tokenizer's chat template; a mapping has options of it. None:
            as ``algorithm`` was trained.
        n_edits: simultaneous edits. Records that fill no such group are left out, and so are
            locality prompts that are edited in their own group.
        kept: file of the scores on the way. If it holds scores of this very evaluation, which was
            interrupted, those are not made again; it stays. Edits that are only ``applied`` to the
            model do not show in its values: merge them.

    Returns:
        The scores. Their intervals resample subjects, or the groups of simultaneous edits.

    Raises:
        ValueError: fewer records than one group, a record that cannot be tokenised or gives an edit
            that is not finite, an empty text, a model that does not fit, or ``kept`` holding
            something else.
        PermissionError: ``kept`` cannot be written.
    """
    if min(batch_size, n_edits) < 1:
        name = "batch_size" if batch_size < 1 else "n_edits"
        raise ValueError(f"{name} is {min(batch_size, n_edits)}; it must be at least 1")
    if len(data) < n_edits:
        raise ValueError(f"{len(data)} records to evaluate; give at least {n_edits}")
    model = unwrapped(model)
    encoder = Encoder.for_model(model, tokenizer, algorithm.chat_for(chat))
    algorithm.prepare(model)
    algorithm.expect(n_edits)
    encoded = encoder.requests(data[: len(data) // n_edits * n_edits])
    size = batch_size if n_edits == 1 else n_edits
    text = None if ppl_text is None else _text_row(encoder, ppl_text)
    done = PartialScores()
    if kept is not None:
        settings = {"batch_size": size, "n_edits": n_edits, "text": text and list(text.ids)}
        of = _identity(algorithm, model) | {"records": digest({"rows": repr(encoded)})} | settings
        done = PartialScores(Path(kept), of)
    bar = tqdm(total=len(encoded), initial=len(done.scores), desc="evaluate", disable=not progress)
    with frozen(model), bar:
        for i in range(len(done.scores), len(encoded), size):
            begin = time.perf_counter()
            chunk = encoded[i : i + size]
            if n_edits > 1:
                chunk = _disjoint(chunk)
            try:
                look = ChunkScores(algorithm, model, chunk, text, n_edits > 1)
            except NonFiniteError:
                _name_culprit(algorithm, model, chunk, i)
                raise
            done.add(
                look.scores(),
                seconds=time.perf_counter() - begin,
                edit_seconds=look.edit_seconds,
                peak_memory_bytes=peak_memory_bytes(),
            )
            bar.update(len(chunk))
    named = "the locality texts" if text is None else f"the first {len(text.ids)} tokens of a text"
    groups = _groups(data[: len(encoded)], n_edits)
    return Metrics(
        done.scores,
        n_edits,
        groups,
        named,
        done.seconds,
        done.edit_seconds,
        done.peak_memory_bytes,
    )


def _identity(algorithm: Algorithm[Any], model: nn.Module) -> dict[str, Any]:
    """What tells this algorithm and this model, here, from others."""
    # A look at every tensor: a merged edit changes nearly all elements of some.
    values = {
        name: x.reshape(-1)[:: x.numel() // SAMPLES + 1] for name, x in model.state_dict().items()
    }
    return {
        "algorithm": algorithm.identity(),
        "model": digest_of_tensors(values),
        "device": next(model.parameters()).device.type,
        "matmul": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    }


def _groups(data: Sequence[EditRequest], n_edits: int) -> list[int]:
    """What intervals resample whole: records edited together, else those of one subject."""
    if n_edits > 1:
        return [i // n_edits for i in range(len(data))]
    first: dict[str, int] = {}
    return [i if r.subject is None else first.setdefault(r.subject, i) for i, r in enumerate(data)]


def _disjoint(chunk: Sequence[EncodedRequest]) -> list[EncodedRequest]:
    """Records edited together, without the locality prompts that one of them edits."""
    edited = {row.prompt for r in chunk for row in (r.edit, *r.rephrases)}
    return [
        replace(r, locality=tuple(row for row in r.locality if row.prompt not in edited))
        for r in chunk
    ]


def _text_row(encoder: Encoder, text: str) -> Row:
    """The first tokens of ``text``, no more than the model's context takes."""
    if not encoder.continues_text:
        raise ValueError("ppl_text is for models that continue a text; leave it out")
    limit = encoder.limit
    start = text.strip()[: 20 * PPL_TOKENS]  # the tokenizer need not read a whole book
    ids = Encoder(encoder.tokenizer).row(start).ids if start else ()
    if len(ids) < 2:
        raise ValueError("the perplexity text is empty, or one token; give some sentences")
    return Row(ids[: min(PPL_TOKENS, limit or PPL_TOKENS)])


def _name_culprit(
    algorithm: Algorithm[Any], model: nn.Module, chunk: Sequence[EncodedRequest], first: int
) -> None:
    """Edit each record of ``chunk`` apart; name the one whose edit is not finite."""
    for number, record in enumerate(chunk, first):
        try:
            ChunkScores(algorithm, model, [record], None)
        except NonFiniteError as error:
            raise NonFiniteError(f"record {number}: {error}") from error


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the GPU where one was used, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ChunkScores:
    """A chunk of records, each edited alone or all at once, looked at before and after."""

    def __init__(
        self,
        algorithm: Algorithm[Any],
        model: nn.Module,
        chunk: Sequence[EncodedRequest],
        text: Row | None,
        joint: bool = False,
    ) -> None:
        self.chunk = chunk
        self.replay = algorithm.replay(model)
        kinds: dict[str, list[tuple[Row, ...]]] = {
            "edit": [(r.edit,) for r in chunk],
            "old": [(r.old,) if r.old else () for r in chunk],
            "rephrases": [r.rephrases for r in chunk],
            "old_rephrases": [r.old_rephrases for r in chunk],
            "portability": [r.portability for r in chunk],
            # Whole rows: the answer's positions, and all others for the perplexity.
            "locality": [tuple(x.whole() for x in r.locality) for r in chunk],
        }
        padded = {name: _pad(rows) for name, rows in kinds.items() if any(rows)}
        edits = [r.edit for r in chunk]

        begin = time.perf_counter()
        self.replay.load(edits)
        edit = algorithm.compute(self.replay, edits, joint)
        self.edit_seconds = time.perf_counter() - begin

        texts = [text] if text else []
        self.replay.load([*texts, *[x for rows in padded.values() for g in rows for x in g]])
        looks = {name: self._look(edit, rows) for name, rows in padded.items()}
        nothing: list[list[_RowLook]] = [[] for _ in chunk]
        self.results: dict[str, list[list[_RowLook]]] = {
            name: [group[: len(kinds[name][i])] for i, group in enumerate(looks.get(name, nothing))]
            for name in kinds
        }
        if text:
            # One edit at a time: the logits of a whole text under every edit may not fit in memory.
            texts_seen = [self._look(edit[i], [[text]])[0] for i in range(len(edit))]
            self.texts = [*texts_seen, *nothing[len(edit) :]]
        elif edits[0].label is None:
            self.texts = self.results["locality"]
        else:  # a class is no token: a classifier has no perplexity
            self.texts = nothing

    def _look(self, edit: BaseEdit, groups: Sequence[Sequence[Row]]) -> list[list[_RowLook]]:
        """Run equal groups of rows unedited and each under its own edit."""
        rows = [row for group in groups for row in group]
        batch = self.replay.batch(rows)
        passes = []
        for context in (nullcontext(), edit.applied(self.replay.model)):
            with context:
                passes.append(self.replay.label_rows(batch).losses(batch.target))
        looks = _row_looks(batch, *passes)
        size = len(groups[0])
        return [looks[i : i + size] for i in range(0, len(looks), size)]

    def scores(self) -> list[RecordScores]:
        """Scores of every record."""
        return [self._record(i) for i in range(len(self.chunk))]

    def _record(self, i: int) -> RecordScores:
        at = {name: groups[i] for name, groups in self.results.items()}
        (edit,) = at["edit"]
        exact = [x.exact for x in at["rephrases"]]
        # Locality answers count from their first token on, prompts without one as a whole.
        pairs = list(zip(self.chunk[i].locality, at["locality"], strict=True))
        same = [x.agreement(row) for row, x in pairs]
        answered = [(row, x) for row, x in pairs if row.answer]
        drawdown = [x.exact_from(row, "before") - x.exact_from(row, "after") for row, x in answered]
        prefers = [float(edit.mean_nll < x.mean_nll) for x in at["old"]]
        # The draw is the record's own: no order or batch changes it.
        rng = random.Random(str(self.chunk[i].edit.ids))
        rephrased = [
            float(new.mean_nll < old.mean_nll)
            for new, old in zip(at["rephrases"], at["old_rephrases"], strict=False)
        ]
        return RecordScores(
            edit_success=edit.exact,
            edit_success_before=edit.exact_before,
            es_paper=sum([edit.exact, *exact]) / (1 + len(exact)),
            es_outer=rng.choice(exact) if exact else None,
            generality=mean(exact),
            locality=mean(same),
            portability=mean([x.exact for x in at["portability"]]),
            accuracy_drawdown=mean(drawdown),
            token_edit_success=edit.accuracy,
            token_generality=mean([x.accuracy for x in at["rephrases"]]),
            prefers_new=mean(prefers),
            prefers_new_rephrased=mean(rephrased),
            text_nll_before=sum(x.nll_before for x in self.texts[i]),
            text_nll_after=sum(x.nll_after for x in self.texts[i]),
            text_tokens=sum(x.tokens for x in self.texts[i]),
        )


class _RowLook:
    """What the model says at the label positions of one row, before and after the edit."""

    def __init__(
        self, target: Tensor, best: tuple[Tensor, Tensor], nll: tuple[float, float]
    ) -> None:
        seen = target != IGNORE
        self.target, (self.best_before, self.best_after) = target, best
        self.tokens = int(seen.sum())
        self.nll_before, self.nll_after = nll
        self.mean_nll = self.nll_after / max(1, self.tokens)
        hits = (self.best_after == target)[seen].double()
        self.exact = float(hits.all())
        self.accuracy = float(hits.mean()) if self.tokens else math.nan
        self.exact_before = float((self.best_before == target)[seen].all())

    def agreement(self, row: Row) -> float:
        """Share of the positions of ``row`` with the same argmax as the unedited model."""
        same = (self.best_before == self.best_after)[row.first :]
        return float(same.double().mean())

    def exact_from(self, row: Row, when: str) -> float:
        """Exact match on the answer of ``row``, "before" or "after" the edit."""
        best = self.best_before if when == "before" else self.best_after
        return float((best == self.target)[row.first :].all())


def _row_looks(batch: Batch, before: TokenLosses, after: TokenLosses) -> list[_RowLook]:
    n = len(batch.rows)
    target, row = batch.target.cpu(), batch.row.cpu()
    best = before.best.cpu(), after.best.cpu()
    sums = []
    for look in (before, after):
        nll = look.nll.double()  # 0 where there is no target
        sums.append(nll.new_zeros(n).index_add(0, batch.row, nll).tolist())
    looks = []
    for i in range(n):
        own = row == i
        pair = best[0][own], best[1][own]
        looks.append(_RowLook(target[own], pair, (sums[0][i], sums[1][i])))
    return looks


def _pad(groups: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """Equal groups: shorter ones get rows without label positions."""
    size = max(len(g) for g in groups)
    some = next(row for g in groups for row in g)
    return [[*g, *[some.filler()] * (size - len(g))] for g in groups]
