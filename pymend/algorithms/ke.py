"""KnowledgeEditor (De Cao et al., "Editing Factual Knowledge in Language Models", EMNLP 2021).

condition  h = tanh(A BiLSTM(prediction >> target || prompt)), on the model's own embeddings
per weight r1, c1, r2, c2, c = network(h)
edit       W~ = W - sigmoid(c) (softmax(r1) c1^T * dL/dW + softmax(r2) c2^T)

A matrix of rank one times a sum of outer products is such a sum again, since
(r c^T) * (delta u^T) = (r * delta) (c * u)^T. So an edit is the captured rows, scaled, and one row
more: an ordinary ``pymend.Edit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence

from pymend.algorithms.trained import Trainable, edit_gradient
from pymend.config import KeConfig
from pymend.edit import Edit, LowRank
from pymend.engine.capture import Factors
from pymend.engine.replay import Replay
from pymend.engine.tokens import Row, stacked
from pymend.models.structure import EditedWeight

BECOMES, IN = 0, 1  # the two separators among the marks; classes follow


class KeEditor(nn.Module):
    """The reader of requests and a network for every edited weight.

    Args:
        width: of the model's token embeddings.
        classes: of a classifier, else 0.
    """

    def __init__(
        self, weights: Sequence[EditedWeight], config: KeConfig, width: int, classes: int
    ) -> None:
        super().__init__()
        self.weights = tuple(weights)
        # Rows are tokens already: vectors stand for ">>" and "||", and for classes, which have no
        # token.
        self.marks = nn.Embedding(2 + classes, width)
        self.lstm = nn.LSTM(width, config.lstm, bidirectional=True)
        self.linear = nn.Linear(2 * config.lstm, config.condition)
        self.nets = nn.ModuleDict(
            {
                # Module names must not hold dots.
                w.name.replace(".", "#"): nn.Sequential(
                    weight_norm(nn.Linear(config.condition, config.hidden)),
                    nn.Tanh(),
                    weight_norm(nn.Linear(config.hidden, 2 * (w.a + w.b) + 1)),
                )
                for w in weights
            }
        )

    def condition(self, texts: Sequence[Tensor]) -> Tensor:
        """What the reader makes of texts of embedded tokens [tokens, width]: [texts, condition]."""
        _, (last, _) = self.lstm(pack_sequence(list(texts), enforce_sorted=False))
        return torch.tanh(self.linear(last.transpose(0, 1).flatten(1)))

    def forward(self, condition: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """name -> softmax(r1) [texts, b], c1 [texts, a], softmax(r2), c2, sigmoid(c) [texts, 1]."""
        parts: dict[str, tuple[Tensor, ...]] = {}
        for w, net in zip(self.weights, self.nets.values(), strict=True):
            r1, c1, r2, c2, c = net(condition).split([w.b, w.a, w.b, w.a, 1], -1)
            parts[w.name] = r1.softmax(-1), c1, r2.softmax(-1), c2, c.sigmoid()
        return parts


class Ke(Trainable[Edit]):
    """A KnowledgeEditor. It edits one fact at a time."""

    kind = "ke"
    config_type = KeConfig
    config: KeConfig
    editor: KeEditor

    def __init__(
        self, config: KeConfig, weights: Sequence[EditedWeight], width: int, classes: int
    ) -> None:
        editor = KeEditor(weights, config, width, classes)
        super().__init__(config, weights, editor, {"width": width, "classes": classes})

    @classmethod
    def sizes_of(cls, model: Any) -> dict[str, Any]:
        """Width of the token embeddings, and the classes of a classifier (one logit: two)."""
        classes = max(2, model.config.num_labels)
        if model.get_output_embeddings() is not None:
            classes = 0
        return {"width": model.get_input_embeddings().weight.shape[1], "classes": classes}

    # -- the algorithm -----------------------------------------------------------------------

    def condition(self, model: nn.Module, rows: Sequence[Row], best: Tensor) -> Tensor:
        """h of every row [rows, condition].

        Args:
            best: [k], what ``model`` predicts at the label positions of ``rows``.
        """
        embed: Any = model.get_input_embeddings()  # type: ignore[operator]
        marks = self.editor.marks

        def look_up(ids: Tensor) -> Tensor:
            found: Tensor = embed(ids.to(embed.weight.device))
            return found.to(marks.weight)

        texts = []
        for row, old in zip(rows, best.split([len(r.positions()) for r in rows]), strict=True):
            new, prompt = torch.tensor(row.targets()), torch.tensor(row.prompt)
            answers = [look_up(x) for x in (old, new)]
            if row.label is not None:
                answers = [marks(x.to(marks.weight.device) + IN + 1) for x in (old, new)]
            becomes, within = marks.weight[[BECOMES]], marks.weight[[IN]]
            texts.append(torch.cat([answers[0], becomes, answers[1], within, look_up(prompt)]))
        return self.editor.condition(texts)

    def factors(self, captured: dict[str, Factors], condition: Tensor) -> dict[str, LowRank]:
        """[episodes, n + 1, .]: the captured rows under the mask, and the offset as the last row.

        Args:
            condition: [episodes, .], one for each episode of ``captured``.
        """
        low_rank = {}
        for name, (r1, c1, r2, c2, gate) in self.editor(condition).items():
            rows = captured[name]
            u, delta = (stacked(x, rows.counts).to(gate) for x in (rows.u, rows.delta))
            u = torch.cat([u * c1[:, None], c2[:, None]], 1)
            delta = torch.cat([delta * r1[:, None], r2[:, None]], 1)
            # The gate is each episode's own, the step size of an edit is not.
            low_rank[name] = LowRank(u, delta * gate[:, None], gate.new_ones(()))
        return low_rank

    # -- editing -----------------------------------------------------------------------------

    def differentiable(
        self, replay: Replay, rows: Sequence[Row], episodes: int, merge: bool = False
    ) -> Edit:
        """Independent edits, one for each of ``rows``, through which gradients reach the editor.

        Raises:
            NonFiniteError: the captured gradients or the factors are not finite.
            ValueError: more than one fact in an edit.
        """
        if len(rows) != episodes:
            raise ValueError(
                f"{len(rows)} facts in {episodes} edit(s): KE edits one fact at a time; use "
                "edit_many"
            )
        captured, best = edit_gradient(replay, self.weights, rows, episodes)
        condition = self.condition(replay.model, rows, best)
        edit = Edit(self.weights, self.factors(captured, condition))
        edit.check(replay.model)
        return edit

    @torch.no_grad()
    def compute(self, replay: Replay, rows: Sequence[Row], joint: bool = False) -> Edit:
        """One edit for each of ``rows``; nothing is trained.

        Raises:
            NonFiniteError: the captured gradients or the factors are not finite.
            ValueError: ``joint``, and more than one row.
        """
        edit = self.differentiable(replay, rows, 1 if joint else len(rows))
        return edit[0] if joint else edit
