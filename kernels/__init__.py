"""The Triton backend: the ops of :mod:`adahessian_fused.reference` for CUDA and ROCm; interpreted, for tests on a CPU.

One file an op, under the op's name. ``adahessian_math`` holds the maths of one element, ``tile`` what a kernel does to
find its elements and average them, ``table`` what the host prepares before a launch.
"""

from .adahessian_step import adahessian_step
from .attention_double_backward import attention_double_backward
from .batch_norm_double_backward import batch_norm_double_backward
from .hessian_diag import hessian_diag
from .perturb import perturb
from .rademacher import rademacher
from .row_norm_double_backward import row_norm_double_backward

__all__ = [
    "adahessian_step",
    "attention_double_backward",
    "batch_norm_double_backward",
    "hessian_diag",
    "perturb",
    "rademacher",
    "row_norm_double_backward",
]
