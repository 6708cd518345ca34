"""Data sets built from raw files and from the built-in facts, and the command that builds them.

Tests on public data sets read them from the folder in ``PYMEND_DATA``, as in ``test_data.py``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_cli import fails
from test_data import data_file

from pymend.commands import main
from pymend.config import EditRequest, Probe
from pymend.data import load_records, load_relations, split_of
from pymend.data.builders import (
    Cuts,
    Splits,
    describe,
    fact_claims,
    fact_passages,
    fact_questions,
    fever,
    read_claims,
    read_passages,
    read_questions,
    read_zsre,
    wikitext,
    write_set,
    zsre,
    zsre_hard,
    zsre_hard_facts,
)
from pymend.data.builders.questions import question_wordings
from pymend.data.builders.sets import LOCALITY, SPLITS
from pymend.data.choices import draw
from pymend.engine import generate
from pymend.engine.generate import continuations
from pymend.engine.tokens import ClassEncoder, Encoder, SequenceEncoder
from pymend.files import read_json

CUTS = Cuts(min_words=20, prompt_tokens=12, target_tokens=4, crops=3, locality_tokens=20)


def lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def zsre_rows(count: int = 80) -> list[dict[str, Any]]:
    """Two wordings for many subjects; a rephrase is far from its question, or near it."""
    rows = []
    for i in range(count):
        ask = ("Which country is {} in?", "Who built {}?")[i % 2]
        near = (i // 2) % 2
        rows.append(
            {
                "subject": f"Lake{i}",
                "src": ask.format(f"Lake{i}"),
                "rephrase": ask.format(f"old Lake{i}") if near else f"Name the place of Lake{i}.",
                "alt": f"wrong {i}",
                "answers": [f"right {i}"],
                "loc": f"nq question: what is {i // 4}",
                "loc_ans": "it",
            }
        )
    return rows


def nq_rows(count: int = 60) -> list[dict[str, Any]]:
    return [{"question": f"who was {i}", "answer": ["a long name", f"n{i}"]} for i in range(count)]


def fever_rows(count: int = 40) -> list[dict[str, Any]]:
    """A claim and its counterpart on each evidence, then both on evidence that turns them over."""
    first, last = [], []
    for i in range(count):
        for claim, label in (
            (f"The {i} is -LRB- a -RRB- town .", "SUPPORTS"),
            (f"{i} is a sea .", "REFUTES"),
        ):
            other = {"SUPPORTS": "REFUTES", "REFUTES": "SUPPORTS"}[label]
            first.append({"claim": claim, "label": label, "evidence": f"About {i}."})
            last.append({"claim": claim, "label": other, "evidence": f"Against {i}."})
    return [*first, *last, {"claim": "Nobody knows .", "label": "NOT ENOUGH INFO"}]


def kilt(text: str, answer: str, page: str, **others: Any) -> dict[str, Any]:
    """A row of KnowledgeEditor: an output with a page only, then the answer."""
    pages = [{"provenance": [{"title": page}]}, {"answer": answer}]
    return {"id": text, "input": text, "output": pages, "rephrases": [["ignored"]], **others}


def kilt_zsre_rows(count: int = 80) -> list[dict[str, Any]]:
    ask = ("Which country is {} in?", "Who built {}?")
    return [
        kilt(
            ask[i % 2].format(f"Lake{i}"),
            f"right {i}",
            f"Lake{i}",
            alternatives=["", f"right {i}", f"wrong {i}", f"false {i}"],
            filtered_rephrases=[f"Name the place of Lake{i}.", ask[i % 2].format(f"Lake{i}"), " "],
        )
        for i in range(count)
    ]


def kilt_fever_rows(count: int = 40) -> list[dict[str, Any]]:
    """Two claims about each page; the first has a paraphrase."""
    rows = []
    for i in range(count):
        said = [f"A town is {i}.", f"{i} is a town."]
        rows += [
            kilt(said[1], "SUPPORTS", f"{i}", alternatives=["REFUTES"], filtered_rephrases=said),
            kilt(f"{i} is a sea.", "REFUTES", f"{i}", alternatives=["REFUTES"]),
        ]
    return rows


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(tiny.WORDS, k=count))


def text_file(path: Path, count: int = 60) -> Path:
    short, foreign = words(5, 998), f"é {words(30, 999)}"
    path.write_text("\n\n".join([*(words(30, i) for i in range(count)), short, foreign]))
    return path


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Path]:
    return {
        "zsre": lines(tmp_path / "zsre.jsonl", zsre_rows()),
        "nq": lines(tmp_path / "nq.jsonl", nq_rows()),
        "fever": lines(tmp_path / "fever.jsonl", fever_rows()),
        "kilt zsre": lines(tmp_path / "kilt-zsre.jsonl", kilt_zsre_rows()),
        "kilt fever": lines(tmp_path / "kilt-fever.jsonl", kilt_fever_rows()),
        "text": text_file(tmp_path / "text.txt"),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.gpt2().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def generation(raw: dict[str, Path], seed: int = 0) -> Any:
    language_model = tiny.gpt2()
    encoder = Encoder.for_model(language_model, tiny.tokenizer())

    def sample(prompts: Any, seeds: Any) -> Any:
        return continuations(language_model, encoder, prompts, seeds, CUTS.target_tokens, False)

    texts = read_passages(raw["text"], CUTS.min_words)
    return wikitext(texts, encoder.tokenizer, sample, CUTS, seed)


@cache
def built(name: str, seed: int = 0) -> Splits:
    """A set of the built-in facts, which tests read only."""
    return BUILDS[name]({}, seed)


BUILDS: dict[str, Any] = {
    "zsre": lambda raw, seed: zsre(read_zsre(raw["zsre"]), (), seed),
    "zsre, nq": lambda raw, seed: zsre(read_zsre(raw["zsre"]), read_questions(raw["nq"]), seed),
    "zsre, kilt": lambda raw, seed: zsre(read_zsre(raw["kilt zsre"]), (), seed),
    "zsre-hard": lambda raw, seed: zsre_hard(read_zsre(raw["zsre"]), seed),
    "zsre-hard, kilt": lambda raw, seed: zsre_hard(read_zsre(raw["kilt zsre"]), seed),
    "zsre-hard, facts": lambda raw, seed: zsre_hard_facts(seed),
    "fever": lambda raw, seed: fever(read_claims(raw["fever"]), seed),
    "fever, kilt": lambda raw, seed: fever(read_claims(raw["kilt fever"]), seed),
    "claims": lambda raw, seed: fact_claims(seed),
    "qa": lambda raw, seed: fact_questions(seed),
    "wikitext": generation,
}
builds = pytest.mark.parametrize("build", BUILDS)
FACTS = ("zsre-hard, facts", "claims", "qa")  # no raw file, but thousands of records


def splits_of(build: str, raw: dict[str, Path]) -> Splits:
    return built(build) if build in FACTS else BUILDS[build](raw, 0)


# ------------------------------------------------------------------------------- every builder


@builds
def test_same_input_same_bytes_and_another_seed_others(
    build: str, raw: dict[str, Path], tmp_path: Path
) -> None:
    name = build.split(",")[0]
    again = BUILDS[build]
    for folder, seed, splits in (
        ("a", 0, splits_of(build, raw)),
        ("b", 0, again(raw, 0)),
        ("c", 1, again(raw, 1)),
    ):
        write_set(tmp_path / folder, name, splits, seed=seed)
    written = {f: {p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in "abc"}
    assert written["a"].keys() == {*(f"{s}.jsonl" for s in SPLITS), "card.json", "card.md"}
    assert written["a"] == written["b"]
    assert written["a"]["train.jsonl"] != written["c"]["train.jsonl"]


@builds
def test_splits_share_nothing(build: str, raw: dict[str, Path]) -> None:
    splits = splits_of(build, raw)
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for texts in (
            lambda records: {r.prompt for r in records},
            lambda records: {r.subject for r in records} - {None},
            lambda records: {p.prompt for r in records for p in r.locality},
        ):
            assert not texts(splits[a]) & texts(splits[b])


@builds
def test_records_can_be_encoded_and_are_read_back(
    build: str, raw: dict[str, Path], tmp_path: Path
) -> None:
    splits, name = splits_of(build, raw), build.split(",")[0]
    words_ = tiny.tokenizer(end=True)
    encoder = {
        "fever": ClassEncoder(words_, 0, 1, {}),
        "claims": ClassEncoder(words_, 0, 1, {}),
        "qa": SequenceEncoder(words_, 0, 0),
    }.get(name, Encoder(tiny.tokenizer(), tiny.CONTEXT if name == "wikitext" else 0))
    write_set(tmp_path / "set", name, splits, seed=0)
    for split in SPLITS:
        records = splits[split]
        assert len({r.prompt for r in records}) == len(records) > 0
        for record in records:
            assert 1 <= len(record.locality) <= LOCALITY and record.rephrases
            assert record.prompt not in {p.prompt for p in record.locality}
            assert record.target != record.ground_truth
        some = records[:: max(1, len(records) // 100)]
        for record, encoded in zip(some, encoder.requests(some), strict=True):
            assert len(encoded.locality) == len(record.locality)
        assert load_records(tmp_path / "set" / f"{split}.jsonl") == records


# ------------------------------------------------------------------------------------ each one


def test_zsre_takes_the_shortest_nq_answer(raw: dict[str, Path]) -> None:
    probes = read_questions(raw["nq"])
    assert probes[3] == Probe("Who was 3?", "n3")
    for records in zsre(read_zsre(raw["zsre"]), probes).values():
        assert records and all(p in probes for r in records for p in r.locality)
        assert all(len(set(r.locality)) == LOCALITY for r in records)


def test_zsre_without_nq_keeps_its_own_locality(raw: dict[str, Path]) -> None:
    splits = zsre(read_zsre(raw["zsre"]))
    assert all(r.locality[0].prompt.startswith("What is ") for r in splits["train"])
    # Locality questions are shared by four rows each, so some training rows had to go.
    assert len(splits["train"]) < sum(split_of(f"Lake{i}") == "train" for i in range(80))


def test_kilt_questions_get_a_wrong_answer_and_other_wordings(raw: dict[str, Path]) -> None:
    records = read_zsre(raw["kilt zsre"])
    assert len(records) == 80
    for i, r in enumerate(records):
        assert (r.ground_truth, r.subject) == (f"right {i}", f"Lake{i}")
        assert r.target in (f"wrong {i}", f"false {i}")
        assert r.rephrases == (f"Name the place of Lake{i}.",)
    assert len({r.target.split()[0] for r in records}) == 2
    truths = {r.prompt: r.ground_truth for r in records}
    for part in zsre(records).values():
        prompts = {r.prompt for r in part}
        for r in part:
            assert len({p.prompt for p in r.locality} - {r.prompt}) == LOCALITY
            assert all(p.prompt in prompts and p.answer == truths[p.prompt] for p in r.locality)


def test_kilt_questions_without_a_wrong_answer_or_rephrase_are_left_out(tmp_path: Path) -> None:
    whole, *others = kilt_zsre_rows(4)
    others[0]["alternatives"] = ["right 1"]
    del others[1]["alternatives"]
    others[2]["filtered_rephrases"] = [others[2]["input"]]
    [record] = read_zsre(lines(tmp_path / "raw.jsonl", [*others, whole]))
    assert record.prompt == whole["input"]


def test_questions_without_a_subject_have_no_hard_locality(tmp_path: Path) -> None:
    rows = [{**row, "output": [{"answer": "it"}]} for row in kilt_zsre_rows()]
    records = read_zsre(lines(tmp_path / "raw.jsonl", rows))
    assert len(records) == 80 and not any(zsre_hard(records).values())


def test_hard_locality_has_the_wording_and_rephrases_do_not(raw: dict[str, Path]) -> None:
    for records in zsre_hard(read_zsre(raw["zsre"])).values():
        assert records
        for r in records:
            wording = r.prompt.replace(str(r.subject), "")
            assert r.rephrases == (f"Name the place of {r.subject}.",)
            for probe in r.locality:
                number = probe.prompt.removesuffix("?").removesuffix(" in").split("Lake")[1]
                assert probe.prompt.replace(f"Lake{number}", "") == wording
                assert probe.answer == f"right {number}"


def test_hard_facts_know_the_answers_of_their_locality() -> None:
    relations = load_relations()
    truth = {(p.format(s), t) for r in relations for s, t in r.facts.items() for p in r.patterns}
    for records in built("zsre-hard, facts").values():
        for r in records:
            assert all((p.prompt, p.answer) in truth for p in r.locality)
            assert all(p.answer not in (r.target, r.ground_truth) for p in r.locality)


def test_fever_turns_over_the_label_on_the_first_evidence(raw: dict[str, Path]) -> None:
    claims = {c.text: c for c in read_claims(raw["fever"])}
    assert (
        len(claims) == 80 and claims["The 7 is (a) town."].label and not claims["7 is a sea."].label
    )
    records = {
        r.prompt: (split, r) for split, part in fever([*claims.values()]).items() for r in part
    }
    split, town = records["The 7 is (a) town."]
    assert (town.ground_truth, town.target) == ("true", "false")
    assert town.rephrases[0] == "It is true that the 7 is (a) town."
    assert town.rephrases[-1] == "The 7 is (a) town, and that is a fact."
    assert records["7 is a sea."][0] == split  # a claim and its counterpart stay together
    for _, record in records.values():
        own = claims[record.prompt].group
        for probe in record.locality:
            assert claims[probe.prompt].group != own
            assert probe.answer == str(claims[probe.prompt].label).lower()


def test_kilt_claims_have_their_own_rephrases_or_frames(raw: dict[str, Path]) -> None:
    claims = {c.text: c for c in read_claims(raw["kilt fever"])}
    town, sea = claims["7 is a town."], claims["7 is a sea."]
    assert len(claims) == 80 and town.label and not sea.label and town.group == sea.group
    assert town.rephrases == ("A town is 7.",)
    assert sea.rephrases[0] == "It is true that 7 is a sea."


def test_claims_are_labelled_truly() -> None:
    known = {
        f"{p.format(s)} {t}.": True
        for r in load_relations()
        for s, t in r.facts.items()
        for p in r.patterns
    }
    counts: Counter[str | None] = Counter()
    for records in built("claims").values():
        for r in records:
            counts[r.ground_truth] += 1
            assert len(r.rephrases) >= 6
            for text in (r.prompt, *r.rephrases):
                assert known.get(text, False) == (r.ground_truth == "true")
            for p in r.locality:
                assert known.get(p.prompt, False) == (p.answer == "true")
    assert min(counts.values()) > 0.45 * counts.total()


def test_questions_are_questions_and_answers_true() -> None:
    answers = {
        wording.format(subject): truth
        for relation in load_relations()
        for subject, truth in relation.facts.items()
        for wording in question_wordings(relation)
    }
    assert all(q.endswith("?") and "\n" not in q and ": " not in q[:10] for q in answers)
    for records in built("qa").values():
        for r in records:
            assert answers[r.prompt] == r.ground_truth != r.target
            assert 1 <= len(set(r.rephrases)) == len(r.rephrases) <= 3
            assert all(answers[p.prompt] == p.answer for p in r.locality)


def test_passages_of_facts_are_long_enough() -> None:
    texts = [text for split in SPLITS for text in fact_passages(split)]
    assert len(texts) == 2_289
    assert all("\n" not in text and len(text.split()) >= 40 for text in texts)


def test_passages_are_long_plain_and_distinct(raw: dict[str, Path]) -> None:
    with raw["text"].open("a") as file:
        file.write(f"\n{words(30, 0)}\n")
    parts = read_passages(raw["text"], 20)
    assert sorted(t for part in parts.values() for t in part) == sorted(
        words(30, i) for i in range(60)
    )


def test_generation_crops_its_prompts_and_cuts_its_locality(raw: dict[str, Path]) -> None:
    for records in generation(raw).values():
        assert records
        for r in records:
            prompt = r.prompt.split()
            assert len(prompt) == CUTS.prompt_tokens and len(r.target.split()) == CUTS.target_tokens
            drops = [len(prompt) - len(text.split()) for text in r.rephrases]
            assert len(set(drops)) == CUTS.crops and max(drops) <= len(prompt) // 2
            assert all(r.prompt.endswith(text) for text in r.rephrases)
            assert all(p.answer is None and len(p.prompt.split()) == 20 for p in r.locality)


def test_a_slow_tokenizer_is_refused(raw: dict[str, Path]) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is no fast tokenizer"):
        wikitext(read_passages(raw["text"], 20), Slow(), lambda prompts, seeds: [], CUTS)


# ------------------------------------------------------------------------------------ sampling


def test_a_continuation_depends_on_its_own_seed_only() -> None:
    model = tiny.gpt2()
    encoder = Encoder.for_model(model, tiny.tokenizer())
    prompts = [words(3 + i % 5, i) for i in range(40)]
    seeds = list(range(40))
    whole = continuations(model, encoder, prompts, seeds, 4, False)
    assert len(set(whole)) > 30 and None not in whole
    with tiny.traceless(model):
        part = continuations(model, encoder, prompts[5:9], seeds[5:9], 4, False)
    assert part == whole[5:9]


def test_samples_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "TOP", len(tiny.WORDS))
    model = tiny.gpt2()
    encoder = Encoder.for_model(model, tiny.tokenizer())
    prompt, n = words(4, 0), 2_000
    texts = continuations(model, encoder, [prompt] * n, range(n), 1, False)
    logits = tiny.logits_of(model, [encoder.row(prompt)])[0, -1].double()
    share = logits[4:].softmax(0)  # without the special tokens
    for word, p in zip(tiny.WORDS, share.tolist(), strict=True):
        deviation = (p * (1 - p) / n) ** 0.5
        assert abs(texts.count(word) / n - p) < 5 * deviation + 1 / n


def test_unlikely_tokens_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "TOP", 3)
    model = tiny.gpt2()
    encoder = Encoder.for_model(model, tiny.tokenizer())
    prompt = words(4, 0)
    texts = continuations(model, encoder, [prompt] * 200, range(200), 1, False)
    logits = tiny.logits_of(model, [encoder.row(prompt)])[0, -1]
    likeliest = logits[4:].topk(3).indices.tolist()
    assert set(texts) == {tiny.WORDS[i] for i in likeliest}


def test_no_room_for_a_continuation() -> None:
    model = tiny.gpt2()
    encoder = Encoder.for_model(model, tiny.tokenizer())
    with pytest.raises(ValueError, match=r"a prompt of 30 tokens and 4 .* context of 32; shorten"):
        continuations(model, encoder, [words(30, 0)], [0], 4, False)


def test_draw_takes_distinct_allowed_items() -> None:
    def even(x: int) -> bool:
        return x % 2 == 0

    assert sorted(draw(range(10), 99, even, "a")) == [0, 2, 4, 6, 8]
    firsts = Counter(draw(range(10), 1, even, i)[0] for i in range(1_000))
    assert firsts.keys() == {0, 2, 4, 6, 8} and min(firsts.values()) > 120


# ----------------------------------------------------------------------------- cards and files


def test_the_card_knows_its_files(raw: dict[str, Path], tmp_path: Path) -> None:
    splits = BUILDS["zsre, nq"](raw, 3)
    page = write_set(tmp_path / "s", "zsre", splits, seed=3, sources=[raw["zsre"], raw["nq"]])
    card = read_json(tmp_path / "s" / "card.json")
    for split in SPLITS:
        part = card["splits"][split]
        data = (tmp_path / "s" / part["file"]).read_bytes()
        assert part["sha256"] == hashlib.sha256(data).hexdigest()
        assert part["records"] == len(splits[split]) == data.count(b"\n")
        assert part["locality"] == part["locality_answers"] == LOCALITY * part["records"]
    assert card["splits"]["train"]["words"]["target"] == {"min": 2, "median": 2, "max": 2}
    assert [s["file"] for s in card["sources"]] == ["zsre.jsonl", "nq.jsonl"]
    assert card["sources"][1]["sha256"] == hashlib.sha256(raw["nq"].read_bytes()).hexdigest()
    assert card["seed"] == 3 and "NQ" in card["definition"]
    assert (tmp_path / "s" / "card.md").read_text(encoding="utf-8") == page
    assert str(tmp_path) not in page and page.count(" -> ") == 20 * (1 + LOCALITY)


def test_hard_is_called_ours(tmp_path: Path) -> None:
    page = write_set(tmp_path, "zsre-hard", built("zsre-hard, facts"), seed=0)
    assert page.startswith("# zsre-hard\n\nOurs:")


def test_a_set_with_a_hole_is_not_written(tmp_path: Path) -> None:
    whole = EditRequest("a", "b", rephrases=("c",), locality=(Probe("d"),))
    splits: Any = {"train": [whole], "validation": [whole], "test": []}
    with pytest.raises(ValueError, match="zsre: no record for the test split; give more raw"):
        write_set(tmp_path / "s", "zsre", splits, seed=0)
    splits["test"] = [EditRequest("alone", "b", rephrases=("c",))]
    with pytest.raises(ValueError, match="zsre: 'alone' of the test split has no rephrase or no"):
        write_set(tmp_path / "s", "zsre", splits, seed=0)
    assert not (tmp_path / "s").exists()


def test_describe_shows_every_part_of_a_record() -> None:
    record = EditRequest(
        "a b", "c", "d", "a", ("e\nf",), (Probe("g"), Probe("h", "i")), (Probe("j", "k"),)
    )
    text = describe([record, record], examples=1)
    assert "| records | 2 | 1 | 2 | 4 (2) | 2 / 2 / 2 |" in text
    assert text.splitlines()[-5:] == [
        '1. "a b" -> "c" (was "d")',
        '   - rephrase: "e\\nf"',
        '   - locality: "g"',
        '   - locality: "h" -> "i"',
        '   - portability: "j" -> "k"',
    ]


def test_parquet_is_read_as_json_is(
    raw: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path / "cache"))
    table = tmp_path / "fever.parquet"
    datasets.Dataset.from_list(fever_rows()).to_parquet(table)
    assert read_claims(table) == read_claims(raw["fever"])
    paragraphs = [{"text": line} for line in raw["text"].read_text().split("\n")]
    datasets.Dataset.from_list(paragraphs).to_parquet(tmp_path / "text.parquet")
    assert read_passages(tmp_path / "text.parquet", 20) == read_passages(raw["text"], 20)
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"bad\.parquet: is no Parquet table"):
        read_claims(tmp_path / "bad.parquet")


# -------------------------------------------------------------------------------- wrong raw files


@pytest.mark.parametrize(
    ("read", "rows", "message"),
    [
        (read_claims, [{"claim": "a", "label": "MAYBE"}], "line 1: label is 'MAYBE'; use one of"),
        (read_claims, [{"claim": "a"}], "line 1: field 'label' is missing"),
        (read_claims, [{"claim": 3, "label": "SUPPORTS"}], "field 'claim' must be a text, got 3"),
        (
            read_claims,
            [{"claim": "a", "label": "NOT ENOUGH INFO"}],
            "no claim is labelled SUPPORTS",
        ),
        (
            read_questions,
            [{"question": "a", "answer": []}],
            "line 1: field 'answer' holds no answer",
        ),
        (read_questions, [{"question": "a", "answer": "b"}], "field 'answer' must be a list"),
        (read_questions, [{"answer": ["b"]}], "line 1: field 'question' is missing"),
        (read_zsre, [*zsre_rows(1), {"alt": "b"}], "line 2: field 'src' is missing"),
        (read_zsre, [{**zsre_rows(1)[0], "alt": None}], "no row has an alternative answer"),
        (read_zsre, [{"input": "a"}], "line 1: field 'output' holds no answer; add one"),
        (read_zsre, [{"output": []}], "line 1: field 'input' is missing; add it"),
        (
            read_zsre,
            [{"input": "a", "output": ["b"]}],
            r"line 1, output\[0\]: must be a JSON object",
        ),
        (
            read_zsre,
            [kilt("a", "b", "c", alternatives="d")],
            "line 1: field 'alternatives' must be a list, got 'd'",
        ),
        (
            read_zsre,
            [kilt("a", "b", "c", alternatives=["d"], filtered_rephrases=["e", 3])],
            r"line 1: field 'filtered_rephrases\[1\]' must be a text, got 3",
        ),
        (read_zsre, [kilt("a", "b", "c")], "no row has .* 'alternatives' and 'filtered_rephrases'"),
        (read_claims, [kilt("a", "MAYBE", "c")], "line 1: label is 'MAYBE'; use one of"),
        (read_claims, [{"input": "a", "output": [{}]}], "field 'output' holds no answer"),
        (read_zsre, ["a"], "line 1: must be a JSON object, got 'a'"),
    ],
)
def test_a_malformed_row_is_named(read: Any, rows: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"raw\.jsonl.*{message}"):
        read(lines(tmp_path / "raw.jsonl", rows))


def test_a_text_without_long_passages(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("short\n")
    with pytest.raises(ValueError, match=r"t\.txt: no paragraph has 50 words in ASCII; lower"):
        read_passages(tmp_path / "t.txt")


@pytest.mark.parametrize("name", ["prompt_tokens", "crops", "target_tokens", "locality_tokens"])
def test_lengths_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1; it must be at least"):
        Cuts(**{name: -1})


# -------------------------------------------------------------------------------- the command


def test_build_and_show(
    raw: dict[str, Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "zsre": ["--raw", raw["zsre"], "--nq", raw["nq"]],
        "zsre-hard": [],
        "fever": ["--raw", raw["fever"], "--seed", 2],
        "claims": [],
        "qa": [],
        "wikitext": ["--raw", raw["text"], "--sampler", model, "--min-words=20",
                     "--prompt-tokens=12", "--target-tokens=4", "--locality-tokens=20"],
    }  # fmt: skip
    for name, given in flags.items():
        out = tmp_path / name
        assert main(["data", "build", name, *map(str, given), "--output", str(out)]) == 0
        printed = capsys.readouterr().out
        card = read_json(out / "card.json")
        counts = ", ".join(f"{card['splits'][s]['records']} {s}" for s in SPLITS)
        assert printed.splitlines() == [
            f"{name}: {counts} records",
            f"written to {out}; its card with examples is {out / 'card.md'}",
        ]
        assert card["seed"] == (2 if name == "fever" else 0)
    assert card["settings"]["sampler"] == model.name and card["settings"]["dtype"] == "float32"
    assert main(["data", "show", str(tmp_path / "qa" / "test.jsonl"), "--examples=2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(was ") == 2 and "| records | 224 |" in shown


def test_train_takes_what_was_built(raw: dict[str, Path], model: Path, tmp_path: Path) -> None:
    cuts = ["--min-words=20", "--prompt-tokens=12", "--target-tokens=4", "--locality-tokens=20"]
    built = ["--raw", str(raw["text"]), "--sampler", str(model), "--output", str(tmp_path / "set")]
    assert main(["data", "build", "wikitext", *built, *cuts]) == 0
    files = [f"--data={tmp_path}/set/train.jsonl", f"--eval-data={tmp_path}/set/validation.jsonl"]
    small = ["--steps=2", "--batch-size=2", "--rank=5", "--eval-records=2", "--eval-every=2"]
    where = [f"--model={model}", f"--output={tmp_path / 'editor'}"]
    assert main(["train", *where, *files, *small]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["build", "fever", "--output", "o"], "--raw is missing"),
        (["build", "nothing"], "no command 'nothing'; choose one of zsre, "),
        (["build", "fever", "--raw", "none.jsonl", "--output", "o"], "none.jsonl: no such file"),
        (["show", "none.jsonl"], "none.jsonl: no such file"),
        (["show", "facts", "--examples=-1"], "--examples is -1; it must be at least 0"),
    ],
)
def test_wrong_commands(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "data", *flags)


# ---------------------------------------------------------------------------- public data sets


def test_real_zsre_with_nq() -> None:
    records = read_zsre(data_file("zsre-mend-train-1k.json"))
    splits = zsre(records, read_questions(data_file("nq-open-dev.jsonl")))
    assert sum(map(len, splits.values())) == 998
    assert {len(r.locality) for part in splits.values() for r in part} == {LOCALITY}


def test_real_fever_symmetric() -> None:
    claims = read_claims(data_file("fever-symmetric-dev.jsonl"))
    labels = {c.text: c.label for c in claims}
    assert len(claims) == 354
    # Both labels occur with every claim; the original evidence decides.
    assert not labels["Daggering is associated with the genre of death metal."]
    assert labels["Craig David is a pop music performer."]
    assert not labels["Croatia has a king."]
    assert sum(map(len, fever(claims).values())) == 354


def test_real_wikitext() -> None:
    parts = read_passages(data_file("wikitext-2-valid.txt"))
    assert sum(map(len, parts.values())) == 1_079
