"""Hessian-vector products as differences of first-order gradients, and what moves the parameters for them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..curvature import by_bucket, draw_probe, drawable
from ..distributed.sharded import part_of
from ..layout import Bucket, Entry
from .replay import Replay

EPSILON = {
    torch.float64: 2.0**-23,
    torch.float32: 2.0**-13,
    torch.float16: 2.0**-9,
    torch.bfloat16: 2.0**-8,
}
"""Distance of the pair by dtype: u^(1/3) / 32 for the unit roundoff u, to the nearest power of two.

The error of a central difference is a rounding part, u / eps, and a truncation part, eps^2 times third derivatives;
the sum is smallest for eps in proportion to u^(1/3). The factor is small because the probe is long: it moves all
parameters at once, by eps each. On a small GPT and an MLP each is the best power of two or the next to it, and Hz is
off by 7e-11 (float64), 5e-5 (float32), 1e-2 (float16) and 4e-2 (bfloat16). A power of two makes eps * z exact.
"""


def epsilon_of(dtypes: Iterable[torch.dtype]) -> float:
    """Distance of the pair for parameters of these dtypes: one number for all, that of the coarsest dtype.

    Different distances would not give the product with z, but with another vector.
    """
    return max(EPSILON[dtype] for dtype in dtypes)


class Moves:
    """Moves parameters along a probe, one launch of ``perturb`` for each device and dtype, and puts them back.

    Args:
        entries: the parameters.
        backends: the backend of each device type.
        probe: "rademacher" or "gaussian".
        seed: Philox key.
    """

    def __init__(self, entries: Sequence[Entry], backends: Mapping[str, Any], *, probe: str, seed: int) -> None:
        self._entries, self._backends, self._probe, self._seed = list(entries), backends, probe, seed
        # Laying parameters out anew in between must not matter: everything is as it is now.
        self._work = []
        for bucket, members in by_bucket(entries).items():
            saved = torch.empty(bucket.numel, dtype=bucket.dtype, device=bucket.device)
            self._work.append((bucket, members, bucket.table_of(members), saved))
        self._saved = 0  # buckets whose values have been taken down

    def to(self, distance: float, sample: int) -> None:
        """Write p + distance * z for probe number ``sample``."""
        by_hand = distance != 0 and not drawable(self._entries, self._probe)
        for number, work in enumerate(self._work):
            self._launch(*work, 0.0 if by_hand else distance, sample, save=number >= self._saved)
            self._saved = max(self._saved, number + 1)
        if by_hand:
            z = draw_probe(self._entries, self._backends, probe=self._probe, seed=self._seed, sample=sample)
            torch._foreach_add_([entry.param.detach() for entry in z], list(z.values()), alpha=distance)
        torch.clear_autocast_cache()  # it may hold 16-bit copies of the weights

    def put_back(self) -> None:
        """Write the values that were there before the first move, bit for bit."""
        for work in self._work[: self._saved]:
            self._launch(*work, 0.0, 0, save=False)
        self._saved = 0
        torch.clear_autocast_cache()

    def _launch(
        self,
        bucket: Bucket,
        members: Sequence[Entry],
        table: Tensor,
        saved: Tensor,
        scale: float,
        sample: int,
        *,
        save: bool,
    ) -> None:
        params = [entry.param.detach() for entry in members]
        dense = [p.contiguous() if entry.copied else p for p, entry in zip(params, members, strict=True)]
        backend = self._backends[bucket.device.type]
        backend.perturb(dense, saved, table, bucket.steps, seed=self._seed, sample=sample, scale=scale, save=save)
        for p, moved in zip(params, dense, strict=True):
            if moved is not p:
                p.copy_(moved)


class FiniteDifference:
    """Gradient and Hz from the gradients at p + eps z and p - eps z.

    Their mean is the gradient up to eps^2 and (g+ - g-) / (2 eps) is Hz up to eps^2, at the cost of two first-order
    steps; memory is that of one, and a copy of the parameters and of the gradients. Right for smooth losses only: kinks
    (ReLU, max pooling) between the two points add noise that grows as eps shrinks. Parameters are back where they were
    after each call, and when the context is left because something was raised.

    Args:
        params: parameters to differentiate by.
        entries: those among them to move.
        backends: the backend of each device type.
        evaluate: computes the loss, differentiates it with the function it is given or by itself, into ``p.grad``, and
            returns its value.
        probe: "rademacher" or "gaussian".
        seed: Philox key.
        epsilon: distance; None for :func:`epsilon_of` the dtypes.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        entries: Sequence[Entry],
        backends: Mapping[str, Any],
        evaluate: Callable[[Callable[..., None]], Any],
        *,
        probe: str,
        seed: int,
        epsilon: float | None,
    ) -> None:
        self._params, self._evaluate, self._given = params, evaluate, epsilon
        self._epsilon = epsilon or epsilon_of(entry.param.dtype for entry in entries)
        self._moves = Moves(entries, backends, probe=probe, seed=seed)
        self._replay = Replay()

    def __enter__(self) -> FiniteDifference:
        return self

    def __exit__(self, *error: object) -> None:
        self._moves.put_back()

    def __call__(self, sample: int) -> tuple[list[Any], list[Tensor | None], list[Tensor | None]]:
        """Evaluate at both points for probe number ``sample``.

        Returns:
            The two values, the gradients and the products; None for parameters without a gradient.
        """
        self._moves.to(self._epsilon, sample)
        first, plus = self._replay(self._gradients)
        if self._given is None:
            warn_of_autocast(self._replay, self._epsilon)
        # Views (of DDP's buckets) would be overwritten by the second evaluation.
        plus = [g if g is None else g.detach().clone() if g._is_view() else g.detach() for g in plus]
        self._moves.to(-self._epsilon, sample)
        second, minus = self._replay(self._gradients)
        minus = [g if g is None else g.detach() for g in minus]
        self._moves.put_back()
        both = [
            i for i, pair in enumerate(zip(plus, minus, strict=True)) if pair[0] is not None and pair[1] is not None
        ]
        grads = [b if b is not None else a for a, b in zip(plus, minus, strict=True)]
        products: list[Tensor | None] = [None] * len(plus)
        if both:  # in place: the pair is all the memory it takes
            differences, means = [plus[i] for i in both], [minus[i] for i in both]
            torch._foreach_sub_(differences, means)
            torch._foreach_add_(means, differences, alpha=0.5)
            torch._foreach_div_(differences, 2 * self._epsilon)
            for i, difference in zip(both, differences, strict=True):
                products[i] = difference
        return [first, second], grads, products

    def _gradients(self) -> tuple[Any, list[Tensor | None]]:
        with torch.enable_grad():
            value = self._evaluate(self._differentiate)
        grads = [p.grad if p.grad is None else part_of(p.grad, p) for p in self._params]
        for p in self._params:
            p.grad = None
        return value, grads

    def _differentiate(self, loss: Tensor, *, gradient: Tensor | None = None, **unused: Any) -> None:
        torch.autograd.backward(loss, gradient)


def warn_of_autocast(replay: Replay, epsilon: float) -> None:
    """Warn if the default distance drowns in the rounding errors of autocast."""
    if replay.autocast is not None and epsilon < EPSILON[replay.autocast]:
        exponent = int(math.log2(EPSILON[replay.autocast]))
        warnings.warn(
            f"the model runs in {replay.autocast} under autocast, and its rounding errors hide the difference of "
            f"gradients at fd_epsilon={epsilon:g}; expected AdaHessian(..., fd_epsilon=2**{exponent})",
            stacklevel=2,
        )
