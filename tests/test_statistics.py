"""opt.statistics() beside the same numbers the long way round, and what profilers show."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from models import batch, conv_net, fresh, loss_of, mlp, train, weights
from published import AdaHessian
from torch import nn

OPTIONS = {
    "plain": {},
    "power": {"hessian_power": 0.5, "eps": 1e-2},
    "every_second": {"update_each": 2, "off_step": "stale"},
    "cautious": {"nesterov": True, "cautious": True},
    "ascent": {"maximize": True, "lr": 1e-3},
    "capturable": {"capturable": True, "betas": (0.0, 0.9)},
}


def flat_norm(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors]).norm().item()


def two_groups(model, **options):
    params = list(model.parameters())
    return AdaHessian([{"params": params[:3]}, {"params": params[3:], "lr": 0.01}], **options)


def expected(params, before, opt):
    """From the parameters before and after, the gradients, and the diagonal as users see it."""
    diag = [opt.hessian_diag(p) for p in params]
    return {
        "param_norm": flat_norm(params),
        "grad_norm": flat_norm([p.grad for p in params]),
        "update_norm": flat_norm([p.detach() - old for p, old in zip(params, before, strict=True)]),
        "hessian_diag_norm": flat_norm(diag),
        "nonfinite": 0.0,
    }


def assert_agree(found, wanted):
    for name, value in wanted.items():
        # The update is the difference of parameters before and after, hence absolute.
        close = math.isclose(found[name], value, rel_tol=1e-9, abs_tol=1e-12)
        assert close, f"{name} is {found[name]}; expected {value}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [mlp, conv_net], ids=["mlp", "conv_net"])
def test_norms(engine, device, make, options):
    model = make(device=device)
    opt = two_groups(model, backend=engine, **options)
    for i in range(3):
        before = weights(model)
        train(opt, model, [i])
        statistics, params = opt.statistics(), list(model.parameters())
        assert_agree(statistics.as_dict(), expected(params, before, opt) | {"step": i + 1})
        halves = slice(0, 3), slice(3, None)
        for group, part, lr in zip(statistics.groups, halves, (opt.defaults["lr"], 0.01), strict=True):
            assert group.numel == sum(p.numel() for p in params[part])
            assert_agree(group.as_dict(), expected(params[part], before[part], opt) | {"lr": lr, "step": i + 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_have_norms_in_float32(device, dtype):
    p = nn.Parameter(torch.full((300,), 3e4, dtype=dtype, device=device))  # their norm is beyond float16
    opt = AdaHessian([p], lr=2.0**-3)
    p.grad = torch.full_like(p, 0.1)
    opt.step(hessian=[torch.ones_like(p)])
    found = opt.statistics()
    assert found.param_norm.dtype == found.grad_norm.dtype == torch.float32
    for norm, tensor in ((found.param_norm, p), (found.grad_norm, p.grad)):
        assert math.isclose(norm, flat_norm([tensor]), rel_tol=1e-6)
    # g = 0.1 rounded and D = 1: the exact update, not what is left of it in 16 bits.
    update = 2.0**-3 * p.grad[0].item() / (1 + 1e-4) * math.sqrt(300)
    assert math.isclose(found.update_norm, update, rel_tol=1e-6)


def test_names(device):
    model, opt = fresh(mlp(device=device))
    train(opt, model, 1)
    names = ["lr", "step", "hessian_step", "param_norm", "grad_norm", "update_norm", "hessian_diag_norm"]
    assert list(opt.statistics().as_dict()) == [*names, "nonfinite", "missed"]
    grouped = two_groups(model)
    train(grouped, model, 1)
    found = grouped.statistics().as_dict()
    assert "lr" not in found
    assert (found["group0/lr"], found["group1/lr"]) == (0.15, 0.01)
    assert {type(x) for x in found.values()} == {float}


def test_what_is_not_known_is_left_out(device):
    model, opt = fresh(mlp(device=device))
    assert set(opt.statistics().as_dict()) == {"param_norm"}
    train(opt, model, 2)
    before = opt.statistics().as_dict()
    again = AdaHessian(model.parameters())
    again.load_state_dict(opt.state_dict())
    for p in model.parameters():
        p.grad = None
    assert again.statistics().as_dict() == {k: before[k] for k in before if k not in ("lr", "grad_norm", "update_norm")}


def test_a_scheduler_between_step_and_statistics_changes_nothing(device):
    model, opt = fresh(mlp(device=device), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    train(opt, model, 1)
    before = opt.statistics().as_dict()
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.05
    assert opt.statistics().as_dict() == before


def test_only_what_the_last_step_moved_counts_as_update(device):
    model, opt = fresh(mlp(device=device))
    train(opt, model, 2)
    before = weights(model)
    opt.zero_grad()
    for p in list(model.parameters())[:2]:
        p.requires_grad_(False)
    opt.backward(loss_of(model, 3))
    opt.step()
    moved = flat_norm([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    assert_agree(opt.statistics().as_dict(), {"update_norm": moved})


def test_parameters_without_curvature_have_not_moved(device):
    model, opt = fresh(mlp(device=device), update_each=2)
    last = list(model.parameters())[-1].requires_grad_(False)
    train(opt, model, 1)
    last.requires_grad_(True)
    before = weights(model)
    train(opt, model, [1])
    moved = flat_norm([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    assert_agree(opt.statistics().as_dict(), {"update_norm": moved})


def test_a_skipped_step_is_not_the_last_step(device):
    model, opt = fresh(mlp(torch.float32, device))
    scaler = torch.amp.GradScaler(device)
    train(opt, model, 1)
    before = opt.statistics().update_norm
    opt.zero_grad()
    opt.backward(loss_of(model, 1) * math.inf, grad_scaler=scaler)
    scaler.step(opt)
    assert torch.equal(opt.statistics().update_norm, before)
    assert opt.statistics().step == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.filterwarnings("ignore:the curvature of")
def test_share_of_bad_elements(engine, device, bad):
    """A gradient that is not finite lasts; curvature does not reach the state and is counted."""
    p, q = (nn.Parameter(torch.ones(4, 4, device=device)) for _ in range(2))
    opt = AdaHessian([{"params": [p]}, {"params": [q]}], block_size="row", backend=engine)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    d = torch.ones_like(p)
    d[1, 2] = p.grad[0, 0] = bad
    opt.step(hessian=[d, torch.ones_like(q)])
    found = opt.statistics()
    assert (found.nonfinite, [group.nonfinite for group in found.groups]) == (1 / 32, [1 / 16, 0])
    assert (found.missed, [group.missed for group in found.groups]) == (4, [4, 0])


def test_statistics_change_nothing_and_wait_for_nothing(device):
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), capturable=True, clip=1.0) for _ in range(2))
    for i in range(3):
        train(opt_a, a, [i])
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            kept = opt_a.statistics()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        no_tensors = ("numel", "missed_in", "groups")
        scalars = [getattr(kept, f.name) for f in dataclasses.fields(kept) if f.name not in no_tensors]
        assert {(x.device.type, x.dim()) for x in scalars} == {(device, 0)}
        train(opt_b, b, [i])
    assert all(map(torch.equal, weights(a), weights(b)))
    first = kept.as_dict()
    train(opt_a, a, [3])
    assert kept.as_dict() == first  # not views of what the next step changes


# ---- profilers -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*profiler")
def test_profilers_name_the_ops_of_every_backend(every_engine, device):
    p = nn.Parameter(torch.ones(3, device=device))
    opt = AdaHessian([p], backend=every_engine, block_size=2, n_samples=2)
    opt.step(lambda: p.pow(3).sum())  # compiles
    loss = p.pow(3).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.backward(loss)
        opt.step()
    counts = {e.key: e.count for e in profile.key_averages()}
    ours = {key: n for key, n in counts.items() if key.startswith("adahessian_fused::")}
    ops = {"rademacher": 2, "hessian_diag": 2, "adahessian_step": 1}
    assert ours == {f"adahessian_fused::{op}": n for op, n in ops.items()}
    assert [counts[f"Optimizer.{method}#AdaHessian.{method}"] for method in ("backward", "step")] == [1, 1]


def test_without_a_profiler_no_range_is_opened(device, monkeypatch):
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda name: pytest.fail(name))
    model, opt = fresh(mlp(torch.float32, device), backend="reference")
    x, y = batch(0, model)
    opt.backward((model(x) - y).square().mean())
    monkeypatch.undo()
    opt.step()
