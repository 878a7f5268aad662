"""Hutchinson's estimator: known diagonals, its expectation, its variance."""

from __future__ import annotations

import pytest
import torch
from models import assert_same, fresh, loss_of, mlp, probe, train, weights
from published import AdaHessian

from adahessian_fused import hutchinson_diagonal

H = torch.tensor(
    [[2.0, 1.0, -0.5, 0.25], [1.0, -3.0, 0.5, 1.0], [-0.5, 0.5, 4.0, 2.0], [0.25, 1.0, 2.0, 1.0]], dtype=torch.float64
)


def quadratic(device):
    h, p = H.to(device), torch.ones(4, dtype=torch.float64, device=device, requires_grad=True)
    return p, lambda: p @ h @ p / 2


@pytest.mark.parametrize("block_size", [1, 3, "tensor", 2**40])
@pytest.mark.parametrize("averaging", ["signed", "abs"])
def test_diagonal_hessian_is_exact(every_engine, device, block_size, averaging):
    diagonal = torch.tensor([1.0, -2.0, 4.0, -8.0, 16.0], device=device)
    p = torch.ones(5, device=device, requires_grad=True)
    options = {"block_size": block_size, "averaging": averaging, "n_samples": 2, "backend": every_engine}
    [found] = hutchinson_diagonal((diagonal * p**2).sum() / 2, [p], **options)
    d = diagonal.abs() if averaging == "abs" else diagonal
    length = {"tensor": 5, 2**40: 5}.get(block_size, block_size)
    means = [sum(d[i : i + length].tolist()) / len(d[i : i + length]) for i in range(0, 5, length)]
    expected = torch.tensor([means[i // length] for i in range(5)], device=device)
    assert ((found - expected).abs() <= 4 * torch.finfo(found.dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("averaging", ["signed", "abs"])
def test_an_estimate_is_z_times_hz(engine, device, averaging):
    """The magnitude of the mean over the samples, not the mean of their magnitudes."""
    p, loss = quadratic(device)
    z = [probe(p, 0, 0, seed=3, sample=i) for i in range(4)]
    [found] = hutchinson_diagonal(loss, [p], n_samples=4, seed=3, averaging=averaging, backend=engine)
    expected = sum(x * (H.to(device) @ x) for x in z) / 4
    assert (expected < 0).any()
    assert torch.equal(found, expected.abs() if averaging == "abs" else expected)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_mean_over_many_seeds(device, kind):
    """The mean of n estimates is off by their standard deviation over sqrt(n), five times that at most."""
    p, loss = quadratic(device)
    n, h = 400, H.to(device)
    found = torch.stack([hutchinson_diagonal(loss, [p], probe=kind, seed=seed)[0] for seed in range(n)])
    off_diagonal = h.square().sum(1) - h.diag() ** 2
    variance = off_diagonal if kind == "rademacher" else off_diagonal + 2 * h.diag() ** 2
    assert ((found.mean(0) - h.diag()).abs() <= 5 * (variance / n).sqrt()).all()
    squares = (found - h.diag()) ** 2
    assert ((squares.mean(0) - variance).abs() <= 5 * squares.std(0) / n**0.5).all()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_samples_and_seeds(device, kind):
    p, loss = quadratic(device)
    estimate = lambda **options: hutchinson_diagonal(loss, [p], probe=kind, **options)[0]  # noqa: E731
    assert_same([estimate(seed=4)], [estimate(seed=4)])
    assert not torch.equal(estimate(seed=4), estimate(seed=5))
    assert not torch.equal(estimate(seed=4), estimate(seed=4, n_samples=2))


def test_parameters_of_one_shape_have_probes_of_their_own(engine, device):
    """With one z for both, z_a z_b would be 1 everywhere."""
    a, b = (torch.ones(50, device=device, requires_grad=True) for _ in range(2))
    found = hutchinson_diagonal((a * b).sum(), [a, b], backend=engine)
    assert found[0].unique().tolist() == [-1.0, 1.0]


def test_a_function_or_its_value(device):
    p, loss = quadratic(device)
    with torch.no_grad():
        assert_same(hutchinson_diagonal(loss, [p]), hutchinson_diagonal(torch.enable_grad()(loss)(), [p]))


def test_linear_and_absent_parameters_are_zero(engine, device):
    a, b, c = (torch.ones(3, device=device, requires_grad=True) for _ in range(3))
    found = hutchinson_diagonal((a**3).sum() + b.sum(), [a, b, c], backend=engine)
    assert_same(found, [torch.full_like(a, 6.0).detach(), torch.zeros_like(a), torch.zeros_like(a)])


def test_it_changes_nothing(device):
    model, opt = fresh(mlp(device=device))
    train(opt, model, 1)
    before, grads = weights(model), [p.grad.clone() for p in model.parameters()]
    hutchinson_diagonal(loss_of(model), list(model.parameters()))
    assert_same(weights(model), before)
    assert_same([p.grad for p in model.parameters()], grads)


def test_a_model_is_not_its_parameters():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"params has a value of type Linear; expected tensors, such as model\.param"):
        hutchinson_diagonal(model(torch.ones(1, 2)).sum(), model)


def test_a_seed_is_an_int():
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"seed=0\.5; expected a 64-bit int"):
        hutchinson_diagonal(p.square().sum(), [p], seed=0.5)


# ---- in the optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_differ_from_step_to_step_and_are_reproducible(device, kind):
    def diagonals():
        p, found = torch.nn.Parameter(torch.ones(4, dtype=torch.float64, device=device)), []
        opt = AdaHessian([p], betas=(0.0, 0.0), lr=0.0, seed=1, probe=kind)
        for _ in range(6):
            opt.backward(p @ H.to(device) @ p / 2)
            opt.step()
            found.append(opt.hessian_diag(p).tolist())
        return found

    assert diagonals() == diagonals()
    distinct = len({tuple(d) for d in diagonals()})
    assert distinct == 6 if kind == "gaussian" else distinct > 1  # of Rademacher probes of 4 elements there are 8
