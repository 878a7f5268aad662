"""The operators behind the double backward of norms: what they do to shapes, and the Triton kernels on CUDA.

They are operators on every device, so that what calls them can be traced with tensors that have no data. The native
library defines them and has the CPU's kernels; where there is none, they are defined here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "adahessian_fused"
_TENSORS = "Tensor v, Tensor? v_weight, Tensor? v_bias, Tensor grad, Tensor x, Tensor? weight"
_RESULTS = "(Tensor, Tensor, Tensor)"
# Those of csrc/norm_ops.cpp, and how many weights there are.
SCHEMAS = {
    "batch_norm_double_backward": f"({_TENSORS}, Tensor mean, Tensor invstd, bool fixed) -> {_RESULTS}",
    "row_norm_double_backward": f"({_TENSORS}, Tensor? mean, Tensor invstd, int groups) -> {_RESULTS}",
}
_N_WEIGHTS: dict[str, Callable[[Tensor, Any], int]] = {
    "batch_norm_double_backward": lambda x, fixed: x.shape[1],
    "row_norm_double_backward": lambda x, groups: groups * x.shape[1],
}


def register_shapes() -> None:
    """Tell torch what the operators, which are defined, do to shapes."""
    for name in SCHEMAS:
        torch.library.register_fake(f"{NAMESPACE}::{name}")(functools.partial(_gradients, _N_WEIGHTS[name]))


def _gradients(
    n_weights: Callable[[Tensor, Any], int],
    v: Tensor,
    v_weight: Tensor | None,
    v_bias: Tensor | None,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor,
    option: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(n_weights(x, option), dtype=wide)


@functools.cache
def register_triton(native: bool) -> torch.library.Library:
    """Give the operators the Triton kernels on CUDA, as long as the result lives; ``native``: they are defined."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    kernels = importlib.import_module(".kernels", __package__)
    for name, schema in SCHEMAS.items():
        if not native:
            library.define(name + schema)
        library.impl(name, getattr(kernels, name), "CUDA")
    if not native:
        register_shapes()
    return library
