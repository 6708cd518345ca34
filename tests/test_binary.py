"""What was built: who includes whom, symbols, architectures, registers and spills."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from stamps import where_csrc_changed

from pymend import _lib

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

needs_binary = pytest.mark.skipif(not _lib.has_kernels(), reason="the native module is not built")
needs_cuda_build = pytest.mark.skipif(not _lib.has_cuda_kernels(), reason="built without CUDA")

# Registers per thread that a kernel may use, on any architecture; spills and stack frames: none.
# 65,536 registers over 256 threads: 128 leave room for two blocks, 80 for three.
# rank_update_kernel keeps 64 sums a thread, so that a product reads little shared memory.
# rank_update_mma_kernel and rank_update_strip_kernel have blocks of 128 threads: 168 leave room for
# three, and the variant of the first that rounds at random takes more.
REGISTERS = {
    "rank_update_kernel": {"*": 128},
    "fidelity_kernel": {"*": 40},
    "rank_update_mma_kernel": {"*": 255},
    "rank_update_strip_kernel": {"*": 168},
    "pack_factors_kernel": {"*": 40},
    "live_rows_kernel": {"*": 40},
    "moments_kernel": {"*": 80},
    "editor_mlp_kernel": {"*": 64},
    "editor_mlp_backward_kernel": {"*": 64},
    "editor_mlp_bias_kernel": {"*": 40},
    "token_losses_kernel": {"d": 128, "*": 80},
    "token_losses_backward_kernel": {"d": 80, "*": 48},
}

FIBER_HEADERS = ("boost/context/", "ucontext.h", "sanitizer/")

# What a folder (or file) of csrc may include, besides the standard library.
ROOMS = {
    "math/": ("math/",),
    "kernels/": ("device.h", "kernels/", "math/"),
    "device.h": ("cuda_runtime.h", "emu/shim.h", "math/"),
    "torch_glue.h": ("torch/csrc/stable/", "torch/headeronly/", "dlfcn.h", "math/"),
    "glue/": ("torch_glue.h", "math/"),
    "cuda/": ("torch_glue.h", "glue/", "device.h", "kernels/", "math/", "cuda/"),
    "cpu/": ("torch_glue.h", "glue/", "math/", "cpu/"),
    "emu/": (*("device.h", "kernels/", "math/", "emu/", "pybind11/"), *FIBER_HEADERS),
    "ops.cpp": ("Python.h", "torch_glue.h"),
}  # fmt: skip
STANDARD = re.compile(r"[a-z_]+")  # <vector>; with a dot or a slash it is not the C++ library


def sources() -> list[Path]:
    return [p for p in sorted(CSRC.rglob("*")) if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(CSRC)))
def test_rooms_include_only_what_they_may(path):
    name = str(path.relative_to(CSRC))
    allowed = next(may for room, may in ROOMS.items() if name.startswith(room))
    for header in re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', path.read_text(), re.M):
        assert STANDARD.fullmatch(header) or header.startswith(allowed), f"{name} includes {header}"


def test_only_the_glue_includes_torch():
    users = [p.name for p in sources() if re.search(r"#\s*include\s*[<\"]torch/", p.read_text())]
    assert users == ["torch_glue.h"]


def test_launches_are_on_the_tensors_device_and_torchs_stream():
    """Launcher guards the device whose stream it asks for, and no kernel is launched without it."""
    text = (CSRC / "cuda/launcher.h").read_text()
    guard, stream = (
        re.findall(of, text) for of in (r"\bguard_\((.+?\))\)", r"current_stream\((.+?\))\)")
    )
    assert guard == stream == ["operand.get_device_index()"]
    for path in CSRC.glob("cuda/*.cu"):
        code = path.read_text()
        assert re.search(r"\bLauncher\b.*?\(\"\w+\", ", code), f"{path.name} launches nothing"
        assert not re.search(r"<<<|current_stream|cuda[A-Z]\w+\(|pymend::launch", code), path.name


def binary() -> Path:
    return Path(_lib._C.__file__)


def undefined_symbols() -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", binary()], capture_output=True, text=True, check=True
    )
    return [line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()]


@needs_binary
def test_abi():
    """One binary for Python 3.10 and later and torch 2.11 and later."""
    assert binary().name == "_C.abi3.so"
    symbols = undefined_symbols()
    assert {s for s in symbols if s.startswith("Py")} == {
        "PyModuleDef_Init",
        "PyModule_AddStringConstant",
    }
    unstable = [s for s in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", s)]
    assert not unstable, "C++ symbols of torch are not stable"
    if _lib.has_cuda_kernels():
        assert not [s for s in symbols if s.startswith("cuda")], "cudart is linked statically"


@needs_binary
def test_abi3audit_passes():
    pytest.importorskip("abi3audit")
    # A file's name does not say "3.10 and later", as the wheel's tag does.
    command = [sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10"]
    done = subprocess.run([*command, binary()], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_binary
def test_names_no_folder_of_the_build_machine():
    dynamic = subprocess.run(
        ["readelf", "-d", binary()], capture_output=True, text=True, check=True
    )
    assert "NEEDED" in dynamic.stdout
    assert not re.search(r"R(UN)?PATH", dynamic.stdout)


@needs_binary
def test_exports_only_its_entry():
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", binary()], capture_output=True, text=True, check=True
    )
    functions = [line.split()[-1] for line in listing.stdout.splitlines() if " T " in line]
    assert functions == ["PyInit__C"]


def test_a_missing_binary_is_an_error_where_it_is_required():
    code = "import sys; sys.modules['pymend._C'] = None; import pymend._lib"
    for required, outcome in (("1", 1), ("", 0)):
        environment = {**os.environ, "PYMEND_REQUIRE_KERNELS": required}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert done.returncode == outcome, done.stderr.decode()


@needs_binary
def test_build_info():
    info = _lib.build_info()
    assert set(info) == {"version", "torch", "compiler", "cuda", "archs"}
    assert re.search(
        rf'^version = "{info["version"]}"$', (ROOT / "pyproject.toml").read_text(), re.M
    )


def fatbin_archs(blob: bytes) -> set[str]:
    """sm_* of machine code and compute_* of PTX in the fat binaries of a file.

    Layout: a header (magic, version, own size, payload size), then entries (kind 1 PTX or 2 machine
    code, own size at byte 4, payload size at byte 8, architecture at byte 28).
    """
    archs = set()
    for start in (m.start() for m in re.finditer(re.escape(b"\x50\xed\x55\xba"), blob)):
        version, header, size = struct.unpack_from("<HHQ", blob, start + 4)
        if version != 1 or header != 16:
            continue
        at, end = start + header, start + header + size
        while at < end:
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", blob, at)
            (arch,) = struct.unpack_from("<I", blob, at + 28)
            archs.add(f"{'compute' if kind == 1 else 'sm'}_{arch}")
            at += entry_header + payload
    return archs


@needs_binary
@needs_cuda_build
def test_architectures_are_in_the_binary():
    wanted = set()
    for arch in _lib.build_info()["archs"].split(","):
        number = re.sub(r"[.a-z]|\+PTX", "", arch)
        wanted.add(f"sm_{number}")
        if arch.endswith("+PTX"):
            wanted.add(f"compute_{number}")
    assert fatbin_archs(binary().read_bytes()) == wanted


def cuda_commands() -> list[dict]:
    for folder in (ROOT / "build/cmake", ROOT / "build"):
        path = folder / "compile_commands.json"
        if path.exists():
            return [c for c in json.loads(path.read_text()) if c["file"].endswith(".cu")]
    return []


def ptxas_report(entry: dict, output: Path) -> str:
    """What ptxas says of each kernel: the build's own command, for the device code alone."""
    command = ["-fatbin" if word == "-c" else word for word in shlex.split(entry["command"])]
    command[command.index("-o") + 1] = str(output)
    built = subprocess.run(
        [*command, "-Xptxas=-v"], cwd=entry["directory"], capture_output=True, text=True, check=True
    )
    return built.stdout + built.stderr


@needs_binary
@needs_cuda_build
def test_no_spills_no_stack_and_few_registers(tmp_path):
    with where_csrc_changed("no-spills", "tests/test_binary.py"):
        check_registers(tmp_path)


def check_registers(folder: Path) -> None:
    commands = cuda_commands()
    if not commands:
        pytest.skip("no compile_commands.json below build/")
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        outputs = [folder / f"{i}.fatbin" for i in range(len(commands))]
        report = "".join(pool.map(ptxas_report, commands, outputs))
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    seen = set()
    for symbol, arch, *numbers in re.findall(pattern, report, re.S):
        stack, stores, loads, registers = map(int, numbers)
        kernel = next(k for k in REGISTERS if k in symbol)
        double = f"{kernel}Id" in symbol
        budget = REGISTERS[kernel].get("d" if double else "*", REGISTERS[kernel]["*"])
        assert (stack, stores, loads) == (0, 0, 0), f"{symbol} on {arch} spills"
        assert registers <= budget, f"{symbol} on {arch}: {registers} registers, may {budget}"
        seen.add((kernel, re.sub(r"[a-z]+$", "", arch)))
    archs = {a for a in fatbin_archs(binary().read_bytes()) if a.startswith("sm_")}
    assert seen == {(kernel, arch) for kernel in REGISTERS for arch in archs}
