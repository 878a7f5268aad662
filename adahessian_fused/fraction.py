"""Curvature from a part of the mini-batch: how a batch is taken apart, cut and put together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .checks import check_fraction


@dataclass(frozen=True)
class _Fields:
    """A mapping or dataclass without its values."""

    kind: type
    names: tuple[Any, ...]
    values: Structure
    empty: Any = field(compare=False, repr=False)  # not to keep a batch alive; whatever else it has comes along

    def filled(self, leaves: Sequence[Any]) -> Any:
        """Return the object with these leaves in it."""
        values = dict(zip(self.names, self.values.unflatten(leaves), strict=True))
        return _filled(self.empty, values) if _can_be_filled(self.kind) else self.kind(values)


@dataclass(frozen=True)
class Structure:
    """How a batch is made of its leaves; equal for batches that are made alike.

    Attributes:
        spec: tuples, named tuples, lists, dicts and what else is registered with PyTorch's pytrees.
        fields: what the leaves of these are in turn, mappings and dataclasses; None where they are leaves.
    """

    spec: pytree.TreeSpec
    fields: tuple[_Fields | None, ...]

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """Return the batch with these leaves."""
        rest = iter(leaves)
        return pytree.tree_unflatten(
            [
                next(rest) if inner is None else inner.filled([next(rest) for _ in range(inner.values.count)])
                for inner in self.fields
            ],
            self.spec,
        )

    @property
    def count(self) -> int:
        """Number of leaves."""
        return sum(1 if inner is None else inner.values.count for inner in self.fields)


def flatten(batch: Any) -> tuple[list[Any], Structure]:
    """Take apart tuples, lists, mappings and dataclasses, nested at will: return leaves, and what they are in."""
    outer, spec = pytree.tree_flatten(batch)
    leaves: list[Any] = []
    fields: list[_Fields | None] = []
    for leaf in outer:
        items = _items(leaf)
        if items is None:
            leaves.append(leaf)
            fields.append(None)
            continue
        inner, values = flatten(list(items.values()))
        leaves += inner
        empty = _filled(leaf, dict.fromkeys(items)) if _can_be_filled(type(leaf)) else None
        fields.append(_Fields(type(leaf), tuple(items), values, empty))
    return leaves, Structure(spec, tuple(fields))


def _can_be_filled(kind: type) -> bool:
    """Tell whether a copy has room for values of its own; otherwise a mapping is made from a dict."""
    copied = issubclass(kind, dict) or (hasattr(kind, "__copy__") and hasattr(kind, "__setitem__"))
    return copied or dataclasses.is_dataclass(kind)


def _filled(container: Any, values: Mapping[Any, Any]) -> Any:
    """Return a copy of the container with these values."""
    filled = copy.copy(container)
    for name, value in values.items():
        if isinstance(filled, Mapping):
            filled[name] = value  # type: ignore[index]
        else:
            object.__setattr__(filled, name, value)  # frozen dataclasses, too
    return filled


def _items(leaf: Any) -> dict[Any, Any] | None:
    """Return the values of a mapping or dataclass by their names; None for anything else."""
    if isinstance(leaf, Mapping):
        return {name: leaf[name] for name in leaf}
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf) if hasattr(leaf, f.name)}
    return None


def split_batch(batch: Any, fraction: float) -> tuple[Any, Any, float]:
    """Cut a mini-batch of n examples into its first ``fraction`` and the rest.

    Args:
        batch: a tensor, or tuples, named tuples, lists, mappings and dataclasses of tensors with the examples along
            their first axis; what is no tensor goes into both parts.
        fraction: r in (0, 1]; the first part has r n examples, rounded, and at least one.

    Returns:
        The two parts, of the structure of ``batch``, and the first one's share of the examples. For a loss that is a
        mean over examples, ``share * loss(first) + (1 - share) * loss(rest)`` is the loss of the batch, and the
        curvature of ``loss(first)`` has the expectation of the whole one's. With a share of 1 the rest is empty.

    Raises:
        ValueError: ``fraction`` is none, there is no tensor in the batch, or their first axes differ in length.
    """
    check_fraction("fraction", fraction)
    leaves, structure = flatten(batch)
    sizes = sorted({leaf.shape[:1] for leaf in leaves if isinstance(leaf, Tensor)})
    if len(sizes) != 1 or not sizes[0] or sizes[0][0] == 0:
        raise ValueError(
            f"the tensors of the batch have first axes of {[*map(tuple, sizes)]} examples; expected one number > 0, "
            "the same for all. What has no axis of examples belongs into loss_fn"
        )
    n = sizes[0][0]
    k = min(max(round(fraction * n), 1), n)
    parts = [
        structure.unflatten([leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        for part in (slice(0, k), slice(k, n))
    ]
    return *parts, k / n
