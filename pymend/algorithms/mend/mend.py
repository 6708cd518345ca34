"""MEND (Mitchell et al., "Fast Model Editing at Scale", ICLR 2022): from a request to an edit.

capture   (u_t, delta_t) of the edit loss, for every token t and edited weight W
transform u~_t, d~_t = g(normalise(u_t, delta_t))
edit      W~ = W - alpha * sum_t d~_t u~_t^T, kept as factors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from pymend.algorithms.mend.network import Editor
from pymend.algorithms.trained import Trainable, edit_gradient
from pymend.config import MendConfig, TrainConfig
from pymend.edit import Edit, LowRank
from pymend.engine.capture import Factors
from pymend.engine.replay import Replay
from pymend.engine.tokens import Row, stacked
from pymend.models.structure import EditedWeight


class Mend(Trainable[Edit]):
    """A MEND editor: the weights it edits, its networks and step sizes.

    Build one with :meth:`from_config` and train it with ``Trainer``, or load one with
    :meth:`from_pretrained`. The model is passed to each call and never changed or kept.
    """

    kind = "mend"
    config_type = MendConfig
    experts = True
    config: MendConfig
    editor: Editor

    def __init__(self, config: MendConfig, weights: Sequence[EditedWeight]) -> None:
        super().__init__(config, weights, Editor(weights, config), n_edits=config.n_edits)

    @property
    def step_sizes(self) -> nn.Parameter:
        """alpha [weights]."""
        return self.editor.alpha

    def parameter_groups(self, config: TrainConfig) -> list[tuple[list[nn.Parameter], float]]:
        """The networks, and alpha at a rate of its own (``official``: one rate for both)."""
        if self.config.official:
            config = replace(config, alpha_lr=config.lr)
        return super().parameter_groups(config)

    # -- the algorithm -----------------------------------------------------------------------

    def capture(self, replay: Replay, rows: Sequence[Row], episodes: int) -> dict[str, Factors]:
        """(u, delta) of the edit loss for the tokens of ``rows`` (paper, section 3.1).

        ``official`` takes one token mean over an episode, not one for each row.

        Args:
            replay: has loaded ``rows``.
            episodes: ``rows`` are that many equal groups of simultaneous edits.
        """
        return edit_gradient(replay, self.weights, rows, episodes, self.config.official)[0]

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
            counts, expert = captured[w.name].counts, captured[w.name].expert
            expert = None if expert is None else expert.to(device)
            if not joint:
                u, delta = stacked(u, counts), stacked(delta, counts)
                if expert is not None:
                    expert = stacked(expert[:, None], counts)[..., 0]
            low_rank[w.name] = LowRank(u, delta, alpha, expert)
        return low_rank

    # -- editing -----------------------------------------------------------------------------

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
    def compute(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> Edit:
        """One edit for each of ``rows``, or one for all of them if ``joint``; nothing is trained.

        Raises:
            NonFiniteError: the captured gradients or the factors are not finite.
        """
        captured = self.capture(replay, rows, 1 if joint else len(rows))
        edit = Edit(self.weights, self.factors(captured, joint))
        edit.check(replay.model)
        return edit
