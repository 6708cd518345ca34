"""Models with known sizes, and the weights that the paper edits in its own: data, not code.

``pymend/presets/models.json`` holds them. A model at hand is known by the values in its
configuration, never by its name, so that a tuned copy in a folder of any name is recognised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

# Adding tokens to a model, or untying its head, changes none of the weights that are edited.
NOT_STRUCTURE = ("vocab_size", "tie_word_embeddings")


@dataclass(frozen=True)
class Preset:
    """A model on the hub.

    Args:
        name: its name there.
        auto: the class of transformers that builds it.
        source: where the values of ``config`` were read.
        parameters: of the whole model as ``auto`` builds it, a check of ``config``.
        config: the values that fix its shapes, ``model_type`` among them.
        weights: what the paper edits, in its order (appendix C); empty if it names nothing.
    """

    name: str
    auto: str
    source: str
    parameters: int
    config: Mapping[str, Any]
    weights: tuple[str, ...] = ()

    def fits(self, config: PretrainedConfig | None) -> bool:
        """Whether a model of this configuration has the same blocks."""
        return all(
            getattr(config, key, None) == value
            for key, value in self.config.items()
            if key not in NOT_STRUCTURE
        )

    def skeleton(self) -> PreTrainedModel:
        """The whole model on the meta device: names and shapes, and no memory."""
        with torch.device("meta"), no_init_weights():
            config = AutoConfig.for_model(**self.config)
            model: PreTrainedModel = getattr(transformers, self.auto).from_config(config)
        model.tie_weights()
        return model


def presets() -> dict[str, Preset]:
    """All presets by name."""
    file = resources.files("pymend") / "presets" / "models.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    return {
        name: Preset(name, **{**values, "weights": tuple(values.get("weights", ()))})
        for name, values in known.items()
    }


def preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        ValueError: there is none.
    """
    known = presets()
    if name not in known:
        raise ValueError(f"no preset is called {name!r}; known are {', '.join(known)}")
    return known[name]


def paper_weights(config: PretrainedConfig | None) -> tuple[str, ...]:
    """Names of the weights that the paper edits in a model of this configuration, in its order.

    Raises:
        ValueError: the paper has no such model, or the model no configuration.
    """
    known = [p for p in presets().values() if p.weights]
    for candidate in known:
        if candidate.fits(config):
            return candidate.weights
    raise ValueError(
        f"the paper names no weights for this model ({getattr(config, 'model_type', 'unknown')}, "
        f"with its sizes), only for {', '.join(p.name for p in known)}; use mlp, or name them"
    )
