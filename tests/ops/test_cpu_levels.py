"""Every op that has CPU code, at each level of x86-64 that its loops are compiled for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops import (
    test_editor_mlp,
    test_factored_adam,
    test_moments,
    test_rank_update,
    test_token_losses,
)

from pymend import _lib

HERE = Path(__file__).parent
F64, F32, HALF = torch.float64, torch.float32, (torch.bfloat16, torch.float16)
DTYPES = {
    test_editor_mlp: (F64, F32),
    test_factored_adam: (F32,),
    test_moments: (F64, F32),
    test_rank_update: HALF,
    test_token_losses: (F32, *HALF),
}


def check_every_op() -> None:
    for module, dtypes in DTYPES.items():
        for dtype in dtypes:
            for name, case in module.samples(dtype).items():
                try:
                    module.assert_right("cpu", case)
                except AssertionError as error:
                    raise AssertionError(f"{module.__name__}: {name}, {dtype}") from error
    test_editor_mlp.test_backward_takes_the_sign_that_forward_took("cpu")
    test_token_losses.test_equal_terms_do_not_drift("cpu")
    test_token_losses.test_special_values_are_as_in_torch("cpu")
    test_token_losses.test_ties_and_nans_in_the_argmax("cpu")


@pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")
@pytest.mark.parametrize("level", ["base", "avx2", "avx512"])
def test_every_cpu_level(level):
    """The level is read once per process, so each gets one; a machine without it takes a lower."""
    code = "from ops import test_cpu_levels; test_cpu_levels.check_every_op()"
    path = os.pathsep.join([str(HERE.parent), str(HERE), *sys.path])
    environment = {
        **os.environ, "PYMEND_CPU": level, "PYMEND_KERNELS": "all", "PYTHONPATH": path,
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
