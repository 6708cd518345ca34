"""The frozen prefix of a model, run once; the part above it, run again and again.

Everything below the lowest edited block gives the same hidden states before and after an edit.
They are computed once for all rows of a step and handed to every later pass. No model code is
copied: blocks below the cut are told to return the kept states, so masks, rotary tables, the final
norm and the head run as the model wrote them. The head sees label rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pymend.models import EditedWeight, forwards, lowest_block
from pymend.tokens import Batch, Row

HEAD_ROWS = 4  # fewest rows the head is given, if more than one
PASS_TOKENS = 64  # padding that costs about as much as another pass
GROUP_TOKENS = 2048  # tokens of one prefix pass; more gains nothing, and memory grows


class Replay:
    """Runs ``model`` on any of a fixed set of rows, reusing the frozen prefix.

    Args:
        model: under ``frozen``; returns an output with ``logits``.
        weights: edited weights; the cut lies below the lowest of them.
        keep: states kept across :meth:`load` calls (``--prefix-cache memory``).
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[EditedWeight], keep: bool = False
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.blocks, self.cut = lowest_block(model, weights)
        head = model.get_output_embeddings()  # type: ignore[operator]
        edited = {model.get_submodule(w.module) for w in weights}
        # An edited head needs whole rows: factors and edits go by the rows of the batch.
        self._head: nn.Module | None = None if head in edited else head
        self._keep = keep
        self._states: dict[tuple[int, ...], list[Tensor]] = {}
        self._shape: tuple[list[Any], TreeSpec, list[int]] | None = None

    def load(self, rows: Sequence[Row]) -> None:
        """Compute the prefix states of ``rows`` that are not kept yet, similar lengths together."""
        if self.cut == 0:
            return
        if not self._keep:
            self._states = {}
        todo = sorted(
            {r.inputs for r in rows} - self._states.keys(), key=lambda ids: (len(ids), ids)
        )
        group: list[tuple[int, ...]] = []
        for ids in todo:
            padding = len(ids) * len(group) - sum(map(len, group))
            full = (len(group) + 1) * len(ids) > GROUP_TOKENS
            if group and (full or padding > PASS_TOKENS):
                self._record(group)
                group = []
            group.append(ids)
        if group:
            self._record(group)

    @torch.no_grad()
    def _record(self, group: list[tuple[int, ...]]) -> None:
        """Run the blocks below the cut on ``group`` and keep what the last of them returns."""
        assert self.blocks is not None
        batch = Batch.of([Row(ids, answer=False) for ids in group], self.device)
        output: Any = None

        def keep(_module: nn.Module, _args: Any, result: Any) -> None:
            nonlocal output
            output = result

        handle = self.blocks[self.cut - 1].register_forward_hook(keep)
        try:
            # The rest of the model would be thrown away: skip its blocks and give the head no row.
            with forwards(dict.fromkeys(self.blocks[self.cut :], lambda *_, **__: output)):
                self._run(batch, batch.row[:0], batch.position[:0])
        finally:
            handle.remove()
        leaves, spec = tree_flatten(output)
        size = tuple(batch.input_ids.shape)
        per_row = [
            i for i, x in enumerate(leaves) if isinstance(x, Tensor) and tuple(x.shape[:2]) == size
        ]
        self._shape = leaves, spec, per_row
        for i, ids in enumerate(group):
            self._states[ids] = [leaves[j][i, : len(ids)].clone() for j in per_row]

    def logits(self, batch: Batch) -> Tensor:
        """Logits [labels, vocabulary] at the label positions of ``batch``.

        Gradients flow if the caller enabled them; hooks on edited modules act as usual.
        """
        with ExitStack() as stack:
            if self.cut:
                assert self.blocks is not None and self._shape is not None
                leaves, spec, per_row = self._shape
                leaves = list(leaves)
                for k, j in enumerate(per_row):
                    states = [self._states[row.inputs][k] for row in batch.rows]
                    leaves[j] = pad_sequence(states, batch_first=True)
                record = tree_unflatten(leaves, spec)
                below = dict.fromkeys(self.blocks[: self.cut], lambda *_, **__: record)
                stack.enter_context(forwards(below))
            return self._run(batch, batch.row, batch.position)

    def _run(self, batch: Batch, row: Tensor, position: Tensor) -> Tensor:
        head = self._head
        # Matrix libraries are slower at two and three rows than at four.
        extra = HEAD_ROWS - len(row) if 1 < len(row) < HEAD_ROWS else 0

        def gather(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (F.pad(args[0][row, position], (0, 0, 0, extra))[None], *args[1:])

        handle = head.register_forward_pre_hook(gather) if head is not None else None
        try:
            logits = self.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits[0, : len(row)] if head is not None else logits[row, position]
