"""Hessian-vector products Hz (paper Eq. 5), in three ways.

``double_backward`` differentiates the gradient again, ``forward_over_reverse`` carries tangents through forward and
backward pass, ``finite_difference`` takes the difference of two gradients. The first works on a loss that has been
computed; the others evaluate it themselves, with the help of ``replay``.
"""

from .complete import Graphs, after_hooks, check_gradients
from .double_backward import (
    CLEARED,
    MIXED,
    NEEDS_FUNCTION,
    NO_CURVATURE,
    NO_LOSS,
    SPENT,
    TWO_WAYS,
    USED,
    accumulate_grads,
    check_loss,
    differentiable,
    first_order,
    has_graph,
    hessian_vector_product,
    release_graph,
)
from .graph import explore
from .intercept import BackwardObserver, InterceptBackward
from .precision import Precision, bfloat16_gain, second_pass
from .treatment import Refused, accumulating, later, run_accumulated, treating, without_hooks

__all__ = [
    "CLEARED",
    "MIXED",
    "NEEDS_FUNCTION",
    "NO_CURVATURE",
    "NO_LOSS",
    "SPENT",
    "TWO_WAYS",
    "USED",
    "BackwardObserver",
    "Graphs",
    "InterceptBackward",
    "Precision",
    "Refused",
    "accumulate_grads",
    "accumulating",
    "after_hooks",
    "bfloat16_gain",
    "check_gradients",
    "check_loss",
    "differentiable",
    "explore",
    "first_order",
    "has_graph",
    "hessian_vector_product",
    "later",
    "release_graph",
    "run_accumulated",
    "second_pass",
    "treating",
    "without_hooks",
]
