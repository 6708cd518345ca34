"""Metrics against a slow loop that merges every edit, and their independence of order and batch."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXT, FAMILY, WORDS, facts, gpt2, logits_of, seasoned_mend, tokenizer

from pymend import EditRequest, Mend, Metrics, Probe, evaluate
from pymend.algorithms.cache import Cache
from pymend.algorithms.finetune import FineTune
from pymend.config import CacheConfig, FineTuneConfig
from pymend.engine.losses import LabelRows
from pymend.engine.replay import Replay
from pymend.engine.tokens import IGNORE, Batch, Encoder, Row
from pymend.evaluation.metrics import RecordScores, interval, mean
from pymend.evaluation.partial import PartialScores
from pymend.files import digest_of_tensors
from pymend.models.structure import find_weights

# The function hides its module of the same name.
evaluate_module = sys.modules["pymend.evaluation.evaluator"]

ALPHA = {"gpt2": 0.003, "llama": 0.02}  # some edits take and some do not
KEYS = {
    "edit_success",
    "generality",
    "locality",
    "accuracy_drawdown",
    "perplexity_drawdown",
    "n",
    "protocol",
    "seconds",
    "edits_per_second",
    "peak_memory_bytes",
    "protocols",
    "es_paper",
    "es_outer",
}


def records() -> list[EditRequest]:
    """Facts with all, some and none of the optional parts."""
    full = facts(7)
    bare = EditRequest(f"{WORDS[3]} {WORDS[4]}", WORDS[5])
    half = EditRequest(
        f"{WORDS[6]} {WORDS[4]}",
        f"{WORDS[7]} {WORDS[8]}",
        rephrases=(f"{WORDS[9]} {WORDS[4]}",),
        locality=(Probe(f"{WORDS[1]} {WORDS[2]}"),),
        portability=(Probe(f"{WORDS[4]} {WORDS[1]}", WORDS[2]),),
    )
    return [*full, bare, half]


def run(model: Any, data: list[EditRequest], batch_size: int = 4, **kw: Any) -> Metrics:
    mend = seasoned_mend(model, alpha=kw.pop("alpha", ALPHA[model.config.model_type]))
    return evaluate(mend, model, tokenizer(), data, batch_size=batch_size, progress=False, **kw)


def look(model: Any, row: Row) -> tuple[list[int], float, int]:
    """Argmax at the looked-at positions, summed NLL of their targets, number of targets."""
    logits = logits_of(model, [row])[0].double()
    positions, targets = list(row.positions()), row.targets()
    log_p = logits.log_softmax(-1)
    nll = [-log_p[t, y].item() for t, y in zip(positions, targets, strict=True) if y != IGNORE]
    return [int(logits[t].argmax()) for t in positions], sum(nll), len(nll)


def slow_loop(model: Any, data: list[EditRequest], text: str | None = None) -> dict[str, Any]:
    """Edit each record alone by merging, and look with plain forward passes."""
    mend = seasoned_mend(model, alpha=ALPHA[model.config.model_type])
    encoder = Encoder(tokenizer())
    columns: dict[str, list[float | None]] = {}
    nll, tokens = [0.0, 0.0], 0
    for request in data:
        encoded = encoder.request(request)
        edit = mend.edit(model, tokenizer(), request)
        whole = [Row(x.ids, 0, x.answer) for x in encoded.locality]
        counted = whole if text is None else [encoder.row(text)]

        def exact(row: Row) -> float:
            return float(look(model, row)[0] == row.targets())

        def hits(row: Row) -> float:
            best = look(model, row)[0]
            return sum(a == b for a, b in zip(best, row.targets(), strict=True)) / len(best)

        def mean_nll(row: Row) -> float:
            _, total, count = look(model, row)
            return total / count

        answered = [x for x in encoded.locality if x.answer]
        base_best = [look(model, x)[0] for x in encoded.locality]
        base_exact = [exact(x) for x in answered]
        before = exact(encoded.edit)
        nll[0] += sum(look(model, x)[1] for x in counted)
        edit.merge_(model)
        nll[1] += sum(look(model, x)[1] for x in counted)
        tokens += sum(look(model, x)[2] for x in counted)
        after_best = [look(model, x)[0] for x in encoded.locality]
        rephrased = [exact(x) for x in encoded.rephrases]
        success = exact(encoded.edit)
        values = {
            "edit_success": success,
            "edit_success_before": before,
            "generality": mean(rephrased),
            "es_paper": mean([success, *rephrased]),
            "locality": mean(
                [
                    sum(a == b for a, b in zip(x, y, strict=True)) / len(x)
                    for x, y in zip(base_best, after_best, strict=False)
                ]
            ),
            "portability": mean([exact(x) for x in encoded.portability]),
            "accuracy_drawdown": mean(
                [b - exact(x) for b, x in zip(base_exact, answered, strict=True)]
            ),
            "token_edit_success": hits(encoded.edit),
            "token_generality": mean([hits(x) for x in encoded.rephrases]),
            "prefers_new": float(mean_nll(encoded.edit) < mean_nll(encoded.old))
            if encoded.old
            else None,
            "prefers_new_rephrased": mean(
                [
                    float(mean_nll(new) < mean_nll(old))
                    for new, old in zip(encoded.rephrases, encoded.old_rephrases, strict=False)
                ]
            ),
        }
        edit.unmerge_(model)
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    columns["perplexity"] = [math.exp(x / tokens) for x in nll]
    return columns


@pytest.mark.parametrize("text", [None, " ".join(WORDS[5:20])], ids=["locality", "text"])
@pytest.mark.parametrize("family", FAMILY)
def test_metrics_equal_a_loop_over_merged_models(family: str, text: str | None) -> None:
    model = FAMILY[family](dtype=torch.float64)
    data = records()
    expected = slow_loop(model, data, text)
    metrics = run(model, data, ppl_text=text)
    before, after = expected.pop("perplexity")
    assert metrics.perplexity[0] == pytest.approx(before, rel=1e-6)
    assert metrics.perplexity[1] == pytest.approx(after, rel=1e-6)
    for name, values in expected.items():
        assert [getattr(r, name) for r in metrics.records] == pytest.approx(values), name
    assert metrics.to_dict()["perplexity_drawdown"] == pytest.approx(after - before, rel=1e-5)
    # The case says something: not all is right, not all is wrong, and records differ.
    for name in ("edit_success", "token_generality", "locality", "prefers_new_rephrased"):
        assert len({v for v in expected[name] if v is not None}) > 1, name


def test_order_and_batch_size_do_not_matter() -> None:
    model = gpt2(dtype=torch.float64)
    data = records()
    first = run(model, data, batch_size=4)
    for batch_size in (1, 3, 100):
        other = run(model, data, batch_size=batch_size)
        assert other.records == first.records
        assert other.perplexity[1] == pytest.approx(first.perplexity[1], rel=1e-9)
    back = run(model, data[::-1], batch_size=2)
    assert back.records[::-1] == first.records
    assert back.perplexity[1] == pytest.approx(first.perplexity[1], rel=1e-9)


def test_a_text_beyond_the_context_is_cut_and_never_a_chat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, words = gpt2(dtype=torch.float64), WORDS[:50]
    text = Row(Encoder(tokenizer()).row(" ".join(words)).ids[:CONTEXT])
    passes: list[int] = []
    label_rows = Replay.label_rows

    def counted(self: Replay, batch: Batch) -> LabelRows:
        passes.append(batch.rows.count(text))
        return label_rows(self, batch)

    monkeypatch.setattr(Replay, "label_rows", counted)
    mend, talker = seasoned_mend(model), tokenizer()
    talker.chat_template = "ba {{ messages[0]['content'] }} be"
    metrics = evaluate(
        mend, model, talker, records(), ppl_text=" ".join(words), chat=True, progress=False
    )
    _, nll, tokens = look(model, text)
    assert metrics.perplexity[0] == pytest.approx(math.exp(nll / tokens), rel=1e-9)
    assert metrics.perplexity_text == f"the first {CONTEXT} tokens of a text"
    assert max(passes) == 1  # a text is long: its logits under one edit at a time


@pytest.mark.parametrize("text", ["", " \n", WORDS[0]])
def test_a_text_without_two_tokens(text: str) -> None:
    with pytest.raises(ValueError, match="the perplexity text is empty"):
        run(gpt2(), records(), ppl_text=text)


@pytest.mark.parametrize("name", ["batch_size", "n_edits"])
def test_a_batch_of_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        run(gpt2(), records(), **{name: 0})


@pytest.mark.parametrize("text", [None, " ".join(WORDS[5:20])], ids=["locality", "text"])
def test_several_edits_at_once(text: str | None) -> None:
    """As a loop that merges the joint edit of every group; what fills no group is left out."""
    model, data = gpt2(dtype=torch.float64), facts(7)
    neighbour = Probe(data[1].prompt, data[1].ground_truth)
    data[0] = replace(data[0], locality=(*data[0].locality, neighbour))
    with pytest.warns(UserWarning, match="trained for n_edits=1 at once, not for 3"):
        metrics = run(model, data, ppl_text=text, n_edits=3)
    assert metrics.n_edits == 3 and len(metrics.records) == 6
    mend, encoder = seasoned_mend(model, alpha=ALPHA["gpt2"]), Encoder(tokenizer())
    nll, tokens, success, same = [0.0, 0.0], 0, [], []
    for group in (data[:3], data[3:6]):
        rows = [encoder.request(r) for r in group]
        kept = [[x for x in r.locality if x.prompt != rows[1].edit.prompt] for r in rows]
        whole = [Row(x.ids, 0, x.answer) for part in kept for x in part]
        counted = whole if text is None else [encoder.row(text)]
        with pytest.warns(UserWarning):
            edit = mend.edit(model, tokenizer(), group)
        looks = []
        for _ in range(2):
            looks.append([[look(model, x)[0] for x in part] for part in kept])
            nll[len(looks) - 1] += sum(look(model, x)[1] for x in counted)
            if len(looks) == 1:
                edit.merge_(model)
        tokens += sum(look(model, x)[2] for x in counted)
        success += [float(look(model, r.edit)[0] == r.edit.targets()) for r in rows]
        for before, after in zip(*looks, strict=True):
            agree = [
                sum(a == b for a, b in zip(x, y, strict=True)) / len(x)
                for x, y in zip(before, after, strict=True)
            ]
            same.append(mean(agree))
        edit.unmerge_(model)
    assert [r.edit_success for r in metrics.records] == success
    assert [r.locality for r in metrics.records] == pytest.approx(same)
    assert metrics.perplexity == pytest.approx([math.exp(x / tokens) for x in nll], rel=1e-6)
    assert len(set(same)) > 1


def test_fewer_records_than_one_group() -> None:
    with pytest.raises(ValueError, match="2 records to evaluate; give at least 3"):
        run(gpt2(), facts(2), n_edits=3)


def test_perplexity_has_an_interval() -> None:
    result = run(gpt2(dtype=torch.float64), records()).to_dict()
    low, high = result["intervals_95"]["perplexity_drawdown"]
    assert low < result["perplexity_drawdown"] < high


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_record_that_is_not_finite_is_named(batch_size: int) -> None:
    model, data = gpt2(), records()
    data[5] = EditRequest(" ".join(WORDS[:25]), WORDS[0])
    mend = seasoned_mend(model)
    with torch.no_grad():
        model.transformer.wpe.weight[20] = math.nan  # also what pads its batch mates
    with pytest.raises(ValueError, match=r"^record 5: the gradients of .* are not finite"):
        evaluate(mend, model, tokenizer(), data, batch_size=batch_size, progress=False)


# -- an evaluation that goes on ---------------------------------------------------------------


def of(model: Any, **config: Any) -> Mend:
    return seasoned_mend(model, alpha=ALPHA[model.config.model_type], **config)


def cut_short(passes: int, algorithm: Any, model: Any, *args: Any, **kw: Any) -> None:
    """Interrupt an evaluation after so many passes, as Ctrl-C does."""
    count = 0
    real = evaluate_module.ChunkScores

    def look(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > passes:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate_module, "ChunkScores", look)
        evaluate(algorithm, model, tokenizer(), *args, progress=False, **kw)


@pytest.mark.filterwarnings("ignore:this editor was trained for n_edits=1")
@pytest.mark.parametrize("n_edits", [1, 3])
@pytest.mark.parametrize("kind", ["mend", "ft+kl"])
def test_an_interrupted_evaluation_goes_on(kind: str, n_edits: int, tmp_path: Path) -> None:
    model, data, kept = gpt2(), records(), tmp_path / "new" / "scores.jsonl"
    how = {"n_edits": n_edits, "batch_size": 3, "ppl_text": " ".join(WORDS[:20])}
    quiet = {"progress": False, **how}
    mend = of(model) if kind == "mend" else held(model, data)
    whole = evaluate(mend, model, tokenizer(), data, **quiet)
    cut_short(2, mend, model, data, kept=kept, **how)
    with open(kept, "a") as file:
        file.write('{"scores": [{"edit_suc')  # what a crash leaves
    cut_short(0, mend, model, data, kept=kept, **how)
    assert len(kept.read_text().splitlines()) == 3, "the torn line is gone, all others stay"
    result = evaluate(mend, model, tokenizer(), data, kept=str(kept), **quiet)
    again = evaluate(mend, model, tokenizer(), data, kept=kept, **quiet)
    assert [vars(r) for r in result.records] == [vars(r) for r in whole.records]
    assert result.to_dict()["intervals_95"] == whole.to_dict()["intervals_95"]
    assert result.to_dict() == again.to_dict(), "nothing was left to do"
    assert 0 < result.edit_seconds < result.seconds


def held(model: Any, data: list[EditRequest]) -> FineTune:
    config = FineTuneConfig(lr=1e-3, kl=True, steps=3, edit=(find_weights(model)[0].name,))
    return FineTune.from_config(model, config, tokenizer=tokenizer(), train_data=data)


def merged(model: Any) -> Any:
    of(model).edit(model, tokenizer(), records()[1]).merge_(model)
    return model


def shifted(model: Any) -> Any:
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(1.01)
    return model


# What is evaluated before and after the interruption, and what the error names.
BEFORE: dict[str, Any] = {"algorithm": of, "model": lambda m: m, "data": lambda d: d, "how": {}}
OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "alpha": ({}, {"algorithm": lambda m: of(m).scale_(0.5)}, "algorithm"),
    "settings": ({}, {"algorithm": lambda m: renamed(of(m), official=True)}, "algorithm"),
    "kind": ({}, {"algorithm": lambda m: Cache(CacheConfig(eps=1.0))}, "algorithm"),
    "eps": (
        {"algorithm": lambda m: Cache(CacheConfig(eps=1.0))},
        {"algorithm": lambda m: Cache(CacheConfig(eps=2.0))},
        "algorithm",
    ),
    "locality of ft+kl": (
        {"algorithm": lambda m: held(m, records())},
        {"algorithm": lambda m: held(m, records()[1:])},
        "algorithm",
    ),
    "merged": ({}, {"model": merged}, "model"),
    "another part of the model": ({}, {"model": shifted}, "model"),
    "dtype": ({}, {"model": lambda m: m.to(torch.bfloat16)}, "model"),
    "records": ({}, {"data": lambda d: [*d[:-1], replace(d[-1], portability=())]}, "records"),
    "fewer": ({}, {"data": lambda d: d[:-1]}, "records"),
    "batch": ({}, {"how": {"batch_size": 2}}, "batch_size"),
    "at once": ({}, {"how": {"n_edits": 3}}, "n_edits"),
    "text": ({}, {"how": {"ppl_text": " ".join(WORDS[:4])}}, "text"),
}


def renamed(mend: Mend, **config: Any) -> Mend:
    mend.config = replace(mend.config, **config)
    return mend


@pytest.mark.filterwarnings("ignore:this editor was trained")
@pytest.mark.parametrize("name", OTHER)
def test_scores_of_another_evaluation_are_refused(name: str, tmp_path: Path) -> None:
    kept = tmp_path / "scores.jsonl"
    first, second, named = OTHER[name]
    first = {**BEFORE, **first}
    second = {**first, **second}
    model = gpt2()
    how = {"batch_size": 3, **first["how"]}
    cut_short(1, first["algorithm"](model), model, first["data"](records()), kept=kept, **how)
    before = kept.read_bytes()
    algorithm = second["algorithm"](model)
    model, how = second["model"](model), {**how, **second["how"]}
    with pytest.raises(ValueError, match=f"was interrupted: its {named} differ; finish that one"):
        evaluate(
            algorithm,
            model,
            tokenizer(),
            second["data"](records()),
            progress=False,
            kept=kept,
            **how,
        )
    assert kept.read_bytes() == before


def test_precision_of_products_is_part_of_an_evaluation(tmp_path: Path) -> None:
    model, kept = gpt2(), tmp_path / "scores.jsonl"
    cut_short(1, of(model), model, records(), batch_size=4, kept=kept)
    products: Any = torch.backends.mkldnn.matmul
    usual = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        with pytest.raises(ValueError, match="its matmul differ"):
            run(model, records(), kept=kept)
    finally:
        products.fp32_precision = usual


@pytest.mark.parametrize(
    "text", ["no json\n", "no json", '{"a": 1}', "[1]\n", "", "\n", '{"format_version": 1}\n3\n']
)
def test_a_file_that_holds_no_scores(text: str, tmp_path: Path) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.txt holds (no )?scores of a"):
        run(gpt2(), records(), kept=kept)
    assert kept.read_text() == text


def test_scores_that_do_not_follow_each_other(tmp_path: Path) -> None:
    """As two evaluations that write to one file leave them."""
    model, kept = gpt2(), tmp_path / "scores.jsonl"
    cut_short(2, of(model), model, records(), batch_size=4, kept=kept)
    lines = kept.read_text().splitlines(keepends=True)
    for wrong in ([*lines, lines[-1]], [lines[0], lines[2]]):
        kept.write_text("".join(wrong))
        with pytest.raises(ValueError, match="a pass is missing, or there twice"):
            run(model, records(), kept=kept)
        assert kept.read_text() == "".join(wrong)


def test_scores_are_not_kept_in_a_file_that_was_deleted(tmp_path: Path) -> None:
    """Another process finished the same evaluation."""
    scores = PartialScores(tmp_path / "scores.jsonl", {})
    (tmp_path / "scores.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"scores\.jsonl"):
        scores.add([], seconds=0.0, edit_seconds=0.0, peak_memory_bytes=0)
    assert not list(tmp_path.iterdir())


def test_names_and_shapes_are_in_a_digest() -> None:
    x = torch.arange(6.0)
    digests = [
        digest_of_tensors(t)
        for t in ({"a": x}, {"b": x}, {"a": x.view(2, 3)}, {"a": x.int()}, {"a": x + 1}, {})
    ]
    assert len(set(digests)) == len(digests)
    assert digest_of_tensors({"a": x.view(2, 3).t().contiguous().t()}) == digests[2]


# -- what is reported -------------------------------------------------------------------------


def test_what_the_json_holds() -> None:
    result = run(gpt2(), records()).to_dict()
    assert result.keys() >= KEYS
    assert result["n"] == 9 == len(result["records"])
    assert set(result["protocols"]) == {"token_accuracy", "prefers_new"}
    assert "exact match" in result["protocol"]
    assert result["edits_per_second"] > 0 and result["peak_memory_bytes"] > 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for name in ("edit_success", "generality", "locality"):
        low, high = result["intervals_95"][name]
        assert 0 <= low <= result[name] <= high <= 1


def test_what_does_not_apply_is_null() -> None:
    result = run(gpt2(), [EditRequest(f"{WORDS[0]} {WORDS[1]}", WORDS[2])]).to_dict()
    for name in ("generality", "locality", "accuracy_drawdown", "perplexity_drawdown", "es_outer"):
        assert result[name] is None, name
    assert result["protocols"]["prefers_new"] == {
        "protocol": result["protocols"]["prefers_new"]["protocol"],
        "edit_success": None,
        "generality": None,
    }
    assert result["es_paper"] == result["edit_success"]


def test_an_edit_that_does_nothing_scores_as_the_model_does() -> None:
    metrics = run(gpt2(dtype=torch.float64), records(), alpha=0.0)
    assert metrics.value("locality") == 1
    assert metrics.value("accuracy_drawdown") == 0
    assert metrics.value("edit_success") == metrics.value("edit_success_before")
    assert metrics.perplexity[1] == pytest.approx(metrics.perplexity[0], rel=1e-12)


def test_means_and_intervals() -> None:
    assert mean([1.0, None, 0.0]) == 0.5 and mean([None]) is None and mean([]) is None
    assert interval([None]) is None and interval([0.25]) == [0.25, 0.25]
    values = [0.0, 1.0] * 200
    assert_interval(interval(values), 0.5, 0.5 / 400**0.5)
    torch.manual_seed(1)  # whatever else was drawn
    assert interval(values) == interval(values)


def assert_interval(found: list[float] | None, middle: float, deviation: float) -> None:
    """The middle 95 % of a normal distribution, up to the draws; 90 % end at 1.64 deviations."""
    assert found is not None
    ends = [(x - middle) / deviation for x in found]
    assert ends == pytest.approx([-1.96, 1.96], abs=0.2)


@pytest.mark.parametrize("copies", [1, 4])
def test_the_interval_of_a_perplexity_drawdown(copies: int) -> None:
    """Of one token a record and small losses, where exp(x) is 1 + x: it is that of a mean.

    A group of copies is one record.
    """
    scores = {f.name: None for f in fields(RecordScores)}
    texts = [{"text_nll_before": 0.0, "text_nll_after": 1e-6 * (i // copies % 2), "text_tokens": 1}
             for i in range(400)]  # fmt: skip
    records = [RecordScores(**{**scores, "edit_success": 1.0, **text}) for text in texts]
    metrics = Metrics(records, 1, [i // copies for i in range(400)], "made up", 1.0, 1.0, 1)
    result = metrics.to_dict()
    assert result["perplexity_drawdown"] == pytest.approx(0.5e-6, rel=1e-4)
    found = result["intervals_95"]["perplexity_drawdown"]
    assert_interval(found, 0.5e-6, 0.5e-6 / (400 / copies) ** 0.5)


def test_an_interval_resamples_groups_whole() -> None:
    """Copies of a record tell nothing new."""
    values = [float(i % 3 == 0) for i in range(40)]
    copied = [v for v in values for _ in range(5)]
    groups = [i for i in range(40) for _ in range(5)]
    assert interval(copied, groups) == pytest.approx(interval(values))
    assert interval(values, list(range(40))) == interval(values)
    low, high = interval(copied)
    wide_low, wide_high = interval(copied, groups)
    assert wide_high - wide_low > 1.8 * (high - low)
    # Unequal groups: the mean is over records; None is no record.
    assert interval([1.0, 1.0, None, 0.0], [0, 0, 1, 1])[0] == 0
    assert interval([0.0, 1.0], [3, 3]) is None and interval([None], [0]) is None


@pytest.mark.filterwarnings("ignore:this editor was trained for")
def test_what_is_resampled() -> None:
    data = [
        replace(r, subject=s) for r, s in zip(records()[:4], ("a", None, "a", None), strict=True)
    ]
    assert run(gpt2(), data).groups == [0, 1, 0, 3]
    metrics = run(gpt2(), facts(4), n_edits=2)
    assert metrics.groups == [0, 0, 1, 1] and metrics.to_dict()["resampled"] == 2
