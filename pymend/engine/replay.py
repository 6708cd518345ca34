"""The frozen prefix of a model, run once; the part above it, run again and again.

Everything below the lowest edited block gives the same hidden states before and after an edit.
They are computed once for all rows of a step and handed to every later pass. No model code is
copied: blocks below the cut are told to return the kept states, so masks, rotary tables, the final
norm and the head run as the model wrote them. The head sees label rows only; one whose output is
the model's does not run at all here, since the losses need it on a few rows at a time.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pymend.engine.hooks import changed_input, forward_hooks, forwards, is_plain, watch
from pymend.engine.losses import LabelRows, class_logits
from pymend.engine.tokens import Batch, Row, padding_of, stacked
from pymend.models.structure import EditedWeight, lowest_block, module_of, stacks

PASS_TOKENS = 64  # padding that costs a CPU about as much as another pass
TRIED_TOKENS = 8  # of the longer of two rows
ROUNDED = 2.0**-20  # relative error that counts as rounding in any dtype
GROUP_TOKENS = 2048  # tokens of one prefix pass; more gains nothing, and memory grows


class Verdict(NamedTuple):
    """What a trial of a model showed, with the reasons; nothing where all is well."""

    prefix: str = ""  # why none can be kept
    mixed: str = ""  # why rows of unequal length go apart
    alone: str = ""  # why all rows do
    turned: str = ""  # the weight whose module is given tokens of texts, not texts of tokens
    head: str = ""  # why it gets whole rows


# Of every model, by the weights, the number of blocks below the cut and the padding id; and of how
# many tokens.
_verdicts: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[int, Verdict]]]
_verdicts = weakref.WeakKeyDictionary()


class Replay:
    """Runs ``model`` on any of a fixed set of rows, reusing the frozen prefix.

    Args:
        model: under ``frozen``; returns an output with ``logits``.
        weights: edited weights; the cut lies below the lowest of them.
        keep: states kept across :meth:`load` calls (``--prefix-cache memory``).
        prefix: whether there is one; False where an edit may change any parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[EditedWeight],
        keep: bool = False,
        prefix: bool = True,
    ) -> None:
        self.model, self.weights = model, tuple(weights)
        self.device = next(model.parameters()).device
        self.blocks, self.cut = lowest_block(model, weights) if prefix else (None, 0)
        parts = stacks(model)
        self._encoder = next(iter(parts.values())) if len(parts) > 1 else None
        head = model.get_output_embeddings()  # type: ignore[operator]
        edited = {module_of(model, w.module) for w in weights}
        # An edited head needs whole rows: factors and edits go by the rows of the batch.
        self._head: nn.Module | None = None if head in edited else head
        self._last = False  # whether what the head returns is what the model returns
        # A classifier has no cache to leave out.
        self._options = {} if head is None else {"use_cache": False}
        # A GPU pads sooner than it begins again: a pass is hundreds of launches.
        self._padding = PASS_TOKENS if self.device.type == "cpu" else GROUP_TOKENS
        self._keep = keep
        self._states: dict[tuple[int, ...], list[Tensor]] = {}
        self._shape: tuple[list[Any], TreeSpec, list[int]] | None = None
        self._live = 0
        self._padding_id = padding_of(model)
        self._verdict: Verdict | None = None  # not tried yet
        self._tried_tokens = 0

    def batch(self, rows: Sequence[Row]) -> Batch:
        """``rows`` padded for this model, on its device.

        Raises:
            ValueError: rows of unequal length, of a model that padding changes; or several, of one
                that takes no other beside it.
        """
        tried, name = self._verdict or Verdict(), type(self.model).__name__
        if tried.alone and len(rows) > 1:
            id_ = "set model.config.pad_token_id, or " if self._padding_id is None else ""
            raise ValueError(
                f"{name} takes one text at a time ({tried.alone}); {id_}edit facts one by one"
            )
        if tried.mixed and len({(len(r.prefix), len(r.inputs)) for r in rows}) > 1:
            raise ValueError(
                f"{name} takes no texts of unequal length at once ({tried.mixed}); edit facts one "
                "by one, or give texts of equal length"
            )
        return Batch.of(rows, self.device, self._padding_id)

    def load(self, rows: Sequence[Row]) -> None:
        """Compute the prefix states of ``rows`` that are not kept yet, similar lengths together."""
        tokens = min(max(len(r.prefix) for r in rows), TRIED_TOKENS)
        if self._tried_tokens < tokens:
            self._try(rows, tokens)
        if self.cut == 0:
            return
        if not self._keep:
            self._states = {}
        todo = sorted(
            {r.prefix for r in rows} - self._states.keys(), key=lambda ids: (len(ids), ids)
        )
        group: list[tuple[int, ...]] = []
        tried = self._verdict or Verdict()
        most = 0 if tried.mixed else self._padding
        for ids in todo:
            padding = len(ids) * len(group) - sum(map(len, group))
            full = bool(tried.alone) or (len(group) + 1) * len(ids) > GROUP_TOKENS
            if group and (full or padding > most):
                self._record(group)
                group = []
            group.append(ids)
        if group:
            self._record(group)

    def _try(self, rows: Sequence[Row], tokens: int) -> None:
        """Find out whether prefix and padding leave what the model says as it is.

        Once a model, and again where texts are longer, up to TRIED_TOKENS.
        Blocks that are handed more than they return, states that mix rows, layers that share keys:
        there are many ways in which a prefix cannot be kept, and a trial finds them all.
        """
        known = _verdicts.setdefault(self.model, {})
        key = self.weights, self.cut, self._padding_id
        if key not in known or known[key][0] < tokens:
            tried = self._tried(rows, tokens)
            if tried is None:  # nothing was learnt, so nothing is remembered, and nothing reused
                self.cut = 0
                return
            known[key] = tokens, tried
            if tried.prefix:
                warnings.warn(
                    f"{type(self.model).__name__} keeps no frozen prefix ({tried.prefix}); every "
                    "pass runs the whole model",
                    stacklevel=4,
                )
        self._tried_tokens, self._verdict = known[key]
        if self._verdict.prefix:
            self.cut = 0
        if self._verdict.head:
            self._head = None

    @torch.no_grad()
    def _tried(self, rows: Sequence[Row], size: int) -> Verdict | None:
        """What two short rows of unequal length show, run in several ways; None if they cannot."""
        longest = max(rows, key=lambda r: len(r.prefix))
        if size < 3:
            return None
        pair = [longest.part(size, 2), longest.part(size - 2)]
        live = Replay(self.model, self.weights, prefix=False)
        live._verdict, head = Verdict(), ""

        def seen() -> tuple[list[Tensor], str]:
            alone = [live._said([row]) for row in pair]
            reason = "padding changes what it says"
            return alone, _differs(lambda: live._said(pair), torch.cat(alone), reason)

        try:
            alone, mixed = seen()
        except (IndexError, RuntimeError, ValueError) as error:
            alone, mixed = [], type(error).__name__
        if mixed and live._head is not None:  # it may want whole rows
            live._head, head = None, mixed
            try:
                alone, mixed = seen()
            except (IndexError, RuntimeError, ValueError):
                alone = []
        if not alone or not all(x.isfinite().all() for x in alone):
            return None  # too short for it; or whoever uses what it says will refuse it
        twice = torch.cat(alone[:1] * 2)
        beside = mixed and _differs(
            lambda: live._said(pair[:1] * 2), twice, "a text beside it changes what it says"
        )
        turned = "" if beside else live._turned(pair[:1] * 2)
        found = Verdict("", mixed, beside, turned, head)
        if self.cut == 0:
            return found
        trial = Replay(self.model, self.weights)
        trial._verdict, trial._tried_tokens, trial._head = found, size, live._head

        def replayed() -> Tensor:
            trial.load(pair)
            return torch.cat([trial._said([row]) for row in pair])

        prefix = _differs(replayed, torch.cat(alone), "its answers would change")
        return found._replace(prefix=prefix)

    def _turned(self, rows: Sequence[Row]) -> str:
        """The weight whose module has another first dimension than ``rows``, but the same second.

        XLNet puts time first. Of as many texts as tokens nobody could tell.
        """
        with ExitStack() as stack:
            modules = {w.name: module_of(self.model, w.module) for w in self.weights}
            calls = {name: stack.enter_context(watch(m)) for name, m in modules.items()}
            self._said(rows)
        for name, seen in calls.items():
            for x in (x for call in seen for x in _tensors(call.inputs)):
                if x.dim() == 3 and x.shape[0] != len(rows) == x.shape[1]:
                    return name
        return ""

    @property
    def turned(self) -> str:
        """The weight whose rows cannot be told apart text by text, of several; "" if none is."""
        return self._verdict.turned if self._verdict else ""

    def _said(self, rows: Sequence[Row]) -> Tensor:
        """Logits at the label positions of ``rows``."""
        found = self.label_rows(self.batch(rows))
        return found.values if found.head is None else found.head(found.values)

    @torch.no_grad()
    def _record(self, group: list[tuple[int, ...]]) -> None:
        """Run the blocks below the cut on ``group`` and keep what the last of them returns."""
        assert self.blocks is not None
        batch = Batch.of([Row(ids, answer=False) for ids in group], self.device, self._padding_id)
        with ExitStack() as stack:
            last = stack.enter_context(watch(self.blocks[self.cut - 1]))
            first = stack.enter_context(watch(self.blocks[0]))
            second = [stack.enter_context(watch(block)) for block in self.blocks[1:2]]
            head = stack.enter_context(watch(self._head)) if is_plain(self._head) else []
            # The rest of the model would be thrown away: skip its blocks and give the head no row.
            above = dict.fromkeys(self.blocks[self.cut :], lambda *_, **__: last[-1].output)
            stack.enter_context(forwards(above))
            if self._encoder is None:
                logits = self._run(batch, (batch.row[:0], batch.position[:0]))
                # The very tensor, and not written to since: a capped or scaled one is another or is
                # newer.
                seen = [call.version for call in head if call.output is logits]
                self._last = len(head) == 1 and seen == [logits._version]
            else:
                self._encoder(**batch.inputs)
        if (
            len(last) != 1
        ):  # by a wrong state the answers may change by little, the gradient by much
            raise ValueError("its blocks are run several times a pass")
        leaves, spec = tree_flatten(last[-1].output)
        size = tuple(batch.inputs["input_ids"].shape)

        def is_per_row(x: Tensor) -> bool:
            return x.dim() == 3 and tuple(x.shape[:2]) == size

        per_row = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and is_per_row(x)]
        self._shape = leaves, spec, per_row
        # T5's first block also makes the position bias, which later ones are handed: it runs live.
        # Attention weights, which GPT-J's return too, are handed to nobody. (What a model made from
        # such a tensor would not be seen here; none that is known does so.)
        made = [x for x in _tensors(first[-1].output) if not is_per_row(x)]
        handed = [x for calls in second for x in _tensors([call.inputs for call in calls])]
        self._live = int(any(_share(x, y) for x in made for y in handed))
        for i, ids in enumerate(group):
            self._states[ids] = [leaves[j][i, : len(ids)] for j in per_row]

    def label_rows(self, batch: Batch) -> LabelRows:
        """The model at the label positions of ``batch``, up to its head if the head is plain.

        Gradients flow if the caller enabled them; hooks on edited modules act as usual.
        """
        # Whoever watches the whole model goes by the rows of the batch, as an edited head does.
        whole = self._head is None or bool(self.model._forward_hooks)
        head = self._head if not whole and is_plain(self._head) and self._last else None
        with ExitStack() as stack:
            if self.cut:
                stack.enter_context(self._replaying(batch))
            if head is not None:
                # The model then returns the head's input.
                stack.enter_context(forwards({head: lambda x: x}))
            values = self._run(batch, None if whole else (batch.row, batch.position))
        if not whole:
            return LabelRows(values[0], head)
        if values.dim() == 3:
            return LabelRows(values[batch.row, batch.position], None)
        return LabelRows(class_logits(values)[batch.row], None)

    @contextmanager
    def _replaying(self, batch: Batch) -> Iterator[None]:
        """The blocks below the cut return the states of the rows of ``batch``."""
        assert self.blocks is not None and self._shape is not None
        leaves, spec, per_row = self._shape
        prefixes = [row.prefix for row in batch.rows]
        states = {
            j: stacked(torch.cat([self._states[ids][k] for ids in prefixes]), [*map(len, prefixes)])
            for k, j in enumerate(per_row)
        }
        record = tree_unflatten([states.get(j, x) for j, x in enumerate(leaves)], spec)

        def live(_module: nn.Module, _args: Any, _kwargs: Any, result: Any) -> None:
            nonlocal record
            leaves = tree_flatten(result)[0]
            record = tree_unflatten([states.get(j, x) for j, x in enumerate(leaves)], spec)

        below = dict.fromkeys(self.blocks[self._live : self.cut], lambda *_, **__: record)
        with forward_hooks(dict.fromkeys(self.blocks[: self._live], live)), forwards(below):
            yield

    def _run(self, batch: Batch, labels: tuple[Tensor, Tensor] | None) -> Tensor:
        """What the model returns: [1, labels, .] with its head on those positions only.

        [rows, tokens, vocabulary] without ``labels`` (rows and positions), or if the head is
        edited; [rows, classes] of a classifier.
        """
        read = batch.inputs.get("decoder_input_ids", batch.inputs["input_ids"])

        def at_labels(x: Tensor) -> Tensor:
            if x.dim() != 3 or x.shape[:2] != read.shape:
                raise ValueError(f"its head is given {tuple(x.shape)}, not [rows, tokens, width]")
            return x[labels][None]

        if self._head is None or labels is None:
            change: AbstractContextManager[None] = nullcontext()
        else:
            change = changed_input(self._head, at_labels)
        with change:
            logits: Tensor = self.model(**batch.inputs, **self._options).logits
        return logits


def _differs(run: Callable[[], Tensor], exact: Tensor, reason: str) -> str:
    """Why what ``run`` gives is not ``exact``; nothing if it is, up to rounding."""
    try:
        found = run()
    except Exception as error:  # whatever a model raises, it is no reason to give up
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    # Models take norms and shares in float32, whatever their own precision.
    allowed = max(torch.finfo(exact.dtype).eps ** 0.6, ROUNDED) * exact.float().norm()
    same = found.shape == exact.shape and (found.float() - exact.float()).norm() <= allowed
    return "" if same else reason


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested values."""
    return [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]


def _share(x: Tensor, y: Tensor) -> bool:
    """Whether both look at the same memory."""
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
