"""Cache: an editor that remembers answers and changes no weight (paper, appendix G).

It keeps the mean final hidden state z_e of the edited input. An input whose mean state is nearer
than eps to it gets the remembered answer, as one-hot logits. What the mean is taken over:

decoder           for every predicted token of the answer, all tokens before it
encoder-decoder   the question, as its encoder leaves it
classifier        the claim
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pymend.algorithms.base import Algorithm
from pymend.config import CacheConfig, to_json
from pymend.edit import BaseEdit, Outcome, check_fingerprint, fingerprint, split_episodes
from pymend.engine.hooks import forward_hooks
from pymend.engine.replay import Replay
from pymend.engine.tokens import IGNORE, Row
from pymend.errors import NonFiniteError
from pymend.models.structure import (
    EditedWeight,
    find_blocks,
    find_weights,
    module_of,
    stacks,
    unwrapped,
)


class OutputEdit(BaseEdit):
    """Remembered answers: acts on what a model returns.

    ``keys`` [entries, d] are mean states, ``answers`` [entries, steps] int64 what to say near them:
    the tokens of an encoder-decoder's answer by decoder position, one token or class of the
    others; IGNORE leaves a position to the model. For independent edits side by side both are
    [episodes, entries, .], with infinite keys behind short episodes.
    """

    def __init__(
        self,
        keys: Tensor,
        answers: Tensor,
        config: CacheConfig,
        fingerprint: str = "",
        outcomes: Sequence[Outcome] = (),
    ) -> None:
        self.keys, self.answers, self.config = keys, answers, config
        super().__init__(len(keys) if keys.dim() == 3 else None, fingerprint, outcomes)

    def _pick(self, index: int) -> OutputEdit:
        kept = self.keys[index].isfinite().all(-1)
        return OutputEdit(self.keys[index][kept], self.answers[index][kept], self.config)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """``model`` returns the remembered logits for inputs near the edited ones.

        Means need the whole text, so generation inside the block runs without a key-value cache. A
        loss that the model itself takes from labels is that of its own logits.

        Raises:
            ValueError: another model, a batch that does not split, or a key-value cache.
        """
        check_fingerprint(model, find_weights(model), self.fingerprint)
        with rewriting(model, self._rewrite):
            yield model

    def _rewrite(self, means: Tensor, logits: Tensor) -> Tensor:
        """``logits`` with the answers to the means [rows, positions, d] that have a near key."""
        keys, answers = self.keys.to(means), self.answers.to(means.device)
        z = split_episodes(means, self.episodes)
        # The other way to compute distances is inexact where they are small.
        distances = torch.cdist(z, keys, compute_mode="donot_use_mm_for_euclid_dist")
        distance, nearest = distances.min(-1)
        if self.episodes is None:
            said = answers[nearest]
        else:
            said = answers.gather(1, nearest[..., None].expand(-1, -1, answers.shape[-1]))
        said = said.masked_fill(~(distance < self.config.eps)[..., None], IGNORE)
        changed = logits[:, None] if logits.dim() == 2 else logits
        said = said.reshape(len(means), means.shape[1] * answers.shape[-1])[:, : changed.shape[1]]
        row, position = (said != IGNORE).nonzero(as_tuple=True)
        if not len(row):
            return logits
        token, changed = said[row, position], changed.clone()
        if logits.dim() == 2 and logits.shape[1] == 1:
            # One logit z is the two classes (0, z).
            changed[row, position, 0] = (self.config.scale * (2 * token - 1)).to(logits.dtype)
        else:
            changed[row, position] = 0
            changed[row, position, token] = self.config.scale
        return changed.view(logits.shape)


class Cache(Algorithm[OutputEdit]):
    """The editor of the paper's appendix G; it needs no training and edits no weight."""

    weights: tuple[EditedWeight, ...] = ()

    def __init__(self, config: CacheConfig | None = None) -> None:
        self.config = config or CacheConfig()

    @classmethod
    def from_config(cls, model: nn.Module, config: CacheConfig | None = None, **_: Any) -> Cache:
        """A cache; it takes nothing from ``model``."""
        return cls(config)

    def prepare(self, model: nn.Module) -> str:
        """The fingerprint of the weights that are edited by default.

        Raises:
            ValueError: ``model`` has no blocks that could be found.
        """
        return fingerprint(model, find_weights(model))

    def identity(self) -> dict[str, Any]:
        """Its settings."""
        return {"kind": "cache", **to_json(self.config)}

    @torch.no_grad()
    def compute(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> OutputEdit:
        """One edit for each of ``rows``, or one for all of them if ``joint``.

        Raises:
            NonFiniteError: a hidden state is not finite.
        """
        batch = replay.batch(rows)
        means: list[Tensor] = []

        def keep(found: Tensor, logits: Tensor) -> Tensor:
            means.append(found)
            return logits

        with rewriting(replay.model, keep):
            replay.label_rows(batch)
        if _by_position(replay.model):
            keys, answers = means[0][batch.row, batch.position], batch.target[:, None]
            counts = [len(row.positions()) for row in rows]
        else:
            targets = [torch.tensor(row.targets(), device=replay.device) for row in rows]
            keys, answers = means[0][:, 0], pad_sequence(targets, True, IGNORE)
            counts = [1] * len(rows)
        if not keys.isfinite().all():
            raise NonFiniteError("the hidden states of the edited text are not finite; try float32")
        if not joint:
            keys = pad_sequence(list(keys.split(counts)), True, math.inf)
            answers = pad_sequence(list(answers.split(counts)), True, IGNORE)
        return OutputEdit(keys, answers, self.config)


@contextmanager
def rewriting(model: nn.Module, rewrite: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Every call of ``model`` inside returns ``rewrite(means, logits)`` for its logits.

    ``means`` [rows, positions, d], at least float32: mean final hidden states, of a decoder one
    for each of the logits' positions, else one a row.
    """
    model = unwrapped(model)
    signature = inspect.signature(model.forward)
    by_position = _by_position(model)
    prefix, part = next(iter(stacks(model).items()))
    trunk = find_blocks(part, prefix)[0].rpartition(".")[0]
    states: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        states[:] = [output if isinstance(output, Tensor) else output[0]]

    def change(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        past = given.get("past_key_values")
        if past is not None and past.get_seq_length():
            raise ValueError("Cache needs the whole text in every call; use use_cache=False")
        # Generation runs an encoder once, before it calls the model.
        found = output.get("encoder_last_hidden_state")
        means = _means(states[0] if found is None else found, given.get("attention_mask"))
        # A decoder may have been asked for its last logits only.
        kept = output.logits.shape[1] if by_position else 1
        output.logits = rewrite(means[:, means.shape[1] - kept :], output.logits)
        return output

    settings = getattr(model, "generation_config", None)
    with ExitStack() as stack:
        if settings is not None:
            stack.callback(setattr, settings, "use_cache", settings.use_cache)
            settings.use_cache = False
        stack.enter_context(forward_hooks({module_of(model, trunk): keep}))
        stack.enter_context(forward_hooks({model: change}))  # may be the same module
        yield


def _by_position(model: nn.Module) -> bool:
    """Whether ``model`` is a decoder alone, which predicts at every position of its text."""
    return len(stacks(model)) == 1 and model.get_output_embeddings() is not None  # type: ignore[operator]


def _means(states: Tensor, mask: Tensor | None) -> Tensor:
    """Means of ``states`` [rows, tokens, d] over the tokens up to each, padding left out."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    seen = states.new_ones(states.shape[:2]) if mask is None else mask.to(states.dtype)
    return (states * seen[..., None]).cumsum(1) / seen.cumsum(1).clamp(min=1)[..., None]


def find_eps(
    drawdown: Callable[[float], float], wanted: float, start: float = 1.0, tolerance: float = 0.01
) -> float:
    """eps*: the largest threshold whose drawdown is at most ``wanted``, by bisection.

    Args:
        drawdown: of the Cache with a given eps on the data at hand; it grows with eps. The paper
            matches MEND's: of accuracy for answers and classes, of perplexity for plain text.
        start: a first guess; it is doubled until the drawdown exceeds ``wanted``.
        tolerance: relative width of the interval that the search ends with.

    Raises:
        ValueError: a ``start`` that is not positive, or no threshold exceeds ``wanted``.
    """
    if not 0 < start < math.inf:
        raise ValueError(f"start is {start}; it must be above 0 and finite")
    low, high = 0.0, start
    while drawdown(high) <= wanted:
        low, high = high, 2 * high
        if high > start * 2**30:
            raise ValueError(f"no eps up to {low:.3g} has a drawdown above {wanted}")
    # Below a millionth of the guess, eps counts as 0.
    while high - low > tolerance * low and high > start * 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if drawdown(middle) <= wanted else (low, middle)
    return low
