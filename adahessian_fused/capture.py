"""Whether a CUDA graph is being captured."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Tell whether the current stream of ``device``, which need not be the current device, is being captured."""
    if device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
