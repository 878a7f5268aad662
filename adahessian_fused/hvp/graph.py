"""Walks over autograd's graph; microseconds a node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node


def nodes(roots: Sequence[Tensor]) -> Iterator[Node]:
    """Every node of the graph that ``roots`` have, once."""
    seen, found = set(), [root.grad_fn for root in roots]
    while found:
        node = found.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            found += [parent for parent, _ in node.next_functions]


def leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that ``loss.backward()`` would give a gradient."""
    return [node.variable for node in nodes([loss]) if node.name() == "torch::autograd::AccumulateGrad"]  # type: ignore[attr-defined]
