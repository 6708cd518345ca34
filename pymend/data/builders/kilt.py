"""Rows of De Cao et al.'s KnowledgeEditor project, from which MEND's zsRE and FEVER come.

They are rows of the KILT benchmark with paraphrases and with answers that a model can be edited to.
"""

from __future__ import annotations

from dataclasses import dataclass

from pymend.data.rows import RawRow


@dataclass(frozen=True)
class KiltRow:
    """A question with its true answers, or a claim with its label.

    ``page`` is the title of the Wikipedia page that answers it: a question's subject, as a rule.
    """

    text: str
    answers: tuple[str, ...]
    alternatives: tuple[str, ...]
    rephrases: tuple[str, ...]
    page: str | None


def kilt_row(row: RawRow) -> KiltRow | None:
    """None for a row of another form.

    Raises:
        ValueError: a malformed row, or one without an answer.
    """
    if not row.values.keys() & {"input", "output"}:
        return None
    text, output = row.text("input"), row.rows("output")
    answers = tuple(filter(None, (entry.optional("answer") for entry in output)))
    if not answers:
        raise ValueError(f"{row.where}: field 'output' holds no answer; add one")
    titles = (page.optional("title") for entry in output for page in entry.rows("provenance"))
    return KiltRow(
        text=text,
        answers=answers,
        alternatives=row.filled("alternatives"),
        rephrases=tuple(r for r in row.filled("filtered_rephrases") if r != text),
        page=next(filter(None, titles), None),
    )
