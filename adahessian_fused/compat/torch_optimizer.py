"""The AdaHessian of torch-optimizer (0.3.0)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import AveragesSpatialAxes


class Adahessian(AveragesSpatialAxes):
    r"""``torch_optimizer.Adahessian`` on fused kernels.

    :math:`\|D\|` is averaged over the kernels of 4-D parameters; curvature at every step; state keys ``step``,
    ``exp_avg``, ``exp_hessian_diag_sq``. Called as the original, ``loss.backward(create_graph=True); opt.step()``, and
    in every other way of :class:`~adahessian_fused.AdaHessian`.

    What the original gets wrong and this class does not: 3-D parameters and those of more than 4 dimensions (an error
    there, or the curvature of the parameter before them) are averaged over their spatial axes; a parameter the loss is
    linear in has zero curvature instead of being an error; no graph stays alive after a step; GradScaler's factor is
    taken out of the curvature too; moving averages of 16-bit parameters are float32. ``lr=0`` and ``eps=0`` are
    accepted.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moving averages of the gradient and the squared diagonal.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        hessian_power: k in [0, 1].
        seed: key of the probe's generator; by default PyTorch's initial seed, so that ``torch.manual_seed`` before the
            construction makes runs repeatable. The original seeds the process's generator with it instead.
        faithful: seed the process's generator with ``seed``, and move elements that have had no curvature by m / eps,
            as the original does.
        backend: as for :class:`~adahessian_fused.AdaHessian`.

    Raises:
        ValueError, TypeError: as for :class:`~adahessian_fused.AdaHessian`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0,
        hessian_power: float = 0.5,
        seed: int | None = None,
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
            averaging="abs",
            seed=seed,
            faithful=faithful,
            backend=backend,
        )
        if faithful and seed is not None:
            torch.manual_seed(seed)
