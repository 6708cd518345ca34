"""Requests and settings: frozen dataclasses that read and write plain JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

FORMAT_VERSION = 1  # of every JSON file this package writes

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is looked at but not edited: locality or portability.

    Without an ``answer`` every token of the prompt is compared.
    """

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class EditRequest:
    """One fact to change, with what is needed to train on it and to judge it.

    Only ``prompt`` and ``target`` are needed to edit. ``target`` carries no leading space; it is
    joined to the prompt by one (see ``pymend.engine.tokens``).
    """

    prompt: str
    target: str
    ground_truth: str | None = None
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The JSONL record of this request; empty optional fields are left out."""
        full = dataclasses.asdict(self)
        kept = {k: v for k, v in full.items() if v not in (None, (), [])}
        for name in ("locality", "portability"):
            if name in kept:
                kept[name] = [{k: v for k, v in p.items() if v is not None} for p in kept[name]]
        return kept


@dataclass(frozen=True)
class EditorConfig:
    """What every trained editor has to be told: the weights it edits."""

    edit: tuple[str, ...] = ()  # weight names, patterns, or mlp, attention, all, paper; empty: mlp
    blocks: int = 0  # of a kind, how many last blocks; 0: three, of an encoder-decoder two each

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_at_least(self, 0, "blocks")


@dataclass(frozen=True)
class MendConfig(EditorConfig):
    """What an editor is: its network, the weights it edits, its numeric conventions.

    The defaults are the paper's (section 4 and appendix C); ``mend.py`` says what each does.
    """

    rank: int = 1920  # width of each low-rank layer, cut to the layer's input width
    alpha: float = 1e-4  # initial step size of every weight
    shared: bool = True  # one network per weight shape
    norm: bool = True
    init: Literal["id", "xavier"] = "id"
    init_v: Literal["normal", "xavier"] = "normal"
    combine: bool = True  # one network on (u, delta) together
    one_sided: bool = False
    x_only: bool = False
    delta_only: bool = False
    n_edits: int = 1  # simultaneous edits the editor is trained for
    official: bool = False  # numeric conventions of the paper's code; see docs/design.md

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "rank", "n_edits")
        _check_finite(self, "alpha")
        partial = [n for n in ("one_sided", "x_only", "delta_only") if getattr(self, n)]
        if self.combine and partial:
            raise ValueError(f"{partial[0]} needs combine=False: one network for each side")
        if len(partial) > 1:
            raise ValueError(f"{' and '.join(partial)} exclude each other; choose one")


@dataclass(frozen=True)
class KeConfig(EditorConfig):
    """KnowledgeEditor, with the widths of the MEND paper's code; ``algorithms/ke.py`` uses them."""

    lstm: int = 512  # hidden width of the LSTM, each way
    condition: int = 768  # width of what it makes of a request
    hidden: int = 512  # hidden width of the network of each weight

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "lstm", "condition", "hidden")


@dataclass(frozen=True)
class EnnConfig(EditorConfig):
    """Editable neural network: one step of gradient descent on a base trained for that."""

    alpha: float = 1e-2  # initial step size of every weight
    second_order: bool = True  # differentiate through the gradient of the step
    c_base: float = 1.0  # weight of the KL from the model to its adapted copy (generation: 10)
    n_edits: int = 1  # simultaneous edits the editor is trained for

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "n_edits")
        _check_at_least(self, 0, "c_base")
        _check_finite(self, "alpha")


@dataclass(frozen=True)
class TrainConfig:
    """The outer loop. A *step* is one optimiser step over ``batch_size`` independent episodes."""

    steps: int = 1000
    batch_size: int = 10
    accumulate: int = 1  # passes that one step is split into, to save memory
    outer: Literal["both", "rephrase", "prompt"] = "both"
    lr: float = 1e-4
    alpha_lr: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0  # steps of linear warm-up
    c_edit: float = 0.1
    c_loc: float = 1.0
    clip: float = 100.0
    seed: int = 0
    eval_every: int = 100  # steps
    eval_records: int = 200
    patience: int = 0  # evaluations without a better loss before stopping; 0: never
    keep: Literal["best", "last"] = "best"  # the editor of the lowest validation loss, or the last
    save_every: int = 100  # steps
    prefix_cache: Literal["none", "memory"] = "none"

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_at_least(self, 1, "steps", "batch_size", "accumulate")
        _check_at_least(self, 1, "eval_every", "eval_records", "save_every")
        _check_at_least(self, 0, "lr", "alpha_lr", "c_edit", "c_loc", "warmup", "patience")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not split into {self.accumulate} equal passes; "
                "choose accumulate among its divisors"
            )


@dataclass(frozen=True)
class FineTuneConfig:
    """Fine-tuning on the facts of one edit (the paper's FT and FT+KL)."""

    lr: float = 0.0  # of RMSprop; 0: the paper's for a model of this kind and size
    steps: int = 100  # at most: an edit that took is done
    clip: float = 100.0  # largest gradient norm
    kl: bool = False  # FT+KL: hold a locality example from the training data at every step
    c_edit: float = 0.0  # FT+KL: weight of the edit loss; 0: the paper's
    rank: int = 0  # of the change of every weight; 0: full
    edit: tuple[str, ...] = ()  # as of MendConfig
    blocks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "steps")
        _check_at_least(self, 0, "lr", "c_edit", "rank", "blocks")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0")


@dataclass(frozen=True)
class CacheConfig:
    """Remembered answers for inputs that look like the edited ones (paper, appendix G)."""

    eps: float = 2.5  # distance below which an input is taken for the edited one; goes by the model
    scale: float = 20.0  # logit of a remembered token; the others are 0

    def __post_init__(self) -> None:
        _check_at_least(self, 0, "eps", "scale")


def _check_choices(config: Any) -> None:
    """Refuse a value that its field's ``Literal`` does not list."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(get_args(hint))}")


def _check_at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:  # so put, it refuses NaN as well
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least {least}")


def _check_finite(config: Any, name: str) -> None:
    if not math.isfinite(getattr(config, name)):
        raise ValueError(f"{name} is {getattr(config, name)}; it must be finite")


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as a JSON object."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build ``cls`` from a JSON object. ``where`` names the source in errors.

    Raises:
        ValueError: a key that ``cls`` does not have, or a value of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(fields)}")
    given = {}
    for name, value in values.items():
        default = fields[name].default
        if isinstance(value, list):
            value = tuple(value)
            if not all(isinstance(part, str) for part in value):
                raise ValueError(f"{where}: {name} must be a list of texts, got {list(value)!r}")
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if default is not dataclasses.MISSING and type(value) is not type(default):
            raise ValueError(f"{where}: {name} must be a {type(default).__name__}, got {value!r}")
        given[name] = value
    return cls(**given)
