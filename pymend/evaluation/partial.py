"""Scores of an evaluation that is under way, in a file from which a later call goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pymend.config import FORMAT_VERSION
from pymend.evaluation.metrics import RecordScores
from pymend.files import replacing, writable_dir


class PartialScores:
    """The scores so far, and what they took.

    With a ``path`` they are also in that file: JSON Lines, first what they are ``of``, then a line
    for every pass. A last line that a crash cut off is dropped.

    Args:
        of: all that the scores depend on, as JSON gives it back.

    Raises:
        ValueError: the file holds scores of something else, or is none of these.
        PermissionError: its folder cannot be written.
    """

    def __init__(self, path: Path | None = None, of: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.scores: list[RecordScores] = []
        self.seconds = self.edit_seconds = 0.0
        self.peak_memory_bytes = 0
        if path is not None:
            writable_dir(path.parent)
            first = {"format_version": FORMAT_VERSION, **(of or {})}
            lines = self._read(path, first) if path.exists() else [json.dumps(first)]
            with replacing(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _read(self, path: Path, of: Mapping[str, Any]) -> list[str]:
        """Take what ``path`` holds; its whole lines."""
        try:
            text = path.read_text(encoding="utf-8")
            lines = text.split("\n")[:-1] or [text]
            own = json.loads(lines[0])
            differing = sorted(k for k in {*own, *of} if own.get(k) != of.get(k))
            if not differing:
                for line in map(json.loads, lines[1:]):
                    if line.pop("first") != len(self.scores):
                        raise ValueError("a pass is missing, or there twice")
                    self._take([RecordScores(**s) for s in line.pop("scores")], **line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no scores of an evaluation ({error}); move it away"
            ) from error
        if differing:
            raise ValueError(
                f"{path} holds scores of another evaluation, which was interrupted: its "
                f"{', '.join(differing)} differ; finish that one, or delete the file"
            )
        return lines

    def add(self, scores: Sequence[RecordScores], **took: Any) -> None:
        """Append the scores of one pass; ``took`` is what :meth:`_take` counts."""
        if self.path is not None:
            line = {"first": len(self.scores), "scores": [asdict(s) for s in scores], **took}
            with open(self.path, "r+", encoding="utf-8") as file:  # it must be there still
                file.seek(0, 2)
                file.write(json.dumps(line) + "\n")
        self._take(scores, **took)

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
