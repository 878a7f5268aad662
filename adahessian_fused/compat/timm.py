"""timm's AdaHessian, and how timm's factory comes to make this one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from . import davda54


class Adahessian(davda54.AdaHessian):
    """``timm.optim.Adahessian`` on fused kernels.

    The rules, state keys and differences of :class:`adahessian_fused.compat.davda54.AdaHessian`, except that timm has
    mended closures itself, calls one argument ``avg_conv_kernel`` and has :attr:`is_second_order`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moving averages of the gradient and the squared diagonal.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        hessian_power: k in [0, 1].
        update_each: Hutchinson frequency.
        n_samples: probes averaged in a Hessian step.
        avg_conv_kernel: average over convolution kernels.
        faithful: move elements that have had no curvature by m / eps, as the original does.
        backend: as for :class:`~adahessian_fused.AdaHessian`.

    Raises:
        ValueError, TypeError: as for :class:`~adahessian_fused.AdaHessian`.
    """

    attributes: ClassVar[dict[str, str]] = {name: name for name in ("update_each", "n_samples", "avg_conv_kernel")}

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
        avg_conv_kernel: bool = False,
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
            update_each=update_each,
            n_samples=n_samples,
            average_conv_kernel=avg_conv_kernel,
            faithful=faithful,
            backend=backend,
        )

    @property
    def avg_conv_kernel(self) -> bool:
        """Whether the diagonal is averaged over convolution kernels."""
        return self.average_conv_kernel

    @property
    def is_second_order(self) -> bool:
        """True: timm's training script then calls ``backward(create_graph=True)``."""
        return True


def register(name: str = "fusedadahessian") -> None:
    """Let ``timm.optim.create_optimizer_v2(model, opt=name)`` make :class:`Adahessian`.

    Args:
        name: what to call it; "adahessian" takes the place of timm's own.

    Raises:
        ImportError: there is no timm, or it has no registry of optimizers (older than 1.0.12).
        ValueError: the name has an underscore, which timm reads as the end of a prefix such as "lookahead_".

    Example:
        >>> from adahessian_fused import compat
        >>> compat.timm.register()  # doctest: +SKIP
        >>> opt = timm.optim.create_optimizer_v2(model, opt="fusedadahessian", lr=0.1)  # doctest: +SKIP
    """
    if "_" in name:
        raise ValueError(f"name={name!r}; expected no underscore, timm takes what precedes one for a prefix")
    try:
        from timm.optim import OptimInfo
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        raise ImportError(
            f"timm's registry of optimizers cannot be imported ({error}); expected timm >= 1.0.12. Without it, make "
            "adahessian_fused.compat.timm.Adahessian yourself"
        ) from error
    info = OptimInfo(
        name=name,
        opt_class=Adahessian,
        description="AdaHessian on fused kernels",
        has_betas=True,
        second_order=True,
    )
    default_registry.register(info)
