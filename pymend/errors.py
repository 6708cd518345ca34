"""The package's own errors, and which errors are told in a sentence."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from difflib import get_close_matches


class NonFiniteError(ValueError):
    """Gradients or factors that are not finite: nothing can be made of the edit they belong to."""


def meant_for_user(error: Exception) -> bool:
    """Whether an error is about what the user gave: a file that fails, or what this package raised.

    Anything else is a bug and keeps its trace.
    """
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return isinstance(error, OSError) or frame.f_globals.get("__name__", "").startswith("pymend")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``word``: what it is nearest to, or nothing."""
    near = get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""
