"""Time the update of every case beside its floor and its peers: ``make bench``.

A case is timed only after its result was found equal to the float64 reference.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed package

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adahessian_fused import __version__, available_backends
from bench.cases import Case, cases
from bench.check import largest_error
from bench.contestants import PEERS, Problem, ours
from bench.measure import Timing, interleaved

ROOT = Path(__file__).resolve().parent.parent


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    facts = {
        "commit": commit + ("+changes" if dirty else ""),
        "adahessian_fused": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_before": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else None,
    }
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver}
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def run_case(case: Case, device: str, backends: list[str], seconds: float) -> dict[str, Any]:
    """Check and time one case."""
    problem = Problem(case, device)
    errors, contestants = {}, {}
    for backend in backends:
        step, opt = ours(problem, backend)
        errors[backend] = largest_error(step, opt, problem)
        if errors[backend] <= 1.0:
            contestants[backend] = step
    for name in case.peers:
        try:
            contestants[name] = PEERS[name](problem)
        except ModuleNotFoundError as error:  # a peer that is not installed has no column
            errors[name] = str(error)
    timings = interleaved(contestants, device=device, seconds=seconds)
    return {
        "case": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "block": case.block,
        "numel": case.numel,
        "tensors": len(case.shapes),
        "bytes": case.bytes,
        "adamw_bytes": case.adamw_bytes,
        "error_over_tolerance": {name: error for name, error in errors.items() if name in backends},
        "missing_peers": {name: error for name, error in errors.items() if name not in backends},
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
    }


def table_of(results: list[dict[str, Any]], backends: list[str]) -> Table:
    """The results for reading: ours against each peer."""
    table = Table(title="One optimizer step (median); ratios: peer's time over ours, same run")
    for column in ("case", "backend", "time", "20-80 %", "GB/s", "time/floor", "per byte vs AdamW fused", *PEERS):
        if column != "floor":
            table.add_column(column, justify="left" if column in ("case", "backend") else "right")
    for result in results:
        seconds = {name: Timing(**timing) for name, timing in result["seconds"].items()}
        for backend in backends:
            table.add_row(*_row(result, backend, seconds))
    return table


def _row(result: dict[str, Any], backend: str, seconds: dict[str, Timing]) -> list[str]:
    if backend not in seconds:
        return [result["case"], backend, f"WRONG: error {result['error_over_tolerance'][backend]:.1f} x tolerance"]
    mine = seconds[backend].median
    per_byte = "-"
    if "AdamW fused" in seconds:
        theirs = seconds["AdamW fused"].median / result["adamw_bytes"]
        per_byte = f"{mine / result['bytes'] / theirs:.2f}"
    over_floor = f"{mine / seconds['floor'].median:.2f}" if "floor" in seconds else "-"
    ratios = [f"{seconds[name].median / mine:.2f}x" if name in seconds else "-" for name in PEERS if name != "floor"]
    spread = f"{seconds[backend].p20 * 1e3:.3g}-{seconds[backend].p80 * 1e3:.3g}"
    rate = f"{result['bytes'] / mine / 1e9:.1f}"
    return [result["case"], backend, f"{mine * 1e3:.3f} ms", spread, rate, over_floor, per_byte, *ratios]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="smaller tensors, shorter timing")
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on a case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--backends", nargs="*", help="default: native, on a GPU triton too")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
    args = parser.parse_args()
    wanted = args.backends or (["native", "triton"] if args.device == "cuda" else ["native"])
    able = available_backends(args.device)
    for name in wanted:
        if able[name] is not None:
            parser.error(f"backend {name} cannot run on {args.device} here: {able[name]}")
    args.out.mkdir(parents=True, exist_ok=True)

    facts, results = machine(args.device), []
    chosen = [case for case in cases(args.device, args.quick) if args.only in case.name]
    console = Console(width=170)
    with Progress(console=console) as progress:
        task = progress.add_task("cases", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            results.append(run_case(case, args.device, wanted, 1.0 if args.quick else args.seconds))
            progress.advance(task)
    console.print(table_of(results, wanted))
    path = args.out / f"{args.device}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps({"machine": facts, "results": results}, indent=1) + "\n")
    console.print(f"written to {path}")
    return int(any(error > 1.0 for result in results for error in result["error_over_tolerance"].values()))


if __name__ == "__main__":
    sys.exit(main())
