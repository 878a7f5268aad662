"""What ran: the nodes of a graph, and the operators that were dispatched."""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def nodes(y: Tensor) -> set[str]:
    """The kinds of nodes that a tensor was computed by."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        found.add(type(node).__name__)
        todo += [n for n, _ in node.next_functions if n is not None]
    return found


class Operators(TorchDispatchMode):
    """Counts operators by their names in ``counts``; in ``launched`` those that are no views or allocations."""

    FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.launched = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        self.launched += not (func.is_view or name in self.FREE)
        return func(*args, **(kwargs or {}))
