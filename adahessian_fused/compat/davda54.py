"""The AdaHessian of davda54/ada-hessian, which timm's was made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import hvp
from ..layout import block_length
from .base import DropIn, Option

_SEED = 2147483647  # of the original's generator


class AdaHessian(DropIn):
    """``ada_hessian.AdaHessian`` of davda54 on fused kernels.

    No averaging, or with ``average_conv_kernel`` that of the samples' mean's magnitude over the kernels of 4-D
    parameters; curvature every ``update_each`` steps, and on the steps between the last diagonal enters v again; state
    keys ``step``, ``hessian step``, ``exp_avg``, ``exp_hessian_diag_sq``. Called as the original,
    ``loss.backward(create_graph=True); opt.step()``, and in every other way of :class:`~adahessian_fused.AdaHessian`.

    What the original gets wrong and this class does not: closures work; several samples do not fail for want of the
    graph; a run that resumes between two Hessian steps goes on exactly (from a checkpoint of the original, which lacks
    the diagonal, v waits for the next Hessian step); :meth:`set_hessian` may be called for several micro-batches;
    GradScaler's factor is taken out of the curvature too; moving averages of 16-bit parameters are float32. The period
    runs per group, not per parameter, and the diagonal is not kept in ``p.hess``: see :meth:`hessian_diag`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moving averages of the gradient and the squared diagonal.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        hessian_power: k in [0, 1].
        update_each: Hutchinson frequency.
        n_samples: probes averaged in a Hessian step.
        average_conv_kernel: average over convolution kernels.
        faithful: move elements that have had no curvature by m / eps, as the original does.
        backend: as for :class:`~adahessian_fused.AdaHessian`.

    Raises:
        ValueError, TypeError: as for :class:`~adahessian_fused.AdaHessian`.
    """

    attributes: ClassVar[dict[str, str]] = {name: name for name in ("update_each", "n_samples", "average_conv_kernel")}
    update_each = Option("update_each")
    n_samples = Option("n_samples")

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        update_each: int = 1,
        n_samples: int = 1,
        average_conv_kernel: bool = False,
        *,
        faithful: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            hessian_power=hessian_power,
            block_size="conv2d" if average_conv_kernel else 1,
            averaging="abs" if average_conv_kernel else "signed",
            update_each=update_each,
            off_step="stale",
            n_samples=n_samples,
            seed=_SEED,
            faithful=faithful,
            backend=backend,
        )

    @property
    def average_conv_kernel(self) -> bool:
        """Whether the diagonal is averaged over convolution kernels."""
        return self.param_groups[0]["averaging"] == "abs"

    def get_params(self) -> Iterator[Tensor]:
        """Return all parameters that require a gradient."""
        return (p for group in self.param_groups for p in group["params"] if p.requires_grad)

    def zero_hessian(self) -> None:
        """Drop curvature that was gathered for the coming step."""
        self.coming_step.forget()

    @torch.no_grad()
    def set_hessian(self) -> None:
        """Gather the curvature of gradients that ``loss.backward(create_graph=True)`` left, if it is due.

        :meth:`step` does it by itself. Called after each of several micro-batches it adds up their curvature, all for
        the same probe, and the graph of each is freed before the next one is built.

        Raises:
            RuntimeError: no gradient has a graph.
        """
        params = [p for p in self.get_params() if p.grad is not None]
        if params and self.needs_hessian:
            self.coming_step.take_graph(params)
        hvp.release_graph([p.grad for p in params])

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict for the original; where its keys cannot tell all, ``"adahessian_fused"`` has the rest."""
        result = super().state_dict()
        for group in result["param_groups"]:
            for i in group["params"]:
                state = result["state"].setdefault(i, {})
                state["hessian step"] = state.get("step", 0)
        return result

    def _stale_diag(self, param: Tensor) -> Tensor | None:
        hess = getattr(param, "hess", None)
        if not isinstance(hess, Tensor):
            return None
        return hess.reshape(-1)[:: block_length(param.shape, self.param_groups[0]["block_size"])]
