"""Requests and settings: frozen dataclasses that read and write plain JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

FORMAT_VERSION = 1  # of every JSON file this package writes
# Han, kana and their punctuation, Thai, Lao, Burmese, Khmer: scripts without spaces between words.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff"
    "\uff00-\uffef\U00020000-\U000323af]"
)
CLOSING = re.compile(r"[.,;:!?\u2026](?!\w)")  # not the dot of ".NET"

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """A prompt whose answer is looked at but not edited: locality or portability.

    Without an ``answer`` every token of the prompt is compared. ``joint`` is what stands between
    the two, as in :class:`EditRequest`.
    """

    prompt: str
    answer: str | None = None
    joint: str | None = None

    def __post_init__(self) -> None:
        _check_texts(self)


@dataclass(frozen=True)
class EditRequest:
    """One fact to change, with what is needed to train on it and to judge it.

    Only ``prompt`` and ``target`` are needed to edit. ``joint`` is what stands between the two (and
    between a rephrase and the target): None chooses nothing or a space by what meets at the seam,
    where stray spaces count for nothing (:func:`joint_of`); a text of your own stands there as it
    is. A ``{}`` in the prompt or a rephrase stands for the subject, if there is one and it does not
    stand there already.

    Raises:
        ValueError: a text with half a character in it.
    """

    prompt: str
    target: str
    ground_truth: str | None = None
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    joint: str | None = None

    def __post_init__(self) -> None:
        _check_texts(self)
        if self.subject:
            # The way to set a field of a frozen object.
            object.__setattr__(self, "prompt", filled_in(self.prompt, self.subject))
            rephrases = tuple(filled_in(text, self.subject) for text in self.rephrases)
            object.__setattr__(self, "rephrases", rephrases)

    def to_dict(self) -> dict[str, Any]:
        """The JSONL record of this request; empty optional fields are left out."""
        full = dataclasses.asdict(self)
        kept = {k: v for k, v in full.items() if v not in (None, (), [])}
        for name in ("locality", "portability"):
            if name in kept:
                kept[name] = [{k: v for k, v in p.items() if v is not None} for p in kept[name]]
        return kept


def joint_of(prompt: str, target: str) -> str:
    """What stands between a prompt and its target, where nobody says: a space or nothing.

    Nothing behind white space, an opening bracket or quote, before white space or closing
    punctuation, and where either side of the seam is of a script without spaces.
    """
    before, after = prompt[-1:], target[:1]
    if not before or not after:
        return ""
    kinds = unicodedata.category(before), unicodedata.category(after)
    opening = kinds[0] == "Ps" or (
        (before in "\"'`" or kinds[0] in ("Pi", "Pf"))
        and not re.search(r"[\w.,;:!?)\]}].\Z", prompt)  # behind a word a quote closes
    )
    closing = kinds[1] in ("Pe", "Pf") or CLOSING.match(target)
    unspaced = UNSPACED.match(before) or UNSPACED.match(after)
    spaced = before.isspace() or after.isspace()
    return "" if opening or closing or unspaced or spaced else " "


def filled_in(text: str, subject: str) -> str:
    """A template with its ``{}`` replaced by ``subject``; any other text as it is."""
    return text if subject in text else text.replace("{}", subject)


def check_text(text: str, what: str) -> None:
    """Refuse half a character, such as JSON writes for text that was cut inside an emoji.

    Args:
        what: names the text, for the error.

    Raises:
        ValueError: there is one.
    """
    half = re.search("[\ud800-\udfff]", text)
    if half:
        raise ValueError(
            f"{what} holds half a character ({half.group()!a} in {text[:60]!a}), which is no text; "
            "repair it"
        )


def _check_texts(values: Any) -> None:
    """Refuse half a character in any text of a dataclass."""
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        for text in value if isinstance(value, tuple | list) else [value]:
            if isinstance(text, str):
                check_text(text, f"the {field.name}")


def setting(default: T, help: str, metavar: str | None = None, later: bool = False) -> T:
    """The field of a setting, with what ``--help`` shows for its flag and for the flag's value.

    Args:
        later: files were written without it. :func:`to_json` leaves it out at its default, so that
            they go on to agree.
    """
    about = {"help": help, "metavar": metavar, "later": later}
    field: T = dataclasses.field(default=default, metadata=about)
    return field


@dataclass(frozen=True)
class EditorConfig:
    """What every trained editor has to be told: the weights it edits."""

    edit: tuple[str, ...] = setting(
        (),
        "weights to edit: mlp, attention or all of the last blocks, routed or shared for the "
        "experts of a mixture, paper for the paper's own list, or names and patterns; nothing: mlp",
    )
    blocks: int = setting(
        0, "how many of the last blocks; 0: three, of an encoder-decoder two of each stack"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_at_least(self, 0, "blocks")


@dataclass(frozen=True)
class MendConfig(EditorConfig):
    """What an editor is: its network, the weights it edits, its numeric conventions.

    The defaults are the paper's (section 4 and appendix C); ``mend.py`` says what each does.
    """

    rank: int = setting(1920, "width of the editor's low-rank layers, at most the input's")
    alpha: float = setting(1e-4, "initial step size of every weight")
    shared: bool = setting(True, "one network for each weight shape, not for each weight")
    norm: bool = setting(True, "normalise the inputs by running moments")
    init: Literal["id", "xavier"] = setting("id", "start of the networks; id: the identity")
    init_v: Literal["normal", "xavier"] = setting(
        "normal", "start of the first factor of each layer"
    )
    combine: bool = setting(True, "one network for u and delta together")
    one_sided: bool = setting(False, "transform only the smaller side")
    x_only: bool = setting(False, "transform only u")
    delta_only: bool = setting(False, "transform only delta")
    n_edits: int = setting(1, "simultaneous edits the editor is trained for")
    official: bool = setting(False, "numeric conventions of the paper's code")  # docs/design.md

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

    lstm: int = setting(512, "width of the LSTM that reads a request, each way")
    condition: int = setting(768, "width of what the LSTM makes of a request")
    hidden: int = setting(512, "width of the network of each weight")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "lstm", "condition", "hidden")


@dataclass(frozen=True)
class EnnConfig(EditorConfig):
    """Editable neural network: one step of gradient descent on a base trained for that."""

    alpha: float = setting(1e-2, "initial step size of every weight")
    second_order: bool = setting(True, "differentiate through the gradient of the inner step")
    # The paper has 10 for generation.
    c_base: float = setting(
        1.0, "weight of the loss that keeps the adapted base close to the model"
    )
    n_edits: int = setting(1, "simultaneous edits the editor is trained for")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_at_least(self, 1, "n_edits")
        _check_at_least(self, 0, "c_base")
        _check_finite(self, "alpha")


@dataclass(frozen=True)
class TrainConfig:
    """The outer loop. A *step* is one optimiser step over ``batch_size`` independent episodes."""

    steps: int = setting(1000, "optimiser steps")
    batch_size: int = setting(10, "independent edits in one step")
    accumulate: int = setting(1, "passes that one step is split into, to save memory")
    outer: Literal["both", "rephrase", "prompt"] = setting(
        "both", "prompts the edit loss is taken on"
    )
    lr: float = setting(1e-4, "learning rate of the editor's networks")
    alpha_lr: float = setting(1e-4, "learning rate of the step sizes alpha")
    schedule: Literal["constant", "cosine"] = setting("constant", "learning rate after warm-up")
    warmup: int = setting(0, "steps of linear warm-up")
    c_edit: float = setting(0.1, "weight of the edit loss")
    c_loc: float = setting(1.0, "weight of the locality loss")
    c_after: float = setting(
        1.0, "weight of the loss on what follows the target, if --after asks for it", later=True
    )
    after: int = setting(
        0,
        "tokens behind the target on which the edited model is to go on as before; 0: none",
        later=True,
    )
    locality_rows: int = setting(
        1, "locality prompts for each edit; those that a record lacks are others'", later=True
    )
    clip: float = setting(100.0, "largest gradient norm")
    seed: int = setting(0, "seed of the editor's start and of the sampling")
    eval_every: int = setting(100, "steps between validations")
    eval_records: int = setting(200, "validation records")
    patience: int = setting(0, "validations without a better loss before stopping; 0: never")
    keep: Literal["best", "last"] = setting(
        "best", "which editor is saved: of the lowest validation loss, or the last"
    )
    save_every: int = setting(100, "steps between checkpoints")
    prefix_cache: Literal["none", "memory"] = setting(
        "none", "keep the states below the edited blocks in memory across epochs"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_at_least(self, 1, "steps", "batch_size", "accumulate")
        _check_at_least(self, 1, "eval_every", "eval_records", "save_every", "locality_rows")
        _check_at_least(self, 0, "lr", "alpha_lr", "c_edit", "c_loc", "warmup", "patience")
        _check_at_least(self, 0, "c_after", "after")
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

    lr: float = setting(
        0.0, "learning rate of RMSprop; 0: the paper's for a model of this kind and size"
    )
    steps: int = setting(100, "steps at most: an edit that took is done")
    clip: float = setting(100.0, "largest gradient norm")
    kl: bool = setting(False, "FT+KL: hold a locality example from the training data at every step")
    c_edit: float = setting(0.0, "FT+KL: weight of the edit loss; 0: the paper's")
    rank: int = setting(0, "rank of the change of every weight; 0: full")
    edit: tuple[str, ...] = setting((), "weights to edit, as for MEND")
    blocks: int = setting(0, "how many of the last blocks, as for MEND")
    seed: int = setting(0, "seed of what is drawn")

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "steps")
        _check_at_least(self, 0, "lr", "c_edit", "rank", "blocks")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0")


@dataclass(frozen=True)
class CacheConfig:
    """Remembered answers for inputs that look like the edited ones (paper, appendix G)."""

    eps: float = setting(
        2.5, "distance below which an input is taken for the edited one; goes by the model"
    )
    scale: float = setting(20.0, "logit of a remembered token; the others are 0")

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
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    for f in dataclasses.fields(config):
        if f.metadata.get("later") and getattr(config, f.name) == f.default:
            del values[f.name]
    return values


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
