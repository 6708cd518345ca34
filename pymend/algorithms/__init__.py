"""MEND and its rivals, behind the same calls and the same evaluation."""
