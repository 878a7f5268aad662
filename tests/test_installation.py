"""The build finds its tools wherever they are; what is missing or broken costs what needs it and is named.

Compilers and cmakes are small scripts here: nothing is compiled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
NVCC = ROOT / "csrc" / "cuda" / "nvcc.cmake"


def load_setup():
    """setup.py as a module, with what it finds in the environment of now."""
    spec = importlib.util.spec_from_file_location("adahessian_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CMAKE = load_setup().find_tool("cmake")[0]
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="there is no cmake")


def copy_source(folder: Path) -> None:
    """The source folder as a clone has it: nothing built, so that nothing of a developer's build is touched."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in "adahessian_fused", "kernels", "bench":
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    for name in "setup.py", "pyproject.toml", "README.md", "CMakeLists.txt":
        shutil.copy(ROOT / name, folder)


def script(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)
    return folder


# ---- cmake and ninja ---------------------------------------------------------------------------------------------

OLD = "echo cmake version 3.10.2"
VERSIONS = {"old": OLD, "new": "echo cmake version 3.30.1-rc2", "broken": "exit 1"}


@pytest.mark.parametrize(
    ("package", "path", "taken", "why"),
    [
        ("new", ["old"], "package", "3.30.1-rc2"),  # a distribution's in front
        ("new", [], "package", "3.30.1-rc2"),
        (None, ["new"], "0", "3.30.1-rc2"),
        (None, ["old", "broken", "new"], "2", "3.30.1-rc2"),
        ("broken", ["new"], "0", "3.30.1-rc2"),
        ("old", ["old"], None, "package/cmake is 3.10.2; {}/0/cmake is 3.10.2"),
        (None, ["broken"], None, "{}/0/cmake does not run"),
        (None, [], None, "there is none"),
    ],
)
def test_cmake_is_the_build_environments_or_the_first_new_enough(package, path, taken, why, tmp_path, monkeypatch):
    module = None
    if package is not None:
        module = SimpleNamespace(CMAKE_BIN_DIR=str(script(tmp_path / "package", "cmake", VERSIONS[package])))
    folders = [script(tmp_path / str(i), "cmake", VERSIONS[kind]) for i, kind in enumerate(path)]
    monkeypatch.setitem(sys.modules, "cmake", module)  # None: it cannot be imported
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)) or "/nonexistent")
    found, version = load_setup().find_tool("cmake")
    assert found == (taken and str(tmp_path / taken / "cmake"))
    assert version.endswith(why.format(tmp_path))


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """The only folder on the PATH: a compiler, and no cmake, ninja or nvcc; nor as Python packages."""
    folder = script(tmp_path / "tools", "c++", "exit 1")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    for name in "ADAHESSIAN_NATIVE", "ADAHESSIAN_CUDA", "ADAHESSIAN_CUDA_ARCHS", "CUDACXX", "CUDA_PATH":
        monkeypatch.delenv(name, raising=False)
    for name in "cmake", "ninja":
        monkeypatch.setitem(sys.modules, name, None)
    return folder


def test_what_is_missing_is_named(tools, monkeypatch):
    assert load_setup().MISSING == "no cmake of version 3.20 or newer found (there is none; pip install cmake)"
    script(tools, "cmake", VERSIONS["new"])
    assert load_setup().MISSING == "no ninja of version 1.5 or newer found (there is none; pip install ninja)"
    script(tools, "ninja", "echo 1.11.1")
    setup = load_setup()
    assert setup.MISSING is None
    monkeypatch.setattr(setup, "find_torch", lambda: (Path("torch"), "2.9.1+cu128"))
    assert setup.missing_for_native() == "torch 2.9.1+cu128 was installed, and 2.10 or newer is needed"
    monkeypatch.setattr(setup, "find_torch", lambda: (None, ""))
    assert setup.missing_for_native().startswith("torch was not installed")
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    assert load_setup().MISSING.startswith("no C++ compiler found (tried /nonexistent/c++ -m64;")
    (tools / "c++").unlink()
    monkeypatch.delenv("CXX")
    assert load_setup().MISSING.startswith("no C++ compiler found (tried c++, g++, clang++;")


def test_torch_is_found_where_pip_hides_it(monkeypatch):
    """In its isolated build environment: the folder it installs into is not on sys.path."""
    site = Path(torch.__file__).parents[1]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(site))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_setup().find_torch() == (site / "torch", torch.__version__)


# ---- the build ------------------------------------------------------------------------------------------------------

CONFIGURES = """if [ "$1" = --version ]; then echo cmake version 3.30.1; exit; fi
echo "$*" >> "$LOG"
"""
ERROR = 'x.cu(3): error: expected a ";"'
FAILS = f"""{CONFIGURES}
if [ "$1" = --build ]; then echo a warning; echo '{ERROR}' >&2; exit 2; fi
"""
FAILS_ONCE = FAILS.replace("--build ]; then ", "--build ]; then [ -e $LOG.2 ] && exit 0; > $LOG.2; ")


def run_setup(tools: Path, cmake: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What ``setup.py build`` says with this cmake, and what that was called with."""
    script(script(tools, "cmake", cmake), "ninja", "echo 1.11.1")
    log = tools / "log"
    hidden = tools.parent / "hidden"
    for package in "cmake", "ninja":  # as if they were not installed
        (hidden / package).mkdir(parents=True, exist_ok=True)
        (hidden / package / "__init__.py").write_text("raise ImportError")
    source = tools.parent / "source"
    copy_source(source)
    environment |= {"LOG": str(log), "PYTHONPATH": str(hidden)}
    command = [sys.executable, "setup.py", "build"]
    result = subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True)
    assert "Traceback" not in result.stdout + result.stderr
    return result, log.read_text().splitlines() if log.exists() else []


def test_the_build_says_what_it_takes(tools):
    result, calls = run_setup(tools, CONFIGURES)
    assert result.returncode == 0, result.stderr
    assert f"adahessian_fused: cmake 3.30.1 of {tools}/cmake\n" in result.stdout
    assert f"adahessian_fused: ninja 1.11.1 of {tools}/ninja\n" in result.stdout
    assert [call.split()[0] for call in calls] == ["-S", "--build", "--install"]
    assert f"-DCMAKE_MAKE_PROGRAM={tools}/ninja" in calls[0]


def test_kernels_that_do_not_compile_cost_cuda_alone(tools):
    """The second attempt goes without them and knows why."""
    result, calls = run_setup(tools, FAILS_ONCE)
    assert result.returncode == 0, result.stderr
    assert [call.split()[0] for call in calls] == ["-S", "--build", "-S", "--build", "--install"]
    assert "-DADAHESSIAN_CUDA_FAILED= " in calls[0]
    assert f"-DADAHESSIAN_CUDA_FAILED={ERROR} " in calls[2]


@pytest.mark.parametrize(
    ("cmake", "environment", "last"),
    [
        (FAILS, {}, "ADAHESSIAN_NATIVE=OFF to install without the native library"),
        (FAILS, {"ADAHESSIAN_CUDA": "OFF"}, "ADAHESSIAN_NATIVE=OFF to install without"),
        (CONFIGURES + 'echo "   ADAHESSIAN_CUDA=ON, but no nvcc found"; exit 1', {"ADAHESSIAN_CUDA": "on"},
         "adahessian_fused: ADAHESSIAN_CUDA=ON, but no nvcc found. Mend that"),
        (OLD, {"ADAHESSIAN_CUDA": "ON"}, "adahessian_fused: ADAHESSIAN_CUDA=ON, but no cmake of version"),
        (OLD, {"ADAHESSIAN_NATIVE": "ON"}, "adahessian_fused: ADAHESSIAN_NATIVE=ON, but no cmake of version"),
        (CONFIGURES, {"ADAHESSIAN_CUDA": "yes"}, "adahessian_fused: ADAHESSIAN_CUDA=YES; expected AUTO, ON or OFF"),
    ],
)  # fmt: skip
def test_the_last_line_of_a_failure_says_what_to_do(cmake, environment, last, tools):
    result, _ = run_setup(tools, cmake, **environment)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(last)


# ---- nvcc -----------------------------------------------------------------------------------------------------------

GOOD = """case "$*" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131";;
  --list-gpu-arch) for one in 50 70 75 80 86 89 90; do echo compute_$one; done;;
  *) echo "$*" > "$0.log";;
esac"""
NVIDIA_SMI = {
    "": "exit 127",
    "mismatch": "echo NVML library version: 535.1; exit 18",
    "one": "echo 8.6",
    "two": "echo 9.0; echo 8.0; echo 9.0",
    "newer": "echo 12.0",
    "older": "echo 7.0",
}


def decide(folder: Path, nvcc: str | None, gpus: str = "", **options: str) -> subprocess.CompletedProcess:
    """What nvcc.cmake says with this nvcc and these GPUs."""
    script(folder, "nvidia-smi", NVIDIA_SMI[gpus])
    if nvcc is not None:
        script(folder, "nvcc", nvcc)
    flags = [f"-D{name}={value}" for name, value in ({"ADAHESSIAN_CUDA": "AUTO"} | options).items()]
    return subprocess.run([CMAKE, *flags, "-P", NVCC], cwd=folder, capture_output=True, text=True)


@needs_cmake
@pytest.mark.parametrize(
    ("nvcc", "why"),
    [
        (None, "no nvcc found (set CUDACXX or put it on the PATH)"),
        ('echo "no \\"license\\"; sorry" >&2; exit 3', "{}/nvcc --version fails (3) no 'license'' sorry"),
        ("echo hello", "{}/nvcc --version tells no version of CUDA"),
        (GOOD.replace("12.4", "11.8"), "{}/nvcc is of CUDA 11.8.131, and the kernels need 12.0 or newer"),
        (GOOD.replace('echo "$*"', "echo hm; echo '#error: unsupported GNU version!'; exit 1; echo"),
         "{}/nvcc cannot compile a kernel (1) #error: unsupported GNU version!"),
    ],
)  # fmt: skip
def test_an_nvcc_that_cannot_be_used_costs_the_kernels_and_on_fails(nvcc, why, tools):
    why = why.format(tools)
    auto, on = decide(tools, nvcc), decide(tools, nvcc, ADAHESSIAN_CUDA="ON")
    assert auto.returncode == 0, auto.stderr
    assert auto.stdout == f"-- adahessian_fused: CUDA kernels off: {why}\n"
    assert on.returncode != 0
    assert f"ADAHESSIAN_CUDA=ON, but {why}" in on.stderr.splitlines()[1]


@needs_cmake
@pytest.mark.parametrize(
    ("gpus", "wanted", "chosen", "ptx"),
    [
        ("", "", "80 90", 90),  # none is seen
        ("mismatch", "", "80 90", 90),
        ("one", "", "86", 86),
        ("two", "", "80 90", 90),
        ("newer", "", "", 90),  # than this nvcc knows: the GPU compiles PTX for itself
        ("one", "all", "75 80 86 89 90", 90),
        ("one", "89;75", "75 89", 89),
    ],
)
def test_architectures(gpus, wanted, chosen, ptx, tools):
    said = decide(tools, GOOD, gpus, ADAHESSIAN_CUDA_ARCHS=wanted)
    assert said.stdout.endswith(f"CUDA kernels on: nvcc 12.4.131, compute capabilities {chosen}, PTX of {ptx}\n")
    flags = (tools / "nvcc.log").read_text()
    assert all(f"code=sm_{one}" in flags for one in chosen.split())
    assert f"code=compute_{ptx}" in flags


@needs_cmake
def test_gpus_that_are_too_old(tools):
    assert "kernels off: the GPUs here are older than compute capability 7.5" in decide(tools, GOOD, "older").stdout


@needs_cmake
def test_a_failed_attempt_is_remembered(tools):
    said = decide(tools, GOOD, ADAHESSIAN_CUDA_FAILED=ERROR)
    assert said.stdout.endswith("CUDA kernels off: compiling them failed: x.cu(3): error: expected a '''\n")


# ---- a source folder that is not installed -------------------------------------------------------------------------


def info(folder: Path, *site: str) -> str:
    """What ``python -m adahessian_fused info`` says in a copy of the source folder."""
    copy_source(folder)
    command = [sys.executable, "-S", "-m", "adahessian_fused", "info"]  # without what is installed but for torch
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(site)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    return result.stdout + result.stderr


SITES = dict.fromkeys(str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ("torch", "numpy"))


def test_info_in_a_folder_that_is_not_installed(tmp_path):
    said = info(tmp_path, *SITES)
    assert f"NOT INSTALLED: this is the source folder {tmp_path}" in said
    assert f'{tmp_path} is a source folder, not built to the end: "pip install -v -e ." does it' in said


def test_info_beside_a_library_that_is_cut_short(tmp_path):
    (tmp_path / "adahessian_fused").mkdir()
    for name in "libadahessian_ops.so", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}":
        (tmp_path / "adahessian_fused" / name).write_bytes(Path(sys.executable).read_bytes()[:4096])
    assert f"it is not whole: {tmp_path}/adahessian_fused has libadahessian_ops.so, _C." in info(tmp_path, *SITES)


def test_info_without_torch(tmp_path):
    assert info(tmp_path).splitlines() == ["adahessian_fused needs PyTorch 2.10 or newer: pip install torch"]


def test_info_into_a_pipe_that_is_closed():
    command = f"{sys.executable} -m adahessian_fused info | true"
    assert subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True).stderr == ""


def test_importing_the_package_leaves_the_compiler_out():
    """Most of what torch.compile needs is slow to import, and every process of a data loader imports what trains."""
    slow = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
    command = f"import sys, adahessian_fused; print(*{slow} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True).stdout == "\n"
