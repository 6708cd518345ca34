"""Files that are never half written: atomic replace, JSON, safetensors, the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymend.config import FORMAT_VERSION

if TYPE_CHECKING:
    import torch


# What a folder holds, by the first of these files in it.
KINDS = {
    "edit.json": "edit",
    "editor.json": "editor",
    "adapter_config.json": "adapter of PEFT",
    "config.json": "model",
}


def kind_of_folder(path: str | Path) -> str:
    """What ``path`` holds, one of the values of ``KINDS``; "" for none of them."""
    return next((kind for name, kind in KINDS.items() if (Path(path) / name).is_file()), "")


def expect_kind(path: str | Path, wanted: str) -> None:
    """Refuse a folder that holds something else than what is ``wanted`` of it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: names what it holds instead.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; name a folder that holds {_a(wanted)}")
    found = kind_of_folder(path)
    if found != wanted:
        held = _a(found) if found else "nothing of the kind"
        raise ValueError(f"{path} holds {held}, not {_a(wanted)}; name another folder")


def _a(kind: str) -> str:
    """The kind of a folder with its article."""
    return f"{'an' if kind[0] in 'ae' else 'a'} {kind}"


def editor_folder(name: str | Path) -> Path:
    """The folder of an editor: ``name`` itself, or of the one that ships for a model called so."""
    shipped = Path(str(resources.files("pymend"))) / "editors" / name
    return shipped if not Path(name).exists() and kind_of_folder(shipped) else Path(name)


def cache_dir() -> Path:
    """Where converted models are kept: ``$PYMEND_CACHE`` or ``~/.cache/pymend``."""
    return Path(os.environ.get("PYMEND_CACHE") or Path.home() / ".cache" / "pymend")


def writable_dir(path: str | Path, make: bool = True) -> Path:
    """``path`` as a folder that can be written to.

    Args:
        make: create it; else only look whether that is possible.

    Raises:
        PermissionError: it cannot be created or written; nothing else was changed.
    """
    folder = Path(path)
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise PermissionError(
            f"cannot write to {folder}: {error.strerror or error}; choose another output folder"
        ) from error
    return folder


def empty_dir(path: str | Path, make: bool = True) -> Path:
    """``path`` as a folder that may be filled.

    Args:
        make: as for :func:`writable_dir`.

    Raises:
        FileExistsError: it holds something already.
        PermissionError: as :func:`writable_dir`.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; choose a new folder")
    return writable_dir(folder, make)


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of the empty ``folder`` if the block succeeds."""
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir()
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there only if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes that call this on ``folder`` out until the block ends.

    Raises:
        RuntimeError: another one is in it.
    """
    import fcntl  # of Unix; the lock goes with its process, however that ends

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"another process writes to {folder}; wait for it, or choose another output folder"
            ) from error
        yield


def is_complete(folder: Path) -> bool:
    """Whether a folder of the cache was filled to the end."""
    return (folder / "complete.json").is_file()


def install(ready: Path, folder: Path) -> None:
    """Move a complete folder into its place, unless another process has put it there by now."""
    try:
        ready.rename(folder)
    except OSError:  # something is there
        if not is_complete(folder):
            shutil.rmtree(folder)
            ready.rename(folder)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write ``values`` atomically, with the format version."""
    text = json.dumps({"format_version": FORMAT_VERSION, **values}, indent=2)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read what ``write_json`` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not an object, or written by a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it may be truncated") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not a JSON object")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}; this pymend reads {FORMAT_VERSION}")
    return values


def digest(values: Mapping[str, Any]) -> str:
    """A short name of a JSON object, to tie a tensor file to the JSON beside it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """A short name of their names, shapes and values."""
    import torch  # so does all that touches tensors here: a command line starts without it

    state = hashlib.sha256()
    for name, value in tensors.items():
        state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:16]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], tie: str = "") -> None:
    """Write ``tensors`` atomically as safetensors; ``tie`` is checked on reading."""
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={"tie": tie})


def read_tensors(path: Path, tie: str | None = None) -> dict[str, torch.Tensor]:
    """Read what ``write_tensors`` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not safetensors, or not the file that belongs to the JSON beside it.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it may be truncated") from error
    if tie is not None and metadata.get("tie") != tie:
        raise ValueError(f"{path} does not belong to the JSON file beside it; copy both together")
    return tensors
