"""The CUDA kernels' own sources on fibers: schedules, block sizes, planted faults, rounding.

This shows index math, barriers, reductions, tails and rounding. It cannot show memory ordering,
true races, warp divergence, the rounding inside tensor cores, occupancy or speed: those need a GPU.
"""

from __future__ import annotations

import copy

import numpy
import pytest
import torch
from ops.test_rank_update import (
    DTYPES,
    SEEDED,
    Case,
    assert_right,
    emulate,
    make_case,
    run,
    samples,
)
from strategies import blocks

_emu = pytest.importorskip("_emu", reason="the emulation module is not built (it needs pybind11)")

ORDERS = [("reversed", 0)] + [("random", seed) for seed in range(5)]


KERNELS = [(dtype, "simt") for dtype in DTYPES]
KERNELS += [(dtype, "mma") for dtype in SEEDED] + [(torch.bfloat16, "strip")]
KERNEL_IDS = [f"{dtype}-{way}" for dtype, way in KERNELS]


def some_case(dtype, way):
    """Tails in both directions, more than one stage of factors, more than one tile."""
    if way == "strip":  # which takes whole tiles only
        return make_case(dtype, [(128, 192), (64, 64), (0, 64), (64, 320)], [30, 1, 2, 0])
    return make_case(dtype, [(33, 70), (17, 31), (0, 3), (5, 260)], [35, 1, 2, 0])


@pytest.mark.parametrize("dtype, way", KERNELS, ids=KERNEL_IDS)
@blocks
def test_schedules_are_bit_equal(block, dtype, way):
    cases = [some_case(dtype, way) for _ in range(1 + len(ORDERS))]
    plain = emulate(cases[0], block=block, way=way)
    for case, (order, seed) in zip(cases[1:], ORDERS, strict=True):
        assert torch.equal(emulate(case, block=block, way=way, order=order, seed=seed), plain)
        for a, b in zip(case.weights, cases[0].weights, strict=True):
            assert torch.equal(a, b), f"{order} {seed}"


@pytest.mark.parametrize("dtype, way", KERNELS, ids=KERNEL_IDS)
def test_block_sizes_agree(dtype, way):
    """An element's sum has one order whatever the block, so the weights are bit-equal."""
    cases = {block: some_case(dtype, way) for block in (32, 64, 128, 256)}
    fidelity = {block: emulate(case, block=block, way=way) for block, case in cases.items()}
    for block, case in cases.items():
        for a, b in zip(case.weights, cases[32].weights, strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(fidelity[block], fidelity[32], rtol=1e-6, atol=0)
    assert_right("emu", some_case(dtype, way), way=way)


@pytest.mark.parametrize("dtype", SEEDED, ids=str)
@pytest.mark.parametrize("name", samples(torch.bfloat16))
def test_tensor_cores(name, dtype):
    """Fragments' index maps, the split of a float into two bfloat16, tails, random rounding."""
    assert_right("emu", samples(dtype)[name], way="mma")
    case = samples(dtype)[name]
    case.seed = 5
    (ours, _), (theirs, _) = run("emu", case, way="mma"), run("eager", case)
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        # Where a change all but cancels a weight, the 16 bits of its factors are what is left.
        cancelled = 2**-14 * b.abs().max() if b.numel() else 0
        beside = (a - b).abs() <= b.abs() * torch.finfo(dtype).eps + cancelled
        # A sum just beside its draw may go either way.
        assert not a.numel() or (a == b).double().mean() > 0.95
        assert beside.all()


@pytest.mark.parametrize("rows", [1, 16, 17, 32])
@pytest.mark.parametrize("shape", [(32, 128), (96, 64), (160, 704)], ids=str)
def test_strips(shape, rows):
    """Shorter than a strip, longer with a rest; one step and two; last warps without columns."""
    assert_right("emu", make_case(torch.bfloat16, [shape, (64, 64)], [rows, 5]), way="strip")


@pytest.mark.parametrize("way, rows", [("strip", 32), ("strip", 16), ("mma", 40)])
def test_tensor_cores_by_hand(way, rows):
    """Every element of a product of small integers, more than one strip: exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    a, b = (192, 160) if way == "strip" else (70, 150)
    u, delta = (torch.randint(-2, 3, (rows, d), generator=generator).float() for d in (a, b))
    case = Case([torch.zeros(b, a).bfloat16()], [u], [delta], torch.tensor([-1.0]), [False])
    emulate(case, way=way)
    assert torch.equal(case.weights[0].float(), delta.t() @ u)


def test_strips_and_tiles_agree():
    """They differ in what they keep, not in a bit of what they write."""
    cases = [make_case(torch.bfloat16, [(160, 320)], [20]) for _ in range(2)]
    emulate(cases[0], way="strip", block=128)
    emulate(cases[1], way="mma", block=32)
    assert torch.equal(cases[0].weights[0], cases[1].weights[0])


def test_arguments_are_refused():
    for options, message in (({"block": 48}, "block is 48"), ({"order": "up"}, "schedule is 'up'")):
        with pytest.raises(ValueError, match=message):
            emulate(make_case(torch.float32, [(2, 2)], [1]), **options)
    with pytest.raises(ValueError, match="32 matrices"):
        emulate(make_case(torch.float32, [(1, 1)] * 33, [1] * 33))
    with pytest.raises(ValueError, match="way is 'up'"):
        emulate(make_case(torch.bfloat16, [(2, 2)], [1]), way="up")


def test_what_no_strip_takes():
    refused = pytest.raises(ValueError, match="32 rows of factors, sides")
    for shape, rows in (((64, 64), 33), ((64, 72), 1), ((64, 96), 1), ((48, 64), 1)):
        with refused:
            emulate(make_case(torch.bfloat16, [shape], [rows]), way="strip")
    crooked = make_case(torch.bfloat16, [(64, 64)], [1])
    crooked.weights = [torch.zeros(64 * 64 + 1).bfloat16()[1:].view(64, 64)]
    seeded = make_case(torch.bfloat16, [(64, 64)], [1])
    seeded.seed = 1
    for case in (crooked, seeded, make_case(torch.float16, [(64, 64)], [1])):
        with refused:
            emulate(case, way="strip")


def reverse(fault: str, order: str = "forward") -> torch.Tensor:
    values, out = torch.arange(64.0), torch.zeros(64)
    _emu.run_fault(fault, values.data_ptr(), out.data_ptr(), order)
    return out


def test_planted_faults_are_caught():
    assert torch.equal(reverse("none"), torch.arange(64.0).flip(0))
    broken = reverse("no barrier")
    assert broken.isnan().any(), "unwritten shared memory reads as NaN"
    assert not torch.equal(broken.isnan(), reverse("no barrier", "reversed").isnan())
    with pytest.raises(RuntimeError, match=r"divergent barrier in block 0.*thread 5 has returned"):
        reverse("early return")
    with pytest.raises(RuntimeError, match=r"divergent barrier.*thread 16 has returned"):
        reverse("half warp")
    assert torch.equal(reverse("none"), copy.copy(torch.arange(64.0).flip(0))), "state is clean"


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounding_is_torch_rounding(name, dtype):
    """All 65,536 values widen as in torch; floats on and beside midpoints round as in torch."""
    words = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = words.float()
    ours = getattr(_emu, f"widen_{name}")(numpy.arange(65536, dtype=numpy.uint16))
    numpy.testing.assert_array_equal(ours, wide.numpy())

    finite = wide[wide.isfinite()].sort().values
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    beside = [torch.nextafter(middle, torch.full_like(middle, e)) for e in (-1e38, 1e38)]
    special = torch.tensor([0.0, -0.0, 1e38, -3.4e38, 65520.0, 65519.99, 1e-45, float("inf")])
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int32).view(torch.float32)
    probes = torch.cat([middle, *beside, special, -special, bits[~bits.isnan()]])
    ours = getattr(_emu, f"round_{name}")(probes.numpy()).astype(numpy.int32)
    theirs = probes.to(dtype).view(torch.int16).int().numpy() & 0xFFFF
    numpy.testing.assert_array_equal(ours, theirs)
    assert (
        torch.tensor([getattr(_emu, f"round_{name}")(float("nan"))])
        .to(torch.int16)
        .view(dtype)
        .isnan()
    )
