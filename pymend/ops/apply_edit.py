"""apply_edit: captured rows in, edited weights out: moments, editor and update of all weights.

A composition of the ops ``moments``, ``editor_mlp`` and ``rank_update``, with no kernel of its
own. The weights of one shape form a group, whose rows pass the editor together; one ``rank_update``
then writes all weights. ``unchecked`` never waits for the device, so it can be captured in a CUDA
graph, in which groups pass their editors side by side; ``EditGraph`` does that, once for every
bucket of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from pymend.ops import editor_mlp, rank_update
from pymend.ops.editor_mlp import Layer
from pymend.ops.moments import moments

T = TypeVar("T")
ROW_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024)  # rows of a weight, padded by dead ones


@dataclass(frozen=True)
class Group:
    """The weights of one shape (a, b) and the network they share, as plain tensors.

    ``joint`` acts on the joined row (u, delta), then ``u_side`` and ``delta_side`` on its parts;
    each may be empty, not all. Nothing requires grad.

    Attributes:
        places: of the weights in the lists that the op is given.
        modes: [len(places)] int64, the row of scale and shift that belongs to each.
        mean, m2: [a + b] float64; count: [] int64, above 0. The moments.
    """

    places: tuple[int, ...]
    modes: Tensor
    mean: Tensor
    m2: Tensor
    count: Tensor
    joint: tuple[Layer, ...] = ()
    u_side: tuple[Layer, ...] = ()
    delta_side: tuple[Layer, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Of the networks."""
        return (*self.joint, *self.u_side, *self.delta_side)[0].v.dtype


def apply_edit(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    alpha: Tensor,
    groups: Sequence[Group],
    transposed: Sequence[bool] | None = None,
    seed: int | None = None,
) -> Tensor:
    """Write W[i] - alpha[i] * sum_r d~_r u~_r^T into every W[i], where (u~, d~) = g(u, delta).

    A dead row, whose u or delta is zero throughout, gives a zero row and so changes nothing: g(0)
    itself is not zero. The op stands outside of autograd. Everything is checked before anything is
    written; for a form that reads no value see ``unchecked``.

    Args:
        weights, alpha, transposed, seed: as in ``rank_update``.
        u: [n_i, a] captured inputs of weight i; delta: [n_i, b]. float64, float32, bfloat16 or
            float16; any strides; n_i may differ between weights.
        groups: every weight belongs to one, on its device.

    Returns:
        [len(weights)], the fidelities of ``rank_update``.

    Raises:
        ValueError: lengths, shapes, devices, places or modes are wrong; or alpha, a transformed
            row or the update they make is not finite.
        TypeError: a dtype is not supported.
        RuntimeError: a tensor requires grad while grad mode is on.
    """
    flags = _flags(weights, transposed)
    rank_update.check_operands(weights, u, delta, alpha, flags)
    _check_groups(groups, weights, flags)
    with torch.no_grad():
        stacked = [_stack(group, u, delta) for group in groups]
        left, right = _transform(groups, stacked, len(weights))
        return rank_update.rank_update(weights, left, right, alpha, flags, seed)


@torch.no_grad()
def unchecked(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    alpha: Tensor,
    groups: Sequence[Group],
    transposed: Sequence[bool] | None = None,
    seed: int | None = None,
) -> Tensor:
    """``apply_edit`` of operands that passed its checks: reads no value, so nothing waits.

    What a row or an editor that is not finite makes, and a change too large for a narrow weight,
    are written as they are. A CUDA graph repeats the random numbers of ``seed`` at every replay.
    """
    stacked = [_stack(group, u, delta) for group in groups]
    return _run(weights, stacked, alpha, groups, _flags(weights, transposed), seed)


class EditGraph:
    """``apply_edit`` for weights that stay where they are, in one CUDA graph per bucket of rows.

    The rows of all weights are copied into buffers and padded by dead rows to the next of
    ``ROW_BUCKETS``; the first call that needs a bucket captures its graph, later ones replay it.
    On a CPU there is nothing to capture: the buffers and the function are the same.

    A graph holds the addresses of the weights and of the groups. Values may change between calls,
    as in training; after a move to another device or dtype, make a new one. bfloat16 and float16
    weights are rounded to nearest.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        groups: Sequence[Group],
        transposed: Sequence[bool] | None = None,
    ) -> None:
        """Check weights and groups; nothing is captured yet.

        Args:
            weights, groups, transposed: as in ``apply_edit``, all on one device.

        Raises:
            ValueError, TypeError: as ``apply_edit``; no weight, or several devices.
        """
        if not weights:
            raise ValueError("weights is empty: there is nothing to edit")
        devices = {weight.device for weight in weights}
        if len(devices) > 1:
            raise ValueError(f"weights lie on {len(devices)} devices, a graph has one")
        self._weights = [weight.detach() for weight in weights]
        self._flags = _flags(weights, transposed)
        self._groups = tuple(groups)
        (self._device,) = devices
        wide = any(weight.dtype == torch.float64 for weight in weights)
        self._alpha_dtype = torch.float64 if wide else torch.float32
        alpha = torch.zeros(len(weights), dtype=self._alpha_dtype, device=self._device)
        rank_update.check_overlap(self._weights, [], [], alpha)
        no_rows = [_sides(w, flag) for w, flag in zip(self._weights, self._flags, strict=True)]
        u, delta = ([alpha.new_empty(0, sides[k]) for sides in no_rows] for k in (0, 1))
        rank_update.check_operands(self._weights, u, delta, alpha, self._flags)
        _check_groups(self._groups, self._weights, self._flags)
        # One pool for all: graphs run one after the other, and what they return is copied.
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._buckets: dict[int, _Bucket] = {}

    @property
    def buckets(self) -> tuple[int, ...]:
        """The buckets in use, in the order of their first call."""
        return tuple(self._buckets)

    def __call__(
        self,
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        delta: Sequence[Tensor],
        alpha: Tensor,
    ) -> Tensor:
        """Edit; see ``apply_edit``.

        Whether the rows and alpha are finite is read back once, before the graph starts. What the
        network makes of finite rows, and whether the change fits a narrow dtype, is not looked at.

        Args:
            weights: the very tensors that the graph was made for.
            u, delta: in no wider dtype than the editor, or float32; at most 1024 rows each.

        Returns:
            [len(weights)] float32 (float64 if a weight is), the fidelities of ``rank_update``.

        Raises:
            ValueError: other weights, too many rows, wrong shapes, or a value is not finite;
                nothing was written.
            TypeError: a dtype is not supported or too wide.
            RuntimeError: a tensor requires grad while grad mode is on.
        """
        self._check(weights, u, delta, alpha)
        with torch.no_grad():
            size = next(b for b in ROW_BUCKETS if b >= max(len(rows) for rows in u))
            if size not in self._buckets:
                self._buckets[size] = self._prepare(size)
            bucket = self._buckets[size]
            bucket.fill(u, delta, alpha)
            if not bucket.is_finite():
                for i in range(len(weights)):
                    rank_update.refuse_non_finite(i, u[i], delta[i], alpha[i])
            fidelity = bucket.run()
            rank_update.mark_written(weights)  # autograd does not see a replay
            return fidelity.clone()

    def _prepare(self, size: int) -> _Bucket:
        """Buffers for ``size`` rows of every weight, and the graph that reads them."""
        rows, buffers = [], []
        for group in self._groups:
            i = group.places[0]
            counts = [size] * len(group.places)
            dtype = torch.promote_types(group.dtype, torch.float32)
            sides = _sides(self._weights[i], self._flags[i])
            own = [group.mean.new_zeros(sum(counts), d, dtype=dtype) for d in sides]
            u, delta = ([*buffer.split(counts)] for buffer in own)
            rows.append(_Rows(u, delta, _modes(group, counts)))
            buffers += own
        alpha = torch.zeros(len(self._weights), dtype=self._alpha_dtype, device=self._device)
        call = partial(_run, self._weights, rows, alpha, self._groups, self._flags)
        cuda = self._device.type == "cuda"
        run = _captured(call, self._device, self._pool) if cuda else call
        u, delta = _by_weight(self._groups, [(r.u, r.delta) for r in rows], len(self._weights))
        return _Bucket(u, delta, alpha, buffers, run)

    def _check(
        self,
        weights: Sequence[Tensor],
        u: Sequence[Tensor],
        delta: Sequence[Tensor],
        alpha: Tensor,
    ) -> None:
        """Refuse what this graph was not made for, by the name and the value of the argument."""
        if len(weights) != len(self._weights):
            raise ValueError(f"weights has {len(weights)} entries, not {len(self._weights)}")
        for i, (given, own) in enumerate(zip(weights, self._weights, strict=True)):
            if _place(given) != _place(own):
                raise ValueError(
                    f"weights[{i}] is not the tensor that this graph was made for; make a new one"
                )
        rank_update.check_operands(weights, u, delta, alpha, self._flags)
        if alpha.device != self._device:
            raise ValueError(f"alpha is on {alpha.device}, the graph is on {self._device}")
        for group in self._groups:
            widest = torch.promote_types(group.dtype, torch.float32)
            for i in group.places:
                if len(u[i]) > ROW_BUCKETS[-1]:
                    raise ValueError(
                        f"u[{i}] has {len(u[i])} rows, the largest bucket has {ROW_BUCKETS[-1]}; "
                        "call apply_edit"
                    )
                for name, rows in ((f"u[{i}]", u[i]), (f"delta[{i}]", delta[i])):
                    if torch.promote_types(rows.dtype, widest) != widest:
                        raise TypeError(f"{name} has dtype {rows.dtype}, the buffers have {widest}")


@dataclass(frozen=True)
class _Rows:
    """Rows of a group, u [n_i, a] and delta [n_i, b] of each weight; the mode of each, [R]."""

    u: list[Tensor]
    delta: list[Tensor]
    mode: Tensor


@dataclass(frozen=True)
class _Bucket:
    """Static buffers: ``u`` and ``delta`` are views into ``whole``, [size, .] for each weight."""

    u: list[Tensor]
    delta: list[Tensor]
    alpha: Tensor
    whole: list[Tensor]
    run: Callable[[], Tensor]

    def fill(self, u: Sequence[Tensor], delta: Sequence[Tensor], alpha: Tensor) -> None:
        """Copy the operands in, dead rows behind them."""
        pairs = list(zip([*self.u, *self.delta], [*u, *delta], strict=True))
        torch._foreach_zero_([buffer[len(rows) :] for buffer, rows in pairs])
        torch._foreach_copy_([buffer[: len(rows)] for buffer, rows in pairs], [r for _, r in pairs])
        self.alpha.copy_(alpha)

    def is_finite(self) -> bool:
        """False if a value is not finite, and perhaps if a sum of values is not: one read-back."""
        total = self.alpha.sum()
        for buffer in self.whole:
            total = total + buffer.sum()
        return bool(total.isfinite())


def _captured(call: Callable[[], Tensor], device: torch.device, pool: Any) -> Callable[[], Tensor]:
    """``call`` as a CUDA graph; running it writes the tensor that the captured call returned.

    Buffers and alpha must be zero: the call before the capture, in which libraries load kernels and
    take workspaces, then writes every weight's own bits back.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            fidelity = call()

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return fidelity

    return replay


def _run(
    weights: Sequence[Tensor],
    rows: Sequence[_Rows],
    alpha: Tensor,
    groups: Sequence[Group],
    flags: Sequence[bool],
    seed: int | None = None,
) -> Tensor:
    """What a graph captures: from stacked rows to written weights, and no value read."""
    return rank_update.unchecked(
        weights, *_transform(groups, rows, len(weights)), alpha, flags, seed
    )


def _stack(group: Group, u: Sequence[Tensor], delta: Sequence[Tensor]) -> _Rows:
    own_u, own_delta = ([side[i] for i in group.places] for side in (u, delta))
    return _Rows(own_u, own_delta, _modes(group, [len(rows) for rows in own_u]))


def _modes(group: Group, counts: Sequence[int]) -> Tensor:
    """The mode of every row, from views on the device: ``repeat_interleave`` would have to wait."""
    return torch.cat([m.expand(n) for m, n in zip(group.modes, counts, strict=True)])


def _transform(
    groups: Sequence[Group], rows: Sequence[_Rows], weights: int
) -> tuple[list[Tensor], list[Tensor]]:
    """u~ [n_i, a] and d~ [n_i, b] of every weight, at least float32, zero where a row is dead."""
    calls = [partial(_transform_group, *pair) for pair in zip(groups, rows, strict=True)]
    return _by_weight(groups, _side_by_side(calls), weights)


def _transform_group(group: Group, r: _Rows) -> list[tuple[Tensor, ...]]:
    wide = torch.promote_types(group.dtype, torch.float32)  # narrower ones have no kernel
    counts = [len(part) for part in r.u]  # one episode: rows weight after weight
    state = (group.mean, group.m2, group.count)
    z, live = moments(r.u, r.delta, counts, *state, merge=False, dtype=wide)
    z = editor_mlp.unchecked(z.to(group.dtype), group.joint, r.mode)
    u, delta = z.split([r.u[0].shape[1], r.delta[0].shape[1]], 1)
    u = editor_mlp.unchecked(u, group.u_side, r.mode)
    delta = editor_mlp.unchecked(delta, group.delta_side, r.mode)
    live, zero = live.unsqueeze(1), z.new_zeros(())
    return [side.where(live, zero).to(wide).split(counts) for side in (u, delta)]


def _side_by_side(calls: Sequence[Callable[[], T]]) -> list[T]:
    """What the calls return; while a CUDA graph is captured, each is a branch of it.

    Elsewhere one runs after the other: there launches take the time, not the device.
    """
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return [call() for call in calls]
    main = torch.cuda.current_stream()
    begin, results = main.record_event(), []
    for number, call in enumerate(calls):
        stream = _side_stream(main.device, number) if number else main
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            results.append(call())
    for number in range(1, len(calls)):
        main.wait_stream(_side_stream(main.device, number))
    return results


@cache
def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """The same for all graphs: every stream that multiplies holds a workspace of cuBLAS."""
    return torch.cuda.Stream(device)


def _by_weight(
    groups: Sequence[Group], rows: Sequence[Sequence[Sequence[Tensor]]], weights: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(u, delta) of each group, weight after weight, in the order of all weights."""
    u: dict[int, Tensor] = {}
    delta: dict[int, Tensor] = {}
    for group, (own_u, own_delta) in zip(groups, rows, strict=True):
        u |= zip(group.places, own_u, strict=True)
        delta |= zip(group.places, own_delta, strict=True)
    return [u[i] for i in range(weights)], [delta[i] for i in range(weights)]


def _flags(weights: Sequence[Tensor], transposed: Sequence[bool] | None) -> list[bool]:
    if transposed is None:
        return [False] * len(weights)
    if len(transposed) != len(weights):
        raise ValueError(f"transposed has {len(transposed)} entries for {len(weights)} weights")
    return [bool(t) for t in transposed]


def _sides(weight: Tensor, flag: bool) -> tuple[int, int]:
    """(a, b) of a weight [b, a], or [a, b] in Conv1D layout."""
    if weight.dim() != 2:
        raise ValueError(f"weights holds a tensor {list(weight.shape)}, expected matrices")
    rows, columns = weight.shape
    return (rows, columns) if flag else (columns, rows)


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _check_groups(
    groups: Sequence[Group], weights: Sequence[Tensor], flags: Sequence[bool]
) -> None:
    """Refuse groups that do not fit the weights or themselves; the modes' values are read."""
    places = sorted(i for group in groups for i in group.places)
    if places != list(range(len(weights))):
        raise ValueError(f"groups name the places {places}, expected each of {len(weights)} once")
    for g, group in enumerate(groups):
        name = f"groups[{g}]"
        if not group.places or not (group.joint or group.u_side or group.delta_side):
            raise ValueError(f"{name} has no {'layer' if group.places else 'place'}")
        first = group.places[0]
        a, b = _sides(weights[first], flags[first])
        for i in group.places:
            if _sides(weights[i], flags[i]) != (a, b):
                raise ValueError(
                    f"{name} holds weights[{i}] {list(weights[i].shape)} beside weights[{first}] "
                    f"{list(weights[first].shape)}"
                )
            if weights[i].device != group.mean.device:
                raise ValueError(
                    f"weights[{i}] is on {weights[i].device}, {name} is on {group.mean.device}"
                )
        if group.modes.dtype != torch.int64 or group.modes.shape != (len(group.places),):
            raise ValueError(
                f"modes of {name} is {group.modes.dtype} {list(group.modes.shape)}, expected "
                f"int64 [{len(group.places)}]"
            )
        if not group.count > 0:
            raise ValueError(f"count of {name} is {int(group.count)}: there are no moments yet")
        x = group.mean.new_empty(0, a + b, dtype=group.dtype)
        moments([x[:, :a]], [x[:, a:]], [0], group.mean, group.m2, group.count, merge=False)
        low, high = (int(m) for m in group.modes.aminmax())
        sides = ((group.joint, x), (group.u_side, x[:, :a]), (group.delta_side, x[:, a:]))
        for layers, part in sides:
            for layer in layers:
                if layer.scale is not None and not 0 <= low <= high < len(layer.scale):
                    raise ValueError(
                        f"modes of {name} runs from {low} to {high}, scale has {len(layer.scale)}"
                    )
                editor_mlp.check_operands(part, layer, group.modes[:0])
