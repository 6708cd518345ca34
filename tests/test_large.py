"""More than 2^31 elements: the kernels' own sources, and a CPU op, on operands that barely exist.

Memory of such a size is reserved, not taken: a page exists once it is written. Of a grid the
emulation runs the last block alone, which holds the largest positions; a position that does not fit
would write elsewhere, or crash.
"""

from __future__ import annotations

import mmap
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from ops.test_editor_mlp import emulate as editor_mlp
from ops.test_editor_mlp import emulate_backward as editor_mlp_backward
from stamps import where_csrc_changed
from torch import Tensor

from pymend import _lib
from pymend.ops import editor_mlp as editor_mlp_op
from pymend.ops import moments as moments_op
from pymend.ops import rank_update as rank_update_op
from pymend.ops import token_losses as token_losses_op

CSRC = Path(__file__).parent.parent / "csrc"
CORNER = (slice(-3, None), slice(-5, None))  # of the last tile, in every case below
linux = pytest.mark.skipif(sys.platform != "linux", reason="reserves memory as Linux does")
needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")


@pytest.fixture
def _emu():
    return pytest.importorskip("_emu", reason="the emulation module is not built")


def reserved(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros of any size; only the pages that are written take memory."""
    count = torch.Size(shape).numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which mmap lacks
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def beyond(x: Tensor, bits: int = 31) -> Tensor:
    assert x.numel() > 2**bits
    return x


@linux
@pytest.mark.parametrize("seeded", [False, True], ids=["nearest", "random"])
@pytest.mark.parametrize("way", ["simt", "mma", "strip"])
def test_rank_update(_emu, way, seeded):
    """The second of two matrices; random rounding at positions above 2^32."""
    if way == "strip" and seeded:
        pytest.skip("strips round to nearest")
    dtype = torch.bfloat16
    tails = (32, 64) if way == "strip" else (9, 5)
    weight = beyond(reserved(2**17 + tails[0], 2**15 + tails[1], dtype=dtype), 32)
    (rows, cols), n, seed = weight.shape, 3, 2**33 + 7
    row, col, alpha = torch.randn(n, rows), torch.randn(n, cols), torch.tensor([0.0, 0.3])
    weight[CORNER] = torch.randn(3, 5)
    before = weight[CORNER].float()
    small = torch.ones(64, 64, dtype=dtype)
    ones = torch.ones(1, 64)
    matrices = [
        (small.data_ptr(), ones.data_ptr(), ones.data_ptr(), 64, 64, 1, 0),
        (weight.data_ptr(), row.data_ptr(), col.data_ptr(), rows, cols, n, seed),
    ]
    fidelity = torch.zeros(2)
    _emu.rank_update(
        "bfloat16", matrices, alpha.data_ptr(), fidelity.data_ptr(),
        block=128, random=seeded, way=way, order="last",
    )  # fmt: skip
    wanted = before - 0.3 * (row[:, -3:].t() @ col[:, -5:])
    if seeded:
        first = rows * cols - 3 * cols
        wanted = torch.cat(
            [
                rank_update_op._round_randomly(line, dtype, seed, first + i * cols + cols - 5)
                for i, line in enumerate(wanted)
            ]
        ).view(3, 5)
    assert first_difference(weight[CORNER], wanted.to(dtype)) is None
    assert not weight[-tails[0] - 3].any() and not weight[:3].any(), "nothing else was written"
    assert fidelity[0] == 0 and abs(fidelity[1] - 1) < 0.02, "the last block is of the second"


def first_difference(actual: Tensor, wanted: Tensor) -> str | None:
    bad = (actual != wanted).nonzero()
    return f"{bad[0].tolist()}: {actual} against {wanted}" if len(bad) else None


@linux
def test_editor_mlp(_emu):
    """x, p and y of more than 2^31 elements, forward; grad and p backward, down whole columns."""
    rows, cols = 2**11 + 3, 2**20 + 5
    x, p, grad = (beyond(reserved(rows, cols)) for _ in range(3))
    corner = [torch.randn(3, 5) for _ in range(3)]
    for whole, part in zip((x, p, grad), corner, strict=True):
        whole[CORNER] = part
    bias, scale, shift = torch.zeros(cols), torch.ones(2, cols), torch.zeros(2, cols)
    scale[1, -5:] = -2
    mode = torch.ones(rows, dtype=torch.int64)
    last = slice(None), slice(-5, None)
    whole = editor_mlp_op.Layer(bias, bias, bias, scale, shift, residual=True)  # without a product
    part = whole._replace(bias=bias[-5:], scale=scale[last], shift=shift[last])
    with pytest.MonkeyPatch.context() as patch:
        # Results of the same size, where the bindings' helpers would fill them.
        patch.setattr(torch, "full_like", lambda t, _: reserved(*t.shape))
        y = editor_mlp(x, p, whole, mode, block=64, order="last")
        grads = editor_mlp_backward(grad, p, whole, mode, block=32, order="last")
    wanted = editor_mlp_op._torch_epilogue(*corner[:2], part, mode[-3:])
    assert torch.equal(y[CORNER], wanted)
    wanted = editor_mlp_op._torch_epilogue_backward(*corner[:0:-1], part, mode[-3:])
    assert torch.equal(grads[0][CORNER], wanted[0])
    # All other rows are zero, and their gradients add nothing.
    torch.testing.assert_close(grads[1][-5:], wanted[1])
    for ours, theirs in zip(grads[2:], wanted[2:], strict=True):
        torch.testing.assert_close(ours[last], theirs)


@linux
def test_moments(_emu):
    """delta and z of more than 2^31 elements; only the last row is live."""
    rows, a, b, block = 2**11 + 7, 37, 2**20 + 5, 256
    u, delta, z = reserved(rows, a), beyond(reserved(rows, b)), beyond(reserved(rows, a + b))
    u[-1:], delta[-1:, -5:] = torch.randn(1, a), torch.randn(1, 5)  # a block a row
    mean, m2 = torch.zeros(2, a + b).double()
    count = torch.tensor(0)  # block 0, which reads it, does not run
    _emu.moments(
        "float32", "float32", [(u.data_ptr(), delta.data_ptr(), rows)], a, b,
        *(t.data_ptr() for t in (mean, m2, count, z)), True, block=block, order="last",
    )  # fmt: skip
    part = torch.zeros(2, 6).double()  # a column of u, and five of delta
    wanted, live = moments_op.eager(
        [u[-1:, :1]], [delta[-1:, -5:]], [1], *part, count, True, torch.float32
    )
    assert live.all()
    torch.testing.assert_close(z[-1:, -5:], wanted[:, 1:])
    torch.testing.assert_close(mean[-5:], part[0, 1:])
    torch.testing.assert_close(m2[-5:], part[1, 1:])
    assert not z[:3].any() and not z[-2].any()


@linux
def test_token_losses(_emu):
    """The last row of logits, base and gradient."""
    rows, vocabulary, dtype = 2**16 + 2, 2**15 + 7, torch.bfloat16
    tensors = {
        name: beyond(reserved(rows, vocabulary, dtype=dtype)) for name in ("logits", "base", "grad")
    }
    logits, base, grad = tensors.values()
    logits[-1], base[-1] = torch.randn(2, vocabulary)
    target = torch.full((rows,), vocabulary - 2)
    tensors |= {
        "target": target,
        "grad_nll": torch.full((rows,), 2.0),
        "grad_kl": torch.full((rows,), 3.0),
        **{name: torch.zeros(rows) for name in ("nll", "kl")},
        **{name: torch.zeros(rows, dtype=torch.int64) for name in ("best", "base_best")},
        "stats": torch.zeros(rows, 4),
    }
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    _emu.token_losses("bfloat16", addresses, rows, vocabulary, order="last")
    x = logits[-1:].clone().requires_grad_()
    wanted = token_losses_op.eager(x, target[-1:], base[-1:])
    for name, value in wanted._asdict().items():
        torch.testing.assert_close(tensors[name][-1:], value.detach())
    (2 * wanted.nll + 3 * wanted.kl).sum().backward()
    torch.testing.assert_close(grad[-1, -3:], x.grad[0, -3:])
    assert grad[-1, -2] < -1, "the target is in the last tile"
    assert not grad[:3].any() and not grad[-2].any()


@linux
@needs_binary
def test_token_losses_of_rows_far_apart():
    """The op on a CPU: rows at a distance of more than 2^31 elements, read where they lie."""
    apart, vocabulary = 2**31 + 11, 3000
    memory = reserved(2 * apart, dtype=torch.bfloat16)
    logits, base = (memory[start:].as_strided((2, vocabulary), (apart, 1)) for start in (0, 5000))
    logits[:], base[:] = torch.randn(2, 2, vocabulary)
    target = torch.tensor([1, vocabulary - 1])
    copies = [t.clone() for t in (logits, base)]
    grads = []
    for op, operands in (
        (token_losses_op.token_losses, (logits, base)),
        (token_losses_op.eager, copies),
    ):
        x = operands[0].detach().requires_grad_()
        losses = op(x, target, operands[1])
        grads.append(torch.autograd.grad((losses.nll + losses.kl).sum(), x)[0])
        grads.append(losses)
    torch.testing.assert_close(grads[0], grads[2])
    for ours, theirs in zip(grads[1], grads[3], strict=True):
        torch.testing.assert_close(ours, theirs)


@linux
@needs_binary
@pytest.mark.slow
def test_rank_update_on_a_cpu():
    """4.3 GB of bfloat16, every element written."""
    psutil = pytest.importorskip("psutil")
    if psutil.virtual_memory().available < 8 * 2**30:
        pytest.skip("needs 8 GiB of free memory")
    weight = beyond(reserved(2**16 + 9, 2**15 + 5, dtype=torch.bfloat16))
    u, delta = torch.randn(2, weight.shape[1]), torch.randn(2, weight.shape[0])
    fidelity = rank_update_op.rank_update([weight], [u], [delta], torch.ones(1))
    assert abs(fidelity - 1) < 1e-3
    for rows in (slice(0, 64), slice(2**15 - 32, 2**15 + 32), slice(-64, None)):
        wanted = torch.zeros_like(weight[rows])
        rank_update_op.eager([wanted], [u], [delta[:, rows]], torch.ones(1), [False])
        torch.testing.assert_close(weight[rows], wanted)


SOURCES = [*sorted(CSRC.glob("cpu/*_rows.cpp")), *sorted(CSRC.glob("emu/*.cpp"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_number_is_narrowed_unseen(path):
    """A position that becomes an int without a cast is an error here, in loops and in kernels."""
    with where_csrc_changed(f"narrowed-{path.parent.name}-{path.stem}", "tests/test_large.py"):
        check_narrowing(path)


def check_narrowing(path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    pybind11 = pytest.importorskip("pybind11")
    outside = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-fsyntax-only", "-Wconversion", "-Wno-sign-conversion", "-Werror"]
    flags += ["-fopenmp-simd", "-Wno-unknown-pragmas", "-DPYMEND_LEVEL=base", f"-I{CSRC}"]
    flags += [f"-isystem{folder}" for folder in outside]
    done = subprocess.run([compiler, *flags, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
