"""What to ask around a fact: does an edit reach its rephrases, and does it leave the rest alone?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pymend.config import EditRequest
from pymend.data.choices import pick
from pymend.data.facts import Relation, load_relations

PROMPT, REPHRASE, NEIGHBOUR, UNRELATED = "prompt", "rephrase", "neighbour", "unrelated"
FEW = 2  # rephrases, neighbours and unrelated prompts that are asked of each fact


def relation_of(prompt: str) -> tuple[Relation, str, str] | None:
    """The built-in relation that a prompt is worded as: it, the pattern, and the subject.

    The subject need not be one of the built-in facts.
    """
    for relation in load_relations():
        for pattern in relation.patterns:
            before, _, after = pattern.partition("{}")
            found = re.fullmatch(f"{re.escape(before)}(.+?){re.escape(after)}", prompt.strip())
            if found:
                return relation, pattern, found[1]
    return None


def verdict(kind: str, target: str, before: str, after: str) -> str:
    """What an answer says of an edit: it took or missed; or what should stay was kept or not."""
    if kind in (PROMPT, REPHRASE):
        return "took" if after.lower().startswith(target.lower().strip()) else "missed"
    return "kept" if after == before else "changed"


def around(
    request: EditRequest, elsewhere: Sequence[str] = (), few: int = FEW
) -> list[tuple[str, str]]:
    """Kind and prompt of what to ask about an edit: its own prompt, rephrases, and others.

    Those of the request, else of the built-in facts where the prompt is worded as one of their
    relations; else there are no rephrases, and ``elsewhere`` gives what is unrelated.

    Args:
        few: at most so many of a kind.
    """
    rephrases = list(request.rephrases)
    neighbours = [probe.prompt for probe in request.locality]
    unrelated = [] if neighbours else list(elsewhere)
    known = relation_of(request.prompt)
    if known is not None:
        relation, pattern, subject = known
        key = ("around", relation.name, subject)
        others = [s for s in relation.facts if s.lower() != subject.lower()]
        rephrases = rephrases or [p.format(subject) for p in relation.patterns if p != pattern]
        if not neighbours:
            neighbours = [pattern.format(s) for s in pick(others, few, *key)]
            [other] = pick({r.name for r in load_relations()} - {relation.name}, 1, "far", *key)
            [far] = (r for r in load_relations() if r.name == other)
            [stranger] = pick(far.facts, 1, "stranger", *key)
            unrelated = [far.patterns[0].format(stranger)]
    kinds = ((REPHRASE, rephrases), (NEIGHBOUR, neighbours), (UNRELATED, unrelated))
    return [
        (PROMPT, request.prompt),
        *((kind, text) for kind, texts in kinds for text in texts[:few]),
    ]
