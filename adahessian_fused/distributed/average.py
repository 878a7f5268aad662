"""Gradients and curvature of a step, averaged over the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bucket import Entry
from ..curvature import Curvature
from .flat_mean import FlatMean
from .ranks import Ranks


class GradientAverage:
    """Gradients on their way to being the mean over the ranks, from when this is made until :meth:`finish`.

    Args:
        ranks: the ranks.
        params: all parameters that are trained, in the same order on every rank. A gradient that some ranks lack is
            zero there; one that none has stays None.
        grads: gradients that come on top of ``p.grad``.
    """

    def __init__(self, ranks: Ranks, params: Sequence[Tensor], grads: Sequence[Tensor | None] | None = None) -> None:
        self._ranks, self._params = ranks, params
        ranks.check_alike(params)
        terms = [[p.grad for p in params], *([] if grads is None else [grads])]
        with torch.no_grad():
            self._mean = FlatMean(params, terms, ranks.group)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the means into ``p.grad``, whatever is there by now, once all of them have arrived.

        Raises:
            RuntimeError: a rank has failed, or has not answered within the group's timeout.
        """
        for p, mean in zip(self._params, self._mean.wait(), strict=True):
            if mean is None:
                continue
            if p.grad is None or p.grad.requires_grad:
                p.grad = torch.empty_like(p)
            p.grad.copy_(mean)
        self._ranks.grads_averaged = True


@torch.no_grad()
def average_curvature(ranks: Ranks, curvature: Curvature, entries: Sequence[Entry]) -> None:
    """Average curvature over the ranks: the block means (Eq. 7), d / b numbers.

    With ``averaging="abs"`` and blocks of several elements D itself, d numbers: what is averaged over blocks then is
    the magnitude of the mean over all ranks, as it is for probes and micro-batches.

    Args:
        ranks: the ranks.
        curvature: what this rank has gathered.
        entries: the parameters whose curvature is due, the same on every rank.

    Raises:
        RuntimeError: a rank has failed, or has not answered within the group's timeout.
    """
    numbers = curvature.numbers(entries)
    means = FlatMean(numbers, [numbers], ranks.group).wait()
    if numbers:
        torch._foreach_copy_(numbers, means)
    ranks.curvature_averaged = True
