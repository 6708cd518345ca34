"""Builds the native module through CMakeLists.txt, which owns sources, flags and architectures."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake: everything for an editable install, the product alone for a wheel."""

    def run(self) -> None:
        # Editable builds keep one folder, so that `make build` goes on where pip left off.
        work = ROOT / "build/cmake" if self.inplace else Path(self.build_temp).resolve()
        output = ROOT / "pymend" if self.inplace else Path(self.build_lib).resolve() / "pymend"
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYMEND_OUTPUT={output}",
            f"-DPYMEND_CUDA={os.environ.get('PYMEND_CUDA', 'auto')}",
        ]
        if shutil.which("ninja"):
            options += ["-G", "Ninja"]
        targets = [] if self.inplace else ["--target", "_C"]
        subprocess.run(["cmake", "-S", str(ROOT), "-B", str(work), *options], check=True)
        subprocess.run(["cmake", "--build", str(work), *targets], check=True)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"


class Abi3Wheel(bdist_wheel):
    """One wheel for Python 3.10 and later."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "cp310", "abi3", platform


setup(
    ext_modules=[Extension("pymend._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Abi3Wheel},
)
