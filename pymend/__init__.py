"""pymend: correct a fact inside a trained transformer, and undo it."""

from pymend._lib import build_info, has_cuda_kernels, has_kernels
from pymend.config import EditRequest, MendConfig, Probe, TrainConfig
from pymend.edit import Edit
from pymend.evaluation import Metrics, evaluate
from pymend.mend import Mend
from pymend.training.trainer import Trainer

__all__ = [
    "Edit",
    "EditRequest",
    "Mend",
    "MendConfig",
    "Metrics",
    "Probe",
    "TrainConfig",
    "Trainer",
    "build_info",
    "evaluate",
    "has_cuda_kernels",
    "has_kernels",
]
