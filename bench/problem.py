"""The tensors of a case."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .cases import Case


class Problem:
    """Starting points, gradients and Hessian-vector products of a case, which all contestants share.

    Args:
        case: what to make.
        device: "cpu" or "cuda".
        seed: of the numbers.
    """

    def __init__(self, case: Case, device: str, seed: int = 0) -> None:
        self.case, self.device = case, device
        self._generator = torch.Generator(device).manual_seed(seed)
        self.start, self.grads, self.hessians = ([self._normal(shape) for shape in case.shapes] for _ in range(3))

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        tensor = self._empty(shape)
        return tensor.copy_(torch.randn(shape, generator=self._generator, device=self.device))

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        """Memory whose head is misaligned by the case's shift."""
        flat = torch.empty(math.prod(shape) + self.case.shift, dtype=self.case.dtype, device=self.device)
        contiguous = torch.empty(shape, device="meta").stride()
        # No view: some peers detach gradients in place, which views do not allow.
        return flat.new_empty(0).set_(flat.untyped_storage(), self.case.shift, shape, contiguous)

    def params(self) -> list[Parameter]:
        """Fresh parameters with their gradients."""
        params = [Parameter(self._empty(p.shape).copy_(p)) for p in self.start]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        return params

    def grouped(self, params: list[Parameter]) -> list[dict[str, Any]]:
        """Return the parameters in as many groups as the case has, in their order."""
        n, groups = len(params), self.case.groups
        return [{"params": params[i * n // groups : (i + 1) * n // groups]} for i in range(groups)]
