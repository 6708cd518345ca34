"""Algorithms whose editor is trained: what the outer loop, files and the command line see of them.

MEND is one; the rivals KE and ENN are others. Each has a ``kind``, which its folder names.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pymend.algorithms.base import Algorithm, E
from pymend.config import EditorConfig, TrainConfig, from_json, to_json
from pymend.edit import fingerprint
from pymend.engine.capture import Factors, capture, mixed
from pymend.engine.losses import LabelRows, mean_of_seen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Batch, Row
from pymend.files import (
    digest,
    digest_of_tensors,
    editor_folder,
    expect_kind,
    read_json,
    read_tensors,
    writable_dir,
    write_json,
    write_tensors,
)
from pymend.models.structure import EditedWeight, find_weights, unwrapped, weight_of

A = TypeVar("A", bound="Trainable[Any]")


class Trainable(Algorithm[E]):
    """An algorithm with an editor: parameters that ``Trainer`` fits.

    Build one with :meth:`from_config` and train it, or load one with :meth:`from_pretrained`. The
    model is passed to each call and never changed or kept.

    Args:
        sizes: what the editor takes from its model besides the weights; saved with it.
        n_edits: simultaneous edits it is trained for.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type[EditorConfig]]
    low_rank: ClassVar[bool] = True  # its edits are ``pymend.Edit``: they can be saved and merged
    experts: ClassVar[bool] = False  # whether it edits those of a mixture

    config: EditorConfig
    editor: nn.Module
    n_edits: int

    def __init__(
        self,
        config: EditorConfig,
        weights: Sequence[EditedWeight],
        editor: nn.Module,
        sizes: Mapping[str, Any] | None = None,
        n_edits: int = 1,
    ) -> None:
        self.config = config
        self.weights = tuple(weights)
        self.editor = editor
        self.sizes = dict(sizes or {})
        self.n_edits = n_edits
        self.model_fingerprint = ""  # of the model it was trained on; only warns
        self.elsewhere: tuple[str, ...] = ()  # locality prompts of its training data

    @classmethod
    def from_config(cls: type[A], model: nn.Module, config: Any = None, **_: Any) -> A:
        """An untrained editor for ``model``, on its device.

        Args:
            config: an :class:`EditorConfig` of this kind.

        Raises:
            ValueError: the configuration names weights that do not exist or cannot be edited.
        """
        config = config or cls.config_type()
        weights = find_weights(model, config.edit, config.blocks, cls.experts)
        with float32():
            made: A = cls(config, weights, **cls.sizes_of(model))
        made.model_fingerprint = fingerprint(model, weights)
        made.editor.to(next(model.parameters()).device)
        return made

    @classmethod
    def sizes_of(cls, model: nn.Module) -> dict[str, Any]:
        """What the constructor wants to know of ``model`` besides its weights; plain JSON."""
        return {}

    # -- training ----------------------------------------------------------------------------

    @property
    def step_sizes(self) -> nn.Parameter | None:
        """The learned step sizes [weights], of an algorithm that has some."""
        return None

    def parameter_groups(self, config: TrainConfig) -> list[tuple[list[nn.Parameter], float]]:
        """What is trained, and at which rate."""
        alpha = self.step_sizes
        rest = [p for p in self.editor.parameters() if p is not alpha]
        own = [] if alpha is None else [([alpha], config.alpha_lr)]
        return [(rest, config.lr), *own]

    @abstractmethod
    def differentiable(self, replay: Replay, rows: Sequence[Row], episodes: int, merge: bool) -> E:
        """Independent edits, one an episode, through which gradients reach the editor.

        Args:
            rows: that many equal groups of simultaneous edits.
            merge: training: take the captured rows into the running moments, if there are any.

        Raises:
            NonFiniteError: the captured gradients or the factors are not finite.
        """

    def penalty(
        self, replay: Replay, locality: Batch, base: LabelRows, episodes: int
    ) -> Tensor | None:
        """What the outer loss has besides edit and locality loss, [episodes]; None for nothing.

        Args:
            locality: that many equal groups of rows.
            base: the model on it.
        """
        return None

    # -- editing -----------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this editor does not fit.

        Raises:
            ValueError: ``model`` lacks an edited weight or has it in another shape.
        """
        for w in self.weights:
            weight_of(model, w)

    def prepare(self, model: nn.Module) -> str:
        """Move the editor to ``model``'s device; return the model's fingerprint.

        Warns if the editor was trained on other values of the edited weights.

        Raises:
            ValueError: as :meth:`check`.
        """
        self.check(model)
        own = fingerprint(model, self.weights)
        if self.model_fingerprint and self.model_fingerprint != own:
            merged = getattr(getattr(unwrapped(model), "config", None), "pymend", None)
            merged = merged if isinstance(merged, dict) else {}
            told = (
                f"this model carries {len(merged.get('facts', []))} edited fact(s); the new edit "
                "comes on top of them"
                if merged.get("base") == self.model_fingerprint
                else "this editor was trained on another model: the edited weights differ, so its "
                "edits may not take; train it on this model"
            )
            warnings.warn(told, stacklevel=4)
        self.editor.to(next(model.parameters()).device)
        return own

    def identity(self) -> dict[str, Any]:
        """Kind, settings, and a digest of the editor's values."""
        values = digest_of_tensors(self.editor.state_dict())
        return {"kind": self.kind, **to_json(self.config), "editor": values}

    def scale_(self: A, strength: float) -> A:
        """Multiply every step size by ``strength``, in place, and return the algorithm.

        Below 1 edits take less often and disturb less; 1 is as trained.

        Raises:
            ValueError: ``strength`` is not positive and finite, or there are no step sizes.
        """
        if not 0 < strength < math.inf:
            raise ValueError(f"strength is {strength}; it must be above 0 and finite")
        if self.step_sizes is not None:
            with torch.no_grad():
                self.step_sizes.mul_(strength)
        elif strength != 1:
            raise ValueError(f"strength is {strength}, but {self.kind} has no step sizes to scale")
        return self

    # -- files -------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``editor.safetensors`` and ``editor.json`` into ``folder``, each atomically.

        Args:
            dtype: of the parameters in the file, bfloat16 for half its size; running moments stay
                as they are. Read again, an editor computes in float32.

        Raises:
            PermissionError: ``folder`` cannot be written.
        """
        path = writable_dir(folder)
        description = {
            "kind": self.kind,
            "config": to_json(self.config),
            "weights": [asdict(w) for w in self.weights],
            "sizes": self.sizes,
            "model_fingerprint": self.model_fingerprint,
            "chat": self.chat,
            "elsewhere": list(self.elsewhere),
        }
        tensors = self.editor.state_dict()
        for name, _ in self.editor.named_parameters() if dtype else ():
            tensors[name] = tensors[name].to(dtype)
        write_tensors(path / "editor.safetensors", tensors, digest(description))
        write_json(path / "editor.json", description)

    @classmethod
    def from_pretrained(cls: type[A], folder: str | Path, device: str | torch.device = "cpu") -> A:
        """Read what :meth:`save_pretrained` wrote; or the editor that ships for a model's name.

        Raises:
            FileNotFoundError: no such editor.
            ValueError: an editor of another kind, a truncated file, foreign or missing keys, or
                tensors of other shapes.
        """
        path = editor_folder(folder)
        expect_kind(path, "editor")
        description = read_json(path / "editor.json")
        if kind_of(description) != cls.kind:
            raise ValueError(
                f"{path} holds an editor of the kind {kind_of(description)}, not {cls.kind}"
            )
        tensors = read_tensors(path / "editor.safetensors", digest(description))
        try:
            config = from_json(cls.config_type, description["config"], str(path / "editor.json"))
            weights = [EditedWeight(**w) for w in description["weights"]]
            with float32():
                loaded: A = cls(config, weights, **description.get("sizes", {}))
            loaded.model_fingerprint = description["model_fingerprint"]
            loaded.chat = description.get("chat")  # files of before say nothing
            loaded.elsewhere = tuple(description.get("elsewhere", ()))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / 'editor.json'} is no editor: {error}") from error
        load_state(loaded.editor, tensors, path / "editor.safetensors")
        loaded.editor.to(device)
        loaded.source = str(folder)
        return loaded


@contextmanager
def float32() -> Iterator[None]:
    """New parameters are in float32 inside: in a half precision a training step moves few."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


def kind_of(description: Mapping[str, Any]) -> str:
    """The kind that an ``editor.json`` names; MEND's was the only one before files named it."""
    return str(description.get("kind", "mend"))


def edit_gradient(
    replay: Replay,
    weights: Sequence[EditedWeight],
    rows: Sequence[Row],
    episodes: int,
    batch_mean: bool = False,
    second_order: bool = False,
) -> tuple[dict[str, Factors], Tensor]:
    """(u, delta) of the edit loss for the tokens of ``rows`` (paper, section 3.1).

    The loss is a token mean for each row, summed over rows, so that an edit does not depend on its
    batch mates.

    Args:
        replay: has loaded ``rows``.
        episodes: ``rows`` are that many equal groups of simultaneous edits.
        batch_mean: one token mean over all rows of an episode instead.
        second_order: u and delta are differentiable in whatever the model's output depends on.

    Returns:
        The factors, and the token or class that the model predicts at each label position [k].

    Raises:
        NonFiniteError: a captured row is not finite.
        ValueError: the rows of the episodes cannot be told apart.
    """
    batch = replay.batch(rows)
    if replay.turned and episodes > 1:
        raise ValueError(mixed(replay.turned, "is given token after token"))
    size = len(rows) // episodes if batch_mean else 1
    with capture(replay.model, weights, second_order) as tape:
        look = replay.label_rows(batch).losses(batch.target, second_order=second_order)
        means = mean_of_seen(look.nll, batch.target, batch.row // size, len(rows) // size)
        shapes = {tuple(x.shape) for x in batch.inputs.values()}
        return tape.backward(means.sum(), episodes, shapes), look.best


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Load ``tensors`` into ``module`` only if names and shapes all agree.

    Raises:
        ValueError: names the first key that is missing, foreign or of another shape.
    """
    own = module.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        kind = "lacks" if name in own else "has the foreign key"
        raise ValueError(f"{where} {kind} {name}; it was written for another editor")
    for name, value in tensors.items():
        if value.shape != own[name].shape:
            raise ValueError(
                f"{where}: {name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
            )
    module.load_state_dict(dict(tensors))
