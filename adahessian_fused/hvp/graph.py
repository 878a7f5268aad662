"""Walks over autograd's graph; a microsecond a node."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node


class Graph(NamedTuple):
    """What one walk over a graph finds."""

    nodes: set[Node]
    leaves: list[Tensor]  # what ``loss.backward()`` would give a gradient
    functions: list[Node]  # made by code of somebody's own: torch.autograd.Function, its like in C++, or what ends it
    wrong: list[Node]  # whose derivative PyTorch computes wrong


_PLAIN, _LEAF, _FUNCTION, _WRONG = range(4)
_OWN = f"{__package__.split('.')[0]}.friendly"  # whose Functions have derivatives of every order
_ROLES = {"AccumulateGrad": _LEAF, "Error": _FUNCTION, "CppFunction": _FUNCTION}
# PyTorch takes the norm, or mean and variance, for constants in the derivatives of these.
WEIGHT_NORM = "WeightNormInterfaceBackward0"
NORMS = ("NativeLayerNormBackwardBackward0", "NativeBatchNormBackwardBackward0", "CudnnBatchNormBackwardBackward0")
_ROLES |= dict.fromkeys((WEIGHT_NORM, *NORMS), _WRONG)
_roles: dict[type, int] = {}  # of nodes, by their type; those of Functions come and go


def explore(roots: Iterable[Tensor]) -> Graph:
    """Return the graph that tensors have."""
    graph = Graph(set(), [], [], [])
    seen, found = graph.nodes, list[Node]()
    for root in roots:
        if root.grad_fn is not None:
            found.append(root.grad_fn)
        elif root.requires_grad:  # a loss may be a parameter itself
            graph.leaves.append(root)
    seen.update(found)
    while found:
        node = found.pop()
        role = _roles.get(type(node))
        if role is None:
            role = _role(type(node))
        if role == _LEAF:
            graph.leaves.append(node.variable)  # type: ignore[attr-defined]
        elif role == _FUNCTION:
            graph.functions.append(node)
        elif role == _WRONG:
            graph.wrong.append(node)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                found.append(parent)
    return graph


def _role(kind: type) -> int:
    if issubclass(kind, BackwardCFunction):
        own = kind._forward_cls.__module__.startswith(_OWN)  # type: ignore[attr-defined]
        return _roles.setdefault(kind, _PLAIN) if own else _FUNCTION
    return _roles.setdefault(kind, _ROLES.get(kind.__name__, _PLAIN))


def nodes(roots: Sequence[Node], boundary: Collection[Node] = ()) -> Iterator[Node]:
    """Yield every node that can be reached from ``roots``, once; of ``boundary`` the first only."""
    seen, found = set(roots), list(roots)
    while found:
        node = found.pop()
        yield node
        if node not in boundary:
            for parent, _ in node.next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    found.append(parent)
