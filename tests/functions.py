"""autograd.Functions as people write them: with a second derivative, and without one in every way there is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def function(forward: Callable, backward: Callable, **attributes) -> type[Function]:
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Custom", (Function,), methods | attributes)


def kinds(of: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> dict[str, type[Function]]:
    """Functions of x, of which only the first can be differentiated twice; some of the others do not say so."""

    def keeps(kept: Callable[[Tensor], Tensor]) -> Callable:
        def forward(ctx, x):
            ctx.save_for_backward(kept(x))
            return of(x)

        return forward

    def hides(kept: Callable[[Tensor], object]) -> Callable:
        def forward(ctx, x):
            ctx.x = kept(x.detach())
            return of(x)

        return forward

    def backward(ctx, g):
        return g * slope(ctx.saved_tensors[0])

    def in_numpy(ctx, g):
        return torch.from_numpy(g.detach().numpy() * slope(torch.from_numpy(ctx.x[0])).numpy())

    def by_inner_backward(ctx, g):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(of(x), x, g)[0]

    whole = keeps(lambda x: x)
    return {
        "complete": function(whole, backward),
        "detached": function(hides(lambda x: x), lambda ctx, g: g * slope(ctx.x)),
        "numpy": function(hides(lambda x: [x.numpy()]), in_numpy),
        "once_differentiable": function(whole, once_differentiable(backward)),
        "no_grad": function(whole, torch.no_grad()(backward)),
        "inner_backward": function(whole, by_inner_backward),
        "intermediate": function(keeps(slope), lambda ctx, g: g * ctx.saved_tensors[0]),
        "data": function(whole, lambda ctx, g: g * slope(ctx.saved_tensors[0].data)),
    }
