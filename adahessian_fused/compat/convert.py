"""From a live optimizer of another package to the drop-in for it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..optimizer import AdaHessian
from . import davda54, official, pytorch_optimizer, timm, torch_optimizer
from .base import DropIn

# The end of the module's name and the class's. The last two are single files that people copy into their projects.
ORIGINALS: dict[tuple[str, str], type[DropIn]] = {
    ("torch_optimizer.adahessian", "Adahessian"): torch_optimizer.Adahessian,
    ("pytorch_optimizer.optimizer.adahessian", "AdaHessian"): pytorch_optimizer.AdaHessian,
    ("timm.optim.adahessian", "Adahessian"): timm.Adahessian,
    ("optim_adahessian", "Adahessian"): official.Adahessian,
    ("ada_hessian", "AdaHessian"): davda54.AdaHessian,
}


def accelerate(optimizer: Optimizer, *, like: type[DropIn] | None = None, **options: Any) -> AdaHessian:
    """Turn a live AdaHessian of another package into the drop-in for it; training goes on where it was.

    Parameters, groups, options, moving averages and step counts are taken over. The given optimizer must not be
    stepped any more, for both have the same parameters. Learning-rate schedulers that hold it are told by
    ``scheduler.optimizer = opt``; hooks are not taken over.

    Args:
        optimizer: of torch-optimizer, pytorch-optimizer, timm, the official repository (``optim_adahessian``) or
            davda54 (``ada_hessian``), recognised by the names of its class and module. One of this package is returned
            as it is.
        like: the drop-in class, for a copy of an original that goes by another name.
        options: what the drop-in's constructor has and the original's has not: ``backend``, ``faithful``.

    Returns:
        The drop-in from :mod:`adahessian_fused.compat`.

    Raises:
        TypeError: the optimizer is none of these, or the drop-in does not have one of the options.

    Example:
        >>> opt = adahessian_fused.accelerate(opt)  # doctest: +SKIP
    """
    if isinstance(optimizer, AdaHessian):
        return optimizer
    return (like or _drop_in(type(optimizer))).from_original(optimizer, **options)


def _drop_in(cls: type) -> type[DropIn]:
    for (module, name), drop_in in ORIGINALS.items():
        if cls.__name__ == name and f".{cls.__module__}".endswith(f".{module}"):
            return drop_in
    known = ", ".join(f"{module}.{name}" for module, name in ORIGINALS)
    raise TypeError(
        f"accelerate() got a {cls.__module__}.{cls.__qualname__}; expected one of {known}. For a copy of one of them "
        "under another name, pass like=adahessian_fused.compat.<origin>.<class>; for one of Adam's family, "
        "adahessian_fused.AdaHessian(...).load_state_dict(opt.state_dict())"
    )
