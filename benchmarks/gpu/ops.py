"""Each op on its own, against the nearest torch form: timing, streams, sanitizers, counters.

A new op adds one function here, named after its module in ``pymend/ops``. It yields cases whose
rivals are, in this order: torch's way, the same as a graph, ours, ours as a graph. "ours graph"
must not wait for the device and must run on the caller's stream: the stage ``stream`` checks both.
From ``benchmarks/``:

    python -m gpu.ops --tiny [--cpu]     # every op once at small sizes, for sanitizers
    python -m gpu.ops --profile [--cpu]  # "ours graph" at full size, for ncu
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu import measure
from gpu.measure import Case, Device, Operands, Run, Skipped, compare_all, error

OURS = "ours graph"
SHAPES = {"GPT-J 6B": (4096, 16384), "GPT-2 small": (768, 3072)}  # d, f of three blocks' MLPs
RANK = 1920
MANY = 64  # rows: with more, an update's own form in torch is timed too
VOCABULARY = 50400


@dataclass(frozen=True)
class Sizes:
    """Where and how large: full, or every width divided by ``shrink``."""

    device: str
    shrink: int = 1

    def of(self, full: int) -> int:
        """A width."""
        return max(2, full // self.shrink)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random operands."""
        return torch.randn(shape, device=self.device).to(dtype)


Maker = Callable[[Sizes], Iterator[Case]]
OPS: dict[str, Maker] = {}


def op(function: Maker) -> Maker:
    """Register the cases of an op."""
    OPS[function.__name__] = function
    return function


def present() -> dict[str, Any]:
    """The modules of the registered ops that this tree has."""
    found = [name for name in OPS if importlib.util.find_spec(f"pymend.ops.{name}")]
    return {name: importlib.import_module(f"pymend.ops.{name}") for name in found}


# -- the registry --------------------------------------------------------------------------------


@op
def rank_update(sizes: Sizes) -> Iterator[Case]:
    """Six matrices W -= alpha d~^T u~ (G6); torch: one ``addmm_`` for each.

    For many rows also the op's own form in torch: what would run in the kernel's place.
    """
    module = present()["rank_update"]
    for model, (d, f) in SHAPES.items():
        d, f = sizes.of(d), sizes.of(f)
        for dtype in (torch.bfloat16, torch.float32):
            for n in (32, 1024):
                rows, size = sizes.of(n) if sizes.shrink > 1 else n, 6 * d * f * dtype.itemsize

                def make(
                    seed: int,
                    d: int = d,
                    f: int = f,
                    dtype: torch.dtype = dtype,
                    rows: int = rows,
                    conv1d: bool = model == "GPT-2 small",
                ) -> Operands:
                    torch.manual_seed(seed)
                    shapes = [(f, d), (d, f)] * 3  # [b, a]
                    weights = [
                        0.02 * sizes.randn(*((a, b) if conv1d else (b, a))) for b, a in shapes
                    ]
                    weights = [w.to(dtype) for w in weights]
                    step = 0.02 / rows**0.5
                    # Both sides get bfloat16 numbers, each in the dtype it works in.
                    u = [sizes.randn(rows, a, dtype=torch.bfloat16).float() for _, a in shapes]
                    delta = [sizes.randn(rows, b, dtype=torch.bfloat16).float() for b, _ in shapes]
                    alpha = torch.full((6,), step, device=sizes.device)
                    pairs = [
                        (left.to(dtype).t(), right.to(dtype))
                        for left, right in zip(*((u, delta) if conv1d else (delta, u)), strict=True)
                    ]

                    def addmm() -> list[Tensor]:
                        for w, (left, right) in zip(weights, pairs, strict=True):
                            w.addmm_(left, right, alpha=-step)
                        return weights

                    def ours(update: Any) -> list[Tensor]:
                        update(weights, u, delta, alpha, [conv1d] * 6)
                        return weights

                    rivals = {"addmm_": addmm, "addmm_ graph": addmm}
                    if rows > MANY:
                        rivals["own form in torch"] = partial(ours, module.eager)
                    rivals["ours"] = partial(ours, module.rank_update)
                    return Operands(weights, {**rivals, OURS: partial(ours, module._run)})

                label = {"op": "rank_update", "model": model, "N": n, "dtype": _name(dtype)}
                flops = 2 * rows * 6 * d * f
                yield Case(
                    label, make, size, 2 * size, flops, 2e-2 if dtype.itemsize == 2 else 1e-4
                )


@op
def moments(sizes: Sizes) -> Iterator[Case]:
    """128 rows of three weights into the statistics, training (G8); torch: the row-by-row loop."""
    from pymend import reference as ref

    module = present()["moments"]
    a, b, rows = sizes.of(4096), sizes.of(16384), sizes.of(128)

    def make(seed: int) -> Operands:
        torch.manual_seed(seed)
        u = [sizes.randn(rows, a) for _ in range(3)]
        delta = [sizes.randn(rows, b) for _ in range(3)]
        mean = sizes.randn(a + b).double()
        m2 = (100 * torch.rand(a + b, device=sizes.device) + 1000).double()
        count = torch.tensor(1000, device=sizes.device)

        def loop() -> list[Tensor]:
            own = ref.Moments(a, b, official=True, device=sizes.device)
            own.k = count.float()
            own.u_mean, own.delta_mean = mean.float().split([a, b])
            own.u_s, own.delta_s = m2.float().split([a, b])
            parts = []
            for u_i, delta_i in zip(u, delta, strict=True):
                own.update(u_i, delta_i)
                parts.append(torch.cat(own.normalise(u_i, delta_i), 1))
            return [torch.cat(parts)]

        def ours(function: Any) -> list[Tensor]:
            return [function(u, delta, [rows] * 3, mean, m2, count, True, torch.float32)[0]]

        eager, own = partial(ours, module.eager), partial(ours, module.moments)
        rivals = {"official loop": loop, "torch": eager, "torch graph": eager}
        return Operands([mean, m2, count], {**rivals, "ours": own, OURS: own})

    moved = 2 * 3 * rows * (a + b) * 4 + 4 * (a + b) * 8
    label = {"op": "moments", "model": "GPT-J 6B", "N": 128, "dtype": "float32"}
    yield Case(label, make, moved, moved, 10 * 3 * rows * (a + b), 1e-3)


@op
def editor_mlp(sizes: Sizes) -> Iterator[Case]:
    """One layer for the rows of three weights, forward, and with its backward pass.

    Also the op's own form in torch: what would run in the kernel's place.
    """
    module = present()["editor_mlp"]
    for model, (d, f) in SHAPES.items():
        width, rank, rows = sizes.of(d) + sizes.of(f), sizes.of(RANK), 3 * sizes.of(32)
        for backward in (False, True):

            def make(
                seed: int, width: int = width, rank: int = rank, rows: int = rows, backward=backward
            ) -> Operands:
                torch.manual_seed(seed)
                x = sizes.randn(rows, width)
                v = sizes.randn(rank, width) / width**0.5
                u = sizes.randn(width, rank) / rank**0.5
                bias, scale, shift = (0.1 * sizes.randn(*s, width) for s in ((), (3,), (3,)))
                mode = torch.arange(3, device=sizes.device).repeat_interleave(rows // 3)
                grad = sizes.randn(rows, width)
                leaves = [x, v, u, bias, scale + 1, shift]
                leaves = [t.requires_grad_(backward) for t in leaves]

                def layer(function: Any) -> list[Tensor]:
                    with torch.set_grad_enabled(backward):
                        x, *parameters = leaves
                        y = function(x, [module.Layer(*parameters, residual=True)], mode)
                        if not backward:
                            return [y]
                        return list(torch.autograd.grad(y, leaves, grad))

                eager, own = (partial(layer, g) for g in (module.eager, module.editor_mlp))
                rivals = {"torch": eager, "torch graph": eager}
                rivals["own form in torch graph"] = _without_kernels(own)
                return Operands([], {**rivals, "ours": own, OURS: own})

            size = 2 * width * rank * 4
            label = {"op": "editor_mlp", "model": model, "N": 32, "dtype": "float32"}
            label["what"] = "forward and backward" if backward else "forward"
            passes = 3 if backward else 1
            flops = passes * 4 * rows * width * rank
            # A row whose sum rounds to the other side of 0 has another gradient.
            yield Case(label, make, size, passes * size, flops, 1e-2 if backward else 1e-4)


@op
def token_losses(sizes: Sizes) -> Iterator[Case]:
    """NLL, KL and the gradient of their sum for 256 rows of logits."""
    module = present()["token_losses"]
    rows, width = sizes.of(256), sizes.of(VOCABULARY)
    for dtype in (torch.bfloat16, torch.float32):

        def make(seed: int, dtype: torch.dtype = dtype) -> Operands:
            torch.manual_seed(seed)
            logits = (3 * sizes.randn(rows, width)).to(dtype).requires_grad_()
            base = (3 * sizes.randn(rows, width)).to(dtype)
            target = torch.randint(width, (rows,), device=sizes.device)

            def losses(function: Any) -> list[Tensor]:
                with torch.enable_grad():
                    found = function(logits, target, base)
                    (gradient,) = torch.autograd.grad(found.nll.sum() + found.kl.sum(), logits)
                return [found.nll.detach(), found.kl.detach(), gradient]

            eager, own = (partial(losses, f) for f in (module.eager, module.token_losses))
            return Operands([], {"torch": eager, "torch graph": eager, "ours": own, OURS: own})

        label = {"op": "token_losses", "model": "GPT-J 6B", "N": 256, "dtype": _name(dtype)}
        size = 2 * rows * width * dtype.itemsize
        tolerance = 2e-2 if dtype.itemsize == 2 else 1e-4
        yield Case(label, make, size, 2.5 * size, 20 * rows * width, tolerance)


@op
def apply_edit(sizes: Sizes) -> Iterator[Case]:
    """The whole edit of GPT-2's six matrices; torch: all rows of a shape together, ``addmm_``."""
    from gpu import edit as gpu_edit

    module, model = present()["apply_edit"], "GPT-2 small"
    dry = sizes.shrink > 1
    rows = sizes.of(32) if dry else 32
    for dtype in (torch.float32, torch.bfloat16):

        def make(seed: int, dtype: torch.dtype = dtype) -> Operands:
            device = Device(dry=sizes.device == "cpu")
            s = gpu_edit.Subject(model, rows, dtype, device, dry, seed)
            flags = [w.transposed for w in s.weights]

            def ours(function: Any) -> list[Tensor]:
                function(s.W, s.u, s.delta, s.alpha, s.plain, flags)
                return s.W

            rivals = {"torch": s.grouped, "torch graph": s.grouped}
            rivals["ours"] = partial(ours, module.apply_edit)
            return Operands(s.W, {**rivals, OURS: partial(ours, module.unchecked)})

        label = {"op": "apply_edit", "model": model, "N": 32, "dtype": _name(dtype)}
        network, update = gpu_edit.phases(model, 32, dtype.itemsize)
        size, moved = network["bytes"] + update["bytes"] / 2, network["bytes"] + update["bytes"]
        flops = network["flops"] + update["flops"]
        yield Case(label, make, size, moved, flops, gpu_edit.TOLERANCE[_name(dtype)])


def _without_kernels(call: Callable[[], Any]) -> Callable[[], Any]:
    def without() -> Any:
        former = os.environ.get("PYMEND_KERNELS", "default")
        os.environ["PYMEND_KERNELS"] = "off"
        try:
            return call()
        finally:
            os.environ["PYMEND_KERNELS"] = former

    return without


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(device: Device, shrink: int) -> list[Case]:
    """Those of every op that this tree has."""
    sizes = Sizes(device.name, shrink)
    return [case for name in present() for case in OPS[name](sizes)]


# -- stages --------------------------------------------------------------------------------------


def ceilings(run: Run) -> None:
    """What this device reaches: a copy, and products. All fractions of a roofline use these."""
    device = Device(run.dry)
    n, elements = (64, 2**16) if run.dry else (8192, 2**30)
    source = torch.randn(elements, device=device.name)
    target = torch.empty_like(source)
    copy = measure.timed(device, {"copy": [partial(target.copy_, source)]})["copy"]
    run.save(copy=2 * source.nbytes / copy["seconds"], spreads={})
    del source, target
    device.free()
    a, b = (torch.randn(n, n, device=device.name) for _ in range(2))
    former = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        left, right = a.to(dtype), b.to(dtype)
        torch.set_float32_matmul_precision(precision)
        try:
            result = measure.timed(device, {name: [partial(torch.matmul, left, right)]})[name]
        finally:
            torch.set_float32_matmul_precision(former)
        spreads = {**run.data["spreads"], name: result["spread"]}
        run.save(**{name: 2 * n**3 / result["seconds"]}, spreads=spreads)
    print("  " + ", ".join(f"{k} {run.data[k]:.3g}/s" for k in ("copy", *run.data["spreads"])))


@torch.no_grad()
def ops(run: Run) -> None:
    """Every op at its real sizes."""
    device = Device(run.dry)
    shrink = 64 if run.dry else 1
    compare_all(run, device, [partial(lambda c: c, case) for case in cases(device, shrink)])


@torch.no_grad()
def stream(run: Run) -> None:
    """No op waits for the device, and each runs on the caller's stream.

    A side stream spins, then receives an operand, then the op is called on it. The call must come
    back while the stream still spins, and the result must be that of the late operand.
    """
    device = Device(run.dry)
    rows = []
    for case in cases(device, 64):
        first, second = case.make(0), case.make(0)
        wanted = [t.clone() for t in first.rivals[OURS]()]
        late = [t.clone() for t in second.state]
        device.sync()
        begin = time.perf_counter()
        if device.cuda:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):  # this stream's own memory, taken beforehand
                _late_call(second, late)
            device.sync()
            torch.cuda.set_sync_debug_mode("error")
            begin = time.perf_counter()
            try:
                with torch.cuda.stream(side):
                    torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second
                    for tensor in second.state:
                        tensor.zero_()
                    got = _late_call(second, late)
                waited = side.query()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            got, waited = _late_call(second, late), False
        seconds = time.perf_counter() - begin
        device.sync()
        row = {**case.label, "waited": waited, "seconds": seconds, "error": error(got, wanted)}
        rows.append(row)
        run.save(rows=rows)
    bad = [r for r in rows if r["waited"] or not r["error"] < 1e-5]
    if bad:
        raise ArithmeticError(f"an op waited for the device or left the stream: {bad}")


def _late_call(operands: Operands, late: Sequence[Tensor]) -> list[Tensor]:
    for tensor, value in zip(operands.state, late, strict=True):
        tensor.copy_(value)
    return list(operands.rivals[OURS]())


def sanitizers(run: Run) -> None:
    """memcheck and racecheck over every op at small sizes, both at once."""
    tool = None if run.dry else shutil.which("compute-sanitizer")
    if not (tool or run.dry):
        raise Skipped("compute-sanitizer was not found")
    script = [sys.executable, "-m", "gpu.ops", "--tiny", *["--cpu"] * run.dry]

    def check(name: str) -> None:
        prefix = [tool, "--tool", name, "--error-exitcode", "9"] if tool else []
        prefix += ["--report-api-errors", "no"] if tool and name == "memcheck" else []
        # Without torch's own pool every tensor has its own bounds. Each has its own log.
        logged = replace(run, stage=name)
        logged.command(*prefix, *script, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    names = measure.SANITIZERS[: 1 if run.dry else None]
    with ThreadPoolExecutor() as pool:
        checks = {name: pool.submit(check, name) for name in names}
        for name, done in checks.items():
            done.result()
            run.save(**{name: "no error" if tool else "rehearsed"})


METRICS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank conflicts",
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "L1 %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
}


def counters(run: Run) -> None:
    """DRAM bytes, occupancy, bank conflicts and the busiest units of our kernels, by ncu."""
    tool = None if run.dry else shutil.which("ncu")
    if not (tool or run.dry):
        raise Skipped("ncu was not found")
    script = [sys.executable, "-m", "gpu.ops", "--profile", *["--cpu"] * run.dry]
    prefix = (
        [tool, "--clock-control", "none", "--profile-from-start", "off", "--csv"] if tool else []
    )
    prefix += ["--print-units", "base", "--metrics", ",".join(METRICS)] if tool else []
    output = run.command(*prefix, *script)
    ideal = [line.removeprefix("ideal ") for line in output.splitlines() if line[:6] == "ideal "]
    run.save(kernels=parse_ncu(output), ideal=ideal)


def parse_ncu(output: str) -> list[dict[str, Any]]:
    """The kernels in what ``ncu --csv`` printed, each with its metrics."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(x for x in lines[start:] if x[:1] == '"'))):
        kernel = kernels.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        name = METRICS.get(row["Metric Name"], row["Metric Name"])
        kernel[name] = float(row["Metric Value"].replace(",", ""))
    return list(kernels.values())


@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    """What the sanitizers and ncu run."""
    device = Device("--cpu" in arguments)
    profile = "--profile" in arguments
    for case in cases(device, 64 if not profile or not device.cuda else 1):
        operands = case.make(0)
        call = operands.rivals[OURS]
        if not profile:
            call()
            operands.rivals["ours"]()
        elif case.label["model"] == "GPT-J 6B":
            call()  # loads the kernels
            device.sync()
            if device.cuda:
                torch.cuda.profiler.start()
            call()
            device.sync()
            if device.cuda:
                torch.cuda.profiler.stop()
            print("ideal", dict(case.label), case.bytes, flush=True)
        del operands, call
        device.free()


if __name__ == "__main__":
    measure.stand_in_for_transformers()
    main(sys.argv[1:])
