"""Progress: a bar on a terminal and in a notebook, in a log a line every half minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.asyncio import tqdm as plain
from tqdm.auto import tqdm as bar

SPARSE = 30.0  # seconds between lines, at least


class _Lines:
    """Takes what a bar draws over itself, and writes each state as a line to stderr."""

    def write(self, text: str) -> None:
        """Write what there is to see of ``text``."""
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        """Pass it on."""
        sys.stderr.flush()


def tqdm(*args: Any, **options: Any) -> Any:
    """``tqdm.auto.tqdm``, which draws lines where stderr is no terminal; arguments as there."""
    if bar is plain and not sys.stderr.isatty():
        options = {"file": _Lines(), "mininterval": SPARSE, "miniters": 1, **options}
    return bar(*args, **options)
