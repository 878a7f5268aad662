"""Elements that have a gradient and no curvature, none yet or none that is finite."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from originals import DROP_INS
from published import AdaHessian
from torch import nn

from adahessian_fused.hessian_step import HessianStep

INF, NAN = math.inf, math.nan


def leaf(*values: float, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64, device=device))


def step(opt: AdaHessian, p: torch.Tensor, g: list[float], d: list[float] | None) -> None:
    """A step with this gradient and this diagonal; an off-step without one."""
    p.grad = torch.tensor(g).to(p)
    if d is None:
        opt.step()
    else:
        opt.step(hessian=[torch.tensor(d).to(p)])


# ---- not measured yet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_curvature_an_element_waits_and_then_moves_with_its_momentum(every_engine, device, weight_decay):
    p = leaf(1.0, 2.0, device=device)
    opt = AdaHessian([p], lr=0.1, update_each=3, weight_decay=weight_decay, backend=every_engine)
    step(opt, p, [1.0, 0.0], [2.0, 0.0])
    for g in (1.0, 1.0):
        step(opt, p, [0.0, g], None)
        assert p[1] == 2.0
    assert opt.state[p]["exp_avg"][1].item() == pytest.approx(1 - 0.9**2)
    step(opt, p, [0.0, 1.0], [0.0, 4.0])
    v_hat = 0.001 * 16 / (1 - 0.999**2)
    m_hat = (1 - 0.9**3) / (1 - 0.9**4)
    assert p[1].item() == pytest.approx(2 - 0.1 * weight_decay * 2 - 0.1 * m_hat / (math.sqrt(v_hat) + 1e-4))


def test_rows_seen_between_hessian_steps_do_not_jump(every_engine, device):
    torch.manual_seed(0)
    embedding, out = nn.Embedding(40, 4, device=device), nn.Linear(4, 40, device=device)
    opt = AdaHessian([*embedding.parameters(), *out.parameters()], update_each=10, backend=every_engine)
    for rows in (torch.arange(0, 20), torch.arange(20, 40)):
        before = embedding.weight.detach().clone()
        opt.zero_grad()
        opt.backward(nn.functional.cross_entropy(out(embedding(rows.to(device))), rows.to(device)))
        opt.step()
        moved = (embedding.weight.detach() - before).abs().amax(1)
    assert moved[20:].max() == 0
    assert opt.state[embedding.weight]["exp_avg"][20:].abs().amin() > 0
    assert moved[:20].min() > 0  # whose momentum goes on


@pytest.mark.parametrize("way", ["fraction", "micro_batches"])
def test_rows_of_the_part_without_curvature_do_not_jump(way, device):
    torch.manual_seed(0)
    embedding, out = nn.Embedding(64, 4, device=device), nn.Linear(4, 64, device=device)
    options = {"hessian_fraction": 0.25} if way == "fraction" else {}
    opt = AdaHessian([*embedding.parameters(), *out.parameters()], **options)
    x, before = torch.randperm(64, device=device), embedding.weight.detach().clone()
    loss_fn = lambda x: nn.functional.cross_entropy(out(embedding(x)), x)  # noqa: E731
    if way == "fraction":
        opt.backward_split(loss_fn, x)
    else:
        for i in range(4):
            opt.backward(loss_fn(x[16 * i : 16 * i + 16]) / 4, curvature=0 if i else 4)
    opt.step()
    moved = (embedding.weight.detach() - before).abs().amax(1)
    assert moved[x[16:]].max() == 0
    assert moved[x[:16]].min() > 0


LINEAR = {
    "hold": ({}, 0.0),
    "move": ({"unmeasured": "move"}, 0.1 / 1e-4),
    "power_0": ({"hessian_power": 0.0}, 0.1 / (1 + 1e-4)),
}


@pytest.mark.parametrize(("options", "moved"), LINEAR.values(), ids=LINEAR)
def test_a_parameter_that_enters_the_loss_linearly(every_engine, device, options, moved):
    p, q = leaf(1.0, device=device), leaf(1.0, device=device)
    opt = AdaHessian([p, q], lr=0.1, backend=every_engine, **options)
    for _ in range(3):
        before, before_q = p.detach().clone(), q.detach().clone()
        opt.zero_grad()
        opt.backward(p.sum() + q.pow(2).sum())
        opt.step()
        assert (before - p).item() == pytest.approx(moved)
    assert q < 1
    together, alone = opt.statistics().update_norm.item(), (before_q - q).item()
    assert together == pytest.approx(math.hypot(moved, alone))


@pytest.mark.parametrize("cls", DROP_INS.values(), ids=DROP_INS)
def test_drop_ins_divide_by_eps_as_their_originals_only_if_faithful(cls):
    for faithful, expected in ((False, 1.0), (True, 1 - 0.1 / 1e-2)):
        p = leaf(1.0)
        opt = cls([p], lr=0.1, eps=1e-2, faithful=faithful)
        opt.backward(p.sum())
        opt.step()
        assert p.item() == pytest.approx(expected)


# ---- not finite ------------------------------------------------------------------------------------------------------


def named(device: str, **options):
    p, q = leaf(1.0, 2.0, 3.0, 4.0, device=device), leaf(1.0, device=device)
    return p, q, AdaHessian([("first", p), ("second", q)], lr=0.1, **options)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e200])
@pytest.mark.parametrize("block_size", [1, 2])
def test_an_element_goes_on_with_the_curvature_it_had(every_engine, device, bad, block_size):
    p = leaf(1.0, 2.0, 3.0, 4.0, device=device)
    opt = AdaHessian([p], lr=0.1, block_size=block_size, backend=every_engine)
    step(opt, p, [1.0] * 4, [1.0, 2.0, 3.0, 4.0])
    other, v = copy.deepcopy(opt), opt.state[p]["exp_hessian_diag_sq"].clone()
    q = other.param_groups[0]["params"][0]
    with pytest.warns(UserWarning, match="the curvature of parameter 0 of group 0 is infinite or NaN"):
        step(opt, p, [1.0] * 4, [1.0, bad, 3.0, 4.0])
    step(other, q, [1.0] * 4, [1.0, 2.0, 3.0, 4.0])
    kept = [False, True, False, False] if block_size == 1 else [True, True, False, False]
    now = opt.state[p]["exp_hessian_diag_sq"]
    assert torch.equal(now[kept], v[kept])
    fine = [not k for k in kept]
    assert torch.equal(now[fine], other.state[q]["exp_hessian_diag_sq"][fine])
    assert torch.equal(p[fine], q[fine])
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(p) - 0.1 / ((v / 0.001).sqrt() + 1e-4)
    expected -= 0.1 / ((v / (1 - 0.999**2)).sqrt() + 1e-4)  # m_hat = 1
    torch.testing.assert_close(p[kept], expected[kept])


def norm_at_zero(opt: AdaHessian, base: nn.Module, adapter: nn.Module) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    opt.zero_grad()
    opt.backward(nn.functional.mse_loss(base(x) + adapter(x), y) + 0.1 * adapter.weight.norm())


def test_a_norm_at_zero_leaves_the_model_finite_and_is_told_once():
    torch.manual_seed(0)
    base, adapter = nn.Linear(3, 1), nn.Linear(3, 1, bias=False)
    nn.init.zeros_(adapter.weight)
    opt = AdaHessian([*base.named_parameters(), ("adapter", adapter.weight)], lr=0.1)
    for i in range(3):
        nn.init.zeros_(adapter.weight)
        norm_at_zero(opt, base, adapter)
        with warnings.catch_warnings(record=True) as told:
            warnings.filterwarnings("always", "the curvature of")
            opt.step()
        assert [str(w.message).startswith("the curvature of adapter is") for w in told] == [True] * (i == 0)
        assert all(p.isfinite().all() for p in (*base.parameters(), adapter.weight))
        found = opt.statistics()
        assert found.missed == 3 * (i + 1)
        assert {name: int(n) for name, n in found.missed_in.items() if n} == {"adapter": 3 * (i + 1)}


@pytest.mark.filterwarnings("ignore:the curvature of")
def test_counts_stay_when_parameters_join(engine, device):
    p, q, opt = named(device, backend=engine)
    p.grad = torch.ones_like(p)
    opt.step(hessian=[torch.tensor([NAN, 1.0, INF, 1.0]).to(p), None])
    q.grad = torch.ones_like(q)
    opt.step(hessian=[torch.ones_like(p), torch.full_like(q, NAN)])
    found = opt.statistics()
    assert {name: int(n) for name, n in found.missed_in.items()} == {"first": 2, "second": 1}
    assert found.as_dict()["missed"] == 3


def test_raise_changes_nothing_and_names_the_parameter(engine, device):
    p, q, opt = named(device, nonfinite="raise", backend=engine)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step(hessian=[torch.ones_like(p), torch.ones_like(q)])
    for way in ("given", "loss"):
        opt.zero_grad()
        before = copy.deepcopy([p, q, opt.state_dict()["state"]])
        if way == "given":
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
            call = lambda: opt.step(hessian=[torch.ones_like(p), torch.full_like(q, NAN)])  # noqa: E731
        else:
            opt.backward(p.pow(2).sum() + (q - q.detach()).norm())
            call = opt.step
        with pytest.raises(RuntimeError, match="curvature of second is infinite or NaN, and nothing has been changed"):
            call()
        torch.testing.assert_close([p, q, opt.state_dict()["state"]], before, rtol=0, atol=0)
    opt.zero_grad()
    opt.backward(p.pow(2).sum() + q.pow(2).sum())
    opt.step()


@pytest.mark.filterwarnings("ignore:the curvature of")
def test_stale_steps_go_on_with_the_last_finite_diagonal(engine, device):
    p = leaf(1.0, 2.0, device=device)
    opt = AdaHessian([p], lr=0.1, update_each=2, off_step="stale", backend=engine)
    for i, d in enumerate(([1.0, 2.0], None, [3.0, NAN], None)):
        step(opt, p, [1.0, 1.0], d)
        assert torch.equal(opt.state[p]["hessian_diag"], torch.tensor([1.0 if i < 2 else 3.0, 2.0]).to(p))


@pytest.mark.filterwarnings("ignore:the curvature of")
def test_samples_and_micro_batches(engine, device):
    p, q, opt = named(device, n_samples=2, backend=engine)
    for _ in range(2):
        opt.backward(p.pow(2).sum() + (q - q.detach()).norm())
    opt.step()
    assert {name: int(n) for name, n in opt.statistics().missed_in.items()} == {"first": 0, "second": 1}
    assert all(x.isfinite().all() for x in (p, q, opt.state[q]["exp_hessian_diag_sq"]))


# ---- rounding --------------------------------------------------------------------------------------------------------


def test_ranks_with_probes_of_their_own_round_states_alike(engine, device, monkeypatch):
    """With the same averaged gradients and diagonals states in bfloat16 must not drift apart."""
    states = []
    for rank in range(2):
        p = nn.Parameter(torch.linspace(-1, 1, 301, device=device))
        opt = AdaHessian([p], state_dtype=torch.bfloat16, seed=5, backend=engine)
        monkeypatch.setattr(HessianStep, "probe_seed", property(lambda step, rank=rank: 5 + 17 * rank))
        for i in range(3):
            p.grad = torch.sin((i + 2) * p.detach())
            opt.step(hessian=[torch.cos((i + 2) * p.detach())])
        states.append([p.detach(), opt.state[p]["exp_avg"], opt.state[p]["exp_hessian_diag_sq"]])
    assert all(map(torch.equal, *states))
