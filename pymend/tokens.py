"""Text to token rows: the only place that knows how a prompt and its target are joined.

Prompt and ``" " + target`` are tokenised apart and joined, so the prompt's tokens do not depend on
the target. The tokenizer's own BOS stands once at the start; no EOS is added. Rows are padded on
the right whatever the tokenizer's setting, so no result depends on the padding side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymend.config import EditRequest, Probe

IGNORE = -100  # target of a position that has no label


@dataclass(frozen=True)
class Row:
    """One tokenised text; the logits of interest are those from position ``first`` on.

    With an answer, positions ``first .. len - 2`` predict the tokens after them. Without one
    (``answer=False``) every position counts, and the last has no target.
    """

    ids: tuple[int, ...]
    first: int = 0
    answer: bool = True

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the last token of an answer is predicted, never read."""
        return self.ids[:-1] if self.answer else self.ids

    def positions(self) -> range:
        """Positions whose logits are looked at."""
        return range(self.first, len(self.ids) - 1 if self.answer else len(self.ids))

    def targets(self) -> list[int]:
        """The token that each of :meth:`positions` should predict."""
        following = [*self.ids[1:], IGNORE]
        return [following[t] for t in self.positions()]


@dataclass(frozen=True)
class EncodedRequest:
    """An :class:`~pymend.config.EditRequest` as rows."""

    edit: Row
    rephrases: tuple[Row, ...]
    locality: tuple[Row, ...]
    old: Row | None  # the edit prompt with the true object
    old_rephrases: tuple[Row, ...]
    portability: tuple[Row, ...]


@dataclass(frozen=True)
class Batch:
    """Padded rows and the label positions in them.

    ``input_ids`` and ``attention_mask`` are [rows, tokens] int64. ``row``, ``position``, ``target``
    [labels] list the positions whose logits are looked at, row after row.
    """

    rows: tuple[Row, ...]
    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor
    target: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
        """Pad ``rows`` on the right."""
        width = max(len(r.inputs) for r in rows)
        # Padding is masked and carries no label, so any token id will do.
        ids = torch.tensor([[*r.inputs, *[0] * (width - len(r.inputs))] for r in rows])
        length = torch.tensor([len(r.inputs) for r in rows])
        mask = (torch.arange(width) < length[:, None]).long()
        labels = [
            (i, t, y)
            for i, r in enumerate(rows)
            for t, y in zip(r.positions(), r.targets(), strict=True)
        ]
        row, position, target = torch.tensor(labels, dtype=torch.long).reshape(-1, 3).unbind(1)
        tensors = (x.to(device) for x in (ids, mask, row, position, target))
        return cls(tuple(rows), *tensors)


class Encoder:
    """Tokenises requests for one model.

    Args:
        tokenizer: a Hugging Face tokenizer.
        limit: the model's context length in tokens; 0 for none.
        chat: put prompts through the tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, limit: int = 0, chat: bool = False) -> None:
        if chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("this tokenizer has no chat template; leave out chat")
        self.tokenizer, self.limit, self.chat = tokenizer, limit, chat
        start = tokenizer("a").input_ids[:1]
        self._bos = start if start and start[0] == tokenizer.bos_token_id else []

    @classmethod
    def for_model(cls, model: torch.nn.Module, tokenizer: Any, chat: bool = False) -> Encoder:
        """An encoder limited to the context length in the model's configuration."""
        return cls(tokenizer, getattr(model.config, "max_position_embeddings", None) or 0, chat)

    def row(self, prompt: str, target: str | None = None) -> Row:
        """Tokenise ``prompt`` joined to ``target``.

        Raises:
            ValueError: an empty prompt, a target without tokens, or a text beyond the context.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty; give at least one word")
        if self.chat:
            turn = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(
                turn, add_generation_prompt=True, tokenize=False
            )
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
        else:
            ids = [*self._bos, *self.tokenizer(prompt, add_special_tokens=False).input_ids]
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
        if target is None:
            row = Row(tuple(ids), 0, answer=False)
        else:
            joined = target if self.chat else f" {target}"
            answer = self.tokenizer(joined, add_special_tokens=False).input_ids
            if not target.strip() or not answer:
                raise ValueError(
                    f"the target {target!r} of prompt {prompt!r} has no tokens; give a word"
                )
            row = Row((*ids, *answer), len(ids) - 1)
        if self.limit and len(row.ids) > self.limit:
            raise ValueError(
                f"prompt and target have {len(row.ids)} tokens, the model's context is "
                f"{self.limit}; shorten {prompt[:60]!r}"
            )
        return row

    def probe(self, probe: Probe) -> Row:
        """Tokenise a locality or portability prompt."""
        return self.row(probe.prompt, probe.answer)

    def request(self, request: EditRequest) -> EncodedRequest:
        """Tokenise everything in ``request``."""
        old = request.ground_truth
        return EncodedRequest(
            edit=self.row(request.prompt, request.target),
            rephrases=tuple(self.row(text, request.target) for text in request.rephrases),
            locality=tuple(self.probe(p) for p in request.locality),
            old=self.row(request.prompt, old) if old else None,
            old_rephrases=tuple(self.row(text, old) for text in request.rephrases if old),
            portability=tuple(self.probe(p) for p in request.portability),
        )

    def requests(self, requests: Sequence[EditRequest]) -> list[EncodedRequest]:
        """Tokenise a data set.

        Raises:
            ValueError: names the first record that cannot be used.
        """
        encoded = []
        for index, request in enumerate(requests):
            try:
                encoded.append(self.request(request))
            except ValueError as error:
                raise ValueError(f"record {index}: {error}") from error
        return encoded
