"""Finds cmake, ninja and torch and drives them; compiler flags are in CMakeLists.txt, metadata in pyproject.toml.

Environment: ADAHESSIAN_NATIVE and ADAHESSIAN_CUDA (AUTO, ON, OFF) and ADAHESSIAN_CUDA_ARCHS ("80;90" or "all"; without
it, the GPUs that are seen). What is missing costs what needs it, not the installation: without a C++ compiler or torch
the package is pure Python, without an nvcc that works it has no CUDA kernels, and ``python -m adahessian_fused info``
says why. ON makes that an error.
"""

import contextlib
import functools
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NOTE = "native_missing.txt"  # read by adahessian_fused/_native.py
TOOLS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}  # where their Python packages say they are
OLDEST = {"cmake": "3.20", "ninja": "1.5", "torch": "2.10"}
COMPILERS = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]


def option(name: str) -> str:
    """AUTO, ON or OFF, from the environment."""
    value = os.environ.get(name, "AUTO").upper()
    if value not in ("AUTO", "ON", "OFF"):
        sys.exit(f"adahessian_fused: {name}={value}; expected AUTO, ON or OFF")
    return value


NATIVE, CUDA = option("ADAHESSIAN_NATIVE"), option("ADAHESSIAN_CUDA")


def is_new_enough(name: str, version: str) -> bool:
    """Whether a tool of this version will do."""
    return tuple(map(int, version.split(".")[:2])) >= tuple(map(int, OLDEST[name].split(".")))


@functools.cache
def find_tool(name: str) -> tuple[str | None, str]:
    """Path of cmake or ninja, and its version or why there is none.

    The Python package in the build environment comes first: what precedes it on the PATH may be too old.
    """
    folders, found = os.get_exec_path(), []
    with contextlib.suppress(Exception):  # absent, or broken
        folders.insert(0, getattr(importlib.import_module(name), TOOLS[name]))
    for place in filter(None, (shutil.which(name, path=folder) for folder in folders if folder)):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            said = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=60)
            version = re.search(r"\d+\.\d+[.\w-]*", said.stdout)
            if said.returncode == 0 and version is not None:
                if is_new_enough(name, version[0]):
                    return place, version[0]
                found.append(f"{place} is {version[0]}")
                continue
        found.append(f"{place} does not run")
    return None, "; ".join(found) or "there is none"


def find_torch() -> tuple[Path | None, str]:
    """Folder and version of torch: in the build environment or, as pip isolates that, where it installs the package."""
    outside = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", outside)
    if spec is None or spec.origin is None:
        return None, ""
    folder = Path(spec.origin).parent
    return folder, runpy.run_path(str(folder / "version.py"))["__version__"]


def missing_for_native() -> str | None:
    """Tell what keeps the native library from being built here; None if nothing does."""
    if NATIVE == "OFF":
        return "ADAHESSIAN_NATIVE=OFF"
    if not any(shutil.which(shlex.split(compiler)[0]) for compiler in COMPILERS):
        return f"no C++ compiler found (tried {', '.join(COMPILERS)}; install g++ or set CXX)"
    folder, version = find_torch()
    if folder is None:
        return "torch was not installed (pip install torch, then this package once more)"
    if not is_new_enough("torch", version):
        return f"torch {version} was installed, and {OLDEST['torch']} or newer is needed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 was not in the build environment (pip install pybind11, or leave out --no-build-isolation)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing (install python3-dev, or the like of another Python)"
    for tool in TOOLS:
        path, why = find_tool(tool)
        if path is None:
            return f"no {tool} of version {OLDEST[tool]} or newer found ({why}; pip install {tool})"
    return None


MISSING = missing_for_native()


class BuildError(Exception):
    """A command failed; its message is what tells most of its output."""


def run(*command: str | Path) -> None:
    """Run a command and show what it prints."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    said = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        said += line
    if process.wait() != 0:
        telling = ["ADAHESSIAN_CUDA=ON, but.*", r".*\b(fatal|error|Killed)\b.*", r"CMake Error.*(\n.*){5}", r".*\w.*"]
        found = next(filter(None, (re.search(pattern, said) for pattern in telling)), [f"{command[0]} failed"])
        raise BuildError(" ".join(found[0].split()))


class BuildPython(build_py):
    """The Python files and, where there will be no native library, the reason why."""

    def run(self) -> None:
        for name, value in ("ADAHESSIAN_NATIVE", NATIVE), ("ADAHESSIAN_CUDA", CUDA):
            if MISSING is not None and value == "ON":
                sys.exit(f"adahessian_fused: {name}=ON, but {MISSING}")
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
            sys.exit(f"adahessian_fused: no native library can be built: {MISSING}")
        try:
            try:
                self.build()
            except BuildError as failure:
                if CUDA != "AUTO":
                    raise
                print(f"adahessian_fused: {failure}; once more without CUDA", flush=True)
                self.build(str(failure))
        except BuildError as failure:
            if str(failure).startswith("ADAHESSIAN_CUDA=ON"):
                sys.exit(f"adahessian_fused: {failure}. Mend that, or leave ADAHESSIAN_CUDA=ON out.")
            sys.exit(
                f"adahessian_fused: compiling the native library failed: {failure}\n"
                "What to do: set CXX to another C++20 compiler, or ADAHESSIAN_CUDA=OFF to leave CUDA out, or\n"
                "ADAHESSIAN_NATIVE=OFF to install without the native library; Triton and plain PyTorch work without it."
            )

    def build(self, cuda_failed: str = "") -> None:
        """Configure, compile and install; without CUDA if that has failed before."""
        import pybind11

        (cmake, _), (ninja, _), (torch, torch_version) = found = find_tool("cmake"), find_tool("ninja"), find_torch()
        for name, (place, version) in zip(OLDEST, found, strict=True):
            print(f"adahessian_fused: {name} {version} of {place}", flush=True)
        package = ROOT / "adahessian_fused" if self.inplace else Path(self.build_lib).resolve() / "adahessian_fused"
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "ADAHESSIAN_VERSION": self.distribution.get_version(),
            "ADAHESSIAN_TORCH_INCLUDE": torch / "include",
            "ADAHESSIAN_TORCH_LIBRARIES": torch / "lib",
            "ADAHESSIAN_TORCH_VERSION": torch_version,
            "ADAHESSIAN_CUDA": CUDA,
            "ADAHESSIAN_CUDA_ARCHS": os.environ.get("ADAHESSIAN_CUDA_ARCHS", ""),
            "ADAHESSIAN_CUDA_FAILED": cuda_failed,
            "ADAHESSIAN_BASELINE_ONLY": os.environ.get("ADAHESSIAN_BASELINE_ONLY", "OFF"),  # for who works on kernels
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
        }
        for stale in (*build.glob("CMakeCache.txt"), *build.glob("CMakeFiles/[0-9]*/CMake*Compiler.cmake")):
            stale.unlink()  # CXX, CUDACXX and what they name may have changed; what has been compiled stays
        flags = [f"-D{name}={value}" for name, value in options.items()]
        run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *flags)
        run(cmake, "--build", build)
        run(cmake, "--install", build, "--prefix", package)

    def get_outputs(self) -> list[str]:
        return []


if __name__ == "__main__":
    setup(
        license="MIT",
        # Without the extension the wheel is one for every platform: py3-none-any.
        ext_modules=[Extension("adahessian_fused._C", sources=[])] if MISSING is None else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    )
