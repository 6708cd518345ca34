"""An edit as a LoRA adapter, for PEFT and for servers that read its folders, such as vLLM.

LoRA adds (lora_alpha / r) B A to a weight of shape [b, a], so A = u~ [r, a], B = -alpha d~^T [b, r]
and lora_alpha = r. Weights with fewer rows get zero rows: vLLM reads one rank for all of them and
knows no ``rank_pattern``. Its ``--max-lora-rank`` must be no smaller.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from pymend.edit import Edit
from pymend.files import empty_dir, filled, write_tensors


def write_adapter(edit: Edit, folder: str | Path) -> None:
    """What ``Edit.to_peft`` does and raises."""
    if edit.episodes is not None:
        raise RuntimeError("pick a single edit out of edit_many with [i] before exporting it")
    edit.check_finite()
    rank = max(edit.rank, 1)  # PEFT refuses 0
    tensors: dict[str, Tensor] = {}
    for w in edit.weights:
        f = edit.factors[w.name]
        missing = (0, 0, 0, rank - len(f.u))
        layer = f"base_model.model.{w.module}"
        tensors[f"{layer}.lora_A.weight"] = pad(f.u, missing)
        tensors[f"{layer}.lora_B.weight"] = pad(-f.alpha * f.delta, missing).t()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(w.transposed for w in edit.weights),
        "target_modules": [w.module for w in edit.weights],  # whole names: no other module has them
        "inference_mode": True,
    }
    with filled(empty_dir(folder)) as scratch:
        write_tensors(scratch / "adapter_model.safetensors", tensors)
        text = json.dumps(config, indent=2) + "\n"  # PEFT warns of a format_version
        (scratch / "adapter_config.json").write_text(text, encoding="utf-8")
