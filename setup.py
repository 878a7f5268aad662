"""Drives CMake and ninja; every compiler flag is in CMakeLists.txt, the metadata in pyproject.toml.

Environment: ADAHESSIAN_NATIVE and ADAHESSIAN_CUDA (AUTO, ON, OFF) and ADAHESSIAN_CUDA_ARCHS ("80;90"). Without a C++
compiler, or without torch in the build environment, the package installs without its native library: as pure Python,
with a note for ``python -m adahessian_fused info`` of what was missing.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = os.environ.get("ADAHESSIAN_NATIVE", "AUTO").upper()
NOTE = "native_missing.txt"  # read by adahessian_fused/_native.py


def missing_for_native() -> str | None:
    """What keeps the native library from being built here, or None."""
    if NATIVE == "OFF":
        return "ADAHESSIAN_NATIVE=OFF"
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "no C++ compiler found (install g++ or set CXX)"
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not in the build environment (install it and use pip install --no-build-isolation)"
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            return f"{tool} not found (pip install {tool})"
    return None


MISSING = missing_for_native()


class BuildPython(build_py):
    """The Python files and, where there will be no native library, the reason why."""

    def run(self) -> None:
        if MISSING is not None and NATIVE == "ON":
            sys.exit(f"ADAHESSIAN_NATIVE=ON, but {MISSING}")
        super().run()
        if MISSING is not None:
            print(f"adahessian_fused: no native library: {MISSING}. The Triton and reference backends work without it.")
        if not self.editable_mode:
            note = Path(self.build_lib, "adahessian_fused", NOTE)
            note.unlink(missing_ok=True)  # of an earlier build
            if MISSING is not None:
                note.write_text(MISSING + "\n")


class CMakeBuild(build_ext):
    """Builds both native targets in one CMake run."""

    def run(self) -> None:
        if MISSING is not None:  # "setup.py build_ext" asks for it by name
            sys.exit(f"no native library can be built: {MISSING}")
        import pybind11
        import torch

        package = ROOT / "adahessian_fused" if self.inplace else Path(self.build_lib).resolve() / "adahessian_fused"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "ADAHESSIAN_VERSION": self.distribution.get_version(),
            "ADAHESSIAN_TORCH_INCLUDE": Path(torch.__file__).parent / "include",
            "ADAHESSIAN_TORCH_LIBRARIES": Path(torch.__file__).parent / "lib",
            "ADAHESSIAN_TORCH_VERSION": torch.__version__,
            "ADAHESSIAN_CUDA": os.environ.get("ADAHESSIAN_CUDA", "AUTO").upper(),
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
        }
        if "ADAHESSIAN_CUDA_ARCHS" in os.environ:
            options["ADAHESSIAN_CUDA_ARCHS"] = os.environ["ADAHESSIAN_CUDA_ARCHS"]
        flags = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *flags], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", package], check=True)

    def get_outputs(self) -> list[str]:
        return []


# Without the extension the wheel is one for every platform: py3-none-any.
setup(
    license="MIT",
    ext_modules=[Extension("adahessian_fused._C", sources=[])] if MISSING is None else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
