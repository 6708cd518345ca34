"""Edit data sets made from raw public files or from the built-in facts.

A builder is a function of raw records and a seed: the same input gives the same bytes. ``sets.py``
writes what it returns, with a card that says what the set is.
"""

from pymend.data.builders.claims import Claim, fact_claims, fever, read_claims
from pymend.data.builders.questions import (
    fact_questions,
    read_questions,
    read_zsre,
    zsre,
    zsre_hard,
    zsre_hard_facts,
)
from pymend.data.builders.sets import Splits, describe, write_set
from pymend.data.builders.wikitext import Cuts, fact_passages, read_passages, wikitext

__all__ = [
    "Claim",
    "Cuts",
    "Splits",
    "describe",
    "fact_claims",
    "fact_passages",
    "fact_questions",
    "fever",
    "read_claims",
    "read_passages",
    "read_questions",
    "read_zsre",
    "wikitext",
    "write_set",
    "zsre",
    "zsre_hard",
    "zsre_hard_facts",
]
