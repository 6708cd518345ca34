"""Edit success, generality, locality and drawdown, each with its protocol."""

from pymend.evaluation.evaluator import evaluate
from pymend.evaluation.metrics import Metrics
from pymend.evaluation.reads import Reads, read

__all__ = ["Metrics", "Reads", "evaluate", "read"]
