"""What is run: the setups of a scale, the runs that a table needs, and their settings.

A *setup* is a column of the paper's tables: a model and a data set. A *run* is an algorithm on a
setup, and gives one cell. The same run may stand in several tables, and is carried out once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pymend.algorithms.registry import METHODS
from pymend.config import CacheConfig, EditorConfig, FineTuneConfig, TrainConfig, from_json
from pymend.data.readers import read_text

SCALES = ("mini", "smollm2", "paper")
COSTS = ("memory", "time")
TABLES = (*(f"table{n}" for n in (3, 4, 5, 6, 8, 9, 10, 11)), *COSTS)
WITH_SUBJECTS = ("claims", "qa", "zsre-hard")  # sets from facts whose records name their subject
FACTORS = (0.5, 1.0, 2.0)  # of Cache's eps*, as in the paper

# Table 6 and Table 9: what is changed of MEND.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "no sharing": {"shared": False},
    "no normalisation": {"norm": False},
    "no identity init": {"init": "xavier"},
    "only u": {"combine": False, "x_only": True},
    "only delta": {"combine": False, "delta_only": True},
    "only smaller": {"combine": False, "one_sided": True},
    "attention": {"edit": ["attention"]},
}


@dataclass(frozen=True)
class Setup:
    """A model and what it is edited on.

    Args:
        model: as ``--model`` takes it.
        data: a data set that is built in, or its files below the folder of ``--data``.
        draws: of a set from the built-in facts, how many drawings of targets and wordings.
        invented: how many drawings more, for training, with names of subjects that do not exist.
        drawdown: what an edit must not cost.
    """

    name: str
    model: str
    data: str | Mapping[str, str]
    draws: int = 1
    invented: int = 0
    drawdown: str = "accuracy_drawdown"


@dataclass(frozen=True, order=True)
class Run:
    """An algorithm on a setup."""

    setup: str
    algorithm: str
    variant: str = ""
    n_edits: int = 1

    @property
    def name(self) -> str:
        """The name of its folder."""
        several = f"{self.n_edits} edits" if self.n_edits > 1 else ""
        parts = (self.setup, self.algorithm.replace("+", "-"), self.variant, several)
        return "-".join(p.replace(" ", "-") for p in parts if p)


@dataclass(frozen=True)
class Settings:
    """All that a run depends on besides its setup."""

    editor: EditorConfig | FineTuneConfig | CacheConfig
    train: TrainConfig | None  # None: nothing is trained
    records: int  # edits that are scored, at most
    factors: tuple[float, ...] = FACTORS


@dataclass(frozen=True)
class Scale:
    """How large a reproduction is: its setups, and the settings of every algorithm.

    Args:
        note: what differs from the paper, for the captions.
        tables: of every table, the setups in it and the paper's column that each stands for.
        algorithms: settings by name: ``train``, ``editor``, ``records``, ``factors``, and by the
            number of simultaneous edits, ``train_several``.
        overrides: the same of single setups, by the setup's name.
        batches: the numbers of simultaneous edits in Table 5.
    """

    name: str
    note: str
    setups: Mapping[str, Setup]
    tables: Mapping[str, Mapping[str, str]]
    algorithms: Mapping[str, Mapping[str, Any]]
    overrides: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    batches: tuple[int, ...] = (1, 5, 25, 75, 125)

    def after(self, run: Run) -> Run | None:
        """The run that ``run`` builds on.

        Cache's threshold is found from MEND's drawdown; an editor for several edits at once is
        trained on from the one for the next smaller number.
        """
        if run.algorithm == "cache":
            return Run(run.setup, "mend")
        if run.n_edits > 1:
            fewer = [n for n in self.batches if n < run.n_edits]
            return replace(run, n_edits=max(fewer, default=1))
        return None

    def before(self, run: Run) -> list[Run]:
        """The runs that have to be done before ``run``, the first one first."""
        after = self.after(run)
        return [*self.before(after), after] if after else []

    def settings(self, run: Run) -> Settings:
        """What ``run`` is made with.

        Raises:
            ValueError: the scale's file gives a setting that does not exist.
        """
        own_setup = self.overrides.get(run.setup, {}).get(run.algorithm, {})
        given = _merged(self.algorithms[run.algorithm], own_setup)
        where = f"scale {self.name}, {run.algorithm}"
        method, factors = METHODS[run.algorithm], tuple(given.get("factors", FACTORS))
        own = {**given.get("editor", {}), **VARIANTS[run.variant]}
        train = None
        if method.trained:
            train = dict(given["train"])
            if run.n_edits > 1:
                own["n_edits"] = run.n_edits
                train |= given.get("train_several", {}).get(run.n_edits, {})
        return Settings(
            method.settings(own, where),
            None if train is None else from_json(TrainConfig, train, where),
            given["records"],
            factors,
        )


def load_scale(name: str, quick: bool = False) -> Scale:
    """A scale that is shipped, or one in a file of the user's.

    Args:
        name: one of ``SCALES``, or a YAML file.
        quick: with the reductions that the file lists below ``quick``.

    Raises:
        ValueError: no such scale, or a file without the parts of one.
    """
    if name in SCALES:
        text = (resources.files("pymend.reproduce") / f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = read_text(Path(name))
    else:
        raise ValueError(f"no scale {name!r}; choose one of {', '.join(SCALES)}, or a YAML file")
    try:
        raw = yaml.safe_load(text)
        if not isinstance(raw, dict):
            raise TypeError("it is no mapping")
        reduced = raw.pop("quick", None)
        if quick and reduced is None:
            raise KeyError("quick")
        setups = {key: Setup(key, **value) for key, value in raw.pop("setups").items()}
        batches = tuple(raw.pop("batches", Scale.batches))
        scale = Scale(Path(name).stem, setups=setups, batches=batches, **raw)
        scale = _reduced(scale, reduced) if quick else scale
        absent = {s for table in scale.tables.values() for s in table} - set(setups)
        absent |= METHODS.keys() - set(scale.algorithms)
        unscored = [a for a, own in scale.algorithms.items() if own.get("records", 0) < 1]
        factors = scale.algorithms["cache"].get("factors", FACTORS)
        nameless = [s.name for s in setups.values() if s.invented and s.data not in WITH_SUBJECTS]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(f"{name} is no scale: {what}") from error
    unknown = set(scale.tables) - set(TABLES)
    if unknown:
        raise ValueError(
            f"{name} has a table {min(unknown)}, which is none; choose of {', '.join(TABLES)}"
        )
    if unscored:
        raise ValueError(f"{name} scores no records of {unscored[0]}; give it records, 1 or more")
    if nameless:
        raise ValueError(
            f"{name} has invented subjects for {', '.join(nameless)}; only "
            f"{', '.join(WITH_SUBJECTS)} can have any"
        )
    if absent or not set(FACTORS) <= set(factors):
        what = f"has no {', '.join(sorted(absent))}" if absent else f"lacks some of {FACTORS}"
        raise ValueError(f"{name} {what}")
    return scale


def _reduced(scale: Scale, quick: Mapping[str, Any]) -> Scale:
    """``scale`` with less of everything that ``quick`` names."""
    algorithms = {
        name: _merged(own, quick["algorithms"].get(name, {}))
        for name, own in scale.algorithms.items()
    }
    most = quick.get("draws", math.inf)
    # What a setup asks for beyond the usual is left out, unless it has a reduced version.
    return replace(
        scale,
        note=f"{scale.note} {quick['note']}",
        setups={
            name: replace(s, draws=min(s.draws, most), invented=min(s.invented, most))
            for name, s in scale.setups.items()
        },
        algorithms=algorithms,
        overrides=quick.get("overrides", {}),
        batches=tuple(quick.get("batches", scale.batches)),
    )


def _merged(own: Mapping[str, Any], less: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` with what ``less`` has in its place, mapping by mapping."""
    merged = dict(own)
    for key, value in less.items():
        merged[key] = _merged(own.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged
