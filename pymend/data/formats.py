"""The forms in which edit data comes, each recognised by its fields.

A reader makes requests of one object. What it does not ask for is named to the user by
``load_records``, but for the fields that a form lists as ``aside``: numbers and names of a record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from pymend.config import EditRequest, Probe, check_text
from pymend.data.rows import RawRow

NO_ANSWER = "<|endoftext|>"  # MEMIT's zsRE writes this where the true answer is not known
# RippleEdits words a fact so: relation, subject, one of these, the target and a full stop.
VERBS = re.compile(r" (?:is followed by|follows|is|are) (?=\S)")
# The second name is that of its README.
SPARED = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
RIPPLES = (
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)


@dataclass(frozen=True)
class Format:
    """A form of records: the fields it is recognised by, its reader, and what says nothing.

    ``read`` returns the requests of an object; None, with a word in the row's ``left_out``, for an
    object that gives none.
    """

    name: str
    marks: tuple[str, ...]
    read: Callable[[RawRow], EditRequest | list[EditRequest] | None]
    aside: tuple[str, ...] = ()


# -- parts that several forms share ------------------------------------------------------------


def paired(row: RawRow, prompt: str, answer: str) -> list[Probe]:
    """Probes from two fields: a text and its answer, or as many texts as answers.

    Raises:
        ValueError: two lists of different lengths.
    """
    if not isinstance(row.get(prompt), list):
        text = row.optional(prompt)
        return [Probe(text, row.answer(answer))] if text else []
    prompts, answers = row.texts(prompt), row.each(answer)
    if len(prompts) != len(answers):
        raise ValueError(
            f"{row.where}: field {prompt!r} holds {len(prompts)} texts and {answer!r} "
            f"{len(answers)}; give one for each"
        )
    return [Probe(p, a.answer(answer)) for p, a in zip(prompts, answers, strict=True)]


def probes(row: RawRow, name: str) -> list[Probe]:
    """The probes of a field: objects in a list, in named lists, or one object."""
    if isinstance(row.get(name), list):
        return [probe for one in row.rows(name) for probe in _probe(one)]
    value = row.inner(name)
    if not value.values or {"prompt", "New Question"} & value.values.keys():
        return _probe(value) if value.values else []
    return [probe for group in value.values for probe in probes(value, group)]


def _probe(row: RawRow) -> list[Probe]:
    if "New Question" in row.values:
        return paired(row, "New Question", "New Answer")
    if "prompt" not in row.values:
        row.text("prompt")
    return paired(row, "prompt", "answer" if "answer" in row.values else "ground_truth")


def answered(found: Sequence[Probe]) -> tuple[Probe, ...]:
    """Those with an answer: without one a portability prompt means nothing."""
    return tuple(probe for probe in found if probe.answer)


def as_question(text: str) -> str:
    """A question as NQ has it, written like one: a capital in front, a question mark behind."""
    text = text.removeprefix("nq question: ")
    return text[:1].upper() + text[1:].rstrip("?") + "?"


def spared(text: str) -> str:
    """A locality prompt; a question of NQ, marked as one, becomes a sentence."""
    return as_question(text) if text.startswith("nq question: ") else text


# -- the forms ---------------------------------------------------------------------------------


def _only(row: RawRow, cls: type) -> None:
    """Refuse fields that ``cls`` does not have: a misspelt one would be lost."""
    known = [f.name for f in fields(cls)]
    for name in row.values:
        if name not in known:
            raise ValueError(
                f"{row.where}: unknown field {name!r}; rename or remove it (known: "
                f"{', '.join(known)})"
            )


def _own(row: RawRow) -> EditRequest:
    row = replace(row, verbatim=True)

    def given(name: str) -> tuple[Probe, ...]:
        rows = row.rows(name)
        for r in rows:
            _only(r, Probe)
        return tuple(Probe(r.text("prompt"), r.optional("answer"), _joint(r)) for r in rows)

    _only(row, EditRequest)
    return EditRequest(
        prompt=row.text("prompt"),
        target=row.text("target"),
        ground_truth=row.optional("ground_truth"),
        subject=row.optional("subject"),
        rephrases=row.texts("rephrases"),
        locality=given("locality"),
        portability=given("portability"),
        joint=_joint(row),
    )


def _joint(row: RawRow) -> str | None:
    """What is to stand between prompt and answer; it may be white space."""
    joint = row.get("joint")
    if not isinstance(joint, str | None):
        raise ValueError(f"{row.where}: field 'joint' must be a text, got {joint!r}")
    check_text(joint or "", f"{row.where}: field 'joint'")
    return joint


def _counterfact(row: RawRow) -> EditRequest:
    return EditRequest(
        prompt=row.text("prompt"),
        target=row.text("target_new"),
        ground_truth=row.text("ground_truth"),
        subject=row.text("subject"),
        rephrases=row.several("rephrase_prompt"),
        locality=(Probe(row.text("locality_prompt"), row.text("locality_ground_truth")),),
        portability=answered(probes(row, "portability")),
    )


def zsre_request(row: RawRow) -> EditRequest | None:
    """None for a row without an alternative answer, which MEND leaves out too."""
    target = row.optional("alt")
    if target is None:
        row.left_out.append("without an alternative answer ('alt')")
        return None
    return EditRequest(
        prompt=row.text("src"),
        target=target,
        ground_truth=row.answer("answers"),
        subject=row.text("subject"),
        rephrases=row.several("rephrase"),
        locality=(Probe(as_question(row.text("loc")), row.text("loc_ans")),),
        portability=answered(probes(row, "portability")),
    )


def _knowedit(row: RawRow) -> EditRequest:
    """A locality probe needs no answer."""
    name = "rephrase_prompt" if row.get("rephrase_prompt") else "rephrase"
    return EditRequest(
        prompt=row.text("prompt"),
        target=row.text("target_new"),
        ground_truth=row.answer("ground_truth"),
        subject=row.text("subject"),
        rephrases=row.several(name) if row.get(name) else (),
        locality=tuple(probes(row, "locality")),
        portability=answered(probes(row, "portability")),
    )


def _wikibio(row: RawRow) -> EditRequest:
    return EditRequest(
        prompt=row.text("text"),
        target=row.text("labels"),
        subject=row.optional("concept"),
        locality=tuple(probes(row, "locality")),
    )


def _cknowedit(row: RawRow) -> EditRequest:
    """Its older files have prompts and answers in fields of their own."""
    return EditRequest(
        prompt=row.text("prompt"),
        target=row.text("target_new"),
        ground_truth=row.answer("target_old"),
        rephrases=row.several("rephrase") if row.get("rephrase") else (),
        locality=(
            *probes(row, "locality"),
            *paired(row, "locality_prompt", "locality_answer"),
        ),
        portability=answered(
            [
                *probes(row, "portability"),
                *paired(row, "portability_prompt", "portability_answer"),
            ]
        ),
    )


def _rewrite(row: RawRow) -> EditRequest:
    """ROME's ``requested_rewrite``: a template, its subject, the new and the true answer."""
    subject, true = row.text("subject"), row.inner("target_true").optional("str")
    return EditRequest(
        prompt=row.text("prompt").replace("{}", subject),
        target=row.inner("target_new").text("str"),
        ground_truth=None if true == NO_ANSWER else true,
        subject=subject,
    )


def _rome(row: RawRow) -> EditRequest:
    """The neighbours of CounterFact have the true answer in common; those of zsRE bring theirs."""
    request = _rewrite(row.inner("requested_rewrite"))
    neighbours = row.get("neighborhood_prompts")
    if isinstance(neighbours, list) and neighbours and isinstance(neighbours[0], dict):
        locality = _token_by_token(row.rows("neighborhood_prompts"))
    else:
        texts = row.texts("neighborhood_prompts")
        locality = tuple(Probe(text, request.ground_truth) for text in texts)
    return replace(request, rephrases=row.texts("paraphrase_prompts"), locality=locality)


def _token_by_token(rows: Sequence[RawRow]) -> tuple[Probe, ...]:
    """MEMIT's zsRE asks for an answer a token at a time, each prompt with the tokens so far."""
    chains: list[list[str]] = []  # prompt, answer so far
    for row in (replace(r, verbatim=True) for r in rows):
        prompt, target = row.text("prompt"), row.text("target")
        if chains and "".join(chains[-1]) == prompt:
            chains[-1][1] += target
        else:
            chains.append([prompt, target])
    return tuple(Probe(spared(prompt.strip()), answer.strip()) for prompt, answer in chains)


def _mquake(row: RawRow) -> list[EditRequest]:
    """A request for each fact of a case. Its questions follow from all of them together."""
    rewrites = row.rows("requested_rewrite")
    requests = []
    for one in rewrites:
        question = one.optional("question")
        requests.append(replace(_rewrite(one), rephrases=(question,) if question else ()))
    questions, answer = row.texts("questions"), row.answer("new_answer")
    if len(requests) != 1 and questions:
        row.left_out.append("questions on several facts: these become edits of their own")
        return requests
    portability = answered([Probe(question, answer) for question in questions])
    return [replace(request, portability=portability) for request in requests]


def _ripple(row: RawRow) -> EditRequest | None:
    """A fact is one sentence here; it is cut where its target begins, if that is sure."""
    edit = row.inner("edit")
    sentence = edit.text("prompt")
    name = "previous_fact" if edit.get("previous_fact") else "original_fact"
    before = edit.inner(name).optional("prompt") or ""
    ends = [m.end() for m in VERBS.finditer(sentence)]
    if before:
        ends = [end for end in ends if before.startswith(sentence[:end])]
    if len(ends) != 1:
        row.left_out.append("whose sentence does not tell where its target begins")
        return None
    end = ends[0]
    return EditRequest(
        prompt=sentence[:end].rstrip(),
        target=sentence[end:].removesuffix("."),
        ground_truth=before[end:].removesuffix(".") or None,
        locality=tuple(_queries(row, SPARED)),
        portability=answered(_queries(row, RIPPLES)),
    )


def _queries(row: RawRow, criteria: Sequence[str]) -> list[Probe]:
    found = []
    for query in (q for name in criteria for t in row.rows(name) for q in t.rows("test_queries")):
        answers = query.rows("answers")
        answer = answers[0].optional("value") if answers else None
        found.append(Probe(query.text("prompt"), answer))
    return found


def _wikibigedit(row: RawRow) -> EditRequest:
    locality = paired(row, "loc", "loc_ans")
    target = row.text("ans")
    personas = row.optional("personas")
    return EditRequest(
        prompt=row.text("update"),
        target=target,
        ground_truth=row.answer("ground_truth"),
        subject=row.optional("subject"),
        rephrases=row.several("rephrase") if row.get("rephrase") else (),
        locality=tuple(Probe(spared(p.prompt), p.answer) for p in locality),
        portability=answered(
            [*([Probe(personas, target)] if personas else []), *paired(row, "mhop", "mhop_ans")]
        ),
    )


def _unke(row: RawRow) -> EditRequest:
    asked = "sub_answer" in row.values
    return EditRequest(
        prompt=row.text("question"),
        target=row.text("answer"),
        rephrases=row.several("para_question") if row.get("para_question") else (),
        portability=answered(paired(row, "sub_question", "sub_answer") if asked else []),
    )


# In the order in which they are tried. Sources: the files that pymend writes; EasyEdit's
# counterfact, zsre, knowedit, wikibigedit and Cknowedit datasets (github.com/zjunlp/EasyEdit);
# MEND's zsRE (github.com/eric-mitchell/mend); ROME's and MEMIT's counterfact and zsre
# (github.com/kmeng01/rome, .../memit, dsets/); github.com/princeton-nlp/MQuAKE;
# github.com/edenbiran/RippleEdits (README); huggingface.co/datasets/lukasthede/WikiBigEdit;
# github.com/TrustedLLM/UnKE (data/).
FORMATS = (
    Format("pymend JSONL", ("prompt", "target"), _own),
    Format("MQuAKE", ("requested_rewrite", "questions"), _mquake, ("case_id",)),
    Format(
        "CounterFact or zsRE (ROME, MEMIT)",
        ("requested_rewrite",),
        _rome,
        ("case_id", "pararel_idx"),
    ),
    Format("CKnowEdit", ("prompt", "target_new", "target_old"), _cknowedit),
    Format(
        "CounterFact (EasyEdit)",
        ("prompt", "target_new", "locality_prompt"),
        _counterfact,
        ("case_id",),
    ),
    Format("zsRE (MEND)", ("src", "alt", "loc"), zsre_request, ("case_id", "pred", "cond")),
    Format("KnowEdit", ("prompt", "target_new", "locality"), _knowedit),
    Format("WikiBio (KnowEdit)", ("text", "labels", "concept"), _wikibio),
    Format(
        "WikiBigEdit",
        ("update", "ans"),
        _wikibigedit,
        ("tag", "relation", "relation_id", "object", "object_id", "subject_id"),
    ),
    Format("UnKE", ("question", "answer", "para_question"), _unke, ("id",)),
    Format("RippleEdits", ("edit", "example_type"), _ripple, ("example_type",)),
)
SHOWN = 12  # fields that an error names


def recognise(row: RawRow) -> Format:
    """The form of a file whose first object is ``row``.

    Raises:
        ValueError: none has its fields.
    """
    for format_ in FORMATS:
        if all(mark in row.values for mark in format_.marks):
            return format_
    known = "; ".join(f"{f.name}: {', '.join(f.marks)}" for f in FORMATS)
    there = [*list(row.values)[:SHOWN], *(["..."] if len(row.values) > SHOWN else [])]
    raise ValueError(
        f"{row.where}: no known format has the fields {', '.join(there) or '(none)'}; "
        f"convert the file to one of these ({known})"
    )
