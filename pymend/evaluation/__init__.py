"""Edit success, generality, locality and drawdown, each with its protocol."""

from pymend.evaluation.evaluator import evaluate
from pymend.evaluation.metrics import Metrics

__all__ = ["Metrics", "evaluate"]
