"""pymend: correct a fact inside a trained transformer, and undo it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymend._lib import build_info as build_info
    from pymend._lib import has_cuda_kernels as has_cuda_kernels
    from pymend._lib import has_kernels as has_kernels
    from pymend.algorithms.mend.mend import Mend as Mend
    from pymend.algorithms.registry import load_editor as load_editor
    from pymend.config import EditRequest as EditRequest
    from pymend.config import MendConfig as MendConfig
    from pymend.config import Probe as Probe
    from pymend.config import TrainConfig as TrainConfig
    from pymend.data import load_facts as load_facts
    from pymend.data import load_records as load_records
    from pymend.edit import Edit as Edit
    from pymend.edit import Outcome as Outcome
    from pymend.evaluation import Metrics as Metrics
    from pymend.evaluation import evaluate as evaluate
    from pymend.training.trainer import Trainer as Trainer
    from pymend.zoo.load import load as load

# Public names and their homes, imported at first use (PEP 562), since torch takes seconds.
_HOMES = {
    "Edit": "edit",
    "EditRequest": "config",
    "Mend": "algorithms.mend.mend",
    "MendConfig": "config",
    "Metrics": "evaluation",
    "Outcome": "edit",
    "Probe": "config",
    "TrainConfig": "config",
    "Trainer": "training.trainer",
    "build_info": "_lib",
    "evaluate": "evaluation",
    "has_cuda_kernels": "_lib",
    "has_kernels": "_lib",
    "load": "zoo.load",
    "load_editor": "algorithms.registry",
    "load_facts": "data",
    "load_records": "data",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pymend.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pymend-editor")
    except PackageNotFoundError:  # a source tree that was not installed
        return "not installed"
