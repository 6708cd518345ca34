"""What is reported about an editor, with its protocol and its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

EXACT = "teacher-forced exact match of all target tokens (Mitchell et al. 2022, Eq. 1)"
TOKENS = "teacher-forced token accuracy (EasyEdit)"
PREFERS = "P(new) > P(old), geometric token means (ROME, CounterFact)"


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; None of nothing."""
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def interval(values: Sequence[float | None], resamples: int = 1000) -> list[float] | None:
    """95 % bootstrap interval of the mean over records, reproducible."""
    present = [v for v in values if v is not None]
    if not present:
        return None
    x = torch.tensor(present, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(x), (resamples, len(x)), generator=generator)
    bounds = torch.quantile(x[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return bounds.tolist()


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


@dataclass
class Metrics:
    """Results of :func:`pymend.evaluate`; ``to_dict`` is what ``metrics.json`` holds."""

    records: list[RecordScores]
    perplexity_before: float | None
    perplexity_after: float | None
    perplexity_text: str
    seconds: float
    edit_seconds: float
    peak_memory_bytes: int

    def value(self, name: str) -> float | None:
        """Mean of one score over the records."""
        return mean([getattr(r, name) for r in self.records])

    def to_dict(self) -> dict[str, Any]:
        """A JSON object: exact match at the top, other protocols below ``protocols``."""
        names = ["edit_success", "generality", "locality", "accuracy_drawdown", "portability"]
        names += ["es_paper", "es_outer", "edit_success_before"]
        before, after = self.perplexity_before, self.perplexity_after
        drawdown = None if before is None or after is None else after - before
        n = len(self.records)
        return {
            **{name: self.value(name) for name in names},
            "perplexity_drawdown": drawdown,
            "n": n,
            "protocol": EXACT,
            "seconds": self.seconds,
            "edits_per_second": n / self.edit_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "intervals_95": {k: interval([getattr(r, k) for r in self.records]) for k in names},
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
