"""``pymend eval``: measure a trained editor, or a rival that needs none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pymend.algorithms.registry import METHODS
from pymend.commands.asking import editor_of
from pymend.commands.edit import STRENGTH
from pymend.commands.settings import SETS, Flag, Machine, Model, named_values

UNTRAINED = tuple(name for name, method in METHODS.items() if not method.trained)


def evaluate(
    data: Annotated[str, Flag(f"facts (the test split), a file, or {SETS}")],
    model: Model,
    machine: Machine,
    editor: Annotated[
        str | None,
        Flag("what train wrote: mend, ke or enn; default: the one that ships for the model", "DIR"),
    ] = None,
    algorithm: Annotated[
        str | None, Flag("a rival without a trained editor, in its place", choices=UNTRAINED)
    ] = None,
    set: Annotated[
        tuple[str, ...],
        Flag("a setting of a rival, a field of its configuration; may be repeated", "NAME=VALUE"),
    ] = (),
    locality_data: Annotated[
        str | None, Flag("ft+kl: training records whose locality it holds", "FILE")
    ] = None,
    strength: Annotated[float, Flag(STRENGTH)] = 1.0,
    limit: Annotated[int | None, Flag("only the first records", least=1)] = None,
    output: Annotated[
        str | None,
        Flag(
            "write the results as JSON; the scores on the way are in FILE.part, from which the "
            "same command goes on",
            "FILE",
        ),
    ] = None,
    ppl_text: Annotated[str | None, Flag("text for the perplexity drawdown", "FILE")] = None,
    batch_size: Annotated[int, Flag("edits in one pass", least=1)] = 16,
    n_edits: Annotated[int, Flag("simultaneous edits", least=1)] = 1,
    read: Annotated[
        int, Flag("records whose answers are read as a person would; 0: none", least=0)
    ] = 0,
) -> None:
    """Measure a trained editor, or a rival."""
    from pymend.data import load_records
    from pymend.data.rows import read_text

    if not algorithm and (set or locality_data):
        raise ValueError("--set and --locality-data are for rivals; leave them out")
    if algorithm and (editor or strength != 1):
        raise ValueError(f"{algorithm} has no trained editor; leave out --editor, --strength")
    if (algorithm == "ft+kl") != bool(locality_data):
        raise ValueError("--locality-data FILE is for ft+kl, which needs it")
    model = model.of(editor)
    found = None if algorithm else editor_of(editor, model.model)
    method = METHODS[algorithm] if algorithm else None
    config = method.settings(_settings(set, method.config), "--set") if method else None
    records = load_records(data, split="test")[:limit]
    # Built-in facts: those of training, never those that are scored.
    held = load_records(locality_data, split="train") if locality_data else []
    text = read_text(Path(ppl_text)) if ppl_text else None
    file = _file(output) if output else None

    from pymend import evaluation
    from pymend.algorithms.registry import load_editor
    from pymend.files import write_json
    from pymend.report.tables import metrics_table

    measured: Any = None if found is None else load_editor(found).scale_(strength)
    chat = model.speech(measured) if measured else model.template
    loaded, tokenizer = machine.load(model.model)
    if method:
        measured = method.load().from_config(
            loaded, config, tokenizer=tokenizer, train_data=held, chat=model.template
        )
    kept = file.with_name(f"{file.name}.part") if file else None
    try:
        result = evaluation.evaluate(
            measured,
            loaded,
            tokenizer,
            records,
            batch_size=batch_size,
            ppl_text=text,
            chat=chat,
            n_edits=n_edits,
            kept=kept,
        )
    except KeyboardInterrupt:
        again = "; run the same command again to continue" if kept else ""
        raise KeyboardInterrupt(f"interrupted{again}") from None
    metrics = result.to_dict()
    if read:
        few = records[:read]
        heard = evaluation.read(measured, loaded, tokenizer, few, batch_size=batch_size, chat=chat)
        metrics["reads"] = heard.to_dict()
    print(metrics_table(metrics))
    print(metrics["protocol"])
    if file and kept:
        source: dict[str, Any] = {
            "model": model.model,
            "algorithm": algorithm,
            "editor": editor or (found and f"shipped for {model.model}"),
            "data": data,
            "strength": strength,
        }
        if algorithm:
            source["settings"] = asdict(measured.config)
        write_json(file, {**metrics, "source": source})
        kept.unlink(missing_ok=True)
        print(f"written to {file}")


def _settings(pairs: Sequence[str], config: type) -> dict[str, Any]:
    """NAME=VALUE as settings of ``config``."""
    settings: dict[str, Any] = {}
    for name, value in named_values(pairs, "--set").items():
        patterns = isinstance(value, str) and isinstance(getattr(config, name, None), tuple)
        settings[name] = [value] if patterns else value
    return settings


def _file(name: str) -> Path:
    """``name`` as a file that may be written.

    Raises:
        OSError: it is a folder, or its folder cannot be written.
    """
    from pymend.files import writable_dir

    file = Path(name)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a file for the results")
    writable_dir(file.parent, make=False)
    return file
