"""A model and its tokenizer from a folder, a hub name, ``smollm2``, or one of the mini models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from pymend.files import expect_kind, is_complete, kind_of_folder
from pymend.zoo import mini, smollm2
from pymend.zoo.recipes import RECIPES

HUB_SECONDS = 5  # until a hub that does not answer is given up
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load(
    name: str, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a decoder, an encoder-decoder or a classifier, in evaluation mode, and its tokenizer.

    Args:
        name: ``smollm2`` or a mini model (no hub needed), a transformers folder, or a name on the
            hub.
        dtype: one of ``DTYPES``; ``auto`` keeps what the model was saved in.
        device: a torch device; by default the GPU if there is one.

    Weights are read from safetensors only; a pickle could run code.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: an unknown dtype or device, a folder without a usable model, or an encoder
            without a classification head.
        RuntimeError: a hub name that cannot be fetched.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    target = find_device(device)
    source = locate(name)
    local = Path(source).expanduser()
    if local.exists():
        source = str(local)
        if kind_of_folder(local) not in ("", "model"):
            expect_kind(local, "model")
    elif _looks_like_path(name):
        raise FileNotFoundError(
            f"model folder {name} does not exist; name a folder, a hub model, or smollm2"
        )
    # Asking the hub about a local folder would only cost time, or fail without a network.
    offline = local.exists() or not _asked_hub(source)
    precision = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
        config = AutoConfig.from_pretrained(source, local_files_only=offline)
        model: Any = _auto(config).from_pretrained(
            source,
            config=config,
            local_files_only=offline,
            dtype=precision,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        reason = _reason(error)
        if local.exists():
            if any(local.glob("pytorch_model*.bin")) and not any(local.glob("*.safetensors")):
                reason = "pytorch_model.bin is a pickle, which is not read; save it as safetensors"
            raise ValueError(f"{source} holds no model that can be loaded: {reason}") from error
        raise RuntimeError(
            f"model {name!r} is no folder here and cannot be fetched from the hub ({reason}); "
            f"without a hub there are smollm2, {', '.join(RECIPES)}"
        ) from error
    if _only_fills_gaps(config):
        raise ValueError(
            f"{name} is an encoder that fills gaps ({', '.join(config.architectures or ())}), with "
            "no next token or class to edit; fine-tune it as a sequence classifier first"
        )
    return model.to(target).eval(), tokenizer


def locate(name: str, progress: bool = True) -> str:
    """Where transformers finds the model called ``name``; made first, if this package makes it."""
    if name == "smollm2":
        return str(smollm2.prepare())
    return str(mini.make(name, progress=progress)) if name in RECIPES else name


def is_to_be_made(name: str) -> bool:
    """Whether ``name`` is a model that this package makes and has not made yet."""
    if name == "smollm2":
        return not is_complete(smollm2.folder())
    return name in RECIPES and not is_complete(mini.folder(name))


def _asked_hub(name: str) -> bool:
    """Whether the hub was there to be asked and has the model; without it, only the cache counts.

    Raises:
        RuntimeError: it has no such model, or one that needs a permission.
    """
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise RuntimeError(
            f"the hub has no model {name!r} that you may read; {_reason(error)}"
        ) from error
    except Exception:  # the errors of whatever library the hub's client is built on
        return False
    return True


def _reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _auto(config: PretrainedConfig) -> Any:
    """The class that builds a model of ``config``'s kind."""
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _only_fills_gaps(config: PretrainedConfig) -> bool:
    """Whether transformers would build a causal LM that sees the tokens it is to predict."""
    bidirectional = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_encoder_decoder
    return (
        bidirectional
        and _auto(config) is AutoModelForCausalLM
        and not getattr(config, "is_decoder", False)
    )


def find_device(name: str | None) -> torch.device:
    """The device called ``name``; by default the GPU if there is one.

    Raises:
        ValueError: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} cannot be used: {str(error).splitlines()[0]}; try cpu"
        ) from error
    return device


def _looks_like_path(name: str) -> bool:
    """Whether ``name`` cannot be a hub name, which is ``name`` or ``owner/name``."""
    return name.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)
