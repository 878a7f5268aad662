"""Where the gradient of a loss jumps: operators at which differences of gradients are not derivatives."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from .graph import explore

_NAMES = """
    Relu LeakyRelu PreluKernel RreluWithNoise Threshold Hardtanh Hardsigmoid Hardswish Hardshrink Softshrink Abs
    Clamp ClampMin ClampMax Maximum Minimum Fmax Fmin Max Min Amax Amin Aminmax Cummax Cummin
    Sort Topk Kthvalue Median Nanmedian Mode MaxPool1D MaxPool2DWithIndices MaxPool3DWithIndices MkldnnMaxPool2D
    AdaptiveMaxPool1D AdaptiveMaxPool2D AdaptiveMaxPool3D FractionalMaxPool2D FractionalMaxPool3D
    MultiMarginLoss MultilabelMarginLoss Round Floor Ceil Trunc Frac Fmod Remainder Sign
    Where SegmentReduce ScatterReduce IndexReduce
"""
KINKED = frozenset(_NAMES.split())
"""Names of autograd's nodes without "Backward0". What chooses by its inputs (Where) may be smooth or not."""

_MAX = 2  # mode of embedding bags


def kinks(loss: Tensor) -> list[str]:
    """Find what in a loss has kinks, or may have for all its author tells: operators and functions, by names."""
    graph = explore([loss])
    names = {name for node in graph.nodes if (name := _kinked(node)) is not None}
    names.update(_name(node) for node in graph.functions if not hasattr(node, "operator"))
    return sorted(names)


def _name(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])


def _kinked(node: Any) -> str | None:
    """Return the name of a node's operator if it has kinks."""
    operator = getattr(node, "operator", None)  # of curvature_friendly()
    if operator is not None:
        name = type(operator).__name__
        return name if name in KINKED or getattr(operator, "mode", None) == _MAX else None
    name = _name(node)
    if name == "Elu":  # and SELU; smooth up to the gradient if the slopes at zero agree
        return name if abs(node._saved_alpha * node._saved_input_scale - 1) > 1e-6 else None
    if name == "EmbeddingBag":
        return name if node._saved_mode == _MAX else None
    return name if name in KINKED else None
