"""Which errors are told in a sentence: those about what the user gave."""

from __future__ import annotations

import traceback


def meant_for_user(error: Exception) -> bool:
    """Files that fail, and what this package raised; anything else is a bug and keeps its trace."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return isinstance(error, OSError) or frame.f_globals.get("__name__", "").startswith("pymend")
