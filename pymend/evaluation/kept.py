"""Scores of an evaluation that is under way, in a file from which a later call goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pymend.evaluation.metrics import RecordScores
from pymend.files import replacing


class Kept:
    """The scores so far, and what they took; in JSON Lines, a line for every pass.

    Args:
        path: the file; None for none. A last line that a crash cut off is dropped.
        of: all that the scores depend on, as JSON gives it back; the first line.

    Raises:
        ValueError: the file holds scores of something else, or is none of these.
    """

    def __init__(self, path: str | Path | None, of: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.scores: list[RecordScores] = []
        self.seconds = self.edit_seconds = 0.0
        self.peak_memory_bytes = 0
        if self.path is not None:
            lines = self._read(self.path, of) or [json.dumps({"evaluation": of})]
            with replacing(self.path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _read(self, path: Path, of: Mapping[str, Any]) -> list[str]:
        """Take what ``path`` holds; its whole lines."""
        if not path.is_file():
            return []
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            first, *passes = [json.loads(line) for line in lines] or [{"evaluation": of}]
            own = first["evaluation"]
            differing = sorted(k for k in {*own, *of} if own.get(k) != of.get(k))
            for line in passes:
                self._take([RecordScores(**s) for s in line.pop("scores")], **line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no scores of an evaluation ({error}); name another file"
            ) from error
        if differing:
            raise ValueError(
                f"{path} holds scores of another evaluation: its {', '.join(differing)} differ; "
                "delete it, or name another file"
            )
        return lines

    def add(self, scores: Sequence[RecordScores], **took: Any) -> None:
        """Append the scores of one pass; ``took`` is what :meth:`_take` counts."""
        self._take(scores, **took)
        if self.path is not None:
            line = {"scores": [asdict(s) for s in scores], **took}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _take(
        self,
        scores: Sequence[RecordScores],
        seconds: float,
        edit_seconds: float,
        peak_memory_bytes: int,
    ) -> None:
        self.scores += scores
        self.seconds += seconds
        self.edit_seconds += edit_seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak_memory_bytes)
