"""Whether a way's gradient and curvature are right: read off the states after its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adahessian_fused import split_batch
from adahessian_fused.layout import block_length
from adahessian_fused.reference import block_mean, rademacher_signs

from .problems import Problem
from .ways import BETAS, Way

# Relative errors in the 2-norm over all parameters, by autocast's dtype. Single precision moves ReLU's kinks, hence 2 %
# for curvature. bfloat16 rounds each activation and weight by up to 2^-9; some tens of such roundings in a row, and
# twice as many for a product, stay below these.
MOST = {None: (1e-3, 2e-2), torch.bfloat16: (5e-2, 1e-1)}


def exact(problem: Problem, fraction: float) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients and block-averaged z * Hz in float64, for the probe of our first step."""
    model = problem.fresh(torch.float64)
    params = list(model.parameters())
    inputs, targets = problem.batch
    batch = (inputs.double() if inputs.is_floating_point() else inputs, targets)
    first, rest, share = split_batch(batch, fraction)
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(problem.loss(model, *first), params, create_graph=True)
        zero = torch.zeros((), dtype=torch.int64, device=params[0].device)
        z = [rademacher_signs(p.numel(), i, zero, 0, 0).view(p.shape).to(p) for i, p in enumerate(params)]
        products = torch.autograd.grad(grads, params, z)
        grads = [share * g.detach() for g in grads]
        if share < 1:
            others = torch.autograd.grad(problem.loss(model, *rest), params)
            grads = [g + (1 - share) * o for g, o in zip(grads, others, strict=True)]
    d = [block_mean((z_i * h).flatten(), block_length(h.shape, "auto")) for z_i, h in zip(z, products, strict=True)]
    return grads, d


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative, in the 2-norm over all tensors."""
    difference = torch.stack([(a.double() - b).norm() for a, b in zip(found, expected, strict=True)]).norm()
    return float(difference / torch.stack([b.norm() for b in expected]).norm())


@contextmanager
def recorded() -> Iterator[list[tuple[list[Tensor], list[Tensor], list[Tensor]]]]:
    """Parameters, probes and products of the calls of autograd.grad that are given a probe."""
    calls, original = [], torch.autograd.grad

    def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
        found = original(outputs, inputs, grad_outputs, **options)
        if grad_outputs is not None:
            calls.append((list(inputs), [z.clone() for z in grad_outputs], [h.clone() for h in found]))
        return found

    with mock.patch("torch.autograd.grad", grad):
        yield calls


def product(problem: Problem, z: Sequence[Tensor]) -> list[Tensor]:
    """Hz in float64 along somebody else's probe."""
    model = problem.fresh(torch.float64)
    params = list(model.parameters())
    inputs, targets = problem.batch
    with sdpa_kernel(SDPBackend.MATH):
        loss = problem.loss(model, inputs.double() if inputs.is_floating_point() else inputs, targets)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return list(torch.autograd.grad(grads, params, [z_i.double() for z_i in z]))


def errors(
    problem: Problem, way: Way, model: nn.Module, step: Callable[[], Any], opt: torch.optim.Optimizer
) -> tuple[float, float | None]:
    """Take the first step; relative errors of the gradient and, for second-order ways, of its curvature.

    Ours are read off the optimizer's states: |Ds| along the probe that the float64 reference draws. A peer's product is
    recorded with the probe it drew.
    """
    params = list(model.parameters())
    with recorded() as calls:
        step()
    grads, d = exact(problem, way.fraction)
    if not way.second_order:
        return error([p.grad for p in params], grads), None
    state = [opt.state[p] for p in params]
    g = error([s["exp_avg"] / (1 - BETAS[0]) for s in state], grads)
    if not way.alternates:
        inputs, z, products = calls[-1]
        if [id(p) for p in inputs] != [id(p) for p in params]:
            raise RuntimeError(
                f"{way.name} differentiated {len(inputs)} tensors; expected the {len(params)} parameters"
            )
        return g, error(products, product(problem, z))
    magnitudes = []
    for p, s in zip(params, state, strict=True):
        root = (s["exp_hessian_diag_sq"] / (1 - BETAS[1])).sqrt().flatten()
        magnitudes.append(root[:: block_length(p.shape, "auto")])
    return g, error(magnitudes, [x.abs() for x in d])
