"""Loss, gradients and Hessian-vector products of one step, as one function that can be traced or captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .. import hvp
from ..fraction import split_batch
from ..friendly import curvature_friendly

Probe = Callable[[list[int], int], Sequence[Tensor]]


class Derivatives(NamedTuple):
    """What a step computes before its update; gradients and products carry the factor ``scale``."""

    loss: Tensor
    grads: list[Tensor | None]  # of all parameters
    probed: list[int]  # numbers of the parameters that have a product
    products: list[list[Tensor]]  # for each sample, of those


class Whole(nn.Module):
    """Model and loss in one; the inputs may be one argument of the model, or a tuple or dict of several."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        """The loss of a batch."""
        if isinstance(inputs, dict):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)
        return self.loss_fn(outputs, targets)


@dataclass(frozen=True)
class Kind:
    """Everything but numbers that decides what a step computes: steps of one kind can share a graph.

    Python values that the model's own code looks at are not among it.
    """

    due: tuple[int, ...]  # numbers of the parameters that need curvature
    n_samples: int
    hvp_dtype: hvp.Precision | None
    fraction: float
    autocast: tuple[str, bool, torch.dtype]
    scaled: bool
    training: tuple[bool, ...]  # mode of every module
    structure: pytree.TreeSpec  # of the batch
    constants: tuple[Any, ...]  # what is no tensor in it
    tensors: tuple[Any, ...]  # shape, strides, dtype and device of all tensors

    def differentiate(
        self, loss_of: Callable[..., Tensor], params: Sequence[Tensor], batch: Any, probe: Probe, scale: Tensor | None
    ) -> Derivatives:
        """Differentiate a loss once, and a second time if any parameter is due.

        With a fraction r < 1 the batch is cut in two: the gradient is made of both parts, with weights r and 1 - r, and
        the products are those of the first.

        Args:
            loss_of: the mean loss of a batch.
            params: leaves of its graph.
            batch: (inputs, targets).
            probe: the probes z of the parameters with these numbers, for a sample.
            scale: GradScaler's factor on the loss.
        """
        first, rest, share = split_batch(batch, self.fraction) if self.due else (batch, None, 1.0)
        loss, grads = self._gradients(loss_of, params, first, scale, create_graph=bool(self.due))
        probed = [i for i in self.due if grads[i] is not None and grads[i].requires_grad]
        products = []
        for sample in range(self.n_samples if probed else 0):
            z, roots = probe(probed, sample), [grads[i] for i in probed]
            with hvp.second_pass(self.hvp_dtype, roots):
                found = torch.autograd.grad(
                    roots,
                    [params[i] for i in probed],
                    z,
                    retain_graph=sample + 1 < self.n_samples,
                    allow_unused=True,
                    materialize_grads=True,
                )
            products.append(list(found))
        grads = [g if g is None else g.detach() for g in grads]
        if share < 1:
            rest_loss, rest_grads = self._gradients(loss_of, params, rest, scale, create_graph=False)
            loss = loss.lerp(rest_loss, 1 - share)
            grads = [_mean(g, other, share) for g, other in zip(grads, rest_grads, strict=True)]
        return Derivatives(loss, grads, probed, products)

    def _gradients(
        self,
        loss_of: Callable[..., Tensor],
        params: Sequence[Tensor],
        batch: Any,
        scale: Tensor | None,
        *,
        create_graph: bool,
    ) -> tuple[Tensor, list[Tensor | None]]:
        device, enabled, dtype = self.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
            if create_graph:
                with curvature_friendly():
                    loss = loss_of(*batch)
            else:
                loss = loss_of(*batch)
        if loss.numel() != 1:
            raise RuntimeError(f"the loss has shape {tuple(loss.shape)}; expected one number, for example its mean")
        with torch.autocast(device, enabled=False):
            scaled = loss if scale is None else loss * scale
            if create_graph:
                grads = hvp.first_order(scaled, params, None)
            else:
                grads = list(torch.autograd.grad(scaled, params, allow_unused=True))
        return loss.detach(), grads


def _mean(a: Tensor | None, b: Tensor | None, share: float) -> Tensor | None:
    """Mean of two gradients, ``share`` the weight of the first; None is zero."""
    if a is not None and b is not None:
        return a.lerp(b, 1 - share)
    return a * share if a is not None else None if b is None else b * (1 - share)


class Flat:
    """A kind of step as a function from a list of tensors to a list of tensors, for tracing and capturing.

    Inputs: the parameters, the module's buffers (updated in place), the probes of each sample for each parameter that
    is due, the scale if there is one, and the tensors of the batch. ``found`` says afterwards what the outputs are.
    """

    def __init__(self, kind: Kind, whole: Whole, names: Sequence[str], buffers: Sequence[str]) -> None:
        self.kind, self._whole, self._names, self._buffers = kind, whole, names, buffers
        self.found: Derivatives | None = None  # with None or anything else in the place of tensors

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Loss, gradients and products, those that there are."""
        rest = list(tensors)

        def take(n: int) -> list[Tensor]:
            taken = rest[:n]
            del rest[:n]
            return taken

        kind = self.kind
        params = [p.detach().requires_grad_() for p in take(len(self._names))]
        buffers = take(len(self._buffers))
        probes = [dict(zip(kind.due, take(len(kind.due)), strict=True)) for _ in range(kind.n_samples)]
        scale = take(1)[0] if kind.scaled else None
        leaves = iter(rest)
        batch = [next(leaves) if c is Tensor else c for c in kind.constants]
        state = dict(zip([*self._names, *self._buffers], [*params, *buffers], strict=True))
        d = kind.differentiate(
            lambda *batch: functional_call(self._whole, state, batch),
            params,
            pytree.tree_unflatten(batch, kind.structure),
            lambda numbers, sample: [probes[sample][i] for i in numbers],
            scale,
        )
        present = [g if g is None else True for g in d.grads]
        self.found = Derivatives(None, present, d.probed, [])  # type: ignore[arg-type]
        return [d.loss, *(g for g in d.grads if g is not None), *(h for sample in d.products for h in sample)]

    def unpack(self, outputs: Sequence[Tensor]) -> Derivatives:
        """The outputs in their places."""
        loss, *others = outputs
        rest = iter(others)
        grads = [None if g is None else next(rest) for g in self.found.grads]
        n_samples = self.kind.n_samples if self.found.probed else 0
        products = [[next(rest) for _ in self.found.probed] for _ in range(n_samples)]
        return Derivatives(loss, grads, self.found.probed, products)
