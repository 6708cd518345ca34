"""The package's own errors, and which errors are told in a sentence."""

from __future__ import annotations

import traceback


class NonFiniteError(ValueError):
    """Gradients or factors that are not finite: nothing can be made of the edit they belong to."""


def meant_for_user(error: Exception) -> bool:
    """Whether an error is about what the user gave: a file that fails, or what this package raised.

    Anything else is a bug and keeps its trace.
    """
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return isinstance(error, OSError) or frame.f_globals.get("__name__", "").startswith("pymend")
