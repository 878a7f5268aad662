"""GradScaler: gradients and curvature carry the same loss scale, and an infinity in either skips the step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import hvp
from .checks import warn
from .curvature import Curvature
from .distributed.sharded import any_sharded
from .hessian_step import HessianStep


@torch.no_grad()
def complete_curvature(step: HessianStep, grad_scaler: torch.amp.GradScaler | None = None) -> None:
    """Compute the curvature that graphs still hold, unscale it if asked to, and report infinities in it.

    ``GradScaler.step`` looks for infinities in the gradients alone, which is all that makes it lower its scale: so a
    gradient becomes infinite where the curvature is.

    Args:
        step: what has been gathered.
        grad_scaler: what has scaled the loss, if its factor is to be taken out of the curvature.
    """
    if step.written is None:  # later it may be us
        step.written = step.record.is_written_to()
    _average(step, too_late=grad_scaler is None)
    entries, grads = step.layout.with_gradients()
    if hvp.has_graph(grads):
        step.complete(entries, grads, step.schedule.due())
    if step.curvature is None or not grads:
        return
    step.average_curvature(step.schedule.due())
    if grad_scaler is not None:
        one = torch.ones((), dtype=torch.float32, device=grads[0].device)
        step.curvature.unscale(1 / grad_scaler.scale(one))
    step.curvature.report(grads)


def _average(step: HessianStep, *, too_late: bool) -> None:
    """Average over the ranks what is still local, so that all of them find the same infinities.

    Unless ``scaler.unscale_`` has looked for them before, which is remembered to be told in ``opt.step()``.
    """
    grads = [p.grad for p in step.layout.trained() if p.grad is not None]
    if step.ranks is None or step.ranks.grads_averaged or not grads:
        return
    if step.curvature is not None or not step.is_due or hvp.has_graph(grads):
        step.average_local()
        step.ranks.averaged_late = too_late


def drop_scale(optimizer: Optimizer) -> None:
    """Forget what GradScaler has left for a step that failed: it would multiply its scale by that of before."""
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)


def scale_and_flag(
    optimizer: Optimizer, step: HessianStep, curvature: Curvature | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what GradScaler has left for a step: the scale the gradients still carry, and whether to skip it."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is not None and any_sharded(step.layout.trained()):
        raise RuntimeError(
            "GradScaler with sharded parameters (DTensor) finds infinities of this rank's part alone; expected "
            "bfloat16, which needs no loss scale"
        )
    if found_inf is not None and grad_scale is None and step.ranks is not None and step.ranks.averaged_late:
        raise RuntimeError(
            "scaler.unscale_(opt) has looked at the gradients of this rank alone, so ranks may disagree about "
            "skipping the step; expected opt.unscale_(scaler), which averages them before"
        )
    if found_inf is None or curvature is None:
        return grad_scale, found_inf
    if grad_scale is not None and step.written and not step.warned:
        step.warned = True
        warn(
            "gradients were written to while they carried the loss scale. If they were clipped, it was at a norm too "
            "small by that factor, and hardly anything moves: write opt.unscale_(scaler) before clip_grad_norm_",
        )
    if grad_scale is None and not curvature.unscaled:
        raise RuntimeError(
            "scaler.unscale_(opt) divided the gradients by the loss scale, but not the curvature; write "
            "opt.unscale_(scaler) instead"
        )
    if not curvature.reported:  # a diagonal of the user's
        found_inf = found_inf + curvature.found_inf().to(found_inf.device)
    return grad_scale, found_inf
