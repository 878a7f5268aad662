"""GradScaler and autocast. Scales are powers of two: scaling and unscaling is exact, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from models import assert_same, fresh, loss_of, mlp, train, weights
from published import AdaHessian
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")


def scaler_for(device, scale=1024.0, **options):
    return torch.amp.GradScaler(device, init_scale=scale, **options)


def create_graph(opt, loss, scaler):
    scaler.scale(loss).backward(create_graph=True)


def backward_of_scaled(opt, loss, scaler):
    opt.backward(scaler.scale(loss))


def backward_with_scaler(opt, loss, scaler):
    opt.backward(loss, grad_scaler=scaler)


def backward_and_unscale(opt, loss, scaler):
    opt.backward(loss, grad_scaler=scaler)
    scaler.unscale_(opt)


def unscaled(way):
    def way_and_unscale(opt, loss, scaler):
        way(opt, loss, scaler)
        opt.unscale_(scaler)

    return way_and_unscale


def hooked(opt, loss, scaler):
    with opt.hook_backward():
        scaler.scale(loss).backward()


SCALED = {f.__name__: f for f in (create_graph, backward_of_scaled, backward_with_scaler, hooked)}
WAYS = {**SCALED, **{f"{name}_unscale": unscaled(f) for name, f in SCALED.items()}}
WAYS["backward_with_scaler_unscale_of_torch"] = backward_and_unscale
OPTIONS = {
    "plain": {},
    "blocks": {"block_size": 4, "averaging": "abs"},
    "samples": {"n_samples": 2, "block_size": 4},
    "stale": {"update_each": 3, "off_step": "stale"},
    "gaussian": {"probe": "gaussian"},
    "capturable": {"capturable": True, "update_each": 2},
}


def scaled_training(way, opt, model, scaler, steps=4, clip=None):
    for i in range(steps):
        opt.zero_grad()
        way(opt, loss_of(model, i), scaler)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(opt)
        scaler.update()
    return weights(model)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_scaling_changes_nothing(device, way, options):
    (a, opt_a), (b, opt_b) = (fresh(mlp(torch.float32, device), **options) for _ in range(2))
    growing = scaler_for(device, growth_interval=1)  # the scale doubles at every step
    assert_same(scaled_training(way, opt_a, a, growing), train(opt_b, b, 4))


@pytest.mark.parametrize("options", ["plain", "stale"])
@pytest.mark.parametrize("way", [name for name in WAYS if "unscale" in name])
def test_scaling_does_not_change_a_clipped_step(device, way, options):
    (a, opt_a), (b, opt_b) = (fresh(mlp(torch.float32, device), **OPTIONS[options]) for _ in range(2))
    growing, off = scaler_for(device, growth_interval=1), scaler_for(device, enabled=False)
    found = scaled_training(WAYS[way], opt_a, a, growing, clip=2.0**-4)
    assert_same(found, scaled_training(backward_with_scaler, opt_b, b, off, clip=2.0**-4))


@pytest.mark.parametrize("way", SCALED.values(), ids=SCALED)
def test_micro_batches_with_scaling(device, way):
    found = []
    for scaler in (scaler_for(device), scaler_for(device, enabled=False)):
        model, opt = fresh(mlp(torch.float32, device))
        for i in range(3):
            way(opt, loss_of(model, i), scaler)
        scaler.step(opt)
        found.append(weights(model))
    assert_same(*found)


@pytest.mark.parametrize("order", [(None, "scaler"), ("scaler", None)], ids=["without_first", "with_first"])
def test_one_step_has_one_way_to_scale(device, order):
    model, opt = fresh(mlp(torch.float32, device))
    scaler = scaler_for(device)
    opt.backward(loss_of(model), grad_scaler=order[0] and scaler)
    with pytest.raises(RuntimeError, match="grad_scaler for some losses of this step"):
        opt.backward(loss_of(model, 1), grad_scaler=order[1] and scaler)


@pytest.mark.parametrize("way", SCALED.values(), ids=SCALED)
def test_asking_for_amp_support_changes_nothing(device, way):
    """Reading the attribute that GradScaler reads completes the curvature, and that is all."""
    found = []
    for times in (2, 0):
        model, opt = fresh(mlp(torch.float32, device), n_samples=2)
        scaler = scaler_for(device)
        for i in range(2):
            opt.zero_grad()
            way(opt, loss_of(model, i), scaler)
            for _ in range(times):
                assert opt._step_supports_amp_scaling is True
            scaler.step(opt)
            scaler.update()
        found.append(weights(model))
    assert_same(*found)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("way", SCALED.values(), ids=SCALED)
def test_float16_curvature_below_its_range_is_not_lost(engine, device, way, block):
    """G = 2^-26 p and Hz = 2^-26 are zero in float16; with the scale they are not."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float16, device=device))
    opt = AdaHessian([p], lr=2.0**-4, betas=(0.0, 0.0), eps=0.0, block_size=block, backend=engine)
    scaler = scaler_for(device, 2.0**16)
    loss = (p.float().square() * 2.0**-27).sum()
    way(opt, loss, scaler)
    scaler.step(opt)
    assert torch.equal(p, torch.full_like(p, 1 - 2.0**-4))
    assert torch.equal(opt.hessian_diag(p), torch.full_like(p, 2.0**-26, dtype=torch.float32))


@pytest.mark.parametrize("way", [create_graph, backward_of_scaled], ids=lambda f: f.__name__)
def test_unscale_without_the_scaler_says_what_to_write(device, way):
    model, opt = fresh(mlp(torch.float32, device))
    scaler, before = scaler_for(device), weights(model)
    way(opt, loss_of(model), scaler)
    scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match=r"write opt\.unscale_\(scaler\) instead"):
        scaler.step(opt)
    assert_same(weights(model), before)


def test_external_curvature_is_not_scaled(engine, device):
    p = nn.Parameter(torch.ones(3, device=device))
    opt, scaler = AdaHessian([p], lr=1.0, betas=(0.0, 0.0), eps=0.0, backend=engine), scaler_for(device)
    scaler.scale((4 * p).sum()).backward()
    scaler.step(opt, hessian=[torch.full_like(p, 8.0)])
    assert torch.equal(p, torch.full_like(p, 0.5))


# ---- infinities ------------------------------------------------------------------------------------------------------

# With a scale of 2^16: g overflows, but not Hz; or Hz, but not g.
OVERFLOWS = {
    "in_g": lambda p: (1e36 * p + p**2).sum(),
    "in_Hz": lambda p: (1e18 * (p - p.detach() + 1e-12)).square().sum(),
}


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("overflow", OVERFLOWS.values(), ids=OVERFLOWS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_infinity_skips_the_whole_step(device, way, overflow, options):
    """Neither weights nor states nor counts change, and the next probe is the one the skipped step would have used."""
    (a, opt_a), (b, opt_b) = (fresh(mlp(torch.float32, device), **options) for _ in range(2))
    scaler = scaler_for(device, 2.0**16)
    scaled_training(way, opt_a, a, scaler, 1)
    before = copy.deepcopy([dict(s) for s in opt_a.state_dict()["state"].values()])
    opt_a.zero_grad()
    way(opt_a, loss_of(a, 5) + overflow(a[0].weight), scaler)
    scaler.step(opt_a)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    for state, old in zip(opt_a.state_dict()["state"].values(), before, strict=True):
        assert_same(list(state.values()), list(old.values()))
    train(opt_a, a, [1, 2])
    assert_same(weights(a), train(opt_b, b, 3))


@pytest.mark.parametrize("way", [*SCALED.values(), backward_and_unscale], ids=lambda f: f.__name__)
def test_an_infinity_in_the_second_micro_batch_lowers_the_scale(device, way):
    model, opt = fresh(mlp(torch.float32, device))
    scaler = scaler_for(device, 2.0**16)
    (backward_with_scaler if way is backward_and_unscale else way)(opt, loss_of(model), scaler)
    way(opt, OVERFLOWS["in_Hz"](model[0].weight), scaler)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**15


def test_without_a_loss_scale_gradients_are_left_alone(device):
    """Infinite curvature is no infinite gradient, and does not reach the states."""
    p = nn.Parameter(torch.ones(3, device=device))
    opt = AdaHessian([p])
    opt.backward((1e20 * (p - p.detach() + 1e-12)).square().sum())
    assert p.grad.isfinite().all()
    opt.step()
    assert not opt.state[p]["exp_hessian_diag_sq"].any()


@pytest.mark.parametrize("hvp", ["autograd", "forward_over_reverse"])
def test_closures_carry_no_scale(device, hvp):
    model, opt = fresh(mlp(torch.float32, device), hvp=hvp, update_each=2)
    answers = []

    def closure():
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        answers.append(opt._step_supports_amp_scaling)
        return loss

    for _ in range(2):
        opt.step(closure)
    assert (answers, opt._step_supports_amp_scaling) == ([False, False], True)


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
def test_external_curvature_that_is_not_finite_skips_the_step(device, capturable):
    p = nn.Parameter(torch.ones(3, device=device))
    opt, scaler = AdaHessian([p], capturable=capturable), scaler_for(device)
    scaler.scale((4 * p).sum()).backward()
    scaler.step(opt, hessian=[torch.tensor([1.0, torch.nan, 1.0], device=device)])
    scaler.update()
    assert torch.equal(p, torch.ones_like(p))
    assert scaler.get_scale() == 1024.0  # which it has nothing to do with


@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("update_each", [2, 3])
def test_skipped_steps_do_not_count_for_the_schedule(device, update_each, capturable):
    p, due = nn.Parameter(torch.ones(3, device=device)), []
    opt, scaler = AdaHessian([p], update_each=update_each, capturable=capturable), scaler_for(device)
    for bad in (False, True, True, False, False):
        opt.zero_grad()
        due.append(opt.needs_hessian)
        opt.backward(p.square().sum() * (float("inf") if bad else 1.0), grad_scaler=scaler)
        scaler.step(opt)
        scaler.update()
    assert due == [True, False, False, False, update_each == 2]


def test_a_resumed_run_may_begin_with_a_skipped_step(device):
    p = nn.Parameter(torch.ones(3, device=device))
    opt, scaler = AdaHessian([p]), scaler_for(device)
    opt.step(lambda: p.square().sum())
    resumed, before = AdaHessian([p]), p.detach().clone()
    resumed.load_state_dict(opt.state_dict())
    resumed.backward(p.square().sum() * float("inf"), grad_scaler=scaler)
    scaler.step(resumed)
    assert torch.equal(p, before)
