"""Everything that pymend does with a model, held against plain PyTorch.

The oracle is the unmodified model, asked row by row: its logits, autograd's gradient of its
parameters, and a copy whose parameters were changed by hand. None of it calls pymend.
"""

from __future__ import annotations

import copy
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import tiny
import torch
from architectures import CLASSES, EOS, PAD
from torch import Tensor
from torch.nn.functional import cross_entropy

from pymend import Edit, EditRequest, Probe, Trainer
from pymend.algorithms.mend.mend import Mend
from pymend.config import TrainConfig
from pymend.edit import LowRank
from pymend.engine.capture import Factors
from pymend.engine.hooks import frozen
from pymend.engine.replay import Replay
from pymend.engine.tokens import Encoder, Row
from pymend.errors import meant_for_user
from pymend.models.structure import EditedWeight, find_weights

CLOSE = 1e-4  # relative error of float32 through five random blocks
TIMES = 10  # the plain model's own rounding, where that is large; a float64 copy tells
EXACT = 1e-6  # of one product of matrices
NOTHING = 1e-6  # share of the largest gradient below which one is rounding
ADVICE = re.compile(r"; (otherwise )?(choose|edit|name|give|load|save|set|use|try|remove|leave)\b")
APART = re.compile("takes (no texts of unequal length at once|one text at a time)")
UNEQUAL, EQUAL, SQUARE = (5, 12, 7), (6,) * 3, (5,) * 6  # words of the prompts
TEXTS = ("any", "of one length", "one by one")  # which texts can be edited at once


class Wrong(Exception):
    """A value that is not what plain PyTorch gives, or a trace left behind."""


class Trial:
    """One model through every check.

    ``findings``: (step, what, text), where what is wrong, crash, unclear or refused. ``prefix``,
    ``texts`` and ``peft``: whether the frozen prefix is kept, which texts go together, and whether
    an adapter can be written.

    Args:
        patterns: the weights to edit, as for ``find_weights``.
        at: is told the step that begins.
    """

    def __init__(
        self,
        kind: str,
        model: Any,
        patterns: Sequence[str] = (),
        at: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.kind, self.model, self.patterns, self.at = kind, model, tuple(patterns), at
        self.text = tiny.tokenizer(end=kind != "causal")
        self.findings: list[tuple[str, str, str]] = []
        self.weights: tuple[EditedWeight, ...] = ()
        self.prefix, self.texts, self.peft = False, TEXTS[0], False
        self.before, self.pristine = _state(model), copy.deepcopy(model)
        self.named = {name for name, _ in model.named_parameters()}
        self.mend: Mend | None = None
        self.edit: Edit | None = None

    # -- the course of it ------------------------------------------------------------------------

    @torch.no_grad()
    def check_plain(self) -> None:
        """Raise whatever the model raises on text alone, before pymend has to do with it."""
        self.at("plain")
        one, other = (self.said(self._plain_row(ids)) for ids in ((5, 9, 30, 7), (6, 31, 7, 12)))
        if not all(x.isfinite().all() for x in (one, other)):
            raise ValueError("what the model says is not finite")
        if not _error(one, other) > CLOSE:
            raise ValueError("what the model says does not depend on the text")

    def run(self, brief: bool = False) -> Trial:
        """All checks, or those of what an edit is."""
        self._step("weights", self._find)
        if not self.weights:
            return self
        self._step("gradient", self._gradient)
        if self.mend is None:
            return self
        for check in (self._together, self._among, self._edit):
            self._step(check.__name__.strip("_"), check)
        if self.edit is not None:
            self._step("several edits", self._several)
            if not brief:
                for check in (self._files, self._adapter, self._generate, self._train):
                    self._step(check.__name__.strip("_"), check)
        return self

    def _step(self, name: str, check: Callable[[], None]) -> None:
        self.at(f"{' '.join(self.patterns)} {name}".strip())
        try:
            check()
            left = _differences(self.before, _state(self.model))
            if left:
                raise Wrong(f"left behind: {', '.join(left[:3])}")
        except Exception as error:
            self.findings.append((name, *self._judged(error)))

    def _judged(self, error: Exception) -> tuple[str, str]:
        """What kind of finding an error is, and its text."""
        text = f"{error}".strip()
        if isinstance(error, Wrong):
            return "wrong", text
        if not (isinstance(error, ValueError) and meant_for_user(error)):
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = trace and f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            return "crash", f"{type(error).__name__}: {text[:300]} ({where})"
        # A parameter, a layer as PEFT calls it, or a class.
        names = {*self.named, *(type(m).__name__ for m in self.model.modules())}
        names |= {w.module.rpartition(".")[2] for w in self.weights}
        clear = ADVICE.search(text) and any(name in text for name in names)
        return "refused" if clear else "unclear", text

    # -- plain PyTorch ---------------------------------------------------------------------------

    def said(self, row: Row, model: Any = None) -> Tensor:
        """What the model says at the label positions of a row that stands alone, [labels, .]."""
        return self.said_together([row], model)[0]

    def said_together(self, rows: Sequence[Row], model: Any = None) -> list[Tensor]:
        """The same of rows that are padded on the right."""
        ids, mask = _padded([row.prefix for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.kind == "seq2seq":
            inputs["decoder_input_ids"] = _padded([row.inputs for row in rows])[0]
        if self.kind != "classification":
            inputs["use_cache"] = False
        logits = (self.model if model is None else model)(**inputs).logits
        if self.kind == "classification":
            return list(logits[:, None])
        return [x[row.first : len(row.inputs)] for x, row in zip(logits, rows, strict=True)]

    def loss(self, row: Row, model: Any = None) -> Tensor:
        """The token mean of one row."""
        return cross_entropy(self.said(row, model), torch.tensor(row.targets()))

    @torch.no_grad()
    def by_hand(self, edit: Edit) -> Any:
        """A copy of the model with the sums of outer products written into its parameters."""
        model = copy.deepcopy(self.pristine)
        for w in edit.weights:
            f = edit.factors[w.name]
            p = model.get_parameter(w.name)
            p.copy_(p.double() - f.alpha.double() * summed(f, w))
        return model

    # -- the checks ------------------------------------------------------------------------------

    def _plain_row(self, ids: tuple[int, ...]) -> Row:
        if self.kind == "seq2seq":
            return Row((EOS, 8, 9), source=(*ids, EOS))
        return Row((*ids, EOS), label=0) if self.kind == "classification" else Row(ids, 1)

    def _find(self) -> None:
        self.weights = find_weights(self.model, self.patterns)

    def _gradient(self) -> None:
        """The outer products of captured factors add up to the dense gradient of every row."""
        mend = tiny.tiny_mend(self.model, edit=self.patterns)
        for row in self._rows(UNEQUAL):
            captured = self._captured(mend, [row])
            self._hold(row, captured, "alone")
            with torch.no_grad():
                mend.factors(captured, merge=True)  # the moments have to see something
        for net in mend.editor.nets.values():
            for side in net.moments.m2.split([net.a, net.b]):
                # A dimension that is rounding would be made as large as the others.
                side.clamp_(min=float(side.mean()) * CLOSE)
        self.mend = mend

    def _among(self) -> None:
        """The same of rows in one batch.

        Also of as many as they have tokens: what puts time first has the same shape then.
        """
        assert self.mend is not None
        if self.texts == TEXTS[2]:
            return
        for several in (self._rows(self._lengths), self._rows(SQUARE)):
            try:
                among = self._captured(self.mend, several)
            except ValueError as error:
                if "edits would be mixed" not in str(error) or self._judged(error)[0] != "refused":
                    raise
                self.texts = TEXTS[2]
                continue
            for i, row in enumerate(several):
                own = {name: _of_episode(f, i) for name, f in among.items()}
                self._hold(row, own, f"among {len(several)} of {len(row.prefix)} tokens")

    def _captured(self, mend: Mend, rows: Sequence[Row]) -> dict[str, Factors]:
        with frozen(self.model), _quiet():
            replay = Replay(self.model, mend.weights)
            replay.load(rows)
            return mend.capture(replay, rows, len(rows))

    def _dense_gradient(self, row: Row, model: Any = None) -> list[Tensor]:
        model = self.model if model is None else model
        parameters = [model.get_parameter(w.name) for w in self.weights]
        grads = torch.autograd.grad(self.loss(row, model), parameters, materialize_grads=True)
        if not any(grad.any() for grad in grads):
            raise Wrong("the plain model has no gradient, so nothing is shown")
        alike = [w.experts and not w.routed for w in self.weights]
        return [
            g.sum(0, keepdim=True).expand_as(g) if same else g
            for g, same in zip(grads, alike, strict=True)
        ]

    def _hold(self, row: Row, captured: dict[str, Factors], where: str) -> None:
        grads = self._dense_gradient(row)
        largest = max(grad.norm() for grad in grads)
        for i, (w, grad) in enumerate(zip(self.weights, grads, strict=True)):
            error = (summed(captured[w.name], w) - grad.double()).norm()
            if not error <= CLOSE * grad.norm() + NOTHING * largest:
                exact = self._dense_gradient(row, _exact(self.pristine))[i]
                if not error <= TIMES * (exact - grad).norm():
                    raise Wrong(
                        f"{where}, the factors of {w.name} are off by {error / largest:.1e}"
                    )

    @torch.no_grad()
    def _together(self) -> None:
        """Rows in one batch, above the frozen prefix, say what each says alone."""
        for i, lengths in enumerate((UNEQUAL, EQUAL, EQUAL[:1])):
            self.texts = TEXTS[i]
            try:
                found = self._replayed(lengths)
            except ValueError as error:
                if not APART.search(str(error)) or self._judged(error)[0] != "refused":
                    raise
            else:
                self._compare(found, self._rows(lengths), "the rows of a batch")
                return

    def _replayed(self, lengths: Sequence[int]) -> list[Tensor]:
        rows = self._rows(lengths)
        with frozen(self.model), _quiet():
            replay = Replay(self.model, self.weights)
            replay.load(rows)
            self.prefix = replay.cut > 0
            found = replay.label_rows(replay.batch(rows))
            values = found.values if found.head is None else found.head(found.values)
        return list(values.split([len(row.positions()) for row in rows]))

    def _edit(self) -> None:
        """Applied, merged and by hand are the same, and undo is exact."""
        assert self.mend is not None
        request, *_ = self._requests(self._lengths)
        edit, rows = self.mend.edit(self.model, self.text, request), self._rows(UNEQUAL)
        hand = self.by_hand(edit)
        base = [self.said(row) for row in rows]
        if not max(_error(self.said(r, hand), b) for r, b in zip(rows, base, strict=True)) > CLOSE:
            raise Wrong("the edit changes nothing that can be seen")
        with edit.applied(self.model):
            self._compare([self.said(row) for row in rows], rows, "applied", hand)
        edit.merge_(self.model)
        for w in self.weights:
            found = self.model.get_parameter(w.name).detach()
            error = _error(found, hand.get_parameter(w.name))
            if not error <= EXACT:
                raise Wrong(f"{w.name} merged is off by {error:.1e}")
        self._compare([self.said(row) for row in rows], rows, "merged", hand)
        edit.unmerge_(self.model)
        self._outcome(edit, request, hand)
        self.edit = edit

    def _several(self) -> None:
        """Edits computed in one pass are those computed one by one, also side by side."""
        assert self.mend is not None
        requests = self._requests(self._lengths)
        rows = self._rows(self._lengths)
        if self.texts == TEXTS[2]:
            return  # refused by name, as was seen
        many = self.mend.edit_many(self.model, self.text, requests)
        alone = [self.mend.edit(self.model, self.text, request) for request in requests]
        for i, one in enumerate(alone):
            sums = [(summed(many[i].factors[w.name], w), w) for w in self.weights]
            for total, w in sums:
                error = _error(total, summed(one.factors[w.name], w))
                if not error <= 10 * CLOSE:
                    raise Wrong(f"{w.name} among others is off by {error:.1e}")
        hands = [self.by_hand(one) for one in alone]
        for i, request in enumerate(requests):
            self._outcome(many[i], request, hands[i])
        with many.applied(self.model), torch.no_grad():
            beside = self.said_together(rows)
        for found, row, hand in zip(beside, rows, hands, strict=True):
            self._compare([found], [row], "edits side by side", hand)

    def _outcome(self, edit: Edit, request: EditRequest, hand: Any) -> None:
        """The probabilities that an edit reports."""
        (outcome,), row = edit.outcomes, self._row(request)
        for model, reported in (
            (self.model, outcome.probability_before),
            (hand, outcome.probability_after),
        ):
            with torch.no_grad():
                loss = cross_entropy(self.said(row, model), torch.tensor(row.targets()))
            error = abs(reported / float((-loss).exp()) - 1)
            if not error <= 10 * CLOSE:
                raise Wrong(f"a reported probability is off by {error:.1e}")

    def _files(self) -> None:
        assert self.mend is not None and self.edit is not None
        with tempfile.TemporaryDirectory() as folder:
            self.mend.save_pretrained(f"{folder}/editor")
            self.edit.save_pretrained(f"{folder}/edit")
            mend, edit = (
                Mend.from_pretrained(f"{folder}/editor"),
                Edit.from_pretrained(f"{folder}/edit"),
            )
        request = self._requests(self._lengths)[0]
        again = mend.edit(self.model, self.text, request)
        for w in self.weights:
            f, g, h = (e.factors[w.name] for e in (self.edit, edit, again))
            if not (torch.equal(f.u, g.u) and torch.equal(f.delta, g.delta)):
                raise Wrong(f"the loaded edit has other factors of {w.name}")
            if not _error(summed(h, w), summed(f, w)) <= CLOSE:
                raise Wrong(f"the loaded editor's edit has other factors of {w.name}")
        rows = self._rows(UNEQUAL)
        with edit.applied(self.model):
            found = [self.said(row) for row in rows]
        self._compare(found, rows, "a loaded edit", self.by_hand(self.edit))

    def _adapter(self) -> None:
        """PEFT makes of the adapter what the edit is."""
        assert self.edit is not None
        rows = self._rows(UNEQUAL)
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.edit.to_peft(f"{folder}/adapter")
            except ValueError as error:
                if self._judged(error)[0] != "refused":
                    raise
                return
            with _quiet():
                model = peft.PeftModel.from_pretrained(
                    copy.deepcopy(self.pristine), f"{folder}/adapter"
                ).eval()
        found = [self.said(row, model) for row in rows]
        self._compare(found, rows, "the adapter in PEFT", self.by_hand(self.edit))
        self.peft = True

    def _generate(self) -> None:
        """With a cache, several texts at once."""
        assert self.edit is not None
        if self.kind == "classification":
            return
        ids = torch.tensor([[5, 9, 30, 7, 11, 8], [6, 12, 40, 33, 8, 20]])

        def written(model: Any) -> tuple[Tensor, Tensor]:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                min_new_tokens=4,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return out.sequences, torch.stack(out.logits)

        try:
            wanted, logits = written(self.by_hand(self.edit))
        except Exception:
            return  # the plain model cannot
        with self.edit.applied(self.model):
            found, other = written(self.model)
        if not torch.equal(found, wanted) or not _error(other, logits) <= 10 * CLOSE:
            raise Wrong(f"generation is off by {_error(other, logits):.1e}")

    def _train(self) -> None:
        mend = tiny.tiny_mend(self.model, edit=self.patterns)
        start = {name: p.detach().clone() for name, p in mend.editor.named_parameters()}
        apart = self.texts == TEXTS[2]
        config = TrainConfig(
            steps=2,
            batch_size=2,
            accumulate=2 if apart else 1,
            lr=1e-3,
            eval_every=2,
            eval_records=1,
        )
        data = self._requests(self._lengths)
        with tempfile.TemporaryDirectory() as folder, _quiet():
            Trainer(
                mend,
                self.model,
                self.text,
                data,
                data[:1],
                config=config,
                output=folder,
                progress=False,
            ).train()
        moved = [name for name, p in mend.editor.named_parameters() if not p.equal(start[name])]
        if not moved or not all(p.isfinite().all() for p in mend.editor.parameters()):
            raise Wrong("two steps of training move nothing, or to no finite value")

    # -- texts -----------------------------------------------------------------------------------

    @property
    def _lengths(self) -> Sequence[int]:
        return UNEQUAL if self.texts == TEXTS[0] else EQUAL

    def _requests(self, lengths: Sequence[int]) -> list[EditRequest]:
        draw, found = random.Random(3), []
        for i, length in enumerate(lengths):
            words = draw.sample(tiny.WORDS, 2 * length + 2)
            target = " ".join(words[-1 - length % 2 :])  # one word or two
            if self.kind == "classification":
                target = str(i % CLASSES)
            found.append(
                EditRequest(
                    prompt=" ".join(words[:length]),
                    target=target,
                    rephrases=(" ".join(words[length : 2 * length]),),
                    locality=(Probe(" ".join(draw.sample(tiny.WORDS, length))),),
                )
            )
        return found

    def _row(self, request: EditRequest) -> Row:
        return Encoder.for_model(self.model, self.text).row(request.prompt, request.target)

    def _rows(self, lengths: Sequence[int]) -> list[Row]:
        return [self._row(request) for request in self._requests(lengths)]

    @torch.no_grad()
    def _compare(
        self, found: Sequence[Tensor], rows: Sequence[Row], what: str, model: Any = None
    ) -> None:
        """Hold logits against what a plain model says of the rows alone."""
        for values, row in zip(found, rows, strict=True):
            wanted = self.said(row, model)
            error = _error(values, wanted)
            if not error <= CLOSE:
                exact = _exact(self.pristine if model is None else model)
                if not error <= TIMES * _error(wanted, self.said(row, exact)):
                    raise Wrong(f"{what}: logits are off by {error:.1e}")


def summed(f: Factors | LowRank, w: EditedWeight) -> Tensor:
    """The sum of the outer products of factors, as the parameter lies; float64.

    Rows of experts count for their own, or without that for all.
    """
    u, delta = f.u.detach().double(), f.delta.detach().double()
    if not w.experts:
        total = delta.mT @ u
    elif f.expert is None:
        total = (delta.mT @ u).expand(w.experts, -1, -1)
    else:
        total = torch.stack([delta[f.expert == e].mT @ u[f.expert == e] for e in range(w.experts)])
    return total.mT if w.transposed else total


def _exact(model: Any) -> Any:
    """A copy in float64."""
    exact = copy.deepcopy(model).double()
    exact.set_experts_implementation("eager")  # others know no float64
    return exact


def _of_episode(f: Factors, i: int) -> Factors:
    """The rows of one of the texts that were captured together."""
    start = sum(f.counts[:i])
    own = slice(start, start + f.counts[i])
    expert = None if f.expert is None else f.expert[own]
    return Factors(f.u[own], f.delta[own], (f.counts[i],), expert)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, tokens]."""
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return torch.tensor([[*row] + [PAD] * (width - len(row)) for row in rows]), mask


def _error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    return tiny.rel_error(found, wanted)


def _state(model: Any) -> dict[str, Any]:
    """All that an edit could leave behind: values, flags, hooks, replaced methods."""
    values = [*model.named_parameters(), *model.named_buffers()]
    state: dict[str, Any] = {name: tiny.bits(x).clone() for name, x in values if x.numel()}
    for path, m in model.named_modules():
        hooks = [m._forward_hooks, m._forward_pre_hooks, m._backward_hooks]
        state[f"module {path}"] = (m.training, "forward" in vars(m), [len(h) for h in hooks])
    state["flags"] = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return state


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The keys of what is not as it was."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    keys = before.keys() | after.keys()
    return sorted(k for k in keys if not same(before.get(k), after.get(k)))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
