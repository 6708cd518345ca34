"""Rivals of MEND, written from their descriptions, behind the same calls and evaluation."""
