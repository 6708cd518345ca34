"""What is reported about an editor, with its protocol and its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

EXACT = "teacher-forced exact match of all target tokens (Mitchell et al. 2022, Eq. 1)"
TOKENS = "teacher-forced token accuracy (EasyEdit)"
PREFERS = "P(new) > P(old), geometric token means (ROME, CounterFact)"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; None of nothing."""
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def interval(
    values: Sequence[float | None], groups: Sequence[int] | None = None
) -> list[float] | None:
    """95 % bootstrap interval of the mean over records, reproducible.

    Args:
        groups: of every record, which group it belongs to; groups are resampled whole. Without it
            every record is one.

    Returns:
        Its bounds; None of nothing, or of a single group with several records.
    """
    seen = [i for i, v in enumerate(values) if v is not None]
    x = torch.tensor([[values[i], 1] for i in seen], dtype=torch.float64)
    sums = _resampled(x, None if groups is None else [groups[i] for i in seen])
    return None if sums is None else _middle(sums[:, 0] / sums[:, 1])


def _resampled(x: Tensor, groups: Sequence[int] | None, resamples: int = 1000) -> Tensor | None:
    """Sums over draws with replacement from the groups of records ``x`` [n, k]: [resamples, k].

    None if there is nothing to draw from.
    """
    if groups is not None:
        _, index = torch.tensor(groups, dtype=torch.long).unique(return_inverse=True)
        whole = x.new_zeros(int(index.max()) + 1 if len(index) else 0, *x.shape[1:])
        if len(whole) == 1 < len(x):
            return None
        x = whole.index_add(0, index, x)
    if not len(x):
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(x), (resamples, len(x)), generator=generator)
    return x[drawn].sum(1)


def _middle(draws: Tensor) -> list[float]:
    """The bounds of the middle 95 %."""
    return torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def _perplexities(sums: Tensor) -> Tensor:
    """Before and after [..., 2], from sums over texts [..., 3]: NLL, NLL, tokens."""
    return (sums[..., :2] / sums[..., 2:]).exp()


@dataclass
class RecordScores:
    """One record; None where the record lacks what a score needs."""

    edit_success: float
    edit_success_before: float
    es_paper: float
    es_outer: float | None
    generality: float | None
    locality: float | None
    portability: float | None
    accuracy_drawdown: float | None
    token_edit_success: float
    token_generality: float | None
    prefers_new: float | None
    prefers_new_rephrased: float | None
    # Of the text that perplexity is taken on: sums over its tokens. No score, and rounded.
    text_nll_before: float = field(compare=False)
    text_nll_after: float = field(compare=False)
    text_tokens: int


@dataclass
class Metrics:
    """Results of :func:`pymend.evaluate`; ``to_dict`` is what ``metrics.json`` holds."""

    records: list[RecordScores]
    n_edits: int  # that were made at once
    groups: list[int]  # of each record; intervals resample groups
    perplexity_text: str
    seconds: float
    edit_seconds: float
    peak_memory_bytes: int

    def value(self, name: str) -> float | None:
        """Mean of one score over the records."""
        return mean([getattr(r, name) for r in self.records])

    def _texts(self) -> Tensor | None:
        """NLL before, NLL after and tokens of every record's text [n, 3]; None without tokens."""
        texts = [(r.text_nll_before, r.text_nll_after, r.text_tokens) for r in self.records]
        x = torch.tensor(texts, dtype=torch.float64)
        return x if x[:, 2].any() else None

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Before and after, token weighted over all records; None of a model without text."""
        x = self._texts()
        if x is None:
            return None
        before, after = _perplexities(x.sum(0)).tolist()
        return before, after

    def _perplexity_interval(self) -> list[float] | None:
        x = self._texts()
        if x is None:
            return None
        sums = _resampled(x, self.groups)
        if sums is None:
            return None
        before, after = _perplexities(sums).nan_to_num().unbind(-1)
        return _middle(after - before)

    def to_dict(self) -> dict[str, Any]:
        """A JSON object: exact match at the top, other protocols below ``protocols``."""
        names = ["edit_success", "generality", "locality", "accuracy_drawdown", "portability"]
        names += ["es_paper", "es_outer", "edit_success_before"]
        before, after = self.perplexity or (None, None)
        drawdown = None if before is None or after is None else after - before
        n = len(self.records)
        intervals = {k: interval([getattr(r, k) for r in self.records], self.groups) for k in names}
        return {
            **{name: self.value(name) for name in names},
            "perplexity_drawdown": drawdown,
            "n": n,
            "n_edits": self.n_edits,
            "protocol": EXACT,
            "seconds": self.seconds,
            "edits_per_second": n / self.edit_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "intervals_95": {**intervals, "perplexity_drawdown": self._perplexity_interval()},
            "resampled": len(set(self.groups)),
            "perplexity": {"before": before, "after": after, "text": self.perplexity_text},
            "locality_protocol": "share of positions predicting the locality answer whose argmax "
            "equals the unedited model's, mean over records",
            "protocols": {
                "token_accuracy": {
                    "protocol": TOKENS,
                    "edit_success": self.value("token_edit_success"),
                    "generality": self.value("token_generality"),
                },
                "prefers_new": {
                    "protocol": PREFERS,
                    "edit_success": self.value("prefers_new"),
                    "generality": self.value("prefers_new_rephrased"),
                },
            },
            "records": [asdict(r) for r in self.records],
        }
