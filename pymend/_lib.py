"""The native module ``_C``: loaded here, and nowhere else is a missing binary known.

Without a binary the package works: every op has an ``eager`` form in torch, and the first use of an
op says so once.

Environment:
    PYMEND_KERNELS: ``default`` uses the kernels that were measured on their kind of device, ``all``
        also the others, ``off`` none.
    PYMEND_REQUIRE_KERNELS: ``1`` turns a missing binary into an error, for CI.
"""

from __future__ import annotations

import os
import warnings

import torch  # its libraries must be loaded before those of _C

try:
    from pymend import _C

    _missing: str | None = None
except ImportError as error:
    if os.environ.get("PYMEND_REQUIRE_KERNELS") == "1":
        raise
    _C = None
    _missing = str(error)

# (op, device type) of the kernels that have been measured there and win over torch.
_MEASURED = {
    ("editor_mlp", "cpu"),
    ("editor_mlp", "cuda"),
    ("factored_adam", "cpu"),
    ("moments", "cpu"),
    ("moments", "cuda"),
    ("rank_update", "cpu"),
    ("rank_update", "cuda"),
    ("token_losses", "cpu"),
    ("token_losses", "cuda"),
}
_warned = False


def has_kernels() -> bool:
    """Whether the native module could be loaded."""
    return _C is not None


def has_cuda_kernels() -> bool:
    """Whether the native module was built with CUDA; a device need not be present."""
    return has_kernels() and build_info()["cuda"] != ""


def build_info() -> dict[str, str]:
    """What was built: version, torch, compiler, cuda, archs; empty without a binary."""
    return dict(item.split("=", 1) for item in _C.build_info.split()) if _C is not None else {}


def gate() -> str:
    """The value of PYMEND_KERNELS.

    Raises:
        ValueError: it is none of the values above.
    """
    value = os.environ.get("PYMEND_KERNELS", "default")
    if value not in ("default", "all", "off"):
        raise ValueError(f"PYMEND_KERNELS is {value!r}, expected 'default', 'all' or 'off'")
    return value


def use_kernel(op: str, device: torch.device) -> bool:
    """Whether ``op`` runs natively on ``device``; if not, its ``eager`` form does.

    Raises:
        ValueError: PYMEND_KERNELS is none of the values above.
    """
    global _warned
    value = gate()
    if value == "off" or device.type not in ("cpu", "cuda"):
        return False
    if not has_kernels():
        if not _warned:
            _warned = True
            warnings.warn(
                f"pymend runs without its native kernels, in plain torch ({_missing}); "
                "build them with: pip install --no-build-isolation -e .",
                RuntimeWarning,
                stacklevel=3,
            )
        return False
    if device.type == "cuda" and not has_cuda_kernels():
        return False
    return value == "all" or (op, device.type) in _MEASURED
