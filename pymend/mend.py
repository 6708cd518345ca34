"""MEND (Mitchell et al., "Fast Model Editing at Scale", ICLR 2022): from a request to an edit.

capture   (u_t, delta_t) of the edit loss, for every token t and edited weight W
transform u~_t, d~_t = g(normalise(u_t, delta_t))
edit      W~ = W - alpha * sum_t d~_t u~_t^T, kept as factors
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pymend.algorithm import Algorithm, AnyEdit
from pymend.capture import Factors, capture
from pymend.config import EditRequest, MendConfig, from_json, to_json
from pymend.edit import Edit, LowRank, fingerprint
from pymend.editor import Editor
from pymend.files import digest, read_json, read_tensors, writable_dir, write_json, write_tensors
from pymend.losses import mean_of_seen
from pymend.models import EditedWeight, find_weights, weight_of
from pymend.replay import Replay
from pymend.tokens import Batch, Row


class Mend(Algorithm):
    """A MEND editor: the weights it edits, its networks and step sizes.

    Build one with :meth:`from_config` and train it with ``Trainer``, or load one with
    :meth:`from_pretrained`. The model is passed to each call and never changed or kept.
    """

    def __init__(self, config: MendConfig, weights: Sequence[EditedWeight]) -> None:
        self.config = config
        self.weights = tuple(weights)
        self.editor = Editor(weights, config)
        self.model_fingerprint = ""  # of the model it was trained on; only warns

    @classmethod
    def from_config(cls, model: nn.Module, config: MendConfig | None = None) -> Mend:
        """An untrained editor for ``model``, on its device.

        Raises:
            ValueError: the configuration names weights that do not exist or cannot be edited.
        """
        config = config or MendConfig()
        mend = cls(config, find_weights(model, config.edit, config.blocks))
        mend.model_fingerprint = fingerprint(model, mend.weights)
        mend.editor.to(next(model.parameters()).device)
        return mend

    # -- the algorithm -----------------------------------------------------------------------

    def capture(self, replay: Replay, rows: Sequence[Row], episodes: int) -> dict[str, Factors]:
        """(u, delta) of the edit loss for the tokens of ``rows`` (paper, section 3.1).

        The loss is a token mean for each row, summed over rows, so that an edit does not depend on
        its batch mates; ``official`` takes one token mean over an episode.

        Args:
            replay: has loaded ``rows``.
            episodes: ``rows`` are that many equal groups of simultaneous edits.
        """
        batch = Batch.of(rows, replay.device)
        with capture(replay.model, self.weights) as tape:
            nll = replay.label_rows(batch).losses(batch.target).nll
            if self.config.official:
                per_episode = len(rows) // episodes
                means = mean_of_seen(nll, batch.target, batch.row // per_episode, episodes)
            else:
                means = mean_of_seen(nll, batch.target, batch.row, len(rows))
            return tape.backward(means.sum(), episodes)

    def factors(
        self, captured: Mapping[str, Factors], joint: bool = False, merge: bool = False
    ) -> dict[str, LowRank]:
        """Transform captured rows; differentiable in the editor's parameters.

        Args:
            joint: one edit from all rows, [n, .]; else [episodes, n, .], zero rows behind short
                episodes.
            merge: training: take the rows into the running moments first.
        """
        device = self.editor.alpha.device
        rows = {
            name: (f.u.to(device), f.delta.to(device), f.counts) for name, f in captured.items()
        }
        transformed = self.editor(rows, merge)
        low_rank = {}
        # A copy: training on must not change an edit that was made.
        for w, alpha in zip(self.weights, self.editor.alpha.clone(), strict=True):
            u, delta = transformed[w.name]
            if not joint:
                counts = list(captured[w.name].counts)
                u = pad_sequence(list(u.split(counts)), batch_first=True)
                delta = pad_sequence(list(delta.split(counts)), batch_first=True)
            low_rank[w.name] = LowRank(u, delta, alpha)
        return low_rank

    # -- editing -----------------------------------------------------------------------------

    def _edit(
        self, model: nn.Module, tokenizer: Any, requests: list[EditRequest], joint: bool, chat: bool
    ) -> AnyEdit:
        if joint and requests and len(requests) != self.config.n_edits:
            warnings.warn(
                f"this editor was trained for n_edits={self.config.n_edits} at once, not for "
                f"{len(requests)}: the size of an edit grows with their number",
                stacklevel=3,
            )
        return super()._edit(model, tokenizer, requests, joint, chat)

    def differentiable(
        self, replay: Replay, rows: Sequence[Row], episodes: int, merge: bool
    ) -> Edit:
        """Independent edits, one an episode, through which gradients reach the editor.

        Args:
            rows: that many equal groups of simultaneous edits.
            merge: training: take the captured rows into the running moments.

        Raises:
            NonFiniteError: the captured gradients or the factors are not finite.
        """
        captured = self.capture(replay, rows, episodes)
        edit = Edit(self.weights, self.factors(captured, merge=merge))
        edit.check(replay.model)
        return edit

    @torch.no_grad()
    def independent(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> Edit:
        """One edit for each of ``rows``, or one for all of them if ``joint``; nothing is trained.

        Raises:
            NonFiniteError: the captured gradients or the factors are not finite.
        """
        captured = self.capture(replay, rows, 1 if joint else len(rows))
        edit = Edit(self.weights, self.factors(captured, joint))
        edit.check(replay.model)
        return edit

    def fit(self, model: nn.Module) -> str:
        """Move the editor to ``model``'s device; return the model's fingerprint.

        Warns if the editor was trained on other values of the edited weights.

        Raises:
            ValueError: ``model`` lacks an edited weight or has it in another shape.
        """
        for w in self.weights:
            weight_of(model, w)
        own = fingerprint(model, self.weights)
        if self.model_fingerprint and self.model_fingerprint != own:
            warnings.warn(
                "this editor was trained on another model: the edited weights differ, so its edits "
                "may not take; train it on this model",
                stacklevel=4,
            )
        self.editor.to(next(model.parameters()).device)
        return own

    def scale_(self, strength: float) -> Mend:
        """Multiply every step size by ``strength``, in place, and return the editor.

        Below 1 edits take less often and disturb less; 1 is as trained.

        Raises:
            ValueError: ``strength`` is not positive and finite.
        """
        if not 0 < strength < math.inf:
            raise ValueError(f"strength is {strength}; it must be above 0 and finite")
        with torch.no_grad():
            self.editor.alpha.mul_(strength)
        return self

    # -- files -------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``editor.safetensors`` and ``editor.json`` into ``folder``, each atomically.

        Raises:
            PermissionError: ``folder`` cannot be written.
        """
        path = writable_dir(folder)
        description = {
            "config": to_json(self.config),
            "weights": [asdict(w) for w in self.weights],
            "model_fingerprint": self.model_fingerprint,
        }
        write_tensors(path / "editor.safetensors", self.editor.state_dict(), digest(description))
        write_json(path / "editor.json", description)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Mend:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: no such editor.
            ValueError: a truncated file, foreign or missing keys, or tensors of other shapes.
        """
        path = Path(folder)
        description = read_json(path / "editor.json")
        tensors = read_tensors(path / "editor.safetensors", digest(description))
        try:
            config = from_json(MendConfig, description["config"], str(path / "editor.json"))
            mend = cls(config, [EditedWeight(**w) for w in description["weights"]])
            mend.model_fingerprint = description["model_fingerprint"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / 'editor.json'} is no editor: {error}") from error
        load_state(mend.editor, tensors, path / "editor.safetensors")
        mend.editor.to(device)
        return mend


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
