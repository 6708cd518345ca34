"""The build: pip, make and CMake alone run the same commands; a bad environment is named.

Nothing is compiled here; CMake is only configured.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from pymend import _lib

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build/cmake"  # of `make build` and of editable installs

needs_tools = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").exists() or not (shutil.which("cmake") and shutil.which("ninja")),
    reason="needs the source tree, cmake and ninja on the PATH",
)


def run(command: list[object], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in the source tree; stdout and stderr come together, as `stdout`."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def configure(folder: Path, *options: str, cmake: str = "cmake", **variables: str):
    # Of two options of one name the last counts.
    options = (f"-DPython_EXECUTABLE={sys.executable}", *options)
    return run([cmake, "-S", ".", "-B", folder, "-G", "Ninja", *options], **variables)


def cached(build: Path, name: str) -> str:
    """A value from a build folder's CMake cache."""
    cache = (build / "CMakeCache.txt").read_text().splitlines()
    return next(line.split("=", 1)[1] for line in cache if line.startswith(f"{name}:"))


def by_cmake(cmake: str, folder: Path, work: Path, environment: dict[str, str]) -> None:
    options = (f"-DPYMEND_CUDA={environment['PYMEND_CUDA']}", f"-DPYMEND_OUTPUT={folder}")
    done = configure(work, *options, cmake=cmake, **environment)
    assert done.returncode == 0, done.stdout


def by_setup(cmake: str, folder: Path, work: Path, environment: dict[str, str]) -> None:
    """What `pip install .` runs, with a cmake that configures and does not compile."""
    stub = folder / "bin/cmake"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\n[ "$1" = --build ] || exec {cmake} "$@"\n')
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    options = ["--build-temp", work, "--build-lib", folder]
    done = run([sys.executable, "setup.py", "build_ext", *options], **environment, PATH=path)
    assert done.returncode == 0, done.stdout


def commands(build: Path) -> list[str]:
    """Every command that leads to _C, without the paths of the build folder and of the module."""
    output = cached(build, "PYMEND_OUTPUT")
    done = run(["ninja", "-C", build, "-t", "commands", "_C"])
    assert done.returncode == 0, done.stdout
    # Ninja writes a module below the build folder by its relative path.
    relative = os.path.relpath(output, build)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("ninja:")]
    return sorted(
        line.replace(f"{output}/_C", "_C").replace(f"{relative}/_C", "_C").replace(f"{build}/", "")
        for line in lines
    )


@needs_tools
@pytest.mark.parametrize("way", [by_cmake, by_setup])
def test_every_way_runs_the_same_commands(way, tmp_path):
    """Same sources, flags, architectures and libraries, so the same symbols."""
    if not (BUILD / "build.ninja").exists() or not _lib.has_kernels():
        pytest.skip("nothing was built by `make build`")
    environment = {
        "PYMEND_CUDA": "on" if _lib.has_cuda_kernels() else "off",
        "TORCH_CUDA_ARCH_LIST": _lib.build_info()["archs"].replace(",", ";"),
    }
    built = commands(BUILD)
    assert sum("-o _C.abi3.so" in line for line in built) == 1
    # The same CMake: versions differ in the order of their flags.
    way(cached(BUILD, "CMAKE_COMMAND"), tmp_path, tmp_path / "work", environment)
    assert commands(tmp_path / "work") == built


@needs_tools
@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        (["-DPYMEND_CUDA=yes"], {}, "PYMEND_CUDA is 'yes', expected auto, on or off"),
        (["-DPYMEND_CUDA=on"], {"CUDACXX": "/no/nvcc"}, "PYMEND_CUDA=on, but no /no/nvcc found"),
        ([], {"TORCH_CUDA_ARCH_LIST": "sm_90"}, "TORCH_CUDA_ARCH_LIST has 'sm_90', expected"),
        (["-DPYMEND_CUDA=off"], {"CXX": "/no/c++"}, "/no/c++"),
    ],
)
def test_a_bad_environment_is_named(options, variables, message, tmp_path):
    done = configure(tmp_path, *options, **variables)
    assert done.returncode != 0
    assert message in " ".join(done.stdout.split())


@needs_tools
@pytest.mark.skipif(not _lib.has_cuda_kernels(), reason="needs the CUDA toolkit")
def test_an_architecture_that_nvcc_does_not_know_is_named(tmp_path):
    done = configure(tmp_path, TORCH_CUDA_ARCH_LIST="3.5")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST has '3.5', but" in " ".join(done.stdout.split())


@needs_tools
def test_without_a_toolkit_one_line_says_cpu_only(tmp_path):
    done = configure(tmp_path, CUDACXX="/no/nvcc")
    assert done.returncode == 0, done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "pymend" in line and "kernels" in line]
    assert "CPU kernels only (no /no/nvcc found: " in line


@needs_tools
def test_a_python_without_torch_is_named(tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare/bin/python")
    done = configure(tmp_path / "work", f"-DPython_EXECUTABLE={python}")
    assert done.returncode != 0
    assert f"{python} has no torch: install it first" in " ".join(done.stdout.split())


@pytest.mark.skipif(not (ROOT / "tools").exists(), reason="needs the source tree")
def test_setup_names_a_missing_compiler(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup.sh", "constraints.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = run(["bash", tmp_path / "tools/setup.sh"], CXX="/no/c++")
    assert done.returncode != 0
    assert "setup failed: no C++ compiler found: install g++ (or clang), or set CXX" in done.stdout
    assert not (tmp_path / ".venv").exists()
