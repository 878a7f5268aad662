"""Gradients and curvature from losses that are evaluated for the purpose, as often as a strategy needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import hvp
from .checks import check_grad
from .curvature import Curvature
from .hvp.finite_difference import FiniteDifference
from .hvp.forward_over_reverse import ForwardOverReverse
from .hvp.replay import mean_of
from .layout import Entry, make_buckets
from .state import PortableState

Differentiate = Callable[..., None]

STRATEGIES: dict[str, type[FiniteDifference] | type[ForwardOverReverse]] = {
    "finite_difference": FiniteDifference,
    "forward_over_reverse": ForwardOverReverse,
}


class EvaluatesLosses(PortableState):
    """Optimizer that knows when curvature is due and lets a strategy evaluate the loss for it."""

    _curvature: Curvature | None
    _entries: dict[int, Entry]
    _tools: Mapping[str, Any]

    def _ensure(self, params: Sequence[Tensor]) -> list[Entry]:
        raise NotImplementedError

    def _due(self) -> list[bool]:
        """Whether the coming step uses new curvature, for each group."""
        return [
            group["step"] % group["update_each"] == 0 and any(p.requires_grad for p in group["params"])
            for group in self.param_groups
        ]

    @property
    def needs_hessian(self) -> bool:
        """Whether the coming step uses new curvature: ``loss.backward(create_graph=opt.needs_hessian)``."""
        return any(self._due())

    def _trained(self) -> list[tuple[int, Tensor]]:
        """Group number and parameter of everything that wants a gradient."""
        return [(n, p) for n, group in enumerate(self.param_groups) for p in group["params"] if p.requires_grad]

    def _gathered(self) -> Curvature:
        """What this step's curvature is to be added to."""
        # Gradients that were dropped behind our back (model.zero_grad()) leave curvature that no longer counts.
        abandoned = all(entry.param.grad is None for entry in self._entries.values())
        if self._curvature is None or abandoned:
            return Curvature(self._tools, self.param_groups[0]["seed"])
        return self._curvature

    def _report_overflow(self, grads: Sequence[Tensor]) -> None:
        """Tell ``scaler.unscale_(opt)``, which may be the next call, if the unscaled curvature is not finite."""
        if self._curvature.unscaled:
            with torch.no_grad():
                self._curvature.report(grads)

    def _evaluate_loss(
        self,
        loss_fn: Callable[[], Tensor],
        gradient: Tensor | None,
        scale: Callable[[Tensor], Tensor] | None,
        weight: float,
    ) -> Tensor:
        """Gradients and curvature of a function that returns the loss, by a strategy that evaluates it."""
        inverse_scale = None

        def evaluate(differentiate: Differentiate) -> Tensor:
            nonlocal inverse_scale
            loss = loss_fn()
            hvp.check_loss(loss, gradient)
            if scale is not None:
                inverse_scale = 1 / scale(torch.ones((), device=loss.device))
            differentiate(loss if scale is None else scale(loss), gradient=gradient)
            return loss.detach()

        return self._repeat(evaluate, lambda: {"weight": weight, "inverse_scale": inverse_scale})

    def _repeat(self, evaluate: Callable[[Differentiate], Any], scales: Callable[[], dict[str, Any]]) -> Any:
        """Let the strategy evaluate a loss; leaves gradients in ``p.grad`` and their curvature.

        Args:
            evaluate: computes the loss, differentiates it with the function it is given, and returns its value.
            scales: factors on the products, asked for after the evaluations.

        Returns:
            The mean of what ``evaluate`` has returned, or the first if it is no number.
        """
        options, params, due = self.param_groups[0], self._trained(), self._due()
        curvature, values = self._gathered(), []
        strategy = STRATEGIES[options["hvp"]](
            [p for _, p in params],
            self._probed(due),
            self._tools,
            evaluate,
            probe=options["probe"],
            seed=options["seed"],
            epsilon=options["fd_epsilon"],
        )
        with _own_grads([p for _, p in params]), strategy, torch.no_grad():
            for sample in range(options["n_samples"]):
                found, grads, products = strategy(sample)
                values += found
                if sample == 0:
                    gradient, kept = grads, [i for i, g in enumerate(grads) if g is not None]
                    entries = dict(zip(kept, self._ensure([params[i][1] for i in kept]), strict=True))
                    for i, entry in entries.items():
                        check_grad(grads[i], entry.name)
                curvature.take(
                    {entries[i]: products[i] for i in kept if due[params[i][0]] and products[i] is not None},
                    probe=options["probe"],
                    n_samples=options["n_samples"],
                    sample=sample,
                    **scales(),
                )
        hvp.accumulate_grads([p for _, p in params], gradient)
        self._curvature = curvature
        self._report_overflow([params[i][1].grad for i in kept])
        return mean_of(values)

    def _probed(self, due: Sequence[bool]) -> list[Entry]:
        """Entries of the parameters whose curvature is due; for those that have not had a gradient, temporary ones."""
        known, new, number = [], [], 0
        for n, group in enumerate(self.param_groups):
            for p in group["params"]:
                if due[n] and p.requires_grad and "exp_avg" in self.state.get(p, ()):
                    known.append(p)
                elif due[n] and p.requires_grad:
                    entry = Entry(p, f"parameter {number}", number, n, {})
                    entry.describe(group["block_size"], group["averaging"])
                    new.append(entry)
                number += 1
        make_buckets(new, with_states=False)
        return self._ensure(known) + new


@contextlib.contextmanager
def _own_grads(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside it ``p.grad`` begins as None; afterwards it is again what it was."""
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
