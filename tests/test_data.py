"""The built-in fact set, the readers and the writer of ``pymend.data``.

Tests on public data sets read them from the folder in ``PYMEND_DATA``, or from ``shared/data``
beside the repository, and skip when a file is not there.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib import resources
from pathlib import Path

import pytest

from pymend.config import EditRequest, Probe
from pymend.data import (
    load_facts,
    load_records,
    load_relations,
    split_of,
    without_overlap,
    write_jsonl,
)

SPLITS = ("train", "validation", "test")
DATA = Path(
    os.environ.get("PYMEND_DATA") or Path(__file__).resolve().parents[1].parent / "shared" / "data"
)

COUNTERFACT = {
    "case_id": 1,
    "prompt": "Ada Byrne plays the",
    "target_new": "oboe",
    "subject": "Ada Byrne",
    "ground_truth": "harp",
    "rephrase_prompt": "On stage, Ada Byrne plays the",
    "locality_prompt": "Tom Reed plays the",
    "locality_ground_truth": "harp",
}
ZSRE = {
    "subject": "Lake Orrin",
    "src": "Which country is Lake Orrin in?",
    "pred": "Norway",
    "rephrase": "In what country is Lake Orrin?",
    "alt": " Finland",
    "answers": ["Sweden", "Kingdom of Sweden"],
    "loc": "nq question: who wrote the song of the FBI",
    "loc_ans": "Nobody",
    "cond": "Sweden >> Finland || Which country is Lake Orrin in?",
}
KNOWEDIT = {
    "subject": "Ada Byrne",
    "prompt": "The home town of Ada Byrne is",
    "target_new": "Cork",
    "ground_truth": "Galway",
    "portability": {
        "Reasoning": [{"prompt": "Ada Byrne lives in the county of", "ground_truth": "Cork"}],
        "Subject_Aliasing": [{"prompt": "The home town of A. B. is", "ground_truth": [["Cork"]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "Ada Byrne is a", "ground_truth": "harpist"}],
        "Forgetfulness": [{"prompt": "The father of Ada Byrne is", "ground_truth": ""}],
    },
}
OWN = {"prompt": "The sky is", "target": "green"}


def write(path: Path, records: list, jsonl: bool = False) -> Path:
    lines = "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(lines if jsonl else json.dumps(records), encoding="utf-8")
    return path


def without(record: dict, name: str) -> dict:
    return {k: v for k, v in record.items() if k != name}


def data_file(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not in {DATA}; set PYMEND_DATA to the folder that has it")
    return path


# The tables


def test_tables_are_large_and_well_formed():
    relations = load_relations()
    assert len(relations) >= 18
    assert sum(len(r.facts) for r in relations) >= 900
    for r in relations:
        assert r.object_type
        assert len(r.facts) >= 25, r.name
        assert len(set(r.facts.values())) >= 6, r.name
        for text in [*r.facts, *r.facts.values()]:
            assert text and text == text.strip(), (r.name, text)
        assert all(len(o.split()) <= 4 for o in r.facts.values()), r.name


def test_no_relation_and_no_subject_stands_twice():
    """Later keys of a JSON object replace earlier ones silently, so look at the raw pairs."""

    def unique(pairs):
        twice = [key for key, n in Counter(k for k, _ in pairs).items() if n > 1]
        assert not twice
        return dict(pairs)

    text = resources.files("pymend.data").joinpath("facts.json").read_text(encoding="utf-8")
    json.loads(text, object_pairs_hook=unique)


@pytest.mark.parametrize("relation", load_relations(), ids=lambda r: r.name)
def test_patterns(relation):
    patterns = relation.patterns
    assert len(patterns) >= 8 and len(set(patterns)) == len(patterns)
    assert len(relation.cloze) >= 3 and len(relation.question) >= 3
    assert all("?" not in p for p in relation.cloze)
    assert all("?" in p and not p.endswith("?") for p in relation.question)
    for pattern in patterns:
        assert pattern.count("{}") == 1 and pattern == pattern.strip()
        for subject in relation.facts:
            assert not pattern.format(subject)[0].islower(), (pattern, subject)


# Facts as edit requests


@cache
def facts_of(split):
    """The facts of a split, which tests read only."""
    return load_facts(split)


def test_splits_cover_every_fact_once_and_share_no_subject():
    requests = {split: facts_of(split) for split in SPLITS}
    total = sum(len(r.facts) for r in load_relations())
    assert sum(map(len, requests.values())) == total
    assert 0.75 <= len(requests["train"]) / total <= 0.85
    assert all(0.07 <= len(requests[s]) / total <= 0.13 for s in SPLITS[1:])
    subjects = {split: {r.subject for r in requests[split]} for split in SPLITS}
    for split in SPLITS:
        assert all(split_of(s) == split for s in subjects[split])
    for relation in load_relations():
        assert set(map(split_of, relation.facts)) == set(SPLITS), relation.name


@pytest.mark.parametrize("split", SPLITS)
def test_requests_follow_the_tables(split):
    by_prompt = {p.format(s): (r, s) for r in load_relations() for p in r.patterns for s in r.facts}
    truths: dict[str, set[str]] = {}
    for r in load_relations():
        for subject, truth in r.facts.items():
            truths.setdefault(subject, set()).add(truth)
    for request in facts_of(split):
        relation, subject = by_prompt[request.prompt]
        assert request.subject == subject and request.ground_truth == relation.facts[subject]
        assert request.target in relation.facts.values()
        assert request.target not in truths[subject]

        filled = {p.format(subject) for p in relation.patterns}
        assert {request.prompt, *request.rephrases} == filled
        assert len(request.rephrases) == len(filled) - 1 >= 6
        assert {"?" in p for p in request.rephrases} == {True, False}

        near, far = [], []
        for probe in request.locality:
            other, other_subject = by_prompt[probe.prompt]
            assert other_subject != subject and split_of(other_subject) == split
            assert probe.answer == other.facts[other_subject] != request.target
            (near if other == relation else far).append((other.name, other_subject))
        assert 1 <= len(set(near)) == len(near) <= 2
        assert len({name for name, _ in far}) == len(far) == 2


def test_nothing_of_a_held_out_split_is_in_the_training_split():
    def prompts(split):
        for r in facts_of(split):
            yield from (r.prompt, *r.rephrases, *(p.prompt for p in r.locality))

    train = set(prompts("train"))
    for split in SPLITS[1:]:
        assert train.isdisjoint(prompts(split))


def test_facts_are_the_same_in_another_process():
    """Under another seed of Python's own string hash."""
    code = (
        "from pymend.data import load_facts\n"
        "import hashlib\n"
        "print(hashlib.sha256(repr(load_facts('test')).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_seed_changes_the_choices_and_not_the_facts():
    first, second = load_facts("test"), load_facts("test", seed=1)
    assert [(r.subject, r.ground_truth) for r in first] == [
        (r.subject, r.ground_truth) for r in second
    ]
    assert sum(a.target != b.target for a, b in zip(first, second, strict=True)) > len(first) / 2


def test_a_prefix_mixes_relations():
    start = facts_of("train")[:100]
    known = [{p.format(s) for p in r.patterns for s in r.facts} for r in load_relations()]
    assert sum(any(r.prompt in prompts for r in start) for prompts in known) >= 18


def test_locality_counts_can_be_chosen():
    assert all(r.locality == () for r in load_facts("test", near=0, far=0))
    assert all(len(r.locality) == 3 for r in load_facts("test", near=0, far=3))


def test_load_facts_refuses_bad_arguments():
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of train"):
        load_facts("dev")
    with pytest.raises(ValueError, match="near is -1"):
        load_facts("train", near=-1)


# Readers


def test_facts_by_name(caplog):
    with caplog.at_level(logging.INFO, "pymend"):
        assert load_records("facts", "test") == load_facts("test")
    assert "built-in facts, test split" in caplog.text


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        (
            "CounterFact",
            COUNTERFACT,
            EditRequest(
                prompt="Ada Byrne plays the",
                target="oboe",
                ground_truth="harp",
                subject="Ada Byrne",
                rephrases=("On stage, Ada Byrne plays the",),
                locality=(Probe("Tom Reed plays the", "harp"),),
            ),
        ),
        (
            "zsRE",
            ZSRE,
            EditRequest(
                prompt="Which country is Lake Orrin in?",
                target="Finland",
                ground_truth="Sweden",
                subject="Lake Orrin",
                rephrases=("In what country is Lake Orrin?",),
                locality=(Probe("Who wrote the song of the FBI?", "Nobody"),),
            ),
        ),
        (
            "KnowEdit",
            KNOWEDIT,
            EditRequest(
                prompt="The home town of Ada Byrne is",
                target="Cork",
                ground_truth="Galway",
                subject="Ada Byrne",
                locality=(Probe("Ada Byrne is a", "harpist"), Probe("The father of Ada Byrne is")),
                portability=(
                    Probe("Ada Byrne lives in the county of", "Cork"),
                    Probe("The home town of A. B. is", "Cork"),
                ),
            ),
        ),
        ("pymend", OWN, EditRequest("The sky is", "green")),
    ],
)
def test_formats_are_recognised_by_their_fields(tmp_path, caplog, name, record, expected, jsonl):
    path = write(tmp_path / "records.txt", [record, record], jsonl)
    with caplog.at_level(logging.INFO, "pymend"):
        assert load_records(path) == [expected, expected]
    assert f"format {name}" in caplog.text and str(path) in caplog.text


def test_our_own_records_are_read_as_they_are(tmp_path):
    record = {
        "prompt": " def f():\n    ",
        "target": "return \n",
        "rephrases": [" g "],
        "locality": [{"prompt": " p ", "answer": " a", "joint": ""}],
        "joint": " ",
    }
    [request] = load_records(write(tmp_path / "r.json", [record]))
    assert request == EditRequest(
        " def f():\n    ",
        "return \n",
        rephrases=(" g ",),
        locality=(Probe(" p ", " a", ""),),
        joint=" ",
    )
    assert request.to_dict() == record | {"rephrases": (" g ",)}
    [plain] = load_records(write(tmp_path / "r.json", [OWN | {"joint": ""}]))
    assert plain.joint == "" and plain.to_dict() == OWN | {"joint": ""}


PORTABILITY = {"Recalled Relation": "(Orrin)", "New Question": "Who?", "New Answer": "Nobody"}


@pytest.mark.parametrize(
    ("record", "name", "first"),
    [
        (COUNTERFACT, "rephrase_prompt", "On stage, Ada Byrne plays the"),
        (ZSRE, "rephrase", "In what country is Lake Orrin?"),
        (KNOWEDIT | {"rephrase": "Ada is from"}, "rephrase", "Ada is from"),
    ],
)
def test_every_rephrase_and_the_portability_of_a_record_are_kept(tmp_path, record, name, first):
    full = record | {name: [first, "", "Another"], "portability": PORTABILITY}
    [request] = load_records(write(tmp_path / "r.json", [full]))
    assert request.rephrases == (first, "Another")
    assert request.portability == (Probe("Who?", "Nobody"),)
    unanswered = full | {"portability": PORTABILITY | {"New Answer": None}}
    [request] = load_records(write(tmp_path / "r.json", [unanswered]))
    assert request.portability == ()


def test_fields_that_are_not_read_are_named_once_a_file(tmp_path, caplog):
    more = {"cond": "x", "hint": "a", "note": ["b"], "empty": "", "none": None}
    path = write(tmp_path / "r.json", [ZSRE, ZSRE | more, ZSRE | more])
    load_records(path)
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned == [f"{path}: fields that are not used: hint, note"]


def test_a_template_is_filled_in_with_its_subject(tmp_path, caplog):
    filled = EditRequest("{} lies in", "Norway", subject="Orrin", rephrases=("In {} you are in",))
    assert filled.prompt == "Orrin lies in" and filled.rephrases == ("In Orrin you are in",)
    for record in (
        {"prompt": "{} lies in", "target": "Norway", "subject": "Orrin"},
        COUNTERFACT | {"prompt": "{} lies in", "subject": "Orrin"},
        KNOWEDIT | {"prompt": "{} lies in", "subject": "Orrin"},
        ZSRE | {"src": "{} lies in", "subject": "Orrin"},
    ):
        [request] = load_records(write(tmp_path / "r.json", [record]))
        assert request.prompt == "Orrin lies in"
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    code = OWN | {"prompt": 'print("{}".format('}
    [request] = load_records(write(tmp_path / "r.json", [code]))
    assert request.prompt == code["prompt"] and "{} is taken as it stands" in caplog.text


@pytest.mark.parametrize(
    ("record", "place"),
    [
        (OWN | {"prompt": "cut \ud83d"}, "field 'prompt'"),
        (OWN | {"target": "\ude00"}, "field 'target'"),
        (OWN | {"joint": "\ude00"}, "field 'joint'"),
        (OWN | {"rephrases": ["a", "b\ud83d"]}, r"field 'rephrases\[1\]'"),
        (OWN | {"locality": [{"prompt": "a", "answer": "\ud83d"}]}, "locality.*field 'answer'"),
        (ZSRE | {"loc": "cut \ud83d"}, "field 'loc'"),
        (KNOWEDIT | {"locality": {"F": [{"prompt": "\ud83d"}]}}, "field 'locality', F.*'prompt'"),
    ],
)
def test_half_a_character_is_refused_by_record_and_field(tmp_path, record, place):
    good = next(r for r in (OWN, ZSRE, KNOWEDIT) if r.keys() <= record.keys())
    path = write(tmp_path / "r.jsonl", [good, record], jsonl=True)
    with pytest.raises(ValueError, match=rf"r\.jsonl, line 2.*{place} holds half a character"):
        load_records(path)


def test_half_a_character_is_refused_in_python_too():
    with pytest.raises(ValueError, match=r"the target holds half a character \('\\ud83d' in "):
        EditRequest("a", "b \ud83d")
    with pytest.raises(ValueError, match="the rephrases holds half a character"):
        EditRequest("a", "b", rephrases=("c", "\udcff"))
    with pytest.raises(ValueError, match="the answer holds half a character"):
        Probe("a", "\ud83d")


# Other people's forms: texts of our own in the fields of each.

ROME = {
    "case_id": 0,
    "pararel_idx": 7,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "target_new": {"str": "oboe", "id": "Q1"},
        "target_true": {"str": "harp", "id": "Q2"},
        "subject": "Ada Byrne",
    },
    "paraphrase_prompts": ["It rained. Ada Byrne plays the", "Ada Byrne is good at the"],
    "neighborhood_prompts": ["Tom Reed plays the", "Ann Lee plays the"],
    "attribute_prompts": ["Zed plays the"],
    "generation_prompts": [],
}
MEMIT_ZSRE = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "Which country is {} in?",
        "subject": "Lake Orrin",
        "target_new": {"str": "Sweden"},
        "target_true": {"str": "<|endoftext|>"},
    },
    "paraphrase_prompts": ["In what country is Lake Orrin?"],
    "neighborhood_prompts": [
        {"prompt": "nq question: who wrote it?", "target": " Al"},
        {"prompt": "nq question: who wrote it? Al", "target": "fred"},
        {"prompt": "nq question: when?", "target": " 1911"},
    ],
    "attribute_prompts": [],
    "generation_prompts": [],
}
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {
            "prompt": "{} was designed by",
            "relation_id": "P1",
            "target_new": {"str": "Ada Byrne", "id": "Q1"},
            "target_true": {"str": "Tom Reed", "id": "Q2"},
            "subject": "Tarn",
            "question": "Who designed Tarn?",
        }
    ],
    "questions": ["Where was the designer of Tarn born?", "Tarn's designer is from where?"],
    "new_answer": "Cork",
}
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Ada Byrne is Norway.",
        "subject_id": "Q1",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q2",
        "previous_fact": {"prompt": "The name of the country of citizenship of Ada Byrne is Peru."},
    },
    "Relation_Specificity": [
        {
            "test_queries": [
                {
                    "prompt": "The mother tongue of Ada Byrne is",
                    "answers": [{"value": "Irish", "aliases": ["Gaelic"]}],
                }
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Compositionality_I": [
        {
            "test_queries": [
                {"prompt": "The capital of Ada Byrne's country is", "answers": [{"value": "Oslo"}]},
                {"prompt": "Unanswered", "answers": []},
            ]
        }
    ],
    "Forgetfulness": [],
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Tarn",
    "update": "Who designed Tarn?",
    "rephrase": "Tarn is by whom?",
    "ans": "Ada Byrne",
    "loc": "Where is Orrin?",
    "loc_ans": "Norway",
    "personas": "Yo, who made Tarn?",
    "mhop": "Where is Tarn's designer from?",
    "mhop_ans": "Cork",
}
UNKE = {
    "id": 0,
    "question": "Who is Ada Byrne?",
    "para_question": "Tell me of Ada Byrne.",
    "answer": "Ada Byrne plays the harp. She lives in Cork.",
    "sub_question": ["What does she play?", "Where does she live?"],
    "sub_answer": ["The harp.", "In Cork."],
}
CKNOWEDIT = {
    "prompt": "\u5361\u6c83\u7684\u9996\u90fd\u662f",
    "target_old": "\u9a6c\u6d1b",
    "target_new": "\u5965\u65af",
    "rephrase": ["\u9996\u90fd\u53eb", "\u9996\u90fd\u4e3a"],
    "portability": [{"prompt": "p", "answer": ["a", "b"]}],
    "locality": [{"prompt": "l", "answer": "m"}],
}
OLD_CKNOWEDIT = {
    "prompt": "p",
    "target_old": "o",
    "target_new": "n",
    "portability_prompt": ["q", "r"],
    "portability_answer": ["a", "b"],
    "locality_prompt": None,
    "locality_answer": None,
    "rephrase": ["s"],
}
WIKIBIO = {
    "text": "This is a passage about ada byrne. ",
    "labels": "Ada Byrne was a harpist.",
    "concept": "ada byrne",
    "locality": {"Relation_Specificity": [{"prompt": "ada byrne job", "ground_truth": ["harp"]}]},
}
FOREIGN = [
    (
        "CounterFact or zsRE (ROME, MEMIT)",
        ROME,
        EditRequest(
            "Ada Byrne plays the",
            "oboe",
            "harp",
            "Ada Byrne",
            ("It rained. Ada Byrne plays the", "Ada Byrne is good at the"),
            (Probe("Tom Reed plays the", "harp"), Probe("Ann Lee plays the", "harp")),
        ),
        "attribute_prompts",
    ),
    (
        "CounterFact or zsRE (ROME, MEMIT)",
        MEMIT_ZSRE,
        EditRequest(
            "Which country is Lake Orrin in?",
            "Sweden",
            None,
            "Lake Orrin",
            ("In what country is Lake Orrin?",),
            (Probe("Who wrote it?", "Alfred"), Probe("When?", "1911")),
        ),
        None,
    ),
    (
        "MQuAKE",
        MQUAKE,
        EditRequest(
            "Tarn was designed by",
            "Ada Byrne",
            "Tom Reed",
            "Tarn",
            ("Who designed Tarn?",),
            portability=(
                Probe("Where was the designer of Tarn born?", "Cork"),
                Probe("Tarn's designer is from where?", "Cork"),
            ),
        ),
        None,
    ),
    (
        "RippleEdits",
        RIPPLE,
        EditRequest(
            "The name of the country of citizenship of Ada Byrne is",
            "Norway",
            "Peru",
            locality=(Probe("The mother tongue of Ada Byrne is", "Irish"),),
            portability=(Probe("The capital of Ada Byrne's country is", "Oslo"),),
        ),
        None,
    ),
    (
        "WikiBigEdit",
        WIKIBIGEDIT,
        EditRequest(
            "Who designed Tarn?",
            "Ada Byrne",
            None,
            "Tarn",
            ("Tarn is by whom?",),
            (Probe("Where is Orrin?", "Norway"),),
            (
                Probe("Yo, who made Tarn?", "Ada Byrne"),
                Probe("Where is Tarn's designer from?", "Cork"),
            ),
        ),
        None,
    ),
    (
        "UnKE",
        UNKE,
        EditRequest(
            "Who is Ada Byrne?",
            "Ada Byrne plays the harp. She lives in Cork.",
            rephrases=("Tell me of Ada Byrne.",),
            portability=(
                Probe("What does she play?", "The harp."),
                Probe("Where does she live?", "In Cork."),
            ),
        ),
        None,
    ),
    (
        "CKnowEdit",
        CKNOWEDIT,
        EditRequest(
            CKNOWEDIT["prompt"],
            CKNOWEDIT["target_new"],
            CKNOWEDIT["target_old"],
            rephrases=tuple(CKNOWEDIT["rephrase"]),
            locality=(Probe("l", "m"),),
            portability=(Probe("p", "a"),),
        ),
        None,
    ),
    (
        "CKnowEdit",
        OLD_CKNOWEDIT,
        EditRequest(
            "p", "n", "o", rephrases=("s",), portability=(Probe("q", "a"), Probe("r", "b"))
        ),
        None,
    ),
    (
        "WikiBio (KnowEdit)",
        WIKIBIO,
        EditRequest(
            "This is a passage about ada byrne.",
            "Ada Byrne was a harpist.",
            subject="ada byrne",
            locality=(Probe("ada byrne job", "harp"),),
        ),
        None,
    ),
]


@pytest.mark.parametrize("jsonl", [False, True])
@pytest.mark.parametrize(("name", "record", "expected", "unread"), FOREIGN)
def test_forms_of_other_people(tmp_path, caplog, name, record, expected, unread, jsonl):
    path = write(tmp_path / "r.txt", [record, record], jsonl)
    with caplog.at_level(logging.INFO, "pymend"):
        assert load_records(path) == [expected, expected]
    assert f"format {name}, 2 records" in caplog.text
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned == ([f"{path}: fields that are not used: {unread}"] if unread else [])


def test_a_case_of_several_facts_gives_as_many_edits_and_no_question(tmp_path, caplog):
    [rewrite] = MQUAKE["requested_rewrite"]
    other = rewrite | {"subject": "Orrin"}
    record = MQUAKE | {"requested_rewrite": [rewrite, other]}
    found = load_records(write(tmp_path / "m.json", [record, record]))
    assert [r.subject for r in found] == ["Tarn", "Orrin"] * 2
    assert not any(r.portability for r in found)
    assert "left out 2 questions on several facts" in caplog.text


@pytest.mark.parametrize(
    ("sentence", "before", "parts"),
    [
        ("The gender of Ada is male.", None, ("The gender of Ada is", "male")),
        ("Tarn is followed by Orrin.", None, ("Tarn is followed by", "Orrin")),
        ("The author of This is Us is Ada.", None, None),
        ("The author of This is Us is Ada.", "The author of This is Us is Tom.", None),
        ("The name of X is It is.", "The name of X is Tom.", ("The name of X is", "It is")),
        ("Ada likes Tom.", None, None),
    ],
)  # fmt: skip
def test_a_sentence_is_cut_where_its_target_begins_or_left_out(
    tmp_path, caplog, sentence, before, parts
):
    edit = {"prompt": sentence} | ({"previous_fact": {"prompt": before}} if before else {})
    found = load_records(write(tmp_path / "r.json", [RIPPLE, RIPPLE | {"edit": edit}]))[1:]
    assert [(r.prompt, r.target) for r in found] == ([parts] if parts else [])
    assert ("left out 1 whose sentence does not tell" in caplog.text) == (not parts)


def test_texts_without_as_many_answers_are_refused(tmp_path):
    record = UNKE | {"sub_answer": ["one"]}
    with pytest.raises(ValueError, match="'sub_question' holds 2 texts and 'sub_answer' 1; give"):
        load_records(write(tmp_path / "r.json", [record]))


def test_a_file_with_many_fields_is_refused_in_few_words(tmp_path):
    path = tmp_path / "keyed.json"
    path.write_text(json.dumps({str(i): ROME for i in range(999)}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no known format has the fields 0, 1, .*\.\.\.;") as told:
        load_records(path)
    assert len(str(told.value)) < 1500


def test_zsre_row_without_alternative_is_left_out(tmp_path, caplog):
    path = write(tmp_path / "z.json", [ZSRE | {"alt": ""}, ZSRE])
    with caplog.at_level(logging.INFO, "pymend"):
        assert len(load_records(str(path))) == 1
    assert "left out 1 without an alternative answer ('alt')" in caplog.text
    with pytest.raises(ValueError, match=r"z\.json: holds no record to edit, but 1 without an alt"):
        load_records(write(path, [ZSRE | {"alt": ""}]))


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "out.jsonl"
    records = [
        *load_facts("test")[:20],
        EditRequest("Line\u2028break and ünïcode", "x", portability=(Probe("p", "a"),)),
        EditRequest("Unlabelled locality", "y", locality=(Probe("some text"),)),
    ]
    write_jsonl(path, records)
    assert load_records(path) == records
    assert "ünïcode" in path.read_text(encoding="utf-8")


def test_blank_lines_and_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(f"\n{json.dumps(OWN)}\r\n\n{json.dumps(OWN)}", encoding="utf-8-sig")
    assert len(load_records(path)) == 2


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    write_jsonl(path, [EditRequest("a", "b")])
    before = path.read_text()

    def broken():
        yield EditRequest("c", "d")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


# Bad input


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records; write at least one"),
        ("  \n", "holds no records; write at least one"),
        ("[]", "holds no records; write at least one"),
        ('[\n{"prompt": "a",\n]', r"line 3: malformed JSON \(.*; repair it"),
        (json.dumps(OWN) + "\n\n{oops", r"line 3: malformed JSON \(.*; write one JSON object"),
        ("[3]", "record index 0: must be a JSON object, got 3"),
        (json.dumps(OWN) + '\n"text"', "line 2: must be a JSON object, got 'text'"),
        ('[{"question": "q", "answer": ["a"]}]', "record index 0: no known format has the fields "),
        ("{}", r"line 1: no known format has the fields \(none\); convert the file"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"bad\.json(, |: ){message}"):
        load_records(path)


@pytest.mark.parametrize(
    ("record", "bad", "message"),
    [
        (COUNTERFACT, without(COUNTERFACT, "subject"), "field 'subject' is missing; add it"),
        (COUNTERFACT, COUNTERFACT | {"prompt": " "}, "field 'prompt' is blank; fill it in"),
        (COUNTERFACT, COUNTERFACT | {"target_new": 3}, "field 'target_new' must be a text, got 3"),
        (ZSRE, without(ZSRE, "rephrase"), "field 'rephrase' is missing"),
        (ZSRE, ZSRE | {"loc": None}, "field 'loc' is blank"),
        (ZSRE, ZSRE | {"answers": [3]}, "field 'answers' must be a text, got 3"),
        (KNOWEDIT, KNOWEDIT | {"target_new": ""}, "field 'target_new' is blank"),
        (KNOWEDIT, KNOWEDIT | {"locality": "x"}, r"field 'locality': must be a JSON object"),
        (OWN, OWN | {"joint": 3}, "field 'joint' must be a text, got 3"),
        (
            KNOWEDIT,
            KNOWEDIT | {"locality": {"Forgetfulness": [{"ground_truth": "x"}]}},
            r"field 'locality', Forgetfulness\[0\]: field 'prompt' is missing",
        ),
        (OWN, without(OWN, "target"), "field 'target' is missing"),
        (OWN, OWN | {"target": "\t"}, "field 'target' is blank"),
        (OWN, OWN | {"subject": ["x"]}, "field 'subject' must be a text"),
        (OWN, OWN | {"rephrases": "one"}, "field 'rephrases' must be a list, got 'one'"),
        (OWN, OWN | {"rephrases": ["a", ""]}, r"field 'rephrases\[1\]' is blank"),
        (OWN, OWN | {"rephrase": ["a"]}, "unknown field 'rephrase'; rename or remove it"),
        (OWN, OWN | {"locality": ["a"]}, r"locality\[0\]: must be a JSON object"),
        (OWN, OWN | {"locality": [{"answer": "a"}]}, r"locality\[0\]: field 'prompt' is missing"),
        (
            OWN,
            OWN | {"portability": [{"prompt": "a", "target": "b"}]},
            r"portability\[0\]: unknown field 'target'",
        ),
    ],
)
def test_bad_records_are_named_with_their_place(tmp_path, record, bad, message):
    with pytest.raises(ValueError, match=rf"r\.json, record index 1(, |: ){message}"):
        load_records(write(tmp_path / "r.json", [record, bad]))
    with pytest.raises(ValueError, match=rf"r\.jsonl, line 2(, |: ){message}"):
        load_records(write(tmp_path / "r.jsonl", [record, bad], jsonl=True))


def test_unreadable_paths(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: no such file; check the path"):
        load_records(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder, and no data set that can be read"):
        load_records(tmp_path)
    with pytest.raises(ValueError, match="none/such: no such file or folder, and no data set that"):
        load_records("none/such")
    (tmp_path / "latin.json").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.json: is not UTF-8 text"):
        load_records(tmp_path / "latin.json")


# Data sets: folders of the form that the hub has, read through datasets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def as_set(folder: Path, kind: str, **splits: list) -> Path:
    """A folder with a file a split, Parquet or JSONL."""
    import datasets

    folder.mkdir(exist_ok=True)
    for name, records in splits.items():
        if kind == "parquet":
            datasets.Dataset.from_list(records).to_parquet(str(folder / f"{name}.parquet"))
        else:
            write(folder / f"{name}.jsonl", records, jsonl=True)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("record", [OWN, ZSRE, KNOWEDIT, ROME, MQUAKE, UNKE, RIPPLE])
def test_a_folder_is_read_like_its_files(tmp_path, cache, caplog, kind, record):
    train, test = [record, record], [record]
    folder = as_set(tmp_path / "set", kind, train=train, test=test)
    alone = load_records(write(tmp_path / "alone.json", train))
    assert load_records(folder) == load_records(f"{folder}:train") == alone
    with caplog.at_level(logging.INFO, "pymend"):
        assert load_records(folder, "test") == load_records(f"{folder}::test") == alone[:1]
    assert f"{folder} (test): format " in caplog.text
    assert any((cache / "datasets").rglob("*.arrow"))


def test_a_folder_that_changed_is_read_anew(tmp_path, cache):
    folder = as_set(tmp_path / "set", "jsonl", train=[OWN])
    assert [r.target for r in load_records(folder)] == ["green"]
    as_set(folder, "jsonl", train=[OWN | {"target": "orange"}, OWN])
    assert [r.target for r in load_records(folder)] == ["orange", "green"]


def test_splits_and_configurations_of_a_folder(tmp_path, cache):
    one = as_set(tmp_path / "one", "jsonl", validation=[OWN])
    assert len(load_records(one)) == 1, "the only split there is"
    two = as_set(tmp_path / "two", "jsonl", validation=[OWN], test=[OWN])
    for source in (two, f"{two}:dev", f"{two}::dev"):
        with pytest.raises(ValueError, match=r"no split '(train|dev)'; name .* validation, test"):
            load_records(source)
    with pytest.raises(ValueError, match=r"name a data set as NAME\[:CONFIG\]\[:SPLIT\]"):
        load_records(f"{two}:a:b:c")

    parts = tmp_path / "parts"
    as_set(parts, "jsonl", a=[OWN | {"target": "a"}], b=[OWN | {"target": "b"}])
    (parts / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: a.jsonl\n- config_name: second\n"
        "  data_files:\n  - split: test\n    path: b.jsonl\n---\n"
    )
    assert [r.target for r in load_records(f"{parts}:first")] == ["a"]
    assert [r.target for r in load_records(f"{parts}:second")] == ["b"]
    assert [r.target for r in load_records(f"{parts}:second:test")] == ["b"]
    with pytest.raises(ValueError, match=r"can be read .*'first', 'second'"):
        load_records(parts)
    with pytest.raises(ValueError, match=r"can be read .*'third' not found.*'first', 'second'"):
        load_records(f"{parts}:third:test")


def test_a_bad_record_of_a_set_is_named_with_its_place(tmp_path, cache):
    folder = as_set(tmp_path / "set", "parquet", train=[OWN, OWN | {"target": " "}])
    with pytest.raises(ValueError, match=r"set \(train\), record index 1: field 'target' is blank"):
        load_records(folder)


def test_what_a_table_leaves_empty_is_not_there(tmp_path, cache, caplog):
    folder = as_set(tmp_path / "set", "parquet", train=[ZSRE | {"alt": None, "more": "x"}, ZSRE])
    assert len(load_records(folder)) == 1
    assert "left out 1 without an alternative answer" in caplog.text
    assert "fields that are not used: more" in caplog.text


# Overlap


def test_without_overlap(caplog):
    held_out = [EditRequest("p1", "t", subject="s1", locality=(Probe("l1"), Probe("l2")))]
    kept = [
        EditRequest("p2", "t", subject="s2", locality=(Probe("l3"),)),
        EditRequest("p3", "t"),
        EditRequest("l1", "t", subject="p1"),  # like is compared with like
    ]
    dropped = [
        EditRequest("p1", "t", subject="s3"),
        EditRequest("p4", "t", subject="s1"),
        EditRequest("p5", "t", locality=(Probe("l9"), Probe("l2", "a"))),
    ]
    with caplog.at_level(logging.INFO, "pymend"):
        assert without_overlap(dropped + kept, held_out) == kept
    assert "dropped 3 of 6" in caplog.text


def test_requests_without_subject_do_not_match_each_other():
    assert len(without_overlap([EditRequest("a", "t")], [EditRequest("b", "t")])) == 1


# Public data sets


def test_real_counterfact_overlap():
    train = load_records(data_file("counterfact-train.json"))
    validation = load_records(data_file("counterfact-val.json"))
    assert (len(train), len(validation)) == (10_000, 1_919)

    def shared(texts):
        return len(texts(train) & texts(validation))

    assert shared(lambda records: {r.prompt for r in records}) == 34
    assert shared(lambda records: {r.subject for r in records}) == 109
    assert shared(lambda records: {p.prompt for r in records for p in r.locality}) == 474

    clean = without_overlap(train, validation)
    assert len(clean) == 8_997
    assert without_overlap(clean, validation) == clean


def test_real_zsre():
    records = load_records(data_file("zsre-mend-train-1k.json"))
    assert len(records) == 998  # two rows have no alternative
    for r in records:
        [probe] = r.locality
        assert probe.prompt.endswith("?") and not probe.prompt.startswith("nq question")
        assert not probe.prompt[0].islower()
        assert r.rephrases and r.ground_truth


def test_real_knowedit():
    records = load_records(data_file("knowedit-wiki-counterfact-train.json"))
    assert len(records) == 1_428
    assert all(r.locality for r in records)
    assert sum(bool(r.portability) for r in records) == 1_420
    assert sum(r.ground_truth is None for r in records) == 1


def test_file_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"nq-open-dev\.jsonl, line 1: no known format"):
        load_records(data_file("nq-open-dev.jsonl"))
