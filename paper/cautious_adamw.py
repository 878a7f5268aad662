"""AdamW by the recipe's two rules of momentum: what they are worth without curvature."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class CautiousAdamW(torch.optim.Optimizer):
    """Take AdamW's steps (Loshchilov and Hutter 2019) with Nesterov's momentum, and cautiously (Liang et al. 2024).

    Both as in :func:`adahessian_fused.reference.adahessian_step`: Nesterov's average is divided by its weights' sum,
    and elements that would move against their gradient's descent stay, without a factor that makes up for them.

    Args:
        params: as in ``torch.optim.AdamW``, all of them with gradients in every step.
        lr, betas, eps, weight_decay: likewise.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter."""
        for group in self.param_groups:
            params, lr, (beta1, beta2) = group["params"], group["lr"], group["betas"]
            group["step"] += 1
            if group["step"] == 1:
                for p in params:
                    self.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            grads = [p.grad for p in params]
            m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            torch._foreach_lerp_(m, grads, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            numerators = torch._foreach_lerp(m, grads, 1 - beta1)
            opposed = [n * g <= 0 for n, g in zip(numerators, grads, strict=True)]
            denominators = torch._foreach_div(v, 1 - beta2 ** group["step"])
            torch._foreach_sqrt_(denominators)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_div_(numerators, denominators)
            for numerator, those in zip(numerators, opposed, strict=True):
                numerator.masked_fill_(those, 0)
            torch._foreach_add_(params, numerators, alpha=-lr / (1 - beta1 ** (group["step"] + 1)))
