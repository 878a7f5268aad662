"""What goes over the wire, overflows, wrong use, and ranks that fail; run by test_distributed.py."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_problem import (
    SETTINGS,
    STEPS,
    N,
    assert_close,
    backward,
    batch,
    bytes_reduced,
    everything,
    loss_of,
    make_model,
    same_bits,
    snapshot,
)
from published import AdaHessian
from ranks import Ranks, worlds
from torch import nn

from adahessian_fused import LongStepWarning, TrainStep, sharing
from adahessian_fused.distributed.ranks import CHECK_EACH

# ---- what goes over the wire -----------------------------------------------------------------------------------------


def check_traffic_is_one_and_one_bth(ranks):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 4))
    params = list(model.parameters())
    d, blocks = sum(p.numel() for p in params), sum(p.shape[:2].numel() if p.ndim == 4 else p.numel() for p in params)
    opt = AdaHessian(params, process_group=ranks.group, update_each=2)
    x, y = batch(0, dtype=torch.float32)

    def step():
        opt.zero_grad()
        opt.backward(loss_of(model, x, y))
        nn.utils.clip_grad_norm_(params, 0.1)  # which does not make gradients this rank's own
        opt.step()

    def backward_only():
        with opt.no_sync():
            opt.backward(loss_of(model, x, y))

    per_tensor = len(params)  # the number of ranks that have it travels along
    checksums = 2 * 8 * per_tensor  # once in a hundred steps with curvature
    alike = 2 * 8  # once
    clipped = 2 * 8  # a checksum of all gradients, in each step
    assert bytes_reduced(step) == alike + checksums + clipped + 4 * (d + per_tensor + blocks + per_tensor)
    assert bytes_reduced(step) == clipped + 4 * (d + per_tensor)
    assert bytes_reduced(step) == clipped + 4 * (d + per_tensor + blocks + per_tensor)
    assert bytes_reduced(step) == clipped + 4 * (d + per_tensor)
    assert bytes_reduced(backward_only) == 0


def check_gradients_travel_while_products_are_computed(ranks):
    model, (x, y) = make_model(), batch(0)
    opt = AdaHessian(model.parameters(), process_group=ranks.group)
    order = []
    reduce, differentiate = dist.all_reduce, sharing.products
    sharing.products = lambda *args, **kwargs: (order.append("Hz"), differentiate(*args, **kwargs))[1]

    def all_reduce(tensor, *args, async_op=False, **kwargs):
        order.append(f"{tensor.numel()} async={async_op}")
        return reduce(tensor, *args, async_op=async_op, **kwargs)

    dist.all_reduce = all_reduce
    try:
        opt.backward(loss_of(model, x, y))
    finally:
        dist.all_reduce, sharing.products = reduce, differentiate
    d = sum(p.numel() + 1 for p in model.parameters())
    assert order == ["2 async=False", f"{d} async=True", "Hz"]  # the first looks whether all ranks have the same


# ---- GradScaler ------------------------------------------------------------------------------------------------------


def check_all_ranks_skip_if_one_overflows(ranks):
    for style, unscale_first in ((s, u) for s in ("backward", "scaled", "create_graph") for u in (False, True)):
        model = make_model(torch.float32)
        opt = AdaHessian(model.parameters(), process_group=ranks.group, update_each=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(4):
            x, y = batch(step, dtype=torch.float32)
            loss = loss_of(model, x, y)
            if step >= 2 and ranks.rank == ranks.size - 1:
                loss = loss * torch.inf
            before = [p.clone() for p in model.parameters()]
            opt.zero_grad()
            if style == "backward":
                opt.backward(loss, grad_scaler=scaler)
            elif style == "scaled":
                opt.backward(scaler.scale(loss))
            else:
                scaler.scale(loss).backward(create_graph=opt.needs_hessian)
            if unscale_first:
                opt.unscale_(scaler)
            scaler.step(opt)
            scaler.update()
            assert all(map(torch.equal, before, model.parameters())) == (step >= 2)
        assert scaler.get_scale() == 2.0**8
        assert opt.param_groups[0]["step"] == 2
        assert same_bits(everything(model, opt), ranks.group)


def check_all_ranks_skip_if_the_curvature_of_one_overflows(ranks):
    """The gradient is finite, the second derivative of x^1.5 at 0 is not."""
    for unscale_first in (False, True):
        model, (x, y) = make_model(torch.float32), batch(0, dtype=torch.float32)
        model[5].bias.data.zero_()
        opt = AdaHessian(model.parameters(), process_group=ranks.group)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        before = [p.clone() for p in model.parameters()]
        loss = loss_of(model, x, y)
        if ranks.rank == ranks.size - 1:
            loss = loss + model[5].bias.pow(1.5).sum()
        opt.backward(loss, grad_scaler=scaler)
        if unscale_first:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        assert all(map(torch.equal, before, model.parameters()))


# ---- errors ----------------------------------------------------------------------------------------------------------


@worlds(2)
def check_wrong_use_is_named(ranks):
    model, (x, y) = make_model(), batch(0)
    with pytest.raises(TypeError, match=r"process_group is a str; expected a torch\.distributed process group"):
        AdaHessian(model.parameters(), process_group="nccl")
    first = dist.new_group([0])
    if ranks.rank > 0:
        with pytest.raises((ValueError, TypeError), match="process_group"):
            AdaHessian(model.parameters(), process_group=first)
    opt = AdaHessian(model.parameters(), process_group=ranks.group)
    with pytest.raises(ValueError, match="batch_size=-1; expected a number of examples"):
        opt.backward(loss_of(model, x, y), batch_size=-1)
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match="this step needs curvature"):
        opt.step()
    opt.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, x, y)).backward(create_graph=True)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"scaler\.unscale_\(opt\) has looked at the gradients of this rank alone"):
        scaler.step(opt)


def hooked_backward(opt, model, x, y):
    with opt.hook_backward():
        loss_of(model, x, y).backward()


PASSES = {
    "opt.backward": lambda opt, model, x, y: opt.backward(loss_of(model, x, y)),
    "closure": lambda opt, model, x, y: opt.step(lambda: loss_of(model, x, y)),
    "create_graph": lambda opt, model, x, y: (loss_of(model, x, y).backward(create_graph=True), opt.step()),
    "hooked": hooked_backward,
    "TrainStep": lambda opt, model, x, y: TrainStep(model, nn.functional.cross_entropy, opt, compile=False)(x, y),
    "weight": lambda opt, model, x, y: opt.batch_weight(len(x)),
}


@worlds(2)
def check_one_of_several_processes_has_to_say_what_it_is(ranks):
    x, y = batch(0)
    for name, run in PASSES.items():
        model = make_model()
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=rf"one of {ranks.size} processes, .* process_group=\"alone\" if this"):
            run(AdaHessian(model.parameters()), model, x, y)
        assert all(map(torch.equal, before, model.parameters())), name
        opt = AdaHessian(model.parameters(), process_group="alone", seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", LongStepWarning)  # as pytest does
            assert bytes_reduced(lambda: run(opt, model, x + ranks.rank, y)) == 0  # noqa: B023 - called at once


@worlds(2)
def check_different_parameters_are_an_error_before_the_first_step(ranks):
    x, y = batch(0, dtype=torch.float32)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = make_model().to(dtype)
        if ranks.rank == ranks.size - 1:
            with torch.no_grad():  # the last bit of one element
                p = model[3].weight[2, 4]
                p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
        opt = AdaHessian(model.parameters(), process_group=ranks.group)
        before = snapshot(model, opt)
        opt.backward(loss_of(model, x.to(dtype), y))
        with pytest.raises(RuntimeError, match=r"parameter 2 of group 0 is not the same on all ranks"):
            opt.step()
        assert all(map(torch.equal, before[0], everything(model, opt)[: len(before[0])]))


@worlds(2)
def check_ranks_that_train_other_parameters_are_an_error(ranks):
    """Which would add up numbers of different parameters, or end the process."""
    x, y = batch(0)
    for name, run in PASSES.items():
        model = make_model()
        opt = AdaHessian(model.parameters(), process_group=ranks.group)
        if ranks.rank == ranks.size - 1:
            model[0].requires_grad_(False)
        if name != "weight":
            with pytest.raises(RuntimeError, match=r"do not train the same parameters: this one trains \d"):
                run(opt, model, x, y)


@worlds(2)
def check_parameters_that_drift_apart_later_are_noticed(ranks):
    model, (x, y) = nn.Linear(36, 3).double(), batch(0)
    opt = AdaHessian(model.named_parameters(), process_group=ranks.group)
    for _ in range(CHECK_EACH):
        opt.step(lambda: loss_of(model, x.flatten(1), y))
    if ranks.rank == 0:
        model.bias.data[1] += 1e-9
    with pytest.raises(RuntimeError, match=r"bias is not the same on all ranks"):
        opt.step(lambda: loss_of(model, x.flatten(1), y))


def _clipped_over_two(model, share, other, hooked, **options):
    """A generator of steps of an optimizer beside another one, with a norm over the parameters of both."""
    opts = [AdaHessian(model[:3].parameters(), **SETTINGS, **options), other(model[3:])]
    for step in range(STEPS):
        x, y = batch(step)
        for opt in opts:
            opt.zero_grad()
        loss = loss_of(model, x[share], y[share])
        with contextlib.ExitStack() as hooks:
            for opt in opts[:hooked]:
                hooks.enter_context(opt.hook_backward())
            loss.backward() if hooked else opts[0].backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        for opt in opts:
            opt.step()
        yield step


@worlds(2)
def check_a_norm_over_gradients_that_are_not_averaged_is_an_error(ranks):
    """It scales the averaged ones apart, in the first step and in one without curvature."""
    for hooked, first in itertools.product((0, 1), (0, 1)):
        model = make_model()
        another = lambda part: AdaHessian(part.parameters(), **SETTINGS, process_group=ranks.group)  # noqa: E731
        plain = lambda part: torch.optim.SGD(part.parameters(), 0.1)  # noqa: E731
        steps = _clipped_over_two(model, ranks.share(N), (another, plain)[first], hooked, process_group=ranks.group)
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"gradient of parameter 0 of group 0 was averaged .* differ"):
            next(steps)
        assert all(map(torch.equal, before, model.parameters()))


def check_two_hooked_optimizers_are_clipped_by_one_norm(ranks):
    options, share = {"process_group": ranks.group, "probe_per_rank": False}, ranks.share(N)
    model, expected = make_model(), make_model()
    for part, group in ((share, options), (slice(N), {"process_group": "alone"})):
        other = lambda last: AdaHessian(last.parameters(), **SETTINGS, **group)  # noqa: B023, E731
        list(_clipped_over_two(model if part is share else expected, part, other, 2, **group))
    assert_close(model, expected)
    assert same_bits(list(model.parameters()), ranks.group)


# ---- ranks that fail -------------------------------------------------------------------------------------------------


def _trained(ranks: Ranks, group) -> tuple[nn.Module, AdaHessian]:
    model, (x, y) = make_model(), batch(0)
    opt = AdaHessian(model.parameters(), process_group=group, lr=0.05)
    backward(model, opt, x, y)
    return model, opt


def _nothing_happened(model, opt, before) -> bool:
    tensors, steps = snapshot(model, opt)
    return all(map(torch.equal, tensors, before[0])) and steps == before[1]


@worlds(2)
def check_a_hanging_rank_is_an_error_on_the_others(ranks):
    seconds = 1.5
    for last_call in ("nothing", "backward"):
        group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
        model, opt = _trained(ranks, group)
        before, (x, y) = snapshot(model, opt), batch(1)
        opt.zero_grad()
        start = time.monotonic()
        if ranks.rank == ranks.size - 1:
            if last_call == "backward":
                opt.backward(loss_of(model, x, y))
            time.sleep(seconds + 1)
        else:
            with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):  # noqa: PT012 - either of them
                opt.backward(loss_of(model, x, y))
                assert last_call == "backward"
                opt.step()
            assert time.monotonic() - start < 2 * seconds
        assert _nothing_happened(model, opt, before)


@worlds(3, kills=True)
def check_a_rank_that_dies_is_an_error_on_the_others(ranks):
    model, opt = _trained(ranks, ranks.group)
    before, (x, y) = snapshot(model, opt), batch(1)
    opt.zero_grad()
    opt.backward(loss_of(model, x, y))
    if ranks.rank == ranks.size - 1:
        os._exit(1)
    with pytest.raises(RuntimeError):
        opt.step()
    assert _nothing_happened(model, opt, before)
