"""The paper's tables on models that are made in seconds: what is run, kept, shown and refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_evaluation import evaluate_module
from test_mini import tiny

from pymend.algorithms.registry import load_editor
from pymend.commands import main
from pymend.config import CacheConfig, FineTuneConfig, MendConfig
from pymend.data.builders import Splits, fact_claims, fact_questions
from pymend.data.builders.questions import question_wordings
from pymend.data.facts import load_relations
from pymend.errors import meant_for_user
from pymend.evaluation import evaluate
from pymend.files import exclusive
from pymend.reproduce import costs, data, figures, runs, tables
from pymend.reproduce.plan import SCALES, VARIANTS, Run, Scale, Setup, load_scale
from pymend.reproduce.runs import RunContext, perform
from pymend.zoo import mini
from pymend.zoo.load import locate

TRAIN = {"steps": 3, "batch_size": 2, "lr": 1e-4, "keep": "last", "eval_records": 4}
PAPER = {"zsre": "BART-base, zsRE", "wikitext": "distilGPT-2, Wikitext"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of models that know nothing."""
    cache = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYMEND_CACHE", str(cache))
        patch.setattr(mini, "RECIPES", {name: tiny(name) for name in mini.RECIPES})
        return {name: str(mini.make(name, progress=False)) for name in ("bart-mini", "gpt2-mini")}


@cache
def some(kind: str, seed: int, every: int) -> Splits:
    """A built-in set, thinned out: to read all of it takes longer than what is done with it."""
    build = {"qa": fact_questions, "claims": fact_claims}[kind]
    return {split: records[::every] for split, records in build(seed, near=0).items()}


@pytest.fixture
def scale_file(models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scale whose tables take seconds."""
    # Processes of their own read what this one has written.
    monkeypatch.setitem(data.BUILT_IN, "qa", partial(some, "qa", every=60))
    trained = {"records": 6, "train": TRAIN, "train_several": {3: {"batch_size": 1}}}
    wiki = tmp_path / "files" / "wiki"
    wiki.mkdir(parents=True)
    for split, count in (("train", 30), ("validation", 8), ("test", 8)):
        lines = [
            json.dumps(
                {
                    "prompt": f"The {split} number {i} of the list says that",
                    "target": f"it is {i}",
                    "rephrases": [f"number {i} of the list says that"],
                    "locality": [{"prompt": f"Another {split} passage {i} says nothing at all"}],
                }
            )
            for i in range(count)
        ]
        (wiki / f"{split}.jsonl").write_text("\n".join(lines))
    scale = {
        "note": "Tiny.",
        "setups": {
            "zsre": {  # a model that knows nothing has no accuracy to lose
                "model": models["bart-mini"],
                "data": "qa",
                "draws": 2,
                "drawdown": "perplexity_drawdown",
            },
            "wikitext": {
                "model": models["gpt2-mini"],
                "data": {"folder": "wiki"},
                "drawdown": "perplexity_drawdown",
            },
        },
        "tables": {
            "table4": PAPER,
            "table5": {"zsre": PAPER["zsre"]},
            "table6": {"wikitext": PAPER["wikitext"]},
            "table8": {"wikitext": ""},
            "table10": {"zsre": ""},
            "table11": PAPER,
            "memory": {"zsre": ""},
            "time": {"zsre": ""},
        },
        "algorithms": {
            "mend": {**trained, "editor": {"rank": 8}},
            "ke": {**trained, "editor": {"lstm": 8, "condition": 8, "hidden": 8}},
            "enn": trained,
            "ft": {"records": 2, "editor": {"steps": 2}},
            "ft+kl": {"records": 2, "editor": {"steps": 2}},
            "cache": {"records": 6},
        },
        "batches": [1, 3],
        "quick": {"note": "Less.", "algorithms": {"mend": {"records": 3, "train": {"steps": 2}}}},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(scale, sort_keys=False))
    return file


def reproduce(scale: Path, *words: str) -> int:
    files, output = str(scale.parent / "files"), str(scale.parent / "out")
    return main(["reproduce", *words, "--scale", str(scale), "--data", files, "--output", output])


def place(scale: Path) -> RunContext:
    return RunContext(scale.parent / "out", scale.parent / "files")


def here(work: Callable[..., Any], asked: dict[Any, Any], *_: Any) -> Iterator[Any]:
    """``runs.in_processes`` without them; each would import torch anew."""
    for key, arguments in asked.items():
        yield key, work(*arguments)


def test_all_tables_of_a_scale(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is written with its numbers, the paper's beside them, and a picture; once."""
    monkeypatch.setattr(costs, "ALGORITHMS", ("mend", "cache"))
    monkeypatch.setattr(costs, "in_processes", here)
    monkeypatch.setattr(runs, "TUNING", 6)
    assert reproduce(scale_file, "all") == 0
    output, scale = scale_file.parent / "out", load_scale(str(scale_file))
    pages = [x for x in capsys.readouterr().out.splitlines() if x.endswith(".md")]
    assert pages == [str(output / f"{name}.md") for name in scale.tables]
    for name in scale.tables:
        page = (output / f"{name}.md").read_text()
        assert page.startswith(f"# {name}: ") and "Tiny." in page
        assert f"    pymend reproduce {name} --scale {scale_file} --data DIR\n" in page
        picture = re.search(r"!\[.*\]\((.*)\)", page)
        assert (picture is None) == (name in ("table8", "table10"))
        if picture:
            assert (output / picture[1]).read_bytes().startswith(b"\x89PNG")
    four = (output / "table4.md").read_text()
    assert f"| {mini.folder('bart-mini').name}, zsre | paper: BART-base, zsRE |" in four
    assert re.search(r"\| MEND \| .* \| \.98 / \.002 \| .* \| \.86 / \.225 \|", four)
    # The sheet and the page tell what the result files hold.
    sheet = list(csv.DictReader((output / "table4.csv").read_text().splitlines()))
    assert len(sheet) == 12
    for line, algorithm in (("MEND", "mend"), ("FT", "ft")):
        [row] = [x for x in sheet if x["row"] == line and x["setup"] == "wikitext"]
        kept = json.loads((output / f"runs/wikitext-{algorithm}/result.json").read_text())
        scores = kept["metrics"]
        assert row["n"] == str(scores["n"]) and row["es outer"] == f"{scores['es_outer']:.3f}"
        assert row["drawdown"] == f"{scores['perplexity_drawdown']:.3f}"
    looks = json.loads((output / "table10.json").read_text())["examples"]["zsre"]
    ten = list(csv.DictReader((output / "table10.csv").read_text().splitlines()))
    assert ten == [{"setup": "zsre", **line} for line in looks]
    assert {"edit", "paraphrase", "neighbour"} == {line["kind"] for line in ten}
    shown = json.loads((output / "table5.json").read_text())["runs"]
    assert shown["zsre-mend-3-edits"]["metrics"]["n_edits"] == 3
    eleven = json.loads((output / "table11.json").read_text())["runs"]["zsre-cache"]
    assert [t["factor"] for t in eleven["thresholds"]] == [0.5, 1.0, 2.0]
    cost = json.loads((output / "costs.json").read_text())["costs"]
    assert [c["algorithm"] for c in cost] == ["mend", "cache"]
    assert cost[0]["step seconds"] > 0 and "step seconds" not in cost[1]
    extra = {(row["setup"], row["row"]): row["extra MiB"] for row in sheet}
    assert extra["zsre", "MEND"] == f"{cost[0]['edit MiB']:.1f}" and extra["zsre", "FT"] == "-"

    # Nothing is done twice.
    def refuse(*_: Any) -> None:
        raise AssertionError("done again")

    for name in ("_trained", "_thresholds", "_scores"):
        monkeypatch.setattr(runs._Bench, name, refuse)
    monkeypatch.setattr(costs, "_measure", refuse)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: path.touch())
    before = four
    assert reproduce(scale_file, "all") == 0
    assert (output / "table4.md").read_text() == before


def test_costs_are_those_of_a_step(scale_file: Path) -> None:
    """How many there are changes nothing, so what was measured stays good."""
    scale = load_scale(str(scale_file))

    def changed(**train: Any) -> dict[str, Any]:
        mend = {**scale.algorithms["mend"]}
        mend["train"] = {**mend["train"], **train}
        algorithms = {**scale.algorithms, "mend": mend}
        return costs._spec(replace(scale, algorithms=algorithms), place(scale_file))

    assert changed(steps=1234) == changed()
    assert changed(batch_size=3) != changed()


def faked(
    patch: pytest.MonkeyPatch, failing: dict[int, BaseException] | None = None
) -> list[tuple[str, str]]:
    """Fake measurements, with the error of the n-th, from 0; the list receives each."""
    measured: list[tuple[str, str]] = []

    def take(measure: Callable[..., Any], asked: dict[Run, Any], *_: Any) -> Iterator[Any]:
        [run], count = asked, len(measured)
        measured.append((run.algorithm, measure.__name__))
        if failing and count in failing:
            raise failing[count]
        kinds = costs.STEP if measure is costs.measure_steps else costs.EDIT
        yield run, dict.fromkeys(kinds, float(count))

    patch.setattr(costs, "in_processes", take)
    patch.setattr(data, "prepare", lambda *_: None)
    return measured


def test_costs_that_were_stopped_go_on(scale_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ALGORITHMS", ("mend", "cache", "ft"))
    file, scale = scale_file.parent / "out" / "costs.json", load_scale(str(scale_file))
    first = faked(monkeypatch, {2: KeyboardInterrupt()})
    assert reproduce(scale_file, "memory") == 130
    assert first == [("mend", "measure_steps"), ("mend", "measure_edits"), first[2]]
    begun = json.loads(file.read_text())
    assert [c["algorithm"] for c in begun["costs"]] == ["mend"]
    assert begun["costs"][0]["step MiB"] == 0.0 and begun["costs"][0]["edit MiB"] == 1.0

    second = faked(monkeypatch)
    # Tables of scores show what there is, and measure nothing.
    assert costs.memory_of_edits(scale, place(scale_file)) == {Run("zsre", "mend"): 1.0}
    assert second == []
    assert reproduce(scale_file, "memory") == 0
    assert second == [("cache", "measure_edits"), ("ft", "measure_edits")]
    whole = json.loads(file.read_text())
    assert [c["algorithm"] for c in whole["costs"]] == ["mend", "cache", "ft"]
    assert whole["costs"][:1] == begun["costs"] and not any("failed" in c for c in whole["costs"])
    assert reproduce(scale_file, "memory", "time") == 0 and len(second) == 2


def test_costs_are_of_one_machine(scale_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is not measured on another one; a file that is complete is shown there."""
    monkeypatch.setattr(costs, "ALGORITHMS", ("mend", "cache"))
    scale, here = load_scale(str(scale_file)), place(scale_file)
    here.output.mkdir()
    faked(monkeypatch, {2: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        costs.measured(scale, here)
    faked(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "machine", lambda: "an abacus")
        with pytest.raises(ValueError, match=r"was begun on another machine \(.*, here an abacus"):
            costs.measured(scale, here)
    whole = costs.measured(scale, here)
    monkeypatch.setattr(costs, "machine", lambda: "an abacus")
    assert costs.measured(scale, here) == whole


def test_costs_out_of_memory_are_shown_as_such(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own error, out of a process: an editor of more bytes than can be addressed."""
    given = yaml.safe_load(scale_file.read_text())
    given["algorithms"]["ke"]["editor"]["hidden"] = 2**50
    given["tables"] = {"memory": {"wikitext": ""}, "time": {"wikitext": ""}}
    scale_file.write_text(yaml.safe_dump(given, sort_keys=False))
    monkeypatch.setattr(costs, "ALGORITHMS", ("ke", "cache"))
    separate, bars, drawn = costs.in_processes, figures.bars, []

    def first_apart(work: Any, asked: dict[Run, Any], *settings: Any) -> Iterator[Any]:
        [run] = asked
        return (separate if run.algorithm == "ke" else here)(work, asked, *settings)

    monkeypatch.setattr(costs, "in_processes", first_apart)

    def draw(*arguments: Any) -> None:
        drawn.append(arguments[2])
        bars(*arguments)

    monkeypatch.setattr(figures, "bars", draw)
    assert reproduce(scale_file, "all") == 0
    output = scale_file.parent / "out"
    ke, cache = json.loads((output / "costs.json").read_text())["costs"]
    assert "DefaultCPUAllocator" in ke["failed"] and "failed" not in cache
    for name, count in (("memory", 3), ("time", 2)):
        sheet = list(csv.reader((output / f"{name}.csv").read_text().splitlines()))
        assert sheet[1] == ["wikitext", "ke", *["out of memory"] * count, "2"]
        assert sheet[2][2:-2] == ["-"] * (count - 1)
        page = (output / f"{name}.md").read_text()
        assert f"| wikitext | ke |{' out of memory |' * count} 2 |" in page
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert drawn[0] == {
        "step MiB, wikitext": {"ke": None},
        "edit MiB, wikitext": {"ke": None, "cache": cache["edit MiB"]},
    }
    memory = costs.memory_of_edits(load_scale(str(scale_file)), place(scale_file))
    assert memory[Run("wikitext", "ke")] is None


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (torch.OutOfMemoryError("no memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("something else"), False),
    ],
)
def test_costs_keep_no_other_error(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kept: bool
) -> None:
    """What was measured before memory ran out stays."""
    monkeypatch.setattr(costs, "ALGORITHMS", ("enn", "cache"))
    faked(monkeypatch, {1: error})
    scale, here = load_scale(str(scale_file)), place(scale_file)
    here.output.mkdir()
    if kept:
        enn, cache = costs.measured(scale, here)["costs"]
        assert enn["failed"] == str(error)
        assert enn["step MiB"] == 0.0 and enn["edit MiB"] is None
        assert cache["edit MiB"] == 2.0
    else:
        with pytest.raises(type(error), match=str(error)):
            costs.measured(scale, here)
        assert costs.memory_of_edits(scale, here) == {}


def test_runs_in_processes_are_the_same(scale_file: Path) -> None:
    scale = load_scale(str(scale_file))
    asked = [Run("zsre", "mend"), Run("wikitext", "mend")]
    one = runs.perform_all(scale, asked, place(scale_file))
    other = replace(place(scale_file), output=scale_file.parent / "other")
    two = runs.perform_all(scale, asked, other, jobs=2)
    for run in asked:
        a, b = one[run]["metrics"], two[run]["metrics"]
        for name in ("before", "after"):
            assert a["perplexity"][name] == pytest.approx(b["perplexity"][name], rel=1e-4)
        assert a["perplexity"]["before"] != a["perplexity"]["after"]


def test_a_training_that_was_stopped_goes_on(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale, run = load_scale(str(scale_file)), Run("wikitext", "mend")
    scored = runs._Bench._scores

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs._Bench, "_scores", stop)
    with pytest.raises(KeyboardInterrupt):
        perform(scale, run, place(scale_file), progress=False)
    log = place(scale_file).folder(run) / "editor" / "metrics.jsonl"
    lines = log.read_text()
    monkeypatch.setattr(runs._Bench, "_scores", scored)
    assert "metrics" in perform(scale, run, place(scale_file), progress=False)
    assert log.read_text() == lines  # no step was taken again


def test_an_evaluation_that_was_stopped_goes_on(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale, run = load_scale(str(scale_file)), Run("wikitext", "ft")
    folder = place(scale_file).folder(run)

    def stopped(*args: Any, **options: Any) -> None:
        evaluate(*args, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "evaluate", stopped)
        perform(scale, run, place(scale_file), progress=False)
    assert (folder / "scores.jsonl").is_file()
    changed = replace(place(scale_file), matmul="bf16")
    with pytest.raises(ValueError, match=r"spec\.json is of other settings"):
        perform(scale, run, changed, progress=False)
    monkeypatch.setattr(evaluate_module, "ChunkScores", None)  # no record is looked at again
    result = perform(scale, run, place(scale_file), progress=False)
    assert "metrics" in result and not (folder / "scores.jsonl").exists()
    (folder / "scores.jsonl").touch()  # a stop between the two
    assert perform(scale, run, place(scale_file), progress=False) == result
    assert not (folder / "scores.jsonl").exists()


def test_thresholds_that_were_stopped_go_on(scale_file: Path) -> None:
    scale, run = load_scale(str(scale_file)), Run("wikitext", "cache")
    folder = place(scale_file).folder(run)
    perform(scale, Run("wikitext", "mend"), place(scale_file), progress=False)
    kept: list[Path] = []

    def stopped(*args: Any, **options: Any) -> Any:
        if options["kept"]:
            kept.append(options["kept"])
        if len(kept) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "evaluate", stopped)
        perform(scale, run, place(scale_file), progress=False)
    assert list(folder.glob("scores-*")) == kept[:1]
    whole = perform(scale, run, place(scale_file), progress=False)
    assert len(whole["thresholds"]) == 3 and not list(folder.glob("scores-*"))


def test_other_settings_are_refused(scale_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale, run = load_scale(str(scale_file)), Run("wikitext", "ft")
    first = perform(scale, run, place(scale_file), progress=False)
    changed = replace(scale, algorithms={**scale.algorithms, "ft": {"records": 3}})
    with pytest.raises(ValueError, match="is of other settings; choose another output folder"):
        perform(changed, run, place(scale_file), progress=False)
    assert perform(scale, run, place(scale_file), progress=False) == first


def test_a_model_by_another_recipe_is_another_setting(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale, run = load_scale(str(scale_file)), Run("wikitext", "ft")
    perform(scale, run, place(scale_file), progress=False)
    spec = costs._spec(scale, place(scale_file))
    for module in (runs, costs):
        monkeypatch.setattr(module, "edition", lambda name: 7)
    with pytest.raises(ValueError, match="is of other settings; choose another output folder"):
        perform(scale, run, place(scale_file), progress=False)
    assert costs._spec(scale, place(scale_file)) != spec


@pytest.mark.filterwarnings("ignore:step")
def test_a_training_that_diverges_is_shown_as_such(scale_file: Path) -> None:
    scale, run = load_scale(str(scale_file)), Run("wikitext", "mend")
    wild = {**scale.algorithms["mend"], "train": {**TRAIN, "steps": 60, "lr": 1e30}}
    scale = replace(scale, algorithms={**scale.algorithms, "mend": wild})
    result = perform(scale, run, place(scale_file), progress=False)
    assert "steps in a row were skipped" in result["failed"]
    assert tables.cell(scale, {run: result}, tables.MEND, "wikitext") is None
    cached = perform(scale, Run("wikitext", "cache"), place(scale_file), progress=False)
    assert cached["failed"] == "wikitext-mend failed, which it builds on"


def test_an_editor_for_several_edits_starts_from_the_one_for_fewer(scale_file: Path) -> None:
    scale, several = load_scale(str(scale_file)), Run("zsre", "mend", n_edits=3)
    still = {**scale.algorithms["mend"], "train_several": {3: {"batch_size": 1, "lr": 1e-12}}}
    scale = replace(scale, algorithms={**scale.algorithms, "mend": still})
    results = runs.perform_all(scale, [several], place(scale_file))
    assert list(results) == [Run("zsre", "mend"), several] == [*scale.before(several), several]
    single, trained = (load_editor(place(scale_file).folder(r) / "editor") for r in results)
    assert trained.n_edits == 3
    names = dict(single.editor.named_parameters())
    for name, value in trained.editor.named_parameters():
        if not name.endswith("alpha"):  # it has a rate of its own
            torch.testing.assert_close(value, names[name], rtol=0, atol=1e-9)


def test_examples_without_their_editor(
    scale_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where somebody's results were copied, which hold no editors."""
    scale, run = load_scale(str(scale_file)), Run("zsre", "mend")
    runs.perform_all(scale, [run], place(scale_file))
    folder = place(scale_file).folder(run)
    shutil.rmtree(folder / "editor")
    assert reproduce(scale_file, "table10") == 2
    assert f"{folder} holds no editor, which is needed here" in capsys.readouterr().err


def test_a_table_needs_intervals(scale_file: Path) -> None:
    scale, run = load_scale(str(scale_file)), Run("zsre", "mend")
    for kept, what in ((None, "no"), (0.5, "no interval, of several groups, of")):
        metrics = {"es_outer": kept, "intervals_95": {"es_outer": None}}
        with pytest.raises(ValueError, match=f"zsre: its test records give {what} es outer"):
            tables.cell(scale, {run: {"metrics": metrics}}, tables.MEND, "zsre")


def test_an_error_is_no_divergence(scale_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    scale, run = load_scale(str(scale_file)), Run("wikitext", "mend")
    monkeypatch.setattr(runs._Bench, "_trained", fail)
    with pytest.raises(torch.OutOfMemoryError):
        perform(scale, run, place(scale_file), progress=False)
    assert not (place(scale_file).folder(run) / "result.json").exists()


def test_a_threshold_is_of_one_mend(scale_file: Path) -> None:
    """With another MEND, what was found for the first is refused."""
    scale, run = load_scale(str(scale_file)), Run("wikitext", "cache")
    perform(scale, Run("wikitext", "mend"), place(scale_file), progress=False)
    perform(scale, run, place(scale_file), progress=False)
    longer = {**scale.algorithms["mend"], "train": {**TRAIN, "steps": 4}}
    scale = replace(scale, algorithms={**scale.algorithms, "mend": longer})
    with pytest.raises(ValueError, match="is of other settings"):
        perform(scale, run, place(scale_file), progress=False)


def test_one_command_at_a_time(scale_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = scale_file.parent / "out"
    output.mkdir()
    with exclusive(output):
        assert reproduce(scale_file, "table6") == 2
    assert f"another process writes to {output}" in capsys.readouterr().err


def test_more_edits_at_once_than_records(scale_file: Path) -> None:
    scale, run = load_scale(str(scale_file)), Run("wikitext", "mend", n_edits=7)
    for other in scale.before(run):
        perform(scale, other, place(scale_file), progress=False)
    with pytest.raises(ValueError, match="8 test records, at most 6, make no two groups of 7"):
        perform(scale, run, place(scale_file), progress=False)


@pytest.mark.parametrize("name", SCALES)
def test_a_shipped_scale_is_sound(name: str) -> None:
    for quick in (False, True):
        scale = load_scale(name, quick)
        columns = {c for t in scale.tables.values() for c in t.values()}
        known = {c for t in ("table3", "table4", "table5", "table6", "table9", "table11")
                 for c in tables.paper(t)}  # fmt: skip
        assert columns - {""} <= known
        for table_name, table in tables.tables(scale).items():
            assert set(scale.tables[table_name]) <= set(scale.setups)
            for run in tables.needed(scale, table_name, table):
                settings = scale.settings(run)
                assert settings.records >= run.n_edits
                assert (settings.train is None) == (run.algorithm in ("ft", "ft+kl", "cache"))
        if not quick:
            assert isinstance(scale, Scale) and "cache" in scale.algorithms


def test_settings_of_a_run() -> None:
    scale = load_scale("mini")
    assert isinstance(scale.settings(Run("zsre", "cache")).editor, CacheConfig)
    kl = scale.settings(Run("zsre", "ft+kl")).editor
    assert isinstance(kl, FineTuneConfig) and kl.kl
    several = scale.settings(Run("zsre", "mend", n_edits=25)).editor
    assert isinstance(several, MendConfig) and several.n_edits == 25
    train = scale.settings(Run("zsre", "mend", n_edits=25)).train
    assert train and train.batch_size == 2
    ablated = scale.settings(Run("zsre", "mend", "only u")).editor
    assert isinstance(ablated, MendConfig) and ablated.x_only and not ablated.combine
    assert len({Run("zsre", "mend", v).name for v in VARIANTS}) == len(VARIANTS)


def test_what_a_run_builds_on() -> None:
    scale = load_scale("mini")
    many = [Run("zsre", "enn", n_edits=n) for n in scale.batches]
    assert scale.before(many[-1]) == many[:-1] and not scale.before(many[0])
    assert scale.before(Run("zsre", "enn", n_edits=7)) == many[:2]
    assert scale.before(Run("zsre", "cache")) == [Run("zsre", "mend")]


def test_groups_stay_within_a_drawing() -> None:
    test: list[Any] = list(range(20))  # two drawings of ten
    assert data.groups(test, 2, 1, 7) == list(range(7))
    several = data.groups(test, 2, 3, 100)
    first, second = several[:9], several[9:]
    assert set(first) < set(range(10)) and set(second) < set(range(10, 20))
    assert [len(first), len(set(first)), len(second), len(set(second))] == [9] * 4
    assert first != [x - 10 for x in second], "their groups are of other facts"
    assert data.groups(test, 2, 3, 10) == first


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("Paris", "Lisbon", "Parbon"),
        ("Wat Pho", "the Great Wall", "Wat Great Wall"),
        ("A Tale of Two Cities", "Ulysses", "A Tale of Ulysses"),
        ("Emma", "Moll Flanders", "Emma Flanders"),
    ],
)
def test_a_name_of_two(first: str, second: str, name: str) -> None:
    assert data.invented(first, second) == name


@pytest.mark.parametrize("kind", ["qa", "claims"])
def test_invented_subjects(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.BUILT_IN, kind, partial(some, kind, every=9))
    setup = Setup("facts", "no model", kind, draws=2, invented=3)
    data.prepare(setup, tmp_path)
    parts = data.records(setup, tmp_path, None)
    drawn = data.records(replace(setup, invented=0), tmp_path, None)
    assert {s: parts[s] == drawn[s] for s in drawn} == dict(train=False, validation=True, test=True)
    size = len(drawn["train"])
    assert parts["train"][:size] == drawn["train"]
    more = parts["train"][size:]
    assert len(more) == 3 * size // 2
    names = [str(r.subject) for r in more]
    real = {r.subject for part in drawn.values() for r in part}
    assert not real & set(names) and len(set(names)) > 100
    first, third = more[: size // 2], more[size:]  # of the same drawing
    assert [r.target for r in first] == [r.target for r in third]
    assert [r.subject for r in first] != [r.subject for r in third]
    wordings = {p for r in load_relations() for p in (*r.patterns, *question_wordings(r))}
    for record, of in zip(first, drawn["train"], strict=False):
        assert record.ground_truth is None and record.locality == of.locality
        for text, before in zip(
            (record.prompt, *record.rephrases), (of.prompt, *of.rephrases), strict=True
        ):
            assert any(
                text == p.format(record.subject) + before[len(p.format(of.subject)) :]
                for p in wordings
                if before.startswith(p.format(of.subject))
            )


def test_names_of_nobody() -> None:
    """A subject with another article is no new one."""
    assert data._is_new("Parbon")
    for name in ("The Inception", "inception", "Paris"):
        assert not data._is_new(name)


def test_models_are_made_side_by_side(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those that are there, and those that others make, are left alone."""
    monkeypatch.setenv("PYMEND_CACHE", str(tmp_path))
    asked: dict[str, Any] = {}

    def made(work: Any, names: dict[str, Any], jobs: int, matmul: str) -> Any:
        assert work is runs.locate and matmul == "ieee"
        asked.update(names, jobs=jobs)
        return iter([(name, name) for name in names])

    monkeypatch.setattr(runs, "in_processes", made)
    runs.make_models(load_scale(str(scale_file)), ["zsre", "wikitext"], jobs=2)
    assert not asked
    mini_scale = load_scale("mini")
    there = mini.folder("gpt2-mini")
    there.mkdir()
    (there / "complete.json").write_text("{}")
    runs.make_models(mini_scale, ["zsre", "fever", "wikitext", "zsre-hard"], jobs=8)
    assert asked == {
        "bart-mini": ("bart-mini", False),
        "bert-mini": ("bert-mini", False),
        "jobs": 2,
    }
    asked.clear()
    runs.make_models(mini_scale, ["zsre"], jobs=8)
    assert asked == {"bart-mini": ("bart-mini", True), "jobs": 1}


def test_answers_and_errors_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results by key; what is wrong with what the user gave is told as if it were found here.

    In threads: real processes, which import torch anew, are those of the tests above.
    """
    monkeypatch.setattr(runs, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(runs, "start", lambda threads, matmul: None)
    asked = {n: (n,) for n in ("no model", "neither", "nor this")}
    assert dict(runs.in_processes(locate, asked, 2, "ieee")) == {n: n for n in asked}
    with pytest.raises(ValueError, match="no model is called 'x'") as caught:
        list(runs.in_processes(mini.folder, {"x": ("x",)}, 1, "ieee"))
    assert meant_for_user(caught.value)
    with pytest.raises(json.JSONDecodeError) as bug:
        list(runs.in_processes(json.loads, {"x": ("{",)}, 1, "ieee"))
    assert not meant_for_user(bug.value)


def test_what_is_missing_is_said_first(
    scale_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is made, which takes minutes."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(runs, "make_models", refuse)
    words = ["reproduce", "table4", "--scale", str(scale_file)]
    out = ["--output", str(scale_file.parent / "out")]
    assert main([*words, *out]) == 2
    assert "wikitext reads wiki; name their folder" in capsys.readouterr().err
    assert main([*words, *out, "--data", str(scale_file.parent)]) == 2
    assert "wiki does not exist; the folder of --data must hold it" in capsys.readouterr().err
    assert main([*words, *out, "--device", "cuda:99"]) == 2
    assert "device 'cuda:99' cannot be used" in capsys.readouterr().err


def test_quick_draws_less(scale_file: Path) -> None:
    full, quick = load_scale("mini"), load_scale("mini", quick=True)
    assert full.setups["zsre"].draws > 2
    assert all(max(s.draws, s.invented) <= 2 for s in quick.setups.values())
    steps = {
        scale.note: [scale.settings(Run(x, "mend")).train.steps for x in ("fever", "wikitext")]
        for scale in (full, quick)
    }
    assert steps == {full.note: [24000, 1600], quick.note: [600, 120]}
    raw = yaml.safe_load(scale_file.read_text())  # its quick part says nothing of drawings
    raw["setups"]["zsre"]["invented"] = 5
    scale_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    kept = load_scale(str(scale_file), quick=True).setups["zsre"]
    assert (kept.draws, kept.invented) == (2, 5)


def test_halves_of_one_file(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"Fact {i} is", "target": "so"}) for i in range(40)]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    setup = Setup("one", "no model", {"train": "one.jsonl"})
    parts = data.records(setup, tmp_path, tmp_path)
    assert [len(parts[s]) for s in ("train", "validation", "test")] == [18, 2, 20]
    assert parts["test"][0].prompt == "Fact 20 is"
    with pytest.raises(ValueError, match=r"one reads one\.jsonl; name their folder"):
        data.records(setup, tmp_path, None)


def cell(success: tuple[float, float, float], drawdown: tuple[float, float, float]) -> tables.Cell:
    """From (value, low, high)."""
    return tables.Cell(success[0], success[1:], drawdown[0], drawdown[1:], {})


def test_verdicts() -> None:
    high = cell((0.9, 0.85, 0.95), (0.1, 0.05, 0.15))
    low = cell((0.5, 0.4, 0.6), (0.01, 0.0, 0.02))
    near = cell((0.85, 0.8, 0.9), (0.12, 0.06, 0.2))
    claim = tables.Claim("a", "b")
    assert tables.verdict(claim, high, low)[0] == "holds"
    assert tables.verdict(claim, high, near)[0] == "holds, intervals overlap"
    assert tables.verdict(claim, low, high)[0] == "does not hold"
    assert tables.verdict(claim, high, None) == ("holds", "diverged")
    assert tables.verdict(claim, None, high) == ("does not hold", "diverged")
    costs_less = replace(claim, drawdown=True)
    assert tables.verdict(costs_less, low, high)[0] == "holds"
    assert tables.verdict(costs_less, high, near)[0] == "holds, intervals overlap"
    assert tables.verdict(costs_less, high, low)[0] == "does not hold"
    assert "0.900 [0.850, 0.950] against 0.500 [0.400, 0.600]" in tables.verdict(claim, high, low)


def test_the_papers_numbers_can_be_read() -> None:
    for name in ("table3", "table4", "table5", "table6", "table9", "table11"):
        for column in tables.paper(name).values():
            for text in column.values():
                success, drawdown = tables.printed(text)
                assert 0 <= success <= 1 and 0 <= drawdown < 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table7"], "has no 'table7'; choose all, or of table3"),
        (["table4", "--scale", "nano"], "no scale 'nano'; choose one of mini, smollm2, paper"),
        (["all", "table12"], "has no 'table12'; choose all, or of table3"),
        (["table4", "--jobs", "0"], "--jobs is 0; it must be at least 1"),
    ],
)
def test_what_is_refused(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_scale(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("note: nothing else\n")
    with pytest.raises(ValueError, match=r"bad\.yaml is no scale"):
        load_scale(str(tmp_path / "bad.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["setups"].pop("zsre"), "has no zsre"),
        (lambda raw: raw["algorithms"].pop("ke"), "has no ke"),
        (
            lambda raw: raw["setups"]["wikitext"].update(invented=1),
            "invented subjects for wikitext; only claims, qa, zsre-hard can have any",
        ),
        (lambda raw: raw["algorithms"]["cache"].update(factors=[1.0]), "lacks some of"),
        (lambda raw: raw.pop("quick"), "is no scale: it has no 'quick'"),
        (lambda raw: raw["algorithms"]["ft"].pop("records"), "scores no records of ft; give it"),
        (lambda raw: raw["tables"].update(table12={"zsre": ""}), "has a table table12, which is"),
    ],
)
def test_a_scale_that_lacks_something(scale_file: Path, change: Any, message: str) -> None:
    raw = yaml.safe_load(scale_file.read_text())
    change(raw)
    scale_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(ValueError, match=message):
        load_scale(str(scale_file), quick=True)


def test_the_scale_paper_edits_what_the_paper_edits() -> None:
    """The default would take both of T5's gated pair, and every model's in the order of its own."""
    scale = load_scale("paper")
    for setup, algorithm in product(scale.setups, ("mend", "ke", "enn", "ft", "ft+kl")):
        editor = scale.settings(Run(setup, algorithm)).editor
        assert not isinstance(editor, CacheConfig) and editor.edit == ("paper",)
    attention = scale.settings(Run("zsre-xl", "mend", "attention")).editor
    assert isinstance(attention, MendConfig) and attention.edit == ("attention",)


def test_every_claim_is_in_the_papers_table() -> None:
    scale = load_scale("paper")
    for name, table in tables.tables(scale).items():
        for claim in table.claims:
            said = [
                column
                for column in tables.paper(name).values()
                if claim.better in column and claim.worse in column
            ]
            assert said, claim
