"""Edit requests: the built-in fact set and readers for public data sets."""

from pymend.data.facts import Relation, Split, load_facts, load_relations, split_of
from pymend.data.readers import load_records, without_overlap, write_jsonl

__all__ = [
    "Relation",
    "Split",
    "load_facts",
    "load_records",
    "load_relations",
    "split_of",
    "without_overlap",
    "write_jsonl",
]
