"""Hessian-vector products as differences of first-order gradients, and what moves the parameters for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..bucket import Bucket, Entry, by_bucket
from ..curvature import draw_probe, drawable
from ..distributed.sharded import part_of
from .replay import Replay

MOST_REPETITIONS = 4
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
    """Return the distance of the pair for parameters of these dtypes: one for all, that of the coarsest dtype.

    Different distances would not give the product with z, but with another vector.
    """
    return max(EPSILON[dtype] for dtype in dtypes)


class Perturbation:
    """Moves parameters along a probe, one launch of ``perturb`` for each device and dtype, and puts them back.

    Whatever interrupts a move, :meth:`put_back` finds the values that were there before: they are taken down before
    anything moves.

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
        self._noted = self._moved = False

    def to(self, distance: float, sample: int) -> None:
        """Write p + distance * z for probe number ``sample``."""
        if not self._noted:
            for bucket, members, _, saved in self._work:
                views = [bucket.view(saved, entry) for entry in members]
                torch._foreach_copy_(views, [entry.param.detach() for entry in members])
            self._noted = True
        self._moved = True
        by_hand = not drawable(self._entries, self._probe)
        for work in self._work:
            self._launch(*work, 0.0 if by_hand else distance, sample)
        if by_hand:
            z = draw_probe(self._entries, self._backends, probe=self._probe, seed=self._seed, sample=sample)
            torch._foreach_add_([entry.param.detach() for entry in z], list(z.values()), alpha=distance)
        torch.clear_autocast_cache()  # it may hold 16-bit copies of the weights

    def put_back(self) -> None:
        """Write the values that were there before the first move, bit for bit."""
        failure = None
        for _ in range(3):  # being interrupted here is no reason to leave them where they are
            try:
                if self._moved:
                    for work in self._work:
                        self._launch(*work, 0.0, 0)
                    self._moved = False
                    torch.clear_autocast_cache()
                break
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

    def note_anew(self) -> None:
        """Take what the parameters are now for the values to go back to."""
        self.put_back()
        self._noted = False

    def by_kind(self) -> list[list[Tensor]]:
        """Return the parameters, those of one device and dtype together."""
        return [[entry.param.detach() for entry in members] for _, members, _, _ in self._work]

    def _launch(
        self,
        bucket: Bucket,
        members: Sequence[Entry],
        table: Tensor,
        saved: Tensor,
        scale: float,
        sample: int,
    ) -> None:
        params = [entry.param.detach() for entry in members]
        dense = [p.contiguous() if entry.copied else p for p, entry in zip(params, members, strict=True)]
        backend = self._backends[bucket.device.type]
        backend.perturb(dense, saved, table, bucket.steps, seed=self._seed, sample=sample, scale=scale, save=False)
        for p, moved in zip(params, dense, strict=True):
            if moved is not p:
                p.copy_(moved)


class _Kept(TorchDispatchMode):
    """Inside it nothing is written to some tensors: what would do so, does nothing."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for value in written:
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() in self._kept:
                    return args[0] if func._schema.returns else None
        return func(*args, **(kwargs or {}))


class _DataKept(TorchFunctionMode):
    """Inside it ``p.data = x`` does nothing to some parameters."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__()
        self._kept = set(map(id, params))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__ and id(args[0]) in self._kept:  # type: ignore[attr-defined]
            return None
        return func(*args, **(kwargs or {}))


@dataclass
class _Habits:
    """What the last evaluations of some parameters' loss have shown."""

    precision: torch.dtype | None = None  # it computes in
    writes: bool = False  # to the parameters themselves


_HABITS = WeakIdKeyDictionary()  # by the first of the parameters


def _same_marks(a: tuple[list[Any], list[Tensor]], b: tuple[list[Any], list[Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a[1], b[1], strict=True))


class FiniteDifference:
    """Gradient and Hz from the gradients at p + eps z and p - eps z.

    Their mean is the gradient up to eps^2 and (g+ - g-) / (2 eps) is Hz up to eps^2, at the cost of two first-order
    steps; memory is that of one, and a copy of the parameters and of the gradients. Right for smooth losses only: kinks
    (ReLU, max pooling) between the two points add noise that grows as eps shrinks. Parameters are back where they were
    after each call, and when the context is left because something was raised.

    Two things are known only after an evaluation, which is then repeated, and remembered for later steps: that the loss
    computes in a coarser precision than its parameters have (autocast, FSDP2's policy), for which eps was too small;
    and that it writes to the parameters (``nn.Embedding(max_norm=...)``, clipped weights). The latter it may do once,
    where they are; at p + eps z and p - eps z what it writes is held off.

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
        self._dtypes = {entry.param.dtype for entry in entries}
        self._locals = [entry.param for entry in entries]
        self._perturbation = Perturbation(entries, backends, probe=probe, seed=seed)
        self._replay = Replay()
        self._habits = _HABITS.setdefault(params[0], _Habits())
        self._written = False  # once, where the parameters are

    def __enter__(self) -> FiniteDifference:
        return self

    def __exit__(self, *error: object) -> None:
        self._perturbation.put_back()
        self._replay.forget_gathered()

    @property
    def _epsilon(self) -> float:
        if self._given is not None:
            return self._given
        coarsest = self._habits.precision
        return epsilon_of(self._dtypes if coarsest is None else self._dtypes | {coarsest})

    def __call__(self, sample: int) -> tuple[list[Any], list[Tensor | None], list[Tensor | None]]:
        """Evaluate at both points for probe number ``sample``.

        Returns:
            The two values, the gradients and the products; None for parameters without a gradient.
        """
        for _ in range(MOST_REPETITIONS):
            if self._habits.writes and not self._written:
                self._replay(self._gradients)
                self._perturbation.note_anew()
                self._written = True
            epsilon = self._epsilon
            plus_point = self._at(epsilon, sample)
            minus_point = None if plus_point is None else self._at(-epsilon, sample)
            self._perturbation.put_back()
            if plus_point is not None and minus_point is not None:
                break
        else:
            raise RuntimeError(
                "finite differences: every evaluation of the loss computes in another precision, or writes to its "
                "parameters in another way; expected it to do the same each time"
            )
        (first, plus), (second, minus) = plus_point, minus_point
        both = [
            i for i, pair in enumerate(zip(plus, minus, strict=True)) if pair[0] is not None and pair[1] is not None
        ]
        grads = [b if b is not None else a for a, b in zip(plus, minus, strict=True)]
        products: list[Tensor | None] = [None] * len(plus)
        if both:  # in place: the pair is all the memory it takes
            differences, means = [plus[i] for i in both], [minus[i] for i in both]
            torch._foreach_sub_(differences, means)
            torch._foreach_add_(means, differences, alpha=0.5)
            torch._foreach_div_(differences, 2 * epsilon)
            for i, difference in zip(both, differences, strict=True):
                products[i] = difference
        return [first, second], grads, products

    def _at(self, distance: float, sample: int) -> tuple[Any, list[Tensor | None]] | None:
        """Compute value and gradients at p + distance * z; return None if it turned out to be something else."""
        self._perturbation.to(distance, sample)
        held = self._marks()
        with contextlib.ExitStack() as stack:
            if self._habits.writes:
                stack.enter_context(_Kept(self._locals))
                stack.enter_context(_DataKept(self._params))
            value, grads = self._replay(self._gradients)
        self._habits.precision = self._replay.precision
        if not self._habits.writes and not _same_marks(held, self._marks()):
            self._habits.writes = True
            return None
        # Views (of DDP's buckets) would be overwritten by the other evaluation; zeros without memory are immutable.
        own = [g is None or not (g._is_view() or g._is_zerotensor()) for g in grads]
        grads = [g if g is None else g.detach() if o else g.detach().clone() for g, o in zip(grads, own, strict=True)]
        return (value, grads) if abs(distance) == self._epsilon else None

    def _marks(self) -> tuple[list[tuple[int, int]], list[Tensor]]:
        """Return what changes if parameters are written to, as far as can be without reading all of them twice."""
        norms = [torch.stack(torch._foreach_norm(params)) for params in self._perturbation.by_kind()]
        return [(p._version, p.data_ptr()) for p in self._locals], norms

    def _gradients(self) -> tuple[Any, list[Tensor | None]]:
        with torch.enable_grad():
            value = self._evaluate(self._differentiate)
        grads: list[Tensor | None]
        grads = [p.grad if p.grad is None else part_of(p.grad, p) for p in self._params]
        for p in self._params:
            p.grad = None
        return value, grads

    def _differentiate(self, loss: Tensor, *, gradient: Tensor | None = None, **unused: Any) -> None:
        torch.autograd.backward(loss, gradient)
