"""Weight normalisation by its definition, since PyTorch's fused operator has a wrong second derivative.

That takes the norm of the weights for a constant (``gradgradcheck`` of ``torch._weight_norm`` fails).
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Scale v to the norm g along every axis but ``dim``, as ``torch._weight_norm``; -1: by one norm for all."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
