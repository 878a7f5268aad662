"""Build the package and run its tests with other versions of torch, each in an environment of its own.

``python tests/versions.py`` takes all versions, before each release: some gigabytes are downloaded and kept in
build/versions, and the suite takes its time for each. ``python tests/versions.py 2.10 newest`` takes those named; what
else is given goes to pytest, ``-k rounding`` for instance. Prints a table and exits with 1 if any version is red.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "versions"
# The oldest that pyproject.toml allows, that of CUDA machines with Triton 3.6, that of constraints.txt, today's.
# NumPy 2.4 has no int() of arrays of one number, with which Triton 3.6 interprets loops.
OLD_NUMPY = "numpy<2.4"
VERSIONS = {
    "2.10": ["torch==2.10.*", OLD_NUMPY],
    "2.11": ["torch==2.11.*", "triton==3.6.*", OLD_NUMPY],
    "pinned": [],
    "newest": ["torch"],
}
BUILD = ["setuptools", "wheel", "cmake", "ninja", "pybind11", "numpy"]
TEST = ["pytest", "hypothesis", "pytest-timeout", "pytest-xdist", "scikit-learn", "matplotlib", "rich"]


def constraints(name: str) -> list[str]:
    """The lines of constraints.txt; without torch, Triton and what torch bounds unless the version is theirs."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    bound = re.compile(r"(torch|triton|setuptools|numpy)\b(?!-)")
    return [line for line in lines if name == "pinned" or not bound.match(line)]


def commands(name: str, arguments: list[str], workers: int) -> list[list[str]]:
    """What makes an environment, builds the package into it, and runs the tests there."""
    python = str(FOLDER / name / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q"]
    wanted = VERSIONS[name] or ["torch", "triton"]
    tests = [str(FOLDER / name / "bin" / "pytest"), "-q", "-p", "no:cacheprovider", "-n", str(workers)]
    return [
        [sys.executable, "-m", "venv", str(FOLDER / name)],
        [*pip, "--upgrade", *wanted],
        [*pip, *BUILD, *TEST],
        [*pip, "--no-build-isolation", "--no-deps", "--force-reinstall", "--no-cache-dir", str(ROOT)],
        # The program, not -m, which would find the package in the source folder before the installed one.
        [*tests, "--dist", "loadfile", "--require", "native,emulated,reference", *arguments],
    ]


def run(name: str, arguments: list[str], workers: int) -> list[str]:
    """A row of the table: name, version of torch, result, seconds."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    constraint = FOLDER / f"{name}.txt"
    constraint.write_text("\n".join(constraints(name)) + "\n")
    environment = {
        **os.environ,
        "PIP_CONSTRAINT": str(constraint),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    environment.pop("PYTHONPATH", None)
    begin = time.monotonic()
    for command in commands(name, arguments, workers):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        if done.returncode:
            print(f"---- {name}: {' '.join(command)}\n{done.stdout[-20_000:]}", flush=True)
            break
    lines = done.stdout.strip().splitlines() or [""]
    result = "RED: " * bool(done.returncode) + re.sub(r"( in [0-9.]+s.*|=+ ?)", "", lines[-1])
    return [name, version_in(name), result, f"{time.monotonic() - begin:.0f} s"]


def version_in(name: str) -> str:
    """The version of torch in an environment."""
    code = "from importlib.metadata import version; print(version('torch'))"
    try:
        done = subprocess.run(
            [FOLDER / name / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "none"
    return done.stdout.strip()


def main(arguments: list[str] | None = None) -> int:
    """Run all versions, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(VERSIONS)}; default: all")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    options, others = parser.parse_known_args(arguments)
    unknown = set(options.names) - set(VERSIONS)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; expected some of {', '.join(VERSIONS)}")
    rows = [run(name, others, options.workers) for name in options.names or VERSIONS]
    print("\nversion, torch, result, time")
    for row in rows:
        print("  ".join(row), flush=True)
    return int(any(row[2].startswith("RED") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
