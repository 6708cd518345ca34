"""moments: take rows (u, delta) into running moments, segment after segment, and normalise them.

A segment is the rows of one weight in one episode. It is merged first and then normalised with the
moments that include it (MEND, Mitchell et al. 2022, section 3.2): z = (x - mean) / (sigma + 1e-7).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from pymend import _lib

EPS = 1e-7  # added to the standard deviation, not under the root
CONSTANT = 1e-6  # relative spread below which a dimension counts as constant
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)  # what the kernels read and write


def moments(
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    counts: Sequence[int],
    mean: Tensor,
    m2: Tensor,
    count: Tensor,
    merge: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Join, merge and normalise the rows of several weights of one shape (a, b).

    sigma = sqrt(m2 / (count - 1)) per dimension; a constant one, m2 <= count (1e-6 mean)^2, gives
    0. A dead row, whose u or delta is zero throughout, gives a zero row and enters no moment. All
    arithmetic is float64. The op stands outside of autograd. It does not look for rows that are
    not finite: on a GPU that would be a synchronisation.

    Args:
        u: [n_i, a] of weight i; delta: [n_i, b]. Rows lie episode by episode. float64, float32,
            bfloat16 or float16, mixed as you like, any strides.
        counts: [episodes * weights], rows of each segment: episode by episode, and within one
            weight by weight. The order in which segments are merged, and of the rows of z.
        mean, m2: [a + b] float64, contiguous; m2 is the sum of squared deviations. count: []
            int64, the rows seen. All three are written in place if ``merge``.
        merge: take the rows in (training); else they are only normalised, with count > 0.
        dtype: of z; if not given, the widest of u and delta.

    Returns:
        z [sum of counts, a + b]; and which of its rows are live, not dead: [sum of counts] bool.

    Raises:
        ValueError: lengths, shapes, counts, devices or strides are wrong.
        TypeError: a dtype is not supported.
        RuntimeError: a tensor requires grad while grad mode is on.
    """
    _check(u, delta, counts, mean, m2, count)
    widest = reduce(torch.promote_types, {part.dtype for part in (*u, *delta)})
    dtype = widest if dtype is None else dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}, expected one of {_names()}")
    if dtype not in WIDE or not _lib.use_kernel("moments", mean.device):
        return eager(u, delta, counts, mean, m2, count, merge, dtype)
    wide = torch.promote_types(widest, torch.float32)  # exact, so the same rows are dead
    z, live = torch.ops.pymend.moments.default(
        [part.to(wide).contiguous() for part in u],
        [part.to(wide).contiguous() for part in delta],
        counts,
        mean,
        m2,
        count,
        merge,
        dtype,
    )
    if merge and not torch.compiler.is_compiling():
        for buffer in (mean, m2, count):
            if not buffer.is_inference():
                torch.autograd.graph.increment_version(buffer)
    return z, live


@torch.no_grad()
def eager(
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    counts: Sequence[int],
    mean: Tensor,
    m2: Tensor,
    count: Tensor,
    merge: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The same in torch ops, on any device and without a synchronisation."""
    x = joined(u, delta, counts)
    live_row = _live_rows(*x.split([u[0].shape[1], delta[0].shape[1]], 1))
    live = live_row[:, None]
    x = x.double()
    if not merge:
        return _normalise(x, live, mean, m2, count).to(dtype), live_row
    z = torch.empty_like(x, dtype=dtype)
    split = [t.split(list(counts)) for t in (x, live, z)]
    for rows, alive, out in zip(*split, strict=True):
        n = alive.sum()
        own_mean = rows.where(alive, 0).sum(0) / n.clamp(min=1)
        own_m2 = (rows - own_mean).where(alive, 0).square().sum(0)
        difference = own_mean - mean
        k = count.double()  # a quotient of integers would be float32
        both = (k + n).clamp(min=1)
        m2 += own_m2 + difference.square() * (k * n / both)
        mean += difference * (n / both)
        count += n
        out.copy_(_normalise(rows, alive, mean, m2, count))
    return z, live_row


def _normalise(x: Tensor, live: Tensor, mean: Tensor, m2: Tensor, count: Tensor) -> Tensor:
    k = count.double()
    sigma = (m2 / (k - 1).clamp(min=1)).sqrt()
    inverse = (1 / (sigma + EPS)).masked_fill(m2 <= k * (CONSTANT * mean).square(), 0)
    return ((x - mean) * inverse).where(live, 0)


def _live_rows(u: Tensor, delta: Tensor) -> Tensor:
    """[n] bool: which rows of u [n, a] and delta [n, b] are not dead; see ``moments``."""
    return (u != 0).any(1) & (delta != 0).any(1)


def joined(u: Sequence[Tensor], delta: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The rows (u, delta) [sum of counts, a + b] in the order of the segments; see ``moments``."""
    rows = [torch.cat(pair, 1) for pair in zip(u, delta, strict=True)]
    parts = [r.split(list(counts[i :: len(rows)])) for i, r in enumerate(rows)]
    return torch.cat([rows[0][:0], *(p for episode in zip(*parts, strict=True) for p in episode)])


def _check(
    u: Sequence[Tensor],
    delta: Sequence[Tensor],
    counts: Sequence[int],
    mean: Tensor,
    m2: Tensor,
    count: Tensor,
) -> None:
    """Refuse what cannot be done, by the name and the value of the argument."""
    weights = len(u)
    if not weights:
        raise ValueError("u is empty: there is no weight")
    if len(delta) != weights:
        raise ValueError(f"delta has {len(delta)} entries for {weights} in u")
    if len(counts) % weights:
        raise ValueError(f"counts has {len(counts)} entries, not a multiple of {weights} weights")
    for s, n in enumerate(counts):
        if n < 0:
            raise ValueError(f"counts[{s}] is {n}")
    for kind, parts in (("u", u), ("delta", delta)):
        for i, part in enumerate(parts):
            name = f"{kind}[{i}]"
            _check_tensor(name, part, mean.device, DTYPES)
            n = sum(counts[i::weights])
            width = parts[0].shape[-1] if parts[0].dim() else 0
            if tuple(part.shape) != (n, width):
                raise ValueError(
                    f"{name} has shape {_shape(part)}, expected [{n}, {width}]: the sum of "
                    f"counts[{i}::{weights}], and the width of {kind}[0]"
                )
    d = u[0].shape[1] + delta[0].shape[1]
    for name, buffer in (("mean", mean), ("m2", m2)):
        _check_tensor(name, buffer, mean.device, (torch.float64,))
        if tuple(buffer.shape) != (d,):
            raise ValueError(f"{name} has shape {_shape(buffer)}, expected [{d}]")
        if not buffer.is_contiguous():
            raise ValueError(f"{name} has strides {buffer.stride()}, expected contiguous memory")
    _check_tensor("count", count, mean.device, (torch.int64,))
    if count.dim():
        raise ValueError(f"count has shape {_shape(count)}, expected []")
    if mean is m2:
        raise ValueError("mean and m2 are the same tensor")


def _check_tensor(
    name: str, tensor: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {_names(dtypes)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, mean is on {device}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, and moments is not differentiable: "
            "detach it, or call under torch.no_grad()"
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _names(dtypes: Sequence[torch.dtype] = DTYPES) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


if _lib.has_kernels():

    @torch.library.register_fake("pymend::moments")
    def _fake(
        u: list[Tensor],
        delta: list[Tensor],
        counts: list[int],
        mean: Tensor,
        m2: Tensor,
        count: Tensor,
        merge: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        rows = sum(part.shape[0] for part in u)
        return (
            mean.new_empty(rows, len(mean), dtype=dtype),
            mean.new_empty(rows, dtype=torch.bool),
        )
