"""The three lines of a script that change with the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from adahessian_fused import AdaHessian, curvature_friendly


@dataclass(frozen=True)
class Script:
    """How a script takes its steps.

    Attributes:
        ours: arguments of AdaHessian, or None: the script keeps the optimizer that such scripts usually have.
    """

    ours: Mapping[str, Any] | None = None

    def optimizer(self, model: nn.Module, own: Callable[[Iterable[Tensor]], Optimizer]) -> Optimizer:
        """Return what ``own`` makes of a model's parameters, or AdaHessian, with the same betas if that has any."""
        usual = own(model.parameters())
        if self.ours is None:
            return usual
        betas = {name: value for name, value in usual.defaults.items() if name == "betas"}
        opt = AdaHessian(model.parameters(), **betas, **self.ours)
        curvature_friendly(model, opt)
        return opt

    def descend(self, opt: Optimizer, loss: Tensor, clip: float | None = None) -> float:
        """Differentiate and step; the loss as a number. ``clip`` bounds the norm of the gradient."""
        opt.zero_grad()
        if self.ours is None:
            loss.backward()
        else:
            opt.backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], clip)
        opt.step()
        return loss.item()
