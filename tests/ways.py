"""Every way to take a step, for all tests: ``way(opt, loss, *batch)`` with a loss that is a function of the batch.

``then`` is called between the backward pass and the update, where users clip gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from adahessian_fused import TrainStep

Way = Callable[..., object]


def outside(differentiate: Callable) -> Way:
    """A way that differentiates before ``opt.step()``."""

    def way(opt, loss, *batch, then=lambda: None):
        opt.zero_grad()
        differentiate(opt, loss, *batch)
        then()
        return opt.step()

    return way


def in_closure(differentiate: Callable, zero: dict | None = {}, returns: bool = True) -> Way:  # noqa: B006
    """A way that differentiates in the closure of ``opt.step(closure)``."""

    def way(opt, loss, *batch, then=lambda: None):
        def closure():
            if zero is not None:
                opt.zero_grad(**zero)
            value = loss(*batch)
            differentiate(opt, value)
            then()
            return value if returns else None

        return opt.step(closure)

    return way


def hook_backward(opt, loss, *batch):
    with opt.hook_backward():
        loss(*batch).backward()


WAYS: dict[str, Way] = {
    "create_graph": outside(lambda opt, loss, *batch: loss(*batch).backward(create_graph=True)),
    "needs_hessian": outside(lambda opt, loss, *batch: loss(*batch).backward(create_graph=opt.needs_hessian)),
    "backward": outside(lambda opt, loss, *batch: opt.backward(loss(*batch))),
    "closure_returns_loss": in_closure(lambda opt, value: None, zero=None),
    "closure_zeroes_returns_loss": in_closure(lambda opt, value: None),
    "closure_zeroes_in_place": in_closure(lambda opt, value: None, zero={"set_to_none": False}),
    "closure_standard": in_closure(lambda opt, value: value.backward()),
    "closure_retains_graph": in_closure(lambda opt, value: value.backward(retain_graph=True)),
    "closure_create_graph": in_closure(lambda opt, value: value.backward(create_graph=True)),
    "closure_opt_backward": in_closure(lambda opt, value: opt.backward(value)),
    "closure_returns_nothing": in_closure(lambda opt, value: value.backward(), returns=False),
    "function": outside(lambda opt, loss, *batch: opt.backward(lambda: loss(*batch))),
    "hook_backward": outside(hook_backward),
    "backward_split": outside(lambda opt, loss, *batch: opt.backward_split(loss, *batch)),
    "train_step": lambda opt, loss, *batch: TrainStep(loss, opt, compile=False)(*batch),
}


def scaled(opt, loss, *batch, then=lambda: None):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    opt.zero_grad()
    opt.backward(scaler.scale(loss(*batch)))
    then()
    scaler.step(opt)
    scaler.update()


def micro_batches(opt, loss, *batch):
    for part in (0.25, 0.75):
        opt.backward(loss(*batch) * part)


def diagonal(opt, loss, *batch):
    """Any numbers."""
    opt.zero_grad()
    loss(*batch).backward()
    opt.step(hessian=[p.detach().square() for group in opt.param_groups for p in group["params"]])


def by_hand(opt, loss, *batch):
    """The definition: D = z * Hz of the optimizer's parameters, by plain double backward."""
    opt.zero_grad()
    value, own = loss(*batch), [p for group in opt.param_groups for p in group["params"]]
    value.backward(retain_graph=True)  # of all leaves there are
    if not opt.needs_hessian:
        return opt.step()
    z = opt.coming_step.draw(own, 0)
    products = torch.autograd.grad(torch.autograd.grad(value, own, create_graph=True), own, z)
    return opt.step(hessian=[a * b for a, b in zip(z, products, strict=True)])


MORE = {"scaled": scaled, "micro_batches": outside(micro_batches), "diagonal": diagonal, "by_hand": by_hand}
EVERY = WAYS | MORE
STYLES = [name for name in WAYS if name not in ("backward_split", "train_step")]  # the loss need not have a batch
