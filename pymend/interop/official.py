"""Editors trained with the paper's code, or with EasyEdit's port of it.

Their archives are pickles in a zip file (``torch.save``), with a configuration object among the
tensors. Nothing in them is run: the reader makes containers, numbers, strings and tensors, and a
placeholder in the place of any other class or function.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor, nn

from pymend.algorithms.mend.mend import Mend
from pymend.algorithms.trained import load_state
from pymend.config import MendConfig
from pymend.edit import fingerprint
from pymend.models.structure import EditedWeight, find_weights

MOMENTS = ("k", "u_mean", "v_mean", "u_std", "v_std")  # v means delta
NETWORKS = {"mlp": "joint", "mlp1": "u_side", "mlp2": "delta_side"}


def load_official(
    path: str | Path,
    model: nn.Module,
    names: Sequence[str],
    norm: bool = True,
    init: Literal["id", "xavier"] = "id",
    n_edits: int = 1,
) -> Mend:
    """The editor in an archive of the paper's code, in ``official`` mode.

    Args:
        model: the one it was trained for.
        names: its ``inner_params``, in their order, or patterns for them: modes and step sizes go
            by it.
        norm, init, n_edits: as it was trained; the archive does not tell. It does tell the rank,
            ``shared``, and which sides have a network.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file or editor, weights that do not fit it, statistics that
            have seen no example, or values that are not finite.
    """
    state = _read(Path(path))
    nets: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key.startswith("mend."):
            net, _, part = key.removeprefix("mend.").partition(".")
            nets.setdefault(net, {})[part] = value
    if not nets or "edit_lrs" not in state:
        raise ValueError(f"{path} holds no MEND editor: it has no mend.* or no edit_lrs")

    shared = all(net.startswith("(") for net in nets)
    weights = _in_order(model, names)
    wanted = {_network_of(w, shared) for w in weights}
    if wanted != nets.keys():
        raise ValueError(
            f"{path} has networks for {', '.join(sorted(nets))}, but these weights need "
            f"{', '.join(sorted(wanted))}; name the inner_params it was trained with"
        )
    sides = {frozenset(p.split(".")[0] for p in parts if "." in p) for parts in nets.values()}
    only_u, only_delta = frozenset(["mlp1"]), frozenset(["mlp2"])
    ranks = [len(v) for parts in nets.values() for p, v in parts.items() if p.endswith(".v")]
    config = MendConfig(
        edit=tuple(names),
        rank=max(ranks, default=1),
        shared=shared,
        norm=norm,
        init=init,
        combine=sides == {frozenset(["mlp"])},
        one_sided=sides == {only_u, only_delta},
        x_only=sides == {only_u},
        delta_only=sides == {only_delta},
        n_edits=n_edits,
        official=True,
    )
    mend = Mend(config, weights)
    tensors = {"alpha": -state["edit_lrs"]}  # the code adds, an edit here is subtracted
    for key, group in mend.editor.groups.items():
        net = _network_of(group[0], shared)
        for name, value in _own_state(nets[net], f"{path}: mend.{net}").items():
            tensors[f"nets.{key}.{name}"] = value
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{path}: what becomes {name} is not finite")
    load_state(mend.editor, tensors, Path(path))
    mend.model_fingerprint = fingerprint(model, weights)
    mend.editor.to(next(model.parameters()).device)
    return mend


def _in_order(model: nn.Module, names: Sequence[str]) -> tuple[EditedWeight, ...]:
    """The weights in the order of ``names``, where ``find_weights`` goes by the model's."""
    weights: list[EditedWeight] = []
    for name in names:
        for w in find_weights(model, (name,)):
            weights.append(replace(w, mode=sum(w.shape == other.shape for other in weights)))
    return tuple(weights)


def _network_of(weight: EditedWeight, shared: bool) -> str:
    """What the archive calls the network of a weight."""
    return str(weight.shape) if shared else weight.name.replace(".", "#")


def _own_state(parts: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The state of an ``EditorNet`` from the archive's tensors of one network."""
    for name in MOMENTS:
        if name not in parts:
            raise ValueError(f"{where} lacks {name}")
    k = parts["k"]
    if not k.numel() == 1 or not k.item() >= 2:  # so put, it refuses the NaN of a fresh editor
        raise ValueError(f"{where}.k is {k.tolist()}: its statistics have not seen two rows")
    # Not from the sums u_s and v_s: they no longer fit a k that float32 stopped at 2^24.
    std = torch.cat([parts["u_std"], parts["v_std"]]).double()
    state = {
        "moments.count": k.long().squeeze(),
        "moments.mean": torch.cat([parts["u_mean"], parts["v_mean"]]),
        "moments.m2": std.square() * (k.double() - 1),
    }
    for name, value in parts.items():
        if name not in (*MOMENTS, "u_s", "v_s"):
            net, _, part = name.partition(".layers.")
            part = part.replace("mode_scale.weight", "scale").replace("mode_shift.weight", "shift")
            state[f"{NETWORKS.get(net, net)}.{part}"] = value
    return state


# -- the archive -----------------------------------------------------------------------------


class _Inert:
    """Stands for a class or function of an archive, and for what would come of calling it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take and forget whatever is given, as every method that a pickle may call."""

    __call__ = __setstate__ = __setitem__ = append = extend = add = __init__


class _Stored(NamedTuple):
    """A tensor that is still in its archive: an optimiser's are never read."""

    dtype: torch.dtype
    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self, archive: ZipFile, folder: str) -> Tensor:
        data = torch.frombuffer(
            bytearray(archive.read(f"{folder}data/{self.key}")), dtype=self.dtype
        )
        return data.as_strided(self.size, self.stride, self.offset)  # refuses what lies outside


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> _Stored:
    dtype, key = storage
    return _Stored(dtype, key, offset, size, stride)


def _rebuild_parameter(data: _Stored, *_: Any) -> _Stored:
    return data


class _Reader(pickle.Unpickler):
    """An unpickler that can call nothing but what is listed here."""

    known: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch", "DoubleStorage"): torch.float64,
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "HalfStorage"): torch.float16,
        ("torch", "BFloat16Storage"): torch.bfloat16,
        ("torch", "LongStorage"): torch.int64,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self.known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _device, _length = pid
        return dtype, key


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors under ``model`` in an archive.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such archive, or damaged.
    """
    try:
        with ZipFile(path) as archive:
            pickled = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            folder = pickled.removesuffix("data.pkl")
            model = _Reader(io.BytesIO(archive.read(pickled))).load()["model"]
            stored = {k: v for k, v in model.items() if isinstance(v, _Stored)}
            return {str(k): v.read(archive, folder) for k, v in stored.items()}
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f"{path} cannot be read as an archive of the paper's code ({error!r}); "
            "it must be what torch.save wrote, torch 1.6 or later"
        ) from error
