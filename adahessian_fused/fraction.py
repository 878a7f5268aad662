"""Curvature from a part of the mini-batch: how a batch is cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def split_batch(batch: Any, fraction: float) -> tuple[Any, Any, float]:
    """Cut a mini-batch of n examples into its first ``fraction`` and the rest.

    Args:
        batch: a tensor, or tuples, lists and dicts of tensors with the examples along their first axis; what is no
            tensor goes into both parts.
        fraction: r in (0, 1]; the first part has r n examples, rounded, and at least one.

    Returns:
        The two parts, of the structure of ``batch``, and the first one's share of the examples. For a loss that is a
        mean over examples, ``share * loss(first) + (1 - share) * loss(rest)`` is the loss of the batch, and the
        curvature of ``loss(first)`` has the expectation of the whole one's. With a share of 1 the rest is empty.

    Raises:
        ValueError: there is no tensor in the batch, or their first axes differ in length.
    """
    leaves, structure = pytree.tree_flatten(batch)
    sizes = sorted({leaf.shape[:1] for leaf in leaves if isinstance(leaf, Tensor)})
    if len(sizes) != 1 or not sizes[0] or sizes[0][0] == 0:
        raise ValueError(
            f"the tensors of the batch have first axes of {[*map(tuple, sizes)]} examples; expected one number > 0, "
            "the same for all. What has no axis of examples belongs into loss_fn"
        )
    n = sizes[0][0]
    k = min(max(round(fraction * n), 1), n)
    parts = [
        pytree.tree_unflatten([leaf[part] if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
        for part in (slice(0, k), slice(k, n))
    ]
    return *parts, k / n
