"""Exact Hessian-vector products by forward-mode differentiation of the gradient (Pearlmutter 1994)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..bucket import Entry
from ..curvature import draw_probe
from .double_backward import accumulate_grads
from .errors import HOOK_WITHOUT_TANGENT, explanation, naming_the_operator
from .graph import explore
from .replay import Replay
from .treatment import Hook, Parts, Treatment, name_of, numbers_in, treating

_TWICE_DIFFERENTIABLE_ONLY = {"SiluBackward0", "MishBackward0", "NativeGroupNormBackward0"}


@contextlib.contextmanager
def tangents(params: Sequence[Tensor], z: Sequence[Tensor]) -> Iterator[None]:
    """Make dual numbers p + z * epsilon of the parameters themselves.

    The very tensors get the tangents, by a copy onto themselves, so every model, closure and tied weight sees them
    without being told; values stay, and the end of the dual level takes the tangents away.
    """
    with forward_ad.dual_level(), naming_the_operator("forward_over_reverse"):
        with torch.no_grad():
            for p, direction in zip(params, z, strict=True):
                p.copy_(forward_ad.make_dual(p.detach(), direction))
        torch.clear_autocast_cache()  # it may hold 16-bit copies of the weights, without tangents
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def gradient_and_product(
    loss: Tensor, params: Sequence[Tensor], gradient: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the gradients of a loss computed inside :func:`tangents`, and their tangents, which are Hz.

    Some backward operators have a forward-mode derivative only in the form that autograd takes when it is to be
    differentiated again. Others than those known are tried in that form if the usual one fails, and hooks called again.

    Returns:
        Gradients and products; None for parameters the loss does not depend on, and products None where the gradient
        does not depend on any parameter.
    """
    options: dict[str, Any] = {"grad_outputs": gradient, "allow_unused": True, "retain_graph": True}
    known = any(node.name() in _TWICE_DIFFERENTIABLE_ONLY for node in explore([loss]).nodes)
    with treating(_Examined()):
        try:
            duals = torch.autograd.grad(loss, params, create_graph=known, **options)
        except NotImplementedError:
            duals = torch.autograd.grad(loss, params, create_graph=True, **options)
    pairs = [(None, None) if dual is None else forward_ad.unpack_dual(dual) for dual in duals]
    primals, products = zip(*pairs, strict=True)
    return [g if g is None else g.detach() for g in primals], [h if h is None else h.detach() for h in products]


class _Examined(Treatment):
    """Of hooks: what they return has to have a tangent if what they are given has one."""

    def __call__(self, hook: Hook, args: Sequence[Any]) -> Any:
        given = [t for arg in args for t in numbers_in(arg)]
        with Parts(()) as parts:
            results = hook(*args)
        problem = _dropped(hook, given, numbers_in(results), cut_off=parts.cut_off)
        if problem is not None:
            raise RuntimeError(explanation(problem, "forward_over_reverse"))
        return results


def _dropped(hook: Hook, given: Sequence[Tensor], results: Sequence[Tensor], *, cut_off: bool) -> str | None:
    new = [r for r in results if not any(r is t for t in given)]
    lost = cut_off or any(not _has_tangent(r) and bool(r.any()) for r in new)
    return HOOK_WITHOUT_TANGENT.format(name_of(hook)) if new and lost and any(map(_has_tangent, given)) else None


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def _check_tangent(entry: Entry, direction: Tensor) -> None:
    """Raise if what was written to a parameter was written to its tangent as well, which no_grad does not prevent."""
    tangent = forward_ad.unpack_dual(entry.param).tangent
    if tangent is None or not torch.equal(tangent, direction):
        raise RuntimeError(
            f'the loss writes to {entry.name} and to its tangent, which hvp="forward_over_reverse" differentiates '
            f'along; expected it to write to detach() of it, or hvp="autograd"'
        )


class ForwardOverReverse:
    """Gradient and Hz of a loss that is evaluated with the probe as tangent of the parameters.

    The arguments are those of :class:`~adahessian_fused.hvp.finite_difference.FiniteDifference`; ``epsilon`` is unused.
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
        epsilon: float | None = None,
    ) -> None:
        self._params, self._entries, self._backends, self._evaluate = params, entries, backends, evaluate
        self._probe: dict[str, Any] = {"probe": probe, "seed": seed}
        self._replay = Replay(watch=False)
        self._products: list[Tensor | None] = []

    def __enter__(self) -> ForwardOverReverse:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, sample: int) -> tuple[list[Any], list[Tensor | None], list[Tensor | None]]:
        """Evaluate once for probe number ``sample``.

        Returns:
            The value, the gradients and the products; None for parameters the loss or gradient does not depend on.
        """
        z = draw_probe(self._entries, self._backends, sample=sample, **self._probe)
        self._products = [None] * len(self._params)
        with tangents([entry.param for entry in z], list(z.values())), torch.enable_grad():
            versions = [entry.param._version for entry in z]
            value = self._replay(lambda: self._evaluate(self._differentiate))
            for (entry, direction), version in zip(z.items(), versions, strict=True):
                if entry.param._version != version:
                    _check_tangent(entry, direction)
        grads = [p.grad for p in self._params]
        for p in self._params:
            p.grad = None
        return [value], grads, self._products

    def _differentiate(self, loss: Tensor, *, gradient: Tensor | None = None, **unused: Any) -> None:
        ours = set(map(id, self._params))
        others = [leaf for leaf in explore([loss]).leaves if id(leaf) not in ours]
        grads, products = gradient_and_product(loss, [*self._params, *others], gradient)
        accumulate_grads([*self._params, *others], grads, gradient)
        products = products[: len(self._params)]
        pairs = zip(self._products, products, strict=True)
        self._products = [new if old is None else old if new is None else old + new for old, new in pairs]
