"""The AdaHessian of the paper's authors (image classification)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from .base import AveragesSpatialAxes


class Adahessian(AveragesSpatialAxes):
    r"""``optim_adahessian.Adahessian`` of the official repository's image classification, on fused kernels.

    :math:`\|D\|` is averaged over the kernels of 4-D parameters; curvature at every step; state keys ``step``,
    ``exp_avg``, ``exp_hessian_diag_sq``. Called as the original, ``loss.backward(create_graph=True); opt.step()``, and
    in every other way of :class:`~adahessian_fused.AdaHessian`.

    What the original gets wrong and this class does not: 3-D parameters and those of more than 4 dimensions (an error
    there, or the curvature of the parameter before them) are averaged over their spatial axes; a parameter the loss is
    linear in has zero curvature instead of being an error; parameters are updated in place instead of being replaced;
    no graph stays alive after a step; GradScaler's factor is taken out of the curvature too.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moving averages of the gradient and the squared diagonal.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        hessian_power: k in [0, 1].
        single_gpu: True; the original's ``single_gpu=False`` ends in a NameError.
        faithful: move elements that have had no curvature by m / eps, as the original does.
        backend: as for :class:`~adahessian_fused.AdaHessian`.

    Raises:
        ValueError, TypeError: as for :class:`~adahessian_fused.AdaHessian`, or ``single_gpu`` is not True.
    """

    attributes: ClassVar[dict[str, str]] = {"single_gpu": "single_gpu"}
    single_gpu = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0,
        hessian_power: float = 1,
        single_gpu: bool = True,
        *,
        faithful: bool = False,
        backend: str = "auto",
    ) -> None:
        if single_gpu is not True:
            raise ValueError(
                f"single_gpu={single_gpu!r}; expected True. The original fails with anything else; for several "
                "processes, average gradients and a diagonal of your own and call opt.step(hessian=[...])"
            )
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            hessian_power=hessian_power,
            averaging="abs",
            faithful=faithful,
            backend=backend,
        )
