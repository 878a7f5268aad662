"""GradScaler: gradients and curvature carry the same loss scale, and an infinity in either skips the step."""

from __future__ import annotations

import torch
from torch import Tensor

from . import hvp
from .closures import TakesClosures
from .curvature import Curvature
from .distributed.sharded import any_sharded
from .layout import Entry


class FollowsGradScaler(TakesClosures):
    """Optimizer that :class:`torch.amp.GradScaler` may drive."""

    def _with_gradients(self) -> tuple[list[Entry], list[Tensor]]:
        raise NotImplementedError

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True: the update divides by the loss scale.

        ``GradScaler.step`` asks for this right before it looks for infinities in the gradients, which is all that makes
        it lower its scale. So this is the moment to compute curvature that only ``step`` would have computed, and to
        let a gradient tell what is wrong with it. Asking again changes nothing.

        False inside closures: GradScaler does not take them, so gradients carry no scale there and may be clipped,
        which is what Lightning wants to know.
        """
        if self._grads_before is not None or self._inside is not None:
            return False
        self._complete_curvature()
        return True

    def unscale_(self, grad_scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the loss scale, and the curvature too: ``scaler.unscale_(opt)`` for this optimizer.

        Works with every way to get gradients of a scaled loss, once all of the step's backward passes are done::

            scaler.scale(loss).backward(create_graph=opt.needs_hessian)
            opt.unscale_(scaler)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()

        After ``opt.backward(loss, grad_scaler=scaler)``, which divides the curvature at once, ``scaler.unscale_(opt)``
        does as well.

        Args:
            grad_scaler: what has scaled the loss.

        Raises:
            RuntimeError: gradients of this step are unscaled already.
            ValueError: a gradient is float16, which GradScaler does not unscale.
        """
        if not grad_scaler.is_enabled():
            return
        self._complete_curvature(grad_scaler)
        grad_scaler.unscale_(self)

    @torch.no_grad()
    def _complete_curvature(self, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        """Compute the curvature that graphs still hold, unscale it if asked to, and report infinities in it."""
        self._average_before_scaler(too_late=grad_scaler is None)
        entries, grads = self._with_gradients()
        if hvp.has_graph(grads):
            self._from_backward(entries, grads, self._due())
            hvp.release_graph(grads)
        if self._curvature is None or not grads:
            return
        self._average_curvature(self._due())
        if grad_scaler is not None:
            one = torch.ones((), dtype=torch.float32, device=grads[0].device)
            self._curvature.unscale(1 / grad_scaler.scale(one))
        self._curvature.report(grads)

    def _average_before_scaler(self, *, too_late: bool) -> None:
        """Average over the ranks what is still local, so that all of them find the same infinities.

        Unless ``scaler.unscale_`` has looked for them before, which is remembered to be told in :meth:`step`.
        """
        grads = [p.grad for _, p in self._trained() if p.grad is not None]
        if self._ranks is None or self._ranks.grads_averaged or not grads:
            return
        if self._curvature is not None or not self.needs_hessian or hvp.has_graph(grads):
            self._average_local(None)
            self._ranks.averaged_late = too_late

    def _drop_scale(self) -> None:
        """Forget what GradScaler has left for a step that failed: it would multiply its scale by that of before."""
        for name in ("grad_scale", "found_inf"):
            vars(self).pop(name, None)

    def _scale_and_flag(self, curvature: Curvature | None) -> tuple[Tensor | None, Tensor | None]:
        """What GradScaler has left for this step: the scale the gradients still carry, and whether to skip."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and any_sharded([p for _, p in self._trained()]):
            raise RuntimeError(
                "GradScaler with sharded parameters (DTensor) finds infinities of this rank's part alone; expected "
                "bfloat16, which needs no loss scale"
            )
        if found_inf is not None and grad_scale is None and self._ranks is not None and self._ranks.averaged_late:
            raise RuntimeError(
                "scaler.unscale_(opt) has looked at the gradients of this rank alone, so ranks may disagree about "
                "skipping the step; expected opt.unscale_(scaler), which averages them before"
            )
        if found_inf is None or curvature is None:
            return grad_scale, found_inf
        if grad_scale is None and not curvature.unscaled:
            raise RuntimeError(
                "scaler.unscale_(opt) divided the gradients by the loss scale, but not the curvature; write "
                "opt.unscale_(scaler) instead"
            )
        if not curvature.reported:  # a diagonal of the user's
            found_inf = found_inf + curvature.found_inf().to(found_inf.device)
        return grad_scale, found_inf
