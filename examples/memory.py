"""Peak memory of what a process does from here on."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


def meter(device: torch.device) -> CudaMeter | ResidentMeter:
    """One that starts now."""
    return CudaMeter(device) if device.type == "cuda" else ResidentMeter()


class CudaMeter:
    """Peak of what PyTorch's allocator handed out."""

    what = "torch.cuda.max_memory_allocated"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def megabytes(self) -> float:
        """Growth of the peak, in 10^6 bytes."""
        return (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e6


class ResidentMeter:
    """Peak resident memory of this process.

    From /proc where there is one: getrusage's ru_maxrss survives exec, so in the child of a large process it starts at
    the parent's peak and does not see anything smaller.
    """

    def __init__(self) -> None:
        self.what = "peak resident memory"
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
        self.before = self.peak_bytes()

    @staticmethod
    def peak_bytes() -> int:
        """Highest resident memory so far."""
        try:
            status = Path("/proc/self/status").read_text()
            return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else 1024 * peak

    def megabytes(self) -> float:
        """Growth of the peak, in 10^6 bytes."""
        return (self.peak_bytes() - self.before) / 1e6
