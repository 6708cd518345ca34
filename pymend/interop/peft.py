"""An edit as a LoRA adapter, for PEFT and for servers that read its folders, such as vLLM.

LoRA adds (lora_alpha / r) B A to a weight of shape [b, a], so A = u~ [r, a], B = -alpha d~^T [b, r]
and lora_alpha = r. Weights with fewer rows get zero rows: vLLM reads one rank for all of them and
knows no ``rank_pattern``. Its ``--max-lora-rank`` must be no smaller.

The matrices of experts that are one parameter, [experts, b, a], have an A [experts * r, a] and a
B [b, r * experts], in the order in which PEFT's ``target_parameters`` take them apart.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from pymend.files import atomic_dir, empty_dir, write_tensors


def write_adapter(
    folder: str | Path,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    transposed: bool,
    base: str = "",
    task: str = "",
    experts: Mapping[str, Sequence[tuple[Tensor, Tensor]]] | None = None,
) -> None:
    """Write a LoRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        layers: by the name of a linear layer, A [n, in] and B^T [n, out] of its change B A; n may
            differ from layer to layer.
        base, task: names of the model and, for PEFT, of its task; "" if unknown.
        transposed: some weight is in GPT-2's ``Conv1D`` layout.
        experts: by the name of a parameter, the same two of each of its matrices; parameters of one
            module in the order in which it has them.

    Raises:
        FileExistsError: ``folder`` holds something already.
        PermissionError: it cannot be written.
    """
    experts = experts or {}
    each = [*layers.values(), *(pair for pairs in experts.values() for pair in pairs)]
    rank = max(1, *(len(a) for a, _ in each))  # PEFT refuses 0

    def filled(x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, rank - len(x)))

    tensors: dict[str, Tensor] = {}
    for name, (a, b) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = filled(a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = filled(b).t()
    wrappers = Counter(name.rpartition(".")[0] for name in experts)
    for name, pairs in experts.items():
        module = name.rpartition(".")[0]
        wrappers[module] -= 1  # PEFT wraps a module anew for each parameter: the last lies outside
        place = f"base_model.model.{module}{'.base_layer' * wrappers[module]}"
        tensors[f"{place}.lora_A.weight"] = torch.cat([filled(a) for a, _ in pairs])
        b_all = torch.stack([filled(b) for _, b in pairs], -1)  # [rank, b, experts]
        tensors[f"{place}.lora_B.weight"] = b_all.transpose(0, 1).flatten(1)
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
        **({"target_parameters": [*experts]} if experts else {}),
        "inference_mode": True,
    }
    with atomic_dir(empty_dir(folder)) as scratch:
        write_tensors(scratch / "adapter_model.safetensors", tensors)
        text = json.dumps(config, indent=2) + "\n"  # PEFT warns of a format_version
        (scratch / "adapter_config.json").write_text(text, encoding="utf-8")
