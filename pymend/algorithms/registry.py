"""Every method by its name: the one list that commands, files, tables and costs read.

It imports no method before one is used, so that a command line can be parsed without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymend.config import (
    CacheConfig,
    EditorConfig,
    EnnConfig,
    FineTuneConfig,
    KeConfig,
    MendConfig,
    from_json,
)

if TYPE_CHECKING:
    import torch

    from pymend.algorithms.base import Algorithm
    from pymend.algorithms.trained import Trainable

    Config = EditorConfig | FineTuneConfig | CacheConfig


@dataclass(frozen=True)
class Method:
    """A way to edit models.

    Args:
        name: on the command line, in the files of editors and of reproductions.
        title: in tables.
        config: its settings.
        home: module below ``pymend.algorithms`` and class.
        trained: it has an editor that ``pymend train`` makes.
        preset: of its training, by default.
        fixed: settings that its name says.
    """

    name: str
    title: str
    config: type[Config]
    home: tuple[str, str]
    trained: bool = False
    preset: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, given: Mapping[str, Any], where: str) -> Config:
        """Its configuration from JSON values; ``where`` names their source in errors.

        Raises:
            ValueError: an unknown setting, a value of the wrong type, or one that the name says.
        """
        for name in self.fixed.keys() & given.keys():
            raise ValueError(f"{where}: {name} goes by the name {self.name}; leave it out")
        return from_json(self.config, {**given, **self.fixed}, where)

    def load(self) -> type[Algorithm[Any]]:
        """Its class."""
        module, name = self.home
        loaded: type[Algorithm[Any]] = getattr(import_module(f"pymend.algorithms.{module}"), name)
        return loaded


# In the order of the paper's tables, MEND first.
METHODS = {
    method.name: method
    for method in (
        Method("mend", "MEND", MendConfig, ("mend.mend", "Mend"), trained=True, preset="default"),
        Method("ft", "FT", FineTuneConfig, ("finetune", "FineTune"), fixed={"kl": False}),
        Method("ft+kl", "FT+KL", FineTuneConfig, ("finetune", "FineTune"), fixed={"kl": True}),
        Method("enn", "ENN", EnnConfig, ("enn", "Enn"), trained=True, preset="enn"),
        Method("ke", "KE", KeConfig, ("ke", "Ke"), trained=True, preset="ke"),
        Method("cache", "Cache", CacheConfig, ("cache", "Cache")),
    )
}
RIVALS = tuple(name for name in METHODS if name != "mend")
TRAINED = tuple(name for name, method in METHODS.items() if method.trained)


def trainable(kind: str) -> type[Trainable[Any]]:
    """The class of a kind of editor that is trained.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in TRAINED:
        raise ValueError(f"no editor of the kind {kind!r}; known are {', '.join(TRAINED)}")
    loaded: type[Trainable[Any]] = METHODS[kind].load()  # type: ignore[assignment]
    return loaded


def load_editor(folder: str | Path, device: str | torch.device = "cpu") -> Trainable[Any]:
    """Read an editor of any kind: what ``pymend train`` or ``save_pretrained`` wrote.

    Args:
        folder: that one; or a model's name, for the editor that ships for it.
        device: where its parameters go.

    Raises:
        FileNotFoundError: no such editor.
        ValueError: an unknown kind, or damaged as ``Trainable.from_pretrained`` says.
    """
    from pymend.algorithms.trained import kind_of
    from pymend.files import editor_folder, expect_kind, read_json

    expect_kind(editor_folder(folder), "editor")
    path = editor_folder(folder) / "editor.json"
    try:
        cls = trainable(kind_of(read_json(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return cls.from_pretrained(folder, device)
