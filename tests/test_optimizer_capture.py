"""capturable=True: the same as without, and on a GPU steps can be captured in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from models import assert_same, fresh, mlp, train
from published import AdaHessian
from tolerances import assert_within, unit
from torch import nn

OPTIONS = {
    "plain": {},
    "every_third": {"update_each": 3},
    "samples": {"n_samples": 2, "block_size": "row"},
    "tensor_lr": {"lr": torch.tensor(0.125)},
    "warmup": {"warmup": 3},
    "nesterov_cautious": {"nesterov": True, "cautious": True},
    "warmup_of_a_tensor": {"lr": torch.tensor(0.125), "warmup": 3},
}


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_capturable_changes_nothing(engine, device, options):
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), backend=engine, capturable=c, **options) for c in (True, False))
    found, expected = train(opt_a, a, 4), train(opt_b, b, 4)
    if device == "cpu":
        assert_same(found, expected)
    else:  # beta^t is the device's in one and the host's in the other
        for x, y in zip(found, expected, strict=True):
            assert_within(x, y, 32 * unit(x.dtype) * float(y.abs().max()), "parameter")
    counts = [[int(opt.state[p]["hessian_step"]) for p in m.parameters()] for opt, m in ((opt_a, a), (opt_b, b))]
    assert counts[0] == counts[1]
    assert {opt_a.state[p]["step"].device.type for p in a.parameters()} == {device}


@pytest.mark.parametrize(
    "option",
    [{"probe": "gaussian"}, {"off_step": "stale", "update_each": 2}, {"shrink": 1.0}, {"nonfinite": "raise"}],
    ids=lambda option: next(iter(option)),
)
def test_what_cannot_be_captured_is_refused(option):
    with pytest.raises(ValueError, match=r"capturable=True with \w+=\"?[\w.]+\"?; expected"):
        AdaHessian([nn.Parameter(torch.ones(2))], capturable=True, **option)


def static_problem(device, **options):
    """Parameters, their (static) gradients and diagonals, and an optimizer."""
    params = [nn.Parameter(torch.linspace(-1, 1, n, device=device).reshape(-1, 5)) for n in (40, 5, 1000)]
    for p in params:
        p.grad = torch.cos(p.detach() * 3)
    diagonals = [torch.sin(p.detach() * 5) for p in params]
    return params, diagonals, AdaHessian(params, capturable=True, block_size="row", **options)


def step(opt, diagonals, with_curvature):
    opt.step(hessian=diagonals if with_curvature else None)


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("kind", ["hessian_step", "off_step"])
def test_a_captured_step_equals_an_eager_one(engine, device, kind):
    if device != "cuda":
        pytest.skip("needs --device cuda")
    if engine == "reference":
        pytest.skip("the reference reads its counts on the host")
    lr = torch.tensor(0.1, device=device)
    eager, captured = (static_problem(device, lr=lr.clone(), update_each=1000, backend=engine) for _ in range(2))
    stream = torch.cuda.Stream()
    for _, d, opt in (eager, captured):  # warm up: buckets, tables and counts are made here
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(opt, d, True)
            step(opt, d, kind == "hessian_step")
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured[2], captured[1], kind == "hessian_step")
    for i in range(5):
        for opt in (eager[2], captured[2]):
            opt.param_groups[0]["lr"].fill_(0.1 / (i + 1))
        graph.replay()
        step(eager[2], eager[1], kind == "hessian_step")
    assert_same([p.detach() for p in captured[0]], [p.detach() for p in eager[0]])
    for key in ("step", "hessian_step", "exp_avg", "exp_hessian_diag_sq"):
        assert_same([captured[2].state[p][key] for p in captured[0]], [eager[2].state[p][key] for p in eager[0]])


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_step_does_not_wait_for_the_gpu(engine, device, found_inf):
    if device != "cuda":
        pytest.skip("needs --device cuda")
    if engine == "reference":
        pytest.skip("the reference reads its counts on the host")
    params, diagonals, opt = static_problem(device, lr=torch.tensor(0.1, device=device), backend=engine)
    step(opt, diagonals, True)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0, device=device), torch.tensor(found_inf, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(opt, diagonals, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(opt.state[params[0]]["step"]) == 2 - found_inf
