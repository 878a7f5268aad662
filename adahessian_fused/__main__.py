"""``python -m adahessian_fused info``: what can run here and, for what cannot, why. ``bench``: how fast it is."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import warnings
from pathlib import Path

import torch

from . import __version__
from .backends import available_backends, choose
from .hvp import bfloat16_gain


def _build_lines() -> list[str]:
    try:
        from ._native import build_info

        info = build_info()
    except (ImportError, OSError, RuntimeError):
        return ["native library   missing; why is said at native below"]
    sets = ", ".join(info["instruction_sets"])
    return [
        f"native library   {info['compiler']}, headers of torch {info['torch_headers']}",
        f"  CPU            compiled for {sets}; in use here: {info['instruction_set_in_use']}",
        f"  CUDA           {info['cuda_decision']}",
    ]


def _device_lines(device: str) -> list[str]:
    lines = []
    for name, reason in available_backends(device).items():
        lines.append(f"  {name:<14} {'can run' if reason is None else 'cannot run: ' + reason}")
    return [*lines, f'  backend="auto" takes {choose("auto", device)}']


def _bfloat16_line() -> str:
    gain = bfloat16_gain()
    verdict = "pays" if gain > 1.3 else "gains nothing here"
    return f"  products of bfloat16 take {1 / gain:.2f} of float32's time: hvp_dtype=torch.bfloat16 {verdict}"


def _gpu_lines() -> list[str]:
    if not torch.cuda.is_available():
        return ["on GPU tensors: no GPU is visible to torch"]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"on GPU tensors ({', '.join(names)})", *_device_lines("cuda")]


def _place_lines() -> list[str]:
    here = Path(__file__).parent
    if importlib.util.find_spec(".kernels", __package__) is not None:
        return [f"in {here}"]
    return [
        f"NOT INSTALLED: this is the source folder {here.parent}, without Triton's kernels and the benchmark;",
        '               "pip install -e ." there installs it where it is, "pip install ." a copy',
    ]


def info() -> str:
    """Return versions, build and backends as text."""
    warnings.simplefilter("ignore")  # of what the lines below say
    lines = [
        f"adahessian_fused {__version__} (Python {platform.python_version()}, torch {torch.__version__})",
        *_place_lines(),
        *_build_lines(),
        f"on CPU tensors ({torch.get_num_threads()} threads)",
        *_device_lines("cpu"),
        _bfloat16_line(),
        *_gpu_lines(),
    ]
    return "\n".join(lines)


def bench(arguments: list[str]) -> int:
    """Run the benchmark, which is part of an installed package; a source tree has it in a folder of its own."""
    try:
        from .bench.run import main as run
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.bench":
            raise
        sys.exit("the benchmark is not part of this installation; in the source folder run python -m bench.run")
    return run(arguments)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m adahessian_fused", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what can run here, and why not what cannot")
    commands.add_parser("bench", help="time the update beside its floor and its peers", add_help=False)
    args, rest = parser.parse_known_args()
    if args.command == "bench":
        return bench(rest)
    parser.parse_args()  # complains about whatever is left
    print(info(), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # of head or a pager that was left; what is not printed yet must not raise it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
