"""Every kind of trained editor by the name that its folder and the command line give it."""

from __future__ import annotations

from pathlib import Path

import torch

from pymend.algorithms.enn import Enn
from pymend.algorithms.ke import Ke
from pymend.files import read_json
from pymend.mend import Mend
from pymend.trainable import Trainable, kind_of

TRAINABLE: dict[str, type[Trainable]] = {cls.kind: cls for cls in (Mend, Ke, Enn)}


def load_editor(folder: str | Path, device: str | torch.device = "cpu") -> Trainable:
    """Read an editor of any kind.

    Raises:
        FileNotFoundError: no such editor.
        ValueError: an unknown kind, or damaged as ``Trainable.from_pretrained`` says.
    """
    path = Path(folder) / "editor.json"
    kind = kind_of(read_json(path))
    if kind not in TRAINABLE:
        raise ValueError(f"{path} has the kind {kind!r}; known are {', '.join(TRAINABLE)}")
    return TRAINABLE[kind].from_pretrained(folder, device)
