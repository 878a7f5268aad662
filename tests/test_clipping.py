"""Clipped gradients: m shrinks, the curvature does not, in every style of stepping and with a loss scale or without."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import assert_same, batch, fresh, loss_of, mlp
from published import AdaHessian
from tolerances import assert_within, unit
from torch import nn
from ways import EVERY, WAYS

from adahessian_fused import LongStepWarning

pytestmark = pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")

MAX_NORM = 2.0**-4


def clip(model):
    assert nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM) > MAX_NORM


def clip_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 2.0**-7)


def clip_out_of_place(model):
    for p in model.parameters():
        with torch.no_grad():
            p.grad.copy_(p.grad * 0.125)


# ---- the styles; ``change`` is what happens to the gradients ---------------------------------------------------------


def stepping(name):
    def style(opt, model, change):
        loss = lambda x, y: (model(x) - y).square().mean()  # noqa: E731
        EVERY[name](opt, loss, *batch(0, model), then=lambda: change(model))

    return style


def pre_hook(opt, model, change):
    handle = opt.register_step_pre_hook(lambda *unused: change(model))
    WAYS["backward"](opt, lambda: loss_of(model))
    handle.remove()


GIVEN = ("needs_hessian", "backward", "function", "backward_split", "closure_standard", "closure_create_graph")
GIVEN += ("micro_batches",)
STYLES = {"pre_hook": (pre_hook, {})} | {n: (stepping(n), {}) for n in GIVEN}
STYLES |= {f"{n}-forward": (stepping(n), {"hvp": "forward_over_reverse"}) for n in ("function", "closure_standard")}
STYLES["function-differences"] = stepping("function"), {"hvp": "finite_difference"}
STYLES["backward_split-quarter"] = stepping("backward_split"), {"hessian_fraction": 0.25}
CHANGES = {f.__name__: f for f in (clip, clip_value, clip_out_of_place)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("style", "options"), STYLES.values(), ids=STYLES)
def test_the_gradient_is_clipped_and_the_curvature_is_not(device, style, options, change):
    (model, opt), (other, other_opt) = (fresh(mlp(device=device), betas=(0.0, 0.0), **options) for _ in range(2))
    style(opt, model, change)
    style(other_opt, other, lambda model: None)
    m, whole = ([o.state[p]["exp_avg"] for p in o.param_groups[0]["params"]] for o in (opt, other_opt))
    change_by_hand = nn.ParameterList(whole)
    for p, g in zip(change_by_hand, whole, strict=True):
        p.grad = g.clone()
    change(change_by_hand)
    assert_same(m, [p.grad for p in change_by_hand])
    assert any((a != b).any() for a, b in zip(m, whole, strict=True))
    assert_same(*([o.hessian_diag(p) for p in o.param_groups[0]["params"]] for o in (opt, other_opt)))


# ---- with a loss scale -----------------------------------------------------------------------------------------------


GATHER = {
    "loss": lambda opt, loss, scaler: opt.backward(scaler.scale(loss)),
    "scaler": lambda opt, loss, scaler: opt.backward(loss, grad_scaler=scaler),
    "hooked": lambda opt, loss, scaler: scaler.scale(loss).backward(),
    "create_graph": lambda opt, loss, scaler: scaler.scale(loss).backward(create_graph=opt.needs_hessian),
}


@pytest.mark.parametrize("gather", GATHER)
@pytest.mark.parametrize(("unscaled", "clipped"), [(False, True), (True, True), (False, False)])
def test_clipping_scaled_gradients_is_said_once(device, gather, unscaled, clipped):
    model, opt = fresh(mlp(torch.float32, device), update_each=2)
    scaler, said = torch.amp.GradScaler(device, init_scale=1024.0), []
    handle = opt.hook_backward() if gather == "hooked" else None
    for i in range(4):
        opt.zero_grad()
        GATHER[gather](opt, loss_of(model, i), scaler)
        if unscaled:
            opt.unscale_(scaler)
        if clipped:
            clip(model)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", LongStepWarning)
            assert opt._step_supports_amp_scaling  # as others ask
            scaler.step(opt)
        said += [str(warning.message) for warning in found]
        scaler.update()
    if handle is not None:
        handle.remove()
    assert len(said) == (clipped and not unscaled)
    assert all("write opt.unscale_(scaler) before clip_grad_norm_" in text for text in said)


def test_float16_gradients_cannot_be_unscaled(device):
    """As with every optimizer; and a step that is taken all the same is the right one."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float16, device=device))
    opt, scaler = AdaHessian([p], lr=0.25, eps=0.0), torch.amp.GradScaler(device, init_scale=1024.0)
    opt.backward(scaler.scale(p.float().square().sum()))
    with pytest.raises(ValueError, match="FP16"):
        opt.unscale_(scaler)
    scaler.step(opt)
    assert torch.equal(p, torch.full_like(p, 0.75))
    assert_within(opt.hessian_diag(p), torch.full_like(p, 2.0), 12 * unit(p.dtype) * 2, "diagonal")
