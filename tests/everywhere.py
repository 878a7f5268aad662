"""Run the numerical tests as other machines would: with their vector widths, libraries and numbers of threads.

``python tests/everywhere.py`` runs every configuration, ``--quick`` the short ones, ``python tests/everywhere.py avx2
seed_1`` those named; what else is given goes to pytest. Errors may take half of every bound (TEST_SHARE). Prints a
table and exits with 1 if any configuration is red.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
# Where numbers are compared: of the kernels, and of models and their derivatives.
FILES = """
    adahessian_step hessian_diag norm_double_backward op_properties perturb rademacher recurrent reference rounding
    amp attention attention_mode clipping compat compat_state complete_graph default_device distributed fraction
    friendly friendly_models groups hook_backward hutchinson hvp_check hvp_dtype leaves_and_hooks master_weights
    optimizer optimizer_capture optimizer_conventions optimizer_layout optimizer_schedule options overhead paper
    recompute stabilisers state state_dtype state_loading statistics strategies styles told tolerances train_step
    train_step_losses trainers unmeasured zoo
"""
# What draws its numbers in processes of its own, by hypothesis or not at all: other seeds change nothing.
UNSEEDED = "distributed op_properties overhead paper trainers"
QUICK = ["compat", "optimizer_layout", "optimizer_schedule", "state_loading", "strategies"]
LEVELS = ["default", "avx2", "avx512"]  # of ATEN_CPU_CAPABILITY, which is taken at its word


class Configuration(NamedTuple):
    """Environment variables, and whether it is among the quick ones."""

    environment: dict[str, str]
    quick: bool = False


def libraries(ours: str, aten: str, onednn: str, mkl: str, threads: int, quick: bool = False) -> Configuration:
    """The instruction sets that this package, PyTorch, oneDNN and MKL may use."""
    names = ("ADAHESSIAN_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OMP_NUM_THREADS")
    return Configuration(dict(zip(names, (ours, aten, onednn, mkl, str(threads)), strict=True)), quick)


CONFIGURATIONS = {
    "as_it_comes": Configuration({}),
    "baseline": libraries("baseline", "default", "SSE41", "COMPATIBLE", 1, quick=True),
    "avx2": libraries("avx2", "avx2", "AVX2", "AVX2", 2, quick=True),
    "avx512": libraries("avx512", "avx512", "AVX512_CORE", "AVX512", 1),
    "avx512_bf16": libraries("avx512", "avx512", "AVX512_CORE_BF16", "AUTO", 2),
    "baseline_in_avx512": libraries("baseline", "avx512", "AVX2_VNNI", "AUTO", 2),
    "avx2_in_default": libraries("avx2", "default", "AVX512_CORE_VNNI", "COMPATIBLE", 2),
    **{f"seed_{i}": Configuration({"TEST_SEED": str(i), "OMP_NUM_THREADS": "1"}, quick=i == 1) for i in range(1, 6)},
}


def missing(configuration: Configuration) -> str | None:
    """What this machine would need, or None."""
    import torch

    wanted = configuration.environment.get("ATEN_CPU_CAPABILITY", "default")
    here = torch.backends.cpu.get_cpu_capability().lower()
    return wanted if wanted not in LEVELS[: LEVELS.index(here) + 1 if here in LEVELS else 1] else None


def files_of(name: str, *, quick: bool) -> list[str]:
    """The files that a configuration runs."""
    seeded = "TEST_SEED" in CONFIGURATIONS[name].environment
    return QUICK if quick else [file for file in FILES.split() if not (seeded and file in UNSEEDED.split())]


def run(name: str, files: list[str], arguments: list[str]) -> list[str]:
    """A row of the table: name, result, largest share of a bound, seconds. Interpreted Triton computes in NumPy."""
    lacks = missing(CONFIGURATIONS[name])
    if lacks:
        return [name, f"skipped: no {lacks}", "", ""]
    environment = {**os.environ, "TEST_SHARE": "0.5", "OMP_WAIT_POLICY": "passive", **CONFIGURATIONS[name].environment}
    paths = [str(HERE / f"test_{file}.py") for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not triton", *paths, *arguments]
    begin = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=HERE.parent, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        print(f"---- {name}: {CONFIGURATIONS[name].environment}\n{done.stdout[-20_000:]}", flush=True)
    largest = re.search(r"largest share of a bound: (.*)", done.stdout)
    result = re.sub(r"( in [0-9.]+s.*|=+ ?)", "", done.stdout.strip().splitlines()[-1])
    row = [
        name,
        "RED: " * bool(done.returncode) + result,
        largest[1] if largest else "",
        f"{time.monotonic() - begin:.0f} s",
    ]
    print("  ".join(row), flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(CONFIGURATIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="the quick ones, and few files")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options, arguments = parser.parse_known_args()
    unknown = set(options.names) - set(CONFIGURATIONS)
    if unknown:
        parser.error(f"unknown {sorted(unknown)}; expected some of {', '.join(CONFIGURATIONS)}")
    names = options.names or [name for name, c in CONFIGURATIONS.items() if c.quick or not options.quick]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda name: run(name, files_of(name, quick=options.quick), arguments), names))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("\nconfiguration, result, largest share of a bound, time")
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return any(row[1].startswith("RED") for row in rows)


if __name__ == "__main__":
    sys.exit(main())
