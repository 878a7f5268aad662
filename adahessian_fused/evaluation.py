"""Losses that are computed for the purpose, as often as a strategy for Hessian-vector products needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import hvp
from .checks import CHOICES, check_choice, check_grad
from .distributed.ranks import without
from .distributed.sharded import any_sharded
from .hessian_step import Differentiate, HessianStep, passing
from .hvp.finite_difference import FiniteDifference
from .hvp.forward_over_reverse import ForwardOverReverse
from .hvp.replay import mean_of
from .record import OtherLeaves

STRATEGIES: dict[str, type[FiniteDifference] | type[ForwardOverReverse]] = {
    "finite_difference": FiniteDifference,
    "forward_over_reverse": ForwardOverReverse,
}


def evaluate_loss(
    step: HessianStep,
    loss_fn: Callable[[], Tensor],
    gradient: Tensor | None,
    scale: Callable[[Tensor], Tensor] | None,
    weight: float,
) -> Tensor:
    """Gather gradients and curvature of a function that returns the loss; return the mean loss."""
    inverse_scale = None

    def evaluate(differentiate: Differentiate) -> Tensor:
        nonlocal inverse_scale
        loss = loss_fn()
        hvp.check_loss(loss, gradient)
        if scale is not None:
            inverse_scale = 1 / scale(torch.ones((), dtype=torch.float32, device=loss.device))
        differentiate(loss if scale is None else scale(loss), gradient=gradient)
        return loss.detach()

    return evaluate_repeatedly(step, evaluate, lambda: {"weight": weight, "inverse_scale": inverse_scale})


def evaluate_repeatedly(
    step: HessianStep, evaluate: Callable[[Differentiate], Any], scales: Callable[[], dict[str, Any]] = dict
) -> Any:
    """Let the strategy evaluate a loss; leave gradients in ``p.grad`` and their curvature in ``step``.

    Args:
        step: what gathers.
        evaluate: computes the loss, differentiates it with the function it is given, and returns its value.
        scales: factors on the products, asked for after the evaluations.

    Returns:
        The mean of what ``evaluate`` has returned, or the first if it is no number.
    """
    layout, due, options = step.layout, step.schedule.due(), step.layout.options
    params = layout.trained()
    step.check_not_sharded()
    curvature, values = step.new_curvature(), []
    # Those that FSDP has made of sharded parameters are leaves, too, and its own business.
    others, sharded = OtherLeaves(params), any_sharded(params)

    def evaluate_all(differentiate: Differentiate) -> Any:
        def seen(loss: Tensor, **options: Any) -> None:
            if not sharded:
                others.before(loss)
            differentiate(loss, **options)

        with contextlib.nullcontext() if sharded else others.evaluation():
            return evaluate(seen)

    check_choice("hvp", options["hvp"], CHOICES["hvp"])
    strategy = STRATEGIES[options["hvp"]](
        params,
        layout.of_groups(due),
        layout.backends,
        evaluate_all,
        probe=options["probe"],
        seed=step.probe_seed,
        epsilon=options["fd_epsilon"],
    )
    ddps = [] if step.ranks is None else step.ranks.around(params)
    with passing([step] if any(due) else []):
        with _own_grads(params), without(ddps), hvp.accumulating(params, hvp.later), strategy, torch.no_grad():
            for sample in range(options["n_samples"]):
                found, grads, products = strategy(sample)
                values += found
                if sample == 0:
                    gradient, kept = grads, [i for i, g in enumerate(grads) if g is not None]
                    entries = dict(zip(kept, layout.ensure([params[i] for i in kept]), strict=True))
                    for i, entry in entries.items():
                        check_grad(grads[i], entry.name)
                curvature.take(
                    {entries[i]: products[i] for i in kept if due[entries[i].group] and products[i] is not None},
                    probe=options["probe"],
                    n_samples=options["n_samples"],
                    sample=sample,
                    **scales(),
                )
                del grads, products  # before the next ones come
        total = step.with_all(curvature)
        hvp.accumulate_grads(params, gradient)
        step.curvature = total
        leaves = others.finish()
        own = options["hvp"] != "finite_difference"  # whose evaluations are backward passes, each with its hooks
        hvp.run_accumulated(params, gradient, own=own)
        hvp.run_accumulated(leaves, leaves, own=own)
        step.finish_average(step.start_average())
        step.report_overflow(scaled=scales().get("inverse_scale") is not None)
    return mean_of(values)


@contextlib.contextmanager
def _own_grads(params: Sequence[Tensor]) -> Iterator[None]:
    """Begin with ``p.grad`` as None, and put back at the end what it was."""
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad
