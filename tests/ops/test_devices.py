"""Every op on a device that is not the current one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ops import (
    test_editor_mlp,
    test_moments,
    test_rank_update,
    test_side_path,
    test_token_losses,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

CASES = {
    "editor_mlp": (test_editor_mlp, "modes"),
    "moments": (test_moments, "dead rows"),
    "rank_update": (test_rank_update, "mixed shapes"),
    "side_path": (test_side_path, "independent edits"),
    "token_losses": (test_token_losses, "plain"),
}


def tensors_of(result) -> list[Tensor]:
    return tree_leaves(vars(result) if dataclasses.is_dataclass(result) else result)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", CASES)
def test_on_another_device_than_the_current_one(name):
    module, sample = CASES[name]
    results = []
    for index in (0, 1):
        case = module.samples(torch.float32)[sample]
        results.append(tensors_of(module.run(f"cuda:{index}", case)))
        assert torch.cuda.current_device() == 0
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
