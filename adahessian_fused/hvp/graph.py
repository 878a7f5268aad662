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


def explore(roots: Iterable[Tensor]) -> Graph:
    """The graph that tensors have."""
    graph = Graph(set(), [], [])
    for node in nodes([root.grad_fn for root in roots if root.grad_fn is not None]):
        graph.nodes.add(node)
        kind = type(node)
        if kind.__name__ == "AccumulateGrad":
            graph.leaves.append(node.variable)  # type: ignore[attr-defined]
        elif issubclass(kind, BackwardCFunction) or kind.__name__ in ("Error", "CppFunction"):
            graph.functions.append(node)
    # A loss may be a parameter itself.
    graph.leaves.extend(root for root in roots if root.grad_fn is None and root.requires_grad)
    return graph


def nodes(roots: Sequence[Node], boundary: Collection[Node] = ()) -> Iterator[Node]:
    """Every node that can be reached from ``roots``, once; of ``boundary`` only the first, and nothing behind it."""
    seen, found = set(roots), list(roots)
    while found:
        node = found.pop()
        yield node
        if node not in boundary:
            for parent, _ in node.next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    found.append(parent)
