"""Means over ranks: many tensors in a few flat buffers, on their way while other work goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

FLAT_BYTES = 32 * 2**20  # enough for a collective to run at full bandwidth


def partition(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield indices of tensors for each flat buffer: of one device and dtype, and up to ``FLAT_BYTES`` together."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(i)
    for members in by_kind.values():
        begin, size = 0, 0
        for end, i in enumerate(members):
            size += tensors[i].nbytes
            if size > FLAT_BYTES and end > begin:
                yield members[begin:end]
                begin, size = end, tensors[i].nbytes
        yield members[begin:]


class FlatMean:
    """Means of tensors over the ranks of a group, which begin to be computed when this is made.

    Every rank has to give tensors of the same shapes and dtypes, in the same order. With each travels the number of
    ranks that have it, so what a rank lacks counts as zero and nobody waits for it. The tensors are left alone.

    Args:
        likes: tensors of the shapes, dtypes and devices in question.
        terms: lists of their length, whose sum over the lists is this rank's contribution; None for nothing.
        group: the process group.
    """

    def __init__(
        self, likes: Sequence[Tensor], terms: Sequence[Sequence[Tensor | None]], group: dist.ProcessGroup
    ) -> None:
        share = 1 / dist.get_world_size(group)  # before the sum, which would be more than float16 can hold
        have = [any(term is not None for term in each) for each in zip(*terms, strict=True)]
        self._count, self._missing = len(likes), not all(have)
        self._parts: list[tuple[list[int], Sequence[Tensor], Tensor, dist.Work]] = []
        for members in partition(likes):
            first, sizes = likes[members[0]], [likes[i].numel() for i in members]
            flat = torch.zeros(sum(sizes) + len(members), dtype=first.dtype, device=first.device)
            *views, counts = flat.split([*sizes, len(members)])
            views = [view.view(likes[i].shape) for view, i in zip(views, members, strict=True)]
            for term in terms:
                present = [(view, term[i]) for view, i in zip(views, members, strict=True) if term[i] is not None]
                if present:
                    torch._foreach_add_(*map(list, zip(*present, strict=True)), alpha=share)
            if all(have[i] for i in members):
                counts.fill_(1)
            else:
                counts.copy_(torch.tensor([have[i] for i in members], device=counts.device))
            self._parts.append((members, views, counts, dist.all_reduce(flat, group=group, async_op=True)))

    def wait(self) -> list[Tensor | None]:
        """Return the means, the same bits on every rank; None for what no rank has.

        Raises:
            RuntimeError: a rank has failed, or has not answered within the group's timeout.
        """
        for *_, work in self._parts:
            work.wait()
        means: list[Tensor | None] = [None] * self._count
        for members, views, counts, _ in self._parts:
            # Looked at only where something is missing here: on a GPU the host has to wait for it.
            found = (counts > 0).tolist() if self._missing else [True] * len(members)
            for i, view, there in zip(members, views, found, strict=True):
                means[i] = view if there else None
        return means
