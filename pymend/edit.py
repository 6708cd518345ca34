"""An edit: applied beside a model or, of low rank, merged into it, and undone."""

from __future__ import annotations

import hashlib
import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pymend.engine.beside import Side, beside
from pymend.engine.hooks import checked
from pymend.errors import NonFiniteError
from pymend.files import (
    digest,
    expect_kind,
    read_json,
    read_tensors,
    writable_dir,
    write_json,
    write_tensors,
)
from pymend.interop.peft import write_adapter
from pymend.models.structure import EditedWeight, Origin, unwrapped, weight_of
from pymend.ops.rank_update import rank_update
from pymend.ops.side_path import routed_side_path, side_path

if TYPE_CHECKING:
    from typing_extensions import Self

SAMPLES = 1024  # elements of each weight in a fingerprint
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}  # that PEFT converts
MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}  # PEFT refuses out_proj
LOSSY = 0.98  # a merge that keeps less of the wanted change than this warns

# Merged edits of every model, oldest first: undo runs backwards through this list.
_merged: weakref.WeakKeyDictionary[nn.Module, list[Edit]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class LowRank:
    """W - alpha * sum_i d_i u_i^T of one weight.

    ``u`` [n, a] and ``delta`` [n, b], or [episodes, n, .] for independent edits whose padded rows
    are zero; ``alpha`` a scalar tensor. Routed experts: each row changes the matrix of its
    ``expert`` [n] or [episodes, n], int64.
    """

    u: Tensor
    delta: Tensor
    alpha: Tensor
    expert: Tensor | None = None

    def rows(self, which: Tensor | int) -> LowRank:
        """The rows that a mask keeps, or one of the independent edits."""
        expert = None if self.expert is None else self.expert[which]
        return LowRank(self.u[which], self.delta[which], self.alpha, expert)

    def of(self, expert: int) -> LowRank:
        """What one of the experts changes by."""
        if self.expert is None:
            return self
        own = self.expert == expert
        return LowRank(self.u[own], self.delta[own], self.alpha)

    def norm(self) -> float:
        """|alpha * sum_i d_i u_i^T| in the Euclidean norm; of routed experts, of all together.

        From products of rows with rows: nothing of the weight's size is formed.
        """
        if self.expert is not None:
            return math.hypot(*(self.of(e).norm() for e in self.expert.unique().tolist()))
        few = self.compressed()
        u, delta = few.u.double(), few.delta.double()
        same = (u @ u.T) * (delta @ delta.T)
        return abs(float(few.alpha)) * float(same.sum().clamp(min=0).sqrt())

    def compressed(self) -> LowRank:
        """The same change in at most min(a, b) rows, up to rounding; routed rows stay."""
        n, a, b = len(self.u), self.u.shape[1], self.delta.shape[1]
        if n <= min(a, b) or self.expert is not None:
            return self
        if a <= b:
            q, r = torch.linalg.qr(self.u.double())
            return LowRank(r.to(self.u), (q.T @ self.delta.double()).to(self.delta), self.alpha)
        q, r = torch.linalg.qr(self.delta.double())
        return LowRank((q.T @ self.u.double()).to(self.u), r.to(self.delta), self.alpha)

    def lora(self) -> tuple[Tensor, Tensor]:
        """A [n, a] and B^T [n, b] of the change B A, with n at most min(a, b)."""
        own = self.compressed()
        return own.u, -own.alpha * own.delta

    def to(self, device: torch.device) -> LowRank:
        """The same on another device."""
        expert = None if self.expert is None else self.expert.to(device)
        return LowRank(self.u.to(device), self.delta.to(device), self.alpha.to(device), expert)


class Matrix(NamedTuple):
    """A matrix that a merge writes, and the factors of its change; one of the experts, or None."""

    name: str
    expert: int | None
    value: Tensor
    factors: LowRank
    transposed: bool


@dataclass(frozen=True)
class Outcome:
    """What an edit did to its own request: probabilities are token means (geometric)."""

    prompt: str
    target: str
    probability_before: float
    probability_after: float
    answer_before: str
    answer_after: str
    success: bool


@dataclass(frozen=True)
class Answer:
    """What the model says to a prompt beside an edit, and without it.

    ``kind``: the edited prompt, a rephrase, a neighbour (the same relation of another subject), or
    what is unrelated. ``target`` is the fact's. ``verdict``: took or missed, kept or changed.
    """

    kind: str
    prompt: str
    target: str
    before: str
    after: str
    verdict: str


class BaseEdit(ABC):
    """One edit of a model, or several independent ones side by side; none has changed the model.

    ``episodes`` is None for one joint edit, else the number of independent edits; ``edit[i]`` is
    one of them. ``fingerprint`` names the model it was made for ("" fits any), ``outcomes`` says of
    every request whether it took.
    """

    def __init__(
        self, episodes: int | None, fingerprint: str = "", outcomes: Sequence[Outcome] = ()
    ) -> None:
        self.episodes = episodes
        self.fingerprint = fingerprint
        self.outcomes = tuple(outcomes)

    def __len__(self) -> int:
        return 1 if self.episodes is None else self.episodes

    def __getitem__(self, index: int) -> Self:
        """One of several independent edits, without its padding.

        Raises:
            IndexError: there are not so many.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} in an edit that holds {len(self)}")
        if self.episodes is None:
            return self
        one = self._pick(index)
        one.fingerprint, one.outcomes = self.fingerprint, self.outcomes[index:][:1]
        return one

    @abstractmethod
    def _pick(self, index: int) -> Self:
        """One of the independent edits, alone."""

    @abstractmethod
    def applied(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """``model`` acts edited inside the block; its weights are never written.

        With independent edits the batch is as many equal groups of rows, one after the other, and
        each group sees its own edit.

        Raises:
            ValueError: another model, values that are not finite, or a batch that does not split.
        """


class Edit(BaseEdit):
    """Low-rank factors for the weights of one model.

    ``applied`` acts beside the weights; ``merge_`` writes them and keeps what it overwrote.
    ``answers``, of whoever asked the model, and ``fidelity``, the least share of the wanted change
    that the last merge kept (None: never merged), are saved with it.
    """

    def __init__(
        self,
        weights: Sequence[EditedWeight],
        factors: Mapping[str, LowRank],
        fingerprint: str = "",
        outcomes: Sequence[Outcome] = (),
    ) -> None:
        self.weights = tuple(weights)
        self.factors = dict(factors)
        u = next(iter(self.factors.values())).u
        super().__init__(len(u) if u.dim() == 3 else None, fingerprint, outcomes)
        self.origin = Origin()
        self.answers: tuple[Answer, ...] = ()
        self.fidelity: float | None = None
        self._backup: dict[tuple[str, int | None], Tensor] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._found: Any = None  # what the model's configuration said before

    @property
    def rank(self) -> int:
        """The largest number of rows of any weight."""
        return max(f.u.shape[-2] for f in self.factors.values())

    def _pick(self, index: int) -> Edit:
        factors = {}
        for name, f in self.factors.items():
            own = f.rows(index)
            factors[name] = own.rows((own.u != 0).any(-1) | (own.delta != 0).any(-1))
        one = Edit(self.weights, factors)
        one.origin = self.origin
        return one

    def __add__(self, other: Edit) -> Edit:
        """Both edits at once: their rows one after the other.

        Raises:
            ValueError: they were made for different models or weights, or hold independent edits.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        if self.weights != other.weights or self.fingerprint != other.fingerprint:
            raise ValueError("these edits were made for different models or weights")
        if self.episodes is not None or other.episodes is not None:
            raise ValueError("pick single edits out of edit_many with [i] before adding them")
        factors = {}
        for name, f in self.factors.items():
            g = other.factors[name].to(f.u.device)
            u, delta = torch.cat([f.u, g.u]), torch.cat([f.alpha * f.delta, g.alpha * g.delta])
            experts = [x for x in (f.expert, g.expert) if x is not None]
            expert = torch.cat(experts) if experts else None
            factors[name] = LowRank(u, delta, torch.ones_like(f.alpha), expert)
        both = Edit(self.weights, factors, self.fingerprint, self.outcomes + other.outcomes)
        both.origin = self.origin
        return both

    # -- beside the weights ------------------------------------------------------------------

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """``model`` acts edited inside the block; its weights are never written.

        With independent edits the batch is as many equal groups of rows, one after the other, and
        each group sees its own edit.

        Raises:
            ValueError: another model, non-finite factors, or a batch that does not split.
            RuntimeError: this edit is merged into ``model``, so it acts already.
        """
        if self in _merged.get(unwrapped(model), []):
            raise RuntimeError("this edit is merged into this model and acts already")
        self.check(model)
        sides = {w.name: self._side(w.name) for w in self.weights}
        with ExitStack() as stack:
            if any(w.experts for w in self.weights):  # they are given tokens, not texts
                stack.enter_context(checked(unwrapped(model), self._check_rows))
            stack.enter_context(beside(model, self.weights, sides))
            yield model

    def _check_rows(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse a batch that is not as many equal groups of rows as there are edits."""
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is not None:
            split_episodes(given[..., None], self.episodes)

    def _side(self, name: str) -> Side:
        """The output of a weight, changed by the edit."""

        def side(x: Tensor, y: Tensor, expert: Tensor | None) -> Tensor:
            f = self.factors[name]
            f = f if x.device == f.u.device == f.alpha.device else f.to(x.device)
            rows = split_episodes(x, self.episodes).to(f.u.dtype)
            if f.expert is None or expert is None:
                change = side_path(rows, f.u, f.delta, f.alpha)
            else:
                same = expert.reshape(*rows.shape[:-1], 1) == f.expert[..., None, :]
                change = routed_side_path(rows, f.u, f.delta, f.alpha, same)
            return y - change.view(y.shape).to(y.dtype)

        return side

    # -- into the weights --------------------------------------------------------------------

    def merge_(self, model: nn.Module, seed: int | None = None) -> float:
        """Write the edit into ``model``'s weights, in place and in their dtype.

        Args:
            seed: round bfloat16 and float16 weights at random, repeatably: an edit below half a
                step survives on average, at the price of noise. None: to the nearest value.

        Returns:
            The smallest share over the weights of the wanted change that survived the rounding:
            1 is all of it. Below 0.98, in bfloat16, the edit may not work; use ``applied``.

        Raises:
            ValueError: another model, or non-finite factors; nothing was written.
            RuntimeError: this edit is merged already, or holds independent edits.
        """
        if self.episodes is not None:
            raise RuntimeError("pick a single edit out of edit_many with [i] before merging it")
        if self._backup:
            raise RuntimeError("this edit is merged already; unmerge_ it first")
        self.check(model)
        matrices = list(self._matrices(model))
        names = [w.name for w in self.weights]
        places = [names.index(m.name) for m in matrices]
        with torch.no_grad():
            backup = {(m.name, m.expert): m.value.clone() for m in matrices}
            try:
                fidelity = rank_update(
                    [m.value for m in matrices],
                    [m.factors.u for m in matrices],
                    [m.factors.delta for m in matrices],
                    torch.stack([self.factors[w.name].alpha for w in self.weights])[places],
                    [m.transposed for m in matrices],
                    seed,
                )
            except BaseException:
                for m in matrices:
                    m.value.copy_(backup[m.name, m.expert])
                raise
        self._backup = backup
        self._model = weakref.ref(model)
        _merged.setdefault(unwrapped(model), []).append(self)
        self._mark(model)
        kept = self.fidelity = float(fidelity.min()) if len(fidelity) else 1.0
        if kept < LOSSY and seed is None:
            warnings.warn(
                f"only {kept:.0%} of the wanted change survived rounding to "
                f"{matrices[0].value.dtype}; the edit may not work, use applied()",
                stacklevel=2,
            )
        return kept

    def unmerge_(self, model: nn.Module) -> None:
        """Put back, bit for bit, the values that ``merge_`` overwrote.

        Raises:
            RuntimeError: this edit is not the last one merged into ``model``; nothing was written.
        """
        stack = _merged.get(unwrapped(model), [])
        if self not in stack:
            raise RuntimeError("this edit is not merged into this model")
        if stack[-1] is not self:
            after = len(stack) - 1 - stack.index(self)
            raise RuntimeError(
                f"{after} later edit(s) are merged on top of this one; unmerge the last one first"
            )
        with torch.no_grad():
            for m in self._matrices(model):
                m.value.copy_(self._backup[m.name, m.expert])
        stack.pop()
        self._backup = {}
        config = getattr(unwrapped(model), "config", None)
        if config is not None:
            vars(config).pop("pymend", None)
            vars(config).update({} if self._found is None else {"pymend": self._found})

    def _mark(self, model: nn.Module) -> None:
        """Let a model's configuration, which is saved with it, say what is merged into it."""
        config = getattr(unwrapped(model), "config", None)
        if config is None:
            return
        self._found = vars(config).get("pymend")
        before = self._found if isinstance(self._found, dict) else {}
        facts = [*before.get("facts", []), *([o.prompt, o.target] for o in self.outcomes)]
        vars(config)["pymend"] = {"base": self.fingerprint, **before, "facts": facts}

    def _matrices(self, model: nn.Module) -> Iterator[Matrix]:
        """The matrices that the edit changes: of experts those that have rows, or all."""
        for w in self.weights:
            value = weight_of(model, w).detach()
            f = self.factors[w.name].to(value.device)
            hit = range(w.experts) if f.expert is None else f.expert.unique().tolist()
            for e in hit if w.experts else ():
                yield Matrix(w.name, e, value[e], f.of(e), w.transposed)
            if not w.experts:
                yield Matrix(w.name, None, value, f, w.transposed)

    # -- files -------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``edit.safetensors`` and ``edit.json`` into ``folder``, each atomically.

        Raises:
            PermissionError: ``folder`` cannot be written.
            RuntimeError: the edit holds independent edits.
        """
        if self.episodes is not None:
            raise RuntimeError("pick a single edit out of edit_many with [i] before saving it")
        path = writable_dir(folder)
        description = {
            "weights": [asdict(w) for w in self.weights],
            "alpha": [float(self.factors[w.name].alpha.detach()) for w in self.weights],
            "fingerprint": self.fingerprint,
            "outcomes": [asdict(o) for o in self.outcomes],
            "origin": asdict(self.origin),
            "answers": [asdict(a) for a in self.answers],
            "fidelity": self.fidelity,
            # For those who look at it without its tensors.
            "ranks": [len(self.factors[w.name].u) for w in self.weights],
            "norms": [self.factors[w.name].norm() for w in self.weights],
        }
        tensors = {}
        for name, f in self.factors.items():
            tensors[f"{name}.u"], tensors[f"{name}.delta"] = f.u, f.delta
            if f.expert is not None:
                tensors[f"{name}.expert"] = f.expert
        write_tensors(path / "edit.safetensors", tensors, digest(description))
        write_json(path / "edit.json", description)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Edit:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: no such edit.
            ValueError: a truncated file, or one with missing or foreign keys.
        """
        path = Path(folder)
        expect_kind(path, "edit")
        description = read_json(path / "edit.json")
        tensors = read_tensors(path / "edit.safetensors", digest(description))
        try:
            weights = [EditedWeight(**w) for w in description["weights"]]
            outcomes = [Outcome(**o) for o in description["outcomes"]]
            alphas, fingerprint = description["alpha"], description["fingerprint"]
            origin = Origin(**description.get("origin", {}))  # older files have none
            answers = [Answer(**a) for a in description.get("answers", [])]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / 'edit.json'} is no edit: {error}") from error
        wanted: dict[str, tuple[int, ...]] = {}
        for w in weights:
            wanted |= {f"{w.name}.u": (w.a,), f"{w.name}.delta": (w.b,)}
            wanted |= {f"{w.name}.expert": ()} if w.routed else {}
        if wanted.keys() != tensors.keys():
            odd = sorted(wanted.keys() ^ tensors.keys())[0]
            raise ValueError(f"{path / 'edit.safetensors'}: {odd} is missing or foreign")
        for name, width in wanted.items():
            shape, rows = tuple(tensors[name].shape), len(tensors[f"{name.rpartition('.')[0]}.u"])
            if shape != (rows, *width):
                raise ValueError(
                    f"{path / 'edit.safetensors'}: {name} is {shape}, expected {(rows, *width)}"
                )
        if len(alphas) != len(weights):
            raise ValueError(
                f"{path / 'edit.json'}: {len(alphas)} alphas for {len(weights)} weights"
            )
        factors = {
            w.name: LowRank(
                tensors[f"{w.name}.u"],
                tensors[f"{w.name}.delta"],
                torch.tensor(alpha),
                tensors.get(f"{w.name}.expert"),
            )
            for w, alpha in zip(weights, alphas, strict=True)
        }
        for w in weights:
            expert = factors[w.name].expert
            if expert is not None and not bool(((expert >= 0) & (expert < w.experts)).all()):
                raise ValueError(f"{path / 'edit.safetensors'}: {w.name} has no such experts")
        edit = cls(weights, factors, fingerprint, outcomes)
        edit.origin, edit.answers = origin, tuple(answers)
        edit.fidelity = description.get("fidelity")
        return edit

    def to_peft(self, folder: str | Path) -> None:
        """Write the edit as a LoRA adapter that ``peft.PeftModel.from_pretrained`` loads.

        Raises:
            FileExistsError: ``folder`` holds something already.
            PermissionError: it cannot be written.
            RuntimeError: the edit holds independent edits.
            ValueError: the factors are not finite, or PEFT would not load them as they are.
        """
        if self.episodes is not None:
            raise RuntimeError("pick a single edit out of edit_many with [i] before exporting it")
        plain = [w for w in self.weights if not w.experts]
        names = {w.module.rpartition(".")[2] for w in plain} & EXPERT_NAMES
        if self.origin.experts and names:
            raise ValueError(
                f"PEFT takes {', '.join(sorted(names))} of a model with experts for those of its "
                "experts, so an adapter would not act as the edit does; save the merged model"
            )
        if self.origin.kind in MAMBA and any(w.module.endswith(".out_proj") for w in plain):
            raise ValueError(
                f"PEFT loads no adapter of out_proj of a model of the type {self.origin.kind}; "
                "save the merged model"
            )
        self.check_finite()
        layers = {w.module: self.factors[w.name].lora() for w in plain}
        experts = {
            w.name: [self.factors[w.name].of(e).lora() for e in range(w.experts)]
            for w in self.weights
            if w.experts
        }
        transposed = any(w.transposed for w in plain)
        write_adapter(folder, layers, transposed, self.origin.name, self.origin.task, experts)

    # -- checks ------------------------------------------------------------------------------

    def check(self, model: nn.Module) -> None:
        """Refuse a model this edit was not made for, and factors that would break one.

        Raises:
            ValueError: names the weight and what is wrong with it.
        """
        for w in self.weights:
            weight_of(model, w)
        if self._model is not None and self._model() is model:
            return
        self.check_finite()
        check_fingerprint(model, self.weights, self.fingerprint)
        made = self.origin
        self.origin = replace(Origin.of(model), chat=made.chat, editor=made.editor)
        self._model = weakref.ref(model)

    def check_finite(self) -> None:
        """Refuse factors that would break any model.

        Raises:
            NonFiniteError: names the weight.
        """
        tensors = [t.detach() for f in self.factors.values() for t in (f.u, f.delta, f.alpha)]
        # A sum of magnitudes is finite only if every element is; all are read back at once.
        totals = torch.stack([x.to(tensors[0].device) for x in torch._foreach_norm(tensors, 1)])
        finite = totals.isfinite().view(-1, 3).tolist()
        for name, parts in zip(self.factors, finite, strict=True):
            if not all(parts):
                raise NonFiniteError(
                    f"the factors of {name} are not finite; compute the edit again"
                )


def split_episodes(x: Tensor, episodes: int | None) -> Tensor:
    """A batch [rows, ., a] as [rows * ., a], or [episodes, ., a] for independent edits.

    Raises:
        ValueError: the batch is not that many equal groups of rows.
    """
    if episodes is None:
        return x.reshape(-1, x.shape[-1])
    if len(x) % episodes:
        raise ValueError(f"a batch of {len(x)} rows does not split into {episodes} edits")
    return x.reshape(episodes, x.shape[:-1].numel() // episodes, x.shape[-1])


def check_fingerprint(model: nn.Module, weights: Sequence[EditedWeight], known: str) -> None:
    """Refuse a model whose fingerprint is not the ``known`` one of an edit; "" fits any.

    Raises:
        ValueError: the edit was made for another model.
    """
    if known and known != fingerprint(model, weights):
        raise ValueError(
            "this edit was made for another model: the edited weights differ; "
            "load the model it was computed on, in its precision (a float16 copy is another model)"
        )


def fingerprint(model: nn.Module, weights: Sequence[EditedWeight]) -> str:
    """A name for the unedited values of ``weights``, whatever is merged on top of them.

    SHA-256 over name, shape and 1,024 evenly spaced elements of each, rounded to bfloat16. Stable
    between float32, float64 and bfloat16; a float16 copy is another model (it rounds twice).
    """
    state = hashlib.sha256()
    for w in weights:
        value = weight_of(model, w).detach()
        index = torch.linspace(0, value.numel() - 1, SAMPLES, dtype=torch.float64).long()
        # By places, not a flat view: a strided weight would be copied whole.
        places = torch.unravel_index(index.to(value.device), value.shape)
        sample = value[places]
        for edit in reversed(_merged.get(unwrapped(model), [])):
            for (name, e), former in edit._backup.items():
                if name == w.name:
                    own = slice(None) if e is None else places[0] == e
                    row, column = (x[own].to(former.device) for x in places[-2:])
                    sample[own] = former[row, column].to(sample.device)
        sample = sample.to(torch.bfloat16).view(torch.int16).cpu()
        state.update(f"{w.name} {tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return state.hexdigest()
