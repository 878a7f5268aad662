"""Losses that are given: differentiated once on off-steps, and twice where curvature is due."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import hvp, sharing
from .checks import CHOICES, check_choice, check_weight
from .evaluation import evaluate_loss
from .fraction import split_batch
from .friendly import curvature_friendly, plain
from .hessian_step import HessianStep, passing

if TYPE_CHECKING:
    from .optimizer import AdaHessian


def backward(
    step: HessianStep,
    loss: Any,
    *,
    gradient: Tensor | None = None,
    retain_graph: bool = False,
    grad_scaler: torch.amp.GradScaler | None = None,
    curvature: float | None = None,
    batch_size: int | None = None,
) -> Tensor | None:
    """Differentiate a loss for a step, see :meth:`AdaHessian.backward`.

    Args:
        step: what gathers.
        loss: the loss, or a function that computes it.
        gradient: as in ``Tensor.backward``.
        retain_graph: keep the graph of the loss.
        grad_scaler: scales the loss.
        curvature: weight of the curvature; None for 1.
        batch_size: number of examples on this rank, if not all have the same.

    Returns:
        The loss that a function computed, detached.
    """
    if curvature is not None:
        check_weight("curvature", curvature)
    given = not callable(loss)
    batch_weight = None if batch_size is None else step.batch_weight(batch_size)
    if step.evaluation is not None:  # in a closure that a strategy evaluates
        loss = loss if given else loss()
        loss = loss if batch_weight is None else loss * batch_weight
        step.evaluation(loss if grad_scaler is None else grad_scaler.scale(loss), gradient=gradient)
        return None if given else loss.detach()
    due = step.is_due
    wanted, strategy = due and curvature != 0, step.layout.options["hvp"]
    if batch_size == 0:
        step.take_nothing(with_curvature=wanted)
        return None
    if wanted and curvature is None:
        step.check_whole_batch()
    scale = grad_scaler.scale if grad_scaler is not None and grad_scaler.is_enabled() else None
    weight = 1.0 if curvature is None else curvature
    if wanted and strategy != "autograd":
        check_choice("hvp", strategy, CHOICES["hvp"])
        if given:
            raise RuntimeError(hvp.NEEDS_FUNCTION.format(strategy))
        weighted = loss if batch_weight is None else lambda: loss() * batch_weight
        found = evaluate_loss(step, weighted, gradient, scale, weight)
        return found if batch_weight is None else found / batch_weight
    if not given:
        with curvature_friendly() if wanted or (curvature != 0 and sharing.expecting(step)) else plain():
            loss = loss()
    hvp.check_loss(loss, gradient)
    inverse_scale = None
    scaled = loss if batch_weight is None else loss * batch_weight
    if scale is not None:
        inverse_scale = 1 / scale(torch.ones((), dtype=torch.float32, device=loss.device))
        scaled = scale(scaled)
    options: dict[str, Any] = {"gradient": gradient, "retain_graph": retain_graph}
    others = sharing.joining([step], hvp.explore([scaled]).leaves) if sharing.awaiting([step]) else []
    taking = [step, *others] if due else others
    if wanted or (others and curvature != 0):
        differentiate_twice(scaled, [step], taking, **options, inverse_scale=inverse_scale, weight=weight)
    else:
        differentiate_once(scaled, [step], taking, **options, by_ddp=batch_size is None and not due)
    return None if given else loss.detach()


def backward_split(
    opt: AdaHessian, loss_fn: Callable[..., Tensor], batch: Sequence[Any], grad_scaler: torch.amp.GradScaler | None
) -> Tensor:
    """Differentiate a loss with curvature from a part of the mini-batch, see :meth:`AdaHessian.backward_split`."""
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is of type {type(loss_fn).__name__}; expected a function of the batch, as in "
            "opt.backward_split(lambda x, y: loss_fn(model(x), y), x, y); a loss that is computed is for "
            "opt.backward(loss)"
        )
    fraction = opt.param_groups[0]["hessian_fraction"]
    if not opt.needs_hessian or fraction == 1:
        return opt.backward(lambda: loss_fn(*batch), grad_scaler=grad_scaler, curvature=1.0)
    if opt.coming_step.evaluation is not None:
        raise RuntimeError(
            "opt.backward_split() in a closure that is evaluated several times; call it before opt.step() instead"
        )
    first, rest, share = split_batch(batch, fraction)
    with opt.no_sync() if share < 1 else contextlib.nullcontext():
        loss = opt.backward(lambda: loss_fn(*first) * share, grad_scaler=grad_scaler, curvature=1 / share)
    if share < 1:
        loss += opt.backward(lambda: loss_fn(*rest) * (1 - share), grad_scaler=grad_scaler, curvature=0)
    return loss


def differentiate_once(
    loss: Tensor,
    steps: Sequence[HessianStep],
    due: Sequence[HessianStep] = (),
    *,
    gradient: Tensor | None,
    retain_graph: bool,
    by_ddp: bool,
) -> None:
    """Compute the gradient alone; averaged by DDP if it may be and DDP does so, otherwise here.

    Args:
        loss: what to differentiate.
        steps: those of the optimizers whose pass it is.
        due: those of all optimizers that wait for curvature; a pass is nothing to others.
        gradient: as in ``Tensor.backward``.
        retain_graph: keep the graph of the loss.
        by_ddp: DDP may average.
    """
    with passing(due):
        everybodys = [step.ranks for step in steps]
        if all(ranks is None or (by_ddp and ranks.averages_first_order) for ranks in everybodys):
            torch.autograd.backward(loss, gradient, retain_graph=retain_graph)
            return
        leaves = hvp.explore([loss]).leaves  # without any hooks of DDP
        grads = torch.autograd.grad(loss, leaves, gradient, retain_graph=retain_graph, allow_unused=True)
        averages = [step.start_average(leaves, grads) for step in steps]
        hvp.accumulate_grads(leaves, grads, gradient)
        hvp.run_accumulated(leaves, grads)
        for step, average in zip(steps, averages, strict=True):
            step.finish_average(average)


def differentiate_twice(
    loss: Tensor,
    steps: Sequence[HessianStep],
    due: Sequence[HessianStep],
    *,
    gradient: Tensor | None,
    retain_graph: bool,
    inverse_scale: Tensor | None = None,
    weight: float = 1.0,
) -> None:
    """Compute the gradients of all leaves, and the curvature of the parameters of all optimizers that need it.

    Either all of it is done, or an error leaves gradients and curvature as they were.

    Args:
        loss: what to differentiate.
        steps: those of the optimizers whose pass it is.
        due: those of all optimizers that wait for curvature; others than ``steps`` average over their ranks by
            themselves.
        gradient: as in ``Tensor.backward``.
        retain_graph: keep the graph of the loss.
        inverse_scale: factor that takes GradScaler's scale out of Hz.
        weight: factor on Hz.
    """
    graph = hvp.explore([loss])
    leaves = graph.leaves
    for step in due:
        step.check_not_sharded(leaves)
    with passing(due):
        grads = hvp.first_order(loss, leaves, gradient, graph)
        averages = [step.start_average(leaves, grads) for step in steps]  # while Hz is computed
        scales: dict[str, Any] = {"inverse_scale": inverse_scale, "weight": weight}
        found = sharing.products(due, leaves, grads, retain_graph=retain_graph, **scales)
        totals = list(map(HessianStep.with_all, due, found))
        hvp.accumulate_grads(leaves, grads, gradient)
        for step, total in zip(due, totals, strict=True):
            step.curvature = total
        hvp.run_accumulated(leaves, grads)
        for step, average in zip(steps, averages, strict=True):
            step.finish_average(average)
        for step in due:
            if step not in steps:
                step.finish_average(None)
            step.report_overflow(scaled=inverse_scale is not None)
