"""An edit as a LoRA adapter, for PEFT and for servers that read its folders, such as vLLM.

LoRA adds (lora_alpha / r) B A to a weight of shape [b, a], so A = u~ [r, a], B = -alpha d~^T [b, r]
and lora_alpha = r. Weights with fewer rows get zero rows: vLLM reads one rank for all of them and
knows no ``rank_pattern``. Its ``--max-lora-rank`` must be no smaller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.nn.functional import pad

from pymend.files import atomic_dir, empty_dir, write_tensors


def write_adapter(
    folder: str | Path,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    transposed: bool,
    base: str = "",
    task: str = "",
) -> None:
    """Write a LoRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        layers: by the name of a linear layer, A [n, in] and B^T [n, out] of its change B A; n may
            differ from layer to layer.
        base, task: names of the model and, for PEFT, of its task; "" if unknown.
        transposed: some weight is in GPT-2's ``Conv1D`` layout.

    Raises:
        FileExistsError: ``folder`` holds something already.
        PermissionError: it cannot be written.
    """
    rank = max(1, *(len(a) for a, _ in layers.values()))  # PEFT refuses 0
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in layers.items():
        missing = (0, 0, 0, rank - len(a))
        tensors[f"base_model.model.{name}.lora_A.weight"] = pad(a, missing)
        tensors[f"base_model.model.{name}.lora_B.weight"] = pad(b, missing).t()
    config = {
        "peft_type": "LORA",
        "task_type": task or None,
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": [*layers],  # whole names: no other module has them
        "inference_mode": True,
    }
    with atomic_dir(empty_dir(folder)) as scratch:
        write_tensors(scratch / "adapter_model.safetensors", tensors)
        text = json.dumps(config, indent=2) + "\n"  # PEFT warns of a format_version
        (scratch / "adapter_config.json").write_text(text, encoding="utf-8")
