"""What autocast does to the arguments of an operator, done before ours sees them.

PyTorch casts when it dispatches an operator. Ours wrap whole operators, so they cast their arguments themselves, by the
same lists: convolutions to the lower precision, layer, group and RMS norms on CUDA to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )


def lower(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the arguments of an operator that autocast runs in low precision."""
    device = tensors[0].device.type
    return _cast(tensors, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensors


def full(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the arguments of an operator that autocast runs in float32 on CUDA, and leaves alone on CPU."""
    on_cuda = tensors[0].device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return _cast(tensors, torch.float32) if on_cuda else tensors
