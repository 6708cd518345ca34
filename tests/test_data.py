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


def test_zsre_row_without_alternative_is_left_out(tmp_path, caplog):
    path = write(tmp_path / "z.json", [ZSRE | {"alt": ""}, ZSRE])
    with caplog.at_level(logging.INFO, "pymend"):
        assert len(load_records(str(path))) == 1
    assert "left out 1" in caplog.text
    with pytest.raises(ValueError, match=r"z\.json: no record has an alternative"):
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
        (KNOWEDIT, KNOWEDIT | {"locality": []}, r"field 'locality': must be a JSON object"),
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
    with pytest.raises(ValueError, match="is a folder; name a file in it"):
        load_records(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.json: is not UTF-8 text"):
        load_records(tmp_path / "latin.json")


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
