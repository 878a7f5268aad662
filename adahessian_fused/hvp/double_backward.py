"""Hessian-vector products by double backward (Pearlmutter 1994; paper Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from ..distributed.sharded import any_sharded, joined, part_of
from ..looks import requires_grad
from .complete import examined, refuse
from .errors import naming_the_operator
from .graph import Graph, explore
from .precision import NOTHING, Precision, second_pass
from .treatment import are_hooked, without_hooks

_PLAIN = {Tensor, torch.nn.Parameter}

NO_CURVATURE = (
    "this step needs curvature, but no gradient carries a graph. Write opt.backward(loss) instead of loss.backward(), "
    "or loss.backward(create_graph=opt.needs_hessian), or opt.step(closure) with a closure that returns the loss; or "
    "call opt.hook_backward() once, where a trainer calls loss.backward()"
)

CLEARED = (
    "this step needs curvature, but the gradients are zeros without a graph: zero_grad(set_to_none=False) has cleared "
    "them after the backward pass, and their curvature with them. Call opt.zero_grad() before opt.backward(loss) or "
    "after opt.step(), not between; where loss.backward() has made these zeros, write opt.backward(loss) instead"
)

USED = (
    "this step needs curvature, but its gradients are still those of the last step, which has used theirs. Compute the "
    "loss and call opt.backward(loss) anew before each opt.step()"
)

MIXED = (
    "loss.backward() has added to gradients of this step without their curvature. Write opt.backward(loss) for every "
    "loss of a step, with curvature=0 where none is wanted, or call opt.hook_backward() once before training; or "
    "opt.zero_grad() first, if those gradients are not meant to stay"
)

TWO_WAYS = (
    "opt.backward(loss) has gathered curvature for this step, but some gradients carry the graph of a "
    "loss.backward(create_graph=True) too. Use one of the two, with opt.zero_grad() between"
)

SPENT = (
    "the graph of the gradients has been used up, by a step() that failed while it differentiated it, or by another "
    "pass through it. Call opt.zero_grad(), then compute the loss and loss.backward(create_graph=True) again"
)

NO_LOSS = (
    "the closure returned {} without a graph and left the gradients alone; expected it to return the loss, or to call "
    "backward() and return the loss"
)

NEEDS_FUNCTION = (
    'hvp="{}" computes the loss itself when curvature is due; write opt.backward(lambda: loss_fn(model(x), y)) or '
    "opt.step(closure) instead of opt.backward(loss) or loss.backward()"
)


def differentiable(grads: Sequence[Tensor | None]) -> list[int]:
    """Return indices of the gradients to differentiate again; others have a zero Hessian row or no graph."""
    return [i for i, grad in enumerate(grads) if grad is not None and grad.requires_grad]


def has_graph(grads: Iterable[Tensor]) -> bool:
    """Tell whether any of the gradients can be differentiated again."""
    return requires_grad(grads)


def hessian_vector_product(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    z: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    precision: Precision | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute Hz for the probe z, as the gradient of <g, z>.

    Args:
        grads: gradients with their graph, for parameters that have one.
        params: the same parameters.
        z: probe, shapes of ``params``.
        retain_graph: keep the graph for another probe; otherwise it is freed while it is walked.
        precision: of the products, as AdaHessian's ``hvp_dtype``.

    Returns:
        One tensor a parameter; None where the gradients do not depend on it.

    Raises:
        RuntimeError: an operator of the model cannot be differentiated twice; the message names it and the ways out.
    """
    hooked = are_hooked(params)
    with naming_the_operator("autograd"), second_pass(precision, grads), without_hooks(params) if hooked else NOTHING:
        found = _gradients(grads, params, z, retain_graph=retain_graph, create_graph=False)
    if any([h is not None and h._is_zerotensor() for h in found]):  # noqa: C419  faster than a generator
        # Autograd's zeros (of abs and sign, twice) have no memory.
        return tuple(h.clone() if h is not None and h._is_zerotensor() else h for h in found)
    return found


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], **options: bool
) -> tuple[Tensor | None, ...]:
    """Call ``torch.autograd.grad`` or, where all tensors are plain ones, what it ends in.

    Before that it looks at every tensor, for some 30 microseconds.
    """
    if not set(map(type, chain(outputs, inputs, seeds))) <= _PLAIN or not inputs:
        return torch.autograd.grad(outputs, inputs, grad_outputs=seeds, allow_unused=True, **options)
    places = options["retain_graph"], options["create_graph"], tuple(inputs), True
    return _engine_run_backward(tuple(outputs), tuple(seeds), *places, accumulate_grad=False)


def first_order(
    loss: Tensor, params: Sequence[Tensor], gradient: Tensor | None, graph: Graph | None = None
) -> list[Tensor | None]:
    """Compute gradients of the loss with their graph; None for parameters the loss does not depend on.

    Args:
        loss: what to differentiate.
        params: by what.
        gradient: as in ``Tensor.backward``.
        graph: that of the loss, if it is at hand.

    Raises:
        RuntimeError: a gradient, or a part of one, cannot be differentiated again.
    """
    check_loss(loss, gradient)
    graph = graph or explore([loss])
    seed = torch.ones_like(loss) if gradient is None else gradient
    with naming_the_operator("autograd"):
        if not (graph.functions or graph.wrong or are_hooked(())):
            return list(_gradients([loss], params, [seed], retain_graph=True, create_graph=True))
        with examined(graph) as found:
            refuse(found)
            grads = _gradients([loss], params, [seed], retain_graph=True, create_graph=True)
        refuse(found)
    return list(grads)


def check_loss(loss: Any, gradient: Tensor | None) -> None:
    """Raise unless ``loss`` is something to differentiate."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss is a {type(loss).__name__}; expected a tensor")
    if not loss.requires_grad:
        raise RuntimeError("loss does not require grad; expected a model's output, computed with gradients enabled")
    if gradient is None and loss.numel() != 1:
        raise RuntimeError(f"loss has shape {tuple(loss.shape)}; expected one number, for example its mean")


def accumulate_grads(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], seed_gradient: Tensor | None = None
) -> None:
    """Add gradients to ``p.grad`` as loss.backward() does, without keeping their graph.

    Args:
        params: parameters.
        grads: their gradients; None is passed over.
        seed_gradient: what the backward pass started from, which must not become anybody's ``p.grad``.
    """
    if any_sharded(params):
        _accumulate_parts(params, grads)
        return
    first, added, old = [], [], []
    seen = set() if seed_gradient is None else {seed_gradient.data_ptr()}
    for p, g in zip(params, grads, strict=True):
        if g is None:
            continue
        g = g.detach()
        if p.grad is not None and p.grad._is_zerotensor():  # which cannot be added to
            p.grad = p.grad.clone()
        if p.grad is not None and p.grad.layout == g.layout:
            old.append(p.grad)
            added.append(g)
        elif p.grad is not None:
            first.append((p, p.grad.detach() + g))
        elif g.layout is not torch.strided:
            first.append((p, g))
        else:
            # Autograd may hand out one tensor twice, or an expanded one; p.grad has to be the parameter's own.
            # Its zeros without memory can neither be added to nor be read by kernels.
            shared = g.data_ptr() in seen or g.stride() != p.stride() or g._base is not None or g._is_zerotensor()
            seen.add(g.data_ptr())
            first.append((p, torch.empty_like(p, requires_grad=False).copy_(g) if shared else g))
    # Nothing below takes memory, so that an error leaves all gradients as they were.
    if old:
        with torch.no_grad():
            torch._foreach_add_(old, added)
    for p, grad in first:
        p.grad = grad


@torch.no_grad()
def _accumulate_parts(params: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    """Do the same for sharded parameters and their gradients, or this rank's part of those."""
    for p, part in zip(params, parts, strict=True):
        if part is None:
            continue
        own = part.detach().clone() if part.requires_grad else part  # autograd may have handed out one tensor twice
        g = joined(part_of(own, p), p)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.add_(g)


def release_graph(grads: Sequence[Tensor]) -> None:
    """Cut gradients from their graph: the cycle parameter -> gradient -> graph -> parameter keeps memory alive."""
    if has_graph(grads):
        for i in differentiable(grads):
            grads[i].detach_()
