"""Trajectories of the AdaHessians people have, given the same probes; and where their bugs would show in ours."""

from __future__ import annotations

import functools
import itertools

import originals
import pytest
import torch
from models import conv_net, fresh, mlp, train, weights
from published import AdaHessian
from tolerances import assert_trajectory, growth, nudge

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 10
SAME = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.05}


@functools.cache
def grows(make, averaging):
    (a, opt_a), (b, opt_b) = (fresh(make(), **SAME, averaging=averaging) for _ in range(2))
    nudge(a)
    return growth(train(opt_a, a, STEPS), train(opt_b, b, STEPS))


def assert_close(found, expected):
    """After STEPS steps, or a few more, of one of the models here with the options SAME."""
    cases = itertools.product((mlp, conv_net, originals.conv_net), ("abs", "signed"))
    assert_trajectory(found, expected, STEPS, max(itertools.starmap(grows, cases)))


def test_errors_grow_little(device):
    """Otherwise the bound would allow anything."""
    for make, averaging in itertools.product((mlp, conv_net, originals.conv_net), ("abs", "signed")):
        assert grows(make, averaging) < 1e6


# ---- AdaHessians under GradScaler ------------------------------------------------------------------------------------

SCALE = 2.0**16
PEERS = {"torch_optimizer": "Adahessian", "pytorch_optimizer": "AdaHessian", "adahessian_fused": "AdaHessian"}
peers = pytest.mark.parametrize(("package", "name"), PEERS.items(), ids=PEERS)


def steps_with_scaler(opt_class, scaler, device, overflow_at=None):
    """How far each of four steps on the sum of p^4 moves p; in one of them only Hz overflows with the loss scale."""
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], device=device))
    opt, moved = opt_class([p], lr=0.1, eps=1e-12, hessian_power=1.0), []
    for i in range(4):
        opt.zero_grad()
        before, loss = p.detach().clone(), p.pow(4).sum()
        if i == overflow_at:  # g = 2e24 overflows with neither, Hz = 2e36 with the scale
            loss = loss + (1e18 * (p - p.detach() + 1e-12)).square().sum()
        scaler.scale(loss).backward(create_graph=True)
        scaler.step(opt)
        scaler.update()
        moved.append((before - p.detach()).norm().item())
    return moved


@peers
def test_a_loss_scale_shrinks_their_steps_but_not_ours(device, package, name):
    """GradScaler unscales g, and they compute Hz from a loss that still carries the scale."""
    opt_class = getattr(pytest.importorskip(package), name)
    plain = steps_with_scaler(opt_class, torch.amp.GradScaler(device, enabled=False), device)
    scaled = steps_with_scaler(opt_class, torch.amp.GradScaler(device, init_scale=2.0**10), device)
    if package == "adahessian_fused":
        assert scaled == plain
    else:
        assert scaled[0] == pytest.approx(plain[0] / 2**10, rel=0.02)  # p resolves steps as small as that to 1 %


@peers
def test_an_overflow_in_the_curvature_ends_their_training_but_not_ours(device, package, name):
    opt_class = getattr(pytest.importorskip(package), name)
    scaler = torch.amp.GradScaler(device, init_scale=SCALE)
    moved = steps_with_scaler(opt_class, scaler, device, overflow_at=1)
    ours = package == "adahessian_fused"
    assert [step > 0 for step in moved] == [True, False, ours, ours]
    assert scaler.get_scale() == (SCALE / 2 if ours else SCALE)  # theirs goes on with the scale that was too large


# ---- mistakes of other fused optimizers ------------------------------------------------------------------------------
# Where each of them would show:
#   trailing empty tensor, zero-numel slots, 2^31 elements       cases.py, test_adahessian_step.py, test_ops.py
#   gradient strides differ; a sliced parameter's neighbours     test_optimizer_layout.py
#   found_inf ignored, double unscale                            test_amp.py
#   bf16 updates vanish                                          test_master_weights.py
#   step shared by parameters, states cast to bf16               test_state_loading.py
#   tensor lr, many groups                                       test_optimizer_conventions.py
#   a group added later is never stepped with master weights, step on the wrong device or of the wrong dtype: below


def test_a_group_added_later_is_stepped_with_master_weights(engine, device):
    model = mlp(torch.bfloat16, device)
    opt = AdaHessian(model[0].parameters(), lr=1e-3, master_weights=True, backend=engine)
    train(opt, model, 1)
    opt.add_param_group({"params": model[2:].parameters()})
    opt.param_groups[0]["lr"] = opt.param_groups[1]["lr"] = 0.1
    before = weights(model)
    train(opt, model, [1, 2])
    assert all((a != b).any() for a, b in zip(weights(model), before, strict=True))
    assert {str(opt.state[p]["master_param"].dtype) for p in model.parameters()} == {"torch.float32"}


@pytest.mark.parametrize("capturable", [False, True])
def test_counts_are_where_they_belong_after_loading(device, capturable):
    """PyTorch 103256: a loaded step count landed on the wrong device."""
    model, opt = fresh(mlp(torch.bfloat16, device), lr=1e-3, capturable=capturable)
    train(opt, model, 1)
    again = AdaHessian(model.parameters(), capturable=capturable)
    again.load_state_dict(opt.state_dict())
    train(again, model, [1])
    expected = device if capturable else "cpu"
    counts = [s[key] for s in again.state.values() for key in ("step", "hessian_step")]
    assert {(x.device.type, x.dtype, int(x)) for x in counts} == {(expected, torch.int64, 2)}
