"""AdaHessian in plain PyTorch, written like the published implementations: what the fused one is compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class PlainAdaHessian(torch.optim.Optimizer):
    """AdaHessian (Yao et al. 2021, Algorithm 1), one parameter after the other, with PyTorch's random numbers.

    After ``loss.backward(create_graph=True)``. Convolution kernels are averaged over their spatial axes (Eq. 7).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def draw(self, params: list[Tensor]) -> list[Tensor]:
        """Return a Rademacher probe z for every parameter."""
        return [torch.randint_like(p, high=2) * 2 - 1 for p in params]

    def diagonals(self, params: list[Tensor]) -> list[Tensor]:
        """D = z * Hz (Eq. 6) of every parameter, averaged over the kernels of convolutions."""
        z = self.draw(params)
        hz = torch.autograd.grad([p.grad for p in params], params, grad_outputs=z)
        d = [z_i * hz_i for z_i, hz_i in zip(z, hz, strict=True)]
        return [d_i.mean((2, 3), keepdim=True).expand_as(d_i) if d_i.dim() == 4 else d_i for d_i in d]

    def step(self) -> None:
        """One step."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        diagonals = dict(zip(params, self.diagonals(params), strict=True))
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p in diagonals:
                        self.update(p, diagonals[p], group)

    def update(self, p: Tensor, d: Tensor, group: dict) -> None:
        """Update the moving averages and one parameter, with bias correction (Eq. 8, 9)."""
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_hessian_diag_sq=torch.zeros_like(p))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
        v = state["exp_hessian_diag_sq"].mul_(beta2).addcmul_(d, d, value=1 - beta2)
        denominator = (v.sqrt() / (1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))
