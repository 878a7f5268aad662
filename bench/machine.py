"""What figures depend on: hardware, versions, commit. No host names."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adahessian_fused import __version__

PACKAGES = ("torch", "triton", "numpy", "torch-optimizer", "pytorch-optimizer")


def machine(device: str) -> dict[str, Any]:
    """Everything that goes into the JSON file beside the results."""
    facts: dict[str, Any] = {
        "device": device,
        "commit": commit(),
        "adahessian_fused": __version__,
        "python": platform.python_version(),
        **{name.replace("-", "_"): _version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": caches(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "gpu_l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0],
        }
    return facts


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(caches().values(), default=32 * 2**20)


def available_memory(device: str) -> int:
    """Bytes that can still be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = [line for line in _lines("/proc/meminfo") if line.startswith("MemAvailable")]
    return int(found[0].split()[1]) * 1024 if found else 8 * 2**30


def caches() -> dict[str, int]:
    """Bytes of the data caches of the first core, by level."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1]) * 1024
    return found


def commit() -> str | None:
    """Return the source tree's commit, marked if there are changes; None for an installed package."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    root = _output([*git, "rev-parse", "--show-toplevel"])
    if not root or not (Path(root) / "csrc" / "launch.h").exists():
        return None
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return _output([*git, "rev-parse", "HEAD"]) + ("+changes" if changed else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _lines(path: str) -> list[str]:
    return _read(Path(path)).splitlines()


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
