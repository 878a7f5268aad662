"""Two AdaHessians on one loss: one Hessian-vector product serves both, in every way of stepping."""

from __future__ import annotations

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import ways
from models import fresh, mlp, weights
from published import AdaHessian
from torch import nn
from torch.nn import functional as F

from adahessian_fused import TrainStep
from adahessian_fused.hvp import double_backward
from adahessian_fused.layout import ParameterLayout

X = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(8, 3)


@pytest.fixture
def products(monkeypatch):
    """The probes of each Hessian-vector product: for each, parameter -> z."""
    found, grad = [], torch.autograd.grad

    def recorded(outputs, inputs, grad_outputs=None, *args, create_graph=False, **kwargs):
        again = found and grad_outputs and next(iter(found[-1].values())) is grad_outputs[0]  # through a mode
        if isinstance(grad_outputs, (list, tuple)) and grad_outputs and not create_graph and not again:
            found.append(dict(zip(inputs, grad_outputs, strict=True)))
        return grad(outputs, inputs, grad_outputs, *args, create_graph=create_graph, **kwargs)

    def quick(outputs, grad_outputs, retain_graph, create_graph, inputs, allow_unused, **options):
        return recorded(
            outputs, inputs, grad_outputs, retain_graph, create_graph=create_graph, allow_unused=allow_unused
        )

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    monkeypatch.setattr(double_backward, "_engine_run_backward", quick)
    return found


def halves(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return model, *(AdaHessian(part.parameters(), lr=0.01, block_size=1, **options) for part in (model[0], model[2]))


def loss_of(model, x=X):
    return (model(x) - x.sin()).square().mean()


def hz(loss, z):
    """Gradient and product by plain double backward."""
    params = list(z)
    grads = torch.autograd.grad(loss, params, create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(grads, z.values(), strict=True))
    return dict(zip(params, grads, strict=True)), dict(zip(params, torch.autograd.grad(inner, params), strict=True))


def assert_diagonal(opt, expected):
    """After a first step: the magnitudes of z * Hz."""
    for p in opt.param_groups[0]["params"]:
        torch.testing.assert_close(opt.hessian_diag(p), expected[p].abs(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ways.WAYS)
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_one_product_serves_both(way, products):
    model, a, b = halves()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    b.zero_grad()
    ways.WAYS[way](a, lambda x=X: loss_of(model, x), *([X] if way in ("backward_split", "train_step") else []))
    grads = {p: p.grad for p in model.parameters()}
    b.step()
    (z,) = products
    assert set(z) == set(model.parameters())
    assert not torch.equal(z[model[0].weight], z[model[2].weight])  # which would not be independent
    nn.utils.vector_to_parameters(before, model.parameters())
    g, h = hz(loss_of(model), z)
    for p in model.parameters():
        assert not grads[p].requires_grad
        torch.testing.assert_close(grads[p], g[p].detach())
    for opt in (a, b):
        assert_diagonal(opt, h)


def test_either_of_them_may_be_between_its_hessian_steps(products):
    for first, second in itertools.product((0, 1), repeat=2):
        model, *opts = halves(update_each=2)
        b = opts[1 - first]
        opts[first].backward(loss_of(model))
        for opt in opts:
            opt.step()
            opt.zero_grad()
        b.param_groups[0]["update_each"] = 1  # the other one has no curvature now
        products.clear()
        opts[first if second else 1 - first].backward(loss_of(model))
        (z,) = products
        assert set(z) == set(b.param_groups[0]["params"])
        assert opts[first].coming_step.curvature is None
        for opt in opts:
            opt.step()


@pytest.mark.parametrize("each", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_probes_are_the_same_in_every_way(each):
    """An optimizer between its Hessian steps draws none, and takes nobody's place."""

    def trained(way):
        model, *opts = halves()
        for opt, update_each in zip(opts, each, strict=True):
            opt.param_groups[0]["update_each"] = update_each
        for _ in range(3):
            opts[1].zero_grad()
            ways.WAYS[way](opts[0], lambda x=X: loss_of(model, x), *([X] if way == "train_step" else []))
            opts[1].step()
        return weights(model)

    expected = trained("backward")
    for way in ("closure_standard", "hook_backward", "train_step"):
        for found, wanted in zip(trained(way), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_micro_batches_and_weights(products):
    """One of two micro-batches gives the curvature, with twice its weight."""
    model, a, b = halves()
    part = X[:4]
    a.backward(loss_of(model, part) / 2, curvature=2)
    b.backward(loss_of(model, X[4:]) / 2, curvature=0)
    (z,) = products
    _, h = hz(loss_of(model, part), z)
    a.step()
    b.step()
    assert_diagonal(a, h)
    assert_diagonal(b, h)


def test_probes_of_a_step_stay_the_same(products):
    """The first micro-batch concerns one of them only, the second both."""
    model, a, b = halves()
    b.backward(model[2](X).square().mean())
    a.backward(loss_of(model))
    assert len(products) == 2
    for p in model[2].parameters():
        assert torch.equal(products[0][p], products[1][p])
    assert not torch.equal(products[1][model[0].weight], products[1][model[2].weight])
    expected = hz(model[2](X).square().mean(), products[0])[1], hz(loss_of(model), products[1])[1]
    a.step()
    b.step()
    assert_diagonal(b, {p: expected[0][p] + expected[1][p] for p in model[2].parameters()})


def test_options_that_differ_take_products_of_their_own(products):
    model, a, _ = halves()
    b = AdaHessian(model[2].parameters(), n_samples=2)
    a.backward(loss_of(model))
    assert [set(z) for z in products] == [set(part.parameters()) for part in (model[0], model[2], model[2])]
    a.step()
    b.step()


def test_losses_of_a_gan_do_not_mix(products):
    def train(share):
        torch.manual_seed(0)
        generator, critic = (
            nn.Linear(3, 3).double(),
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double(),
        )
        opt_g, opt_d = (AdaHessian(m.parameters(), lr=0.05) for m in (generator, critic))
        for _ in range(3):
            opt_d.zero_grad()
            opt_d.backward(F.softplus(-critic(X)).mean() + F.softplus(critic(generator(X).detach())).mean())
            opt_d.step()
            opt_g.zero_grad()
            products.clear()
            loss = F.softplus(-critic(generator(X))).mean()
            opt_g.backward(loss) if share else opt_g.step(lambda: loss)  # noqa: B023 - called at once
            assert set(products[0]) == set(generator.parameters())
            if share:
                opt_g.step()
        return [*weights(generator), *weights(critic)]

    for one, other in zip(train(True), train(False), strict=True):
        assert torch.equal(one, other)


def test_gradients_from_before_get_no_curvature():
    model, a, b = halves()
    loss_of(model).backward()
    a.zero_grad()
    a.backward(loss_of(model))
    a.step()
    with pytest.raises(RuntimeError, match="this step needs curvature"):
        b.step()


def test_an_optimizer_that_was_replaced_takes_no_part(products):
    model, a, old = halves()
    new = AdaHessian(model.parameters())
    new.backward(loss_of(model))
    assert old.coming_step.curvature is a.coming_step.curvature is None
    b = AdaHessian(model[2].parameters())
    new.zero_grad()
    a.backward(loss_of(model))
    assert b.coming_step.curvature is not None
    assert new.coming_step.curvature is old.coming_step.curvature is None


def test_both_under_a_scaler():
    """Its factor is out of the curvature of both."""
    (one, a, b), (other, c, d) = halves(), halves()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(3):
        a.backward(loss_of(one), grad_scaler=scaler)
        for opt in (a, b):
            scaler.unscale_(opt)
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
        c.backward(loss_of(other))
        for opt in (c, d):
            opt.step()
            opt.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_compiled_steps_serve_both():
    (one, a, b), (other, c, d) = halves(update_each=2), halves(update_each=2)
    step = TrainStep(one, F.mse_loss, a)
    for _ in range(4):
        b.zero_grad()
        step(X, X.sin())
        b.step()
        d.zero_grad()
        c.step(lambda: loss_of(other))
        d.step()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert "1 with curvature, 1 without" in repr(step)


def test_one_alone_draws_what_it_always_drew(products):
    model, opt = fresh(mlp())
    opt.backward(model(torch.ones(2, 3, dtype=torch.float64)).square().mean())
    z = [v.clone() for v in products[0].values()]
    other = AdaHessian(nn.Linear(2, 2).parameters())
    opt.zero_grad()
    opt.backward(model(torch.ones(2, 3, dtype=torch.float64)).square().mean())
    assert all(map(torch.equal, z, products[1].values()))
    assert other.coming_step.curvature is None


def quartic(p, factor=1.0):
    """A loss whose Hessian is diagonal: p^2 times ``factor``."""
    return factor * (p**4).sum() / 12


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_graphs_of_unrelated_models_are_left_to_their_own_optimizers():
    a, b = (nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for _ in range(2))
    opt_a, opt_b = (AdaHessian([p], lr=0.0) for p in (a, b))
    quartic(b, 0.5).backward(create_graph=True)
    quartic(a).backward(create_graph=True)
    opt_a.step()
    quartic(b, 0.5).backward(create_graph=True)
    opt_b.step()
    for opt, p in ((opt_a, a), (opt_b, b)):
        torch.testing.assert_close(opt.hessian_diag(p), p.detach() ** 2, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_the_modules_zeroing_takes_the_curvature_that_another_optimizer_has_given():
    a, b = (nn.ParameterList([torch.tensor([1.0, 2.0], dtype=torch.float64)]) for _ in range(2))
    opt_a, opt_b = (AdaHessian(model.parameters(), lr=0.0) for model in (a, b))
    (quartic(a[0]) + quartic(b[0], 7.0)).backward(create_graph=True)
    opt_a.step()  # differentiates b's gradient too, whose turn it is not
    b.zero_grad()
    quartic(b[0], 5.0).backward(create_graph=True)
    opt_b.step()
    torch.testing.assert_close(opt_b.hessian_diag(b[0]), 5 * b[0].detach() ** 2, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_step_whose_optimizer_is_gone_concerns_nobody():
    """Another thread may drop it between two looks at it."""
    model, opt = fresh(mlp())
    step, leaves = opt.coming_step, set(map(id, model.parameters()))
    assert step.concerns(leaves)
    assert step.is_due
    del opt
    gc.collect()
    assert not step.concerns(leaves)
    assert not step.is_due
    assert not step.has_graphs()


def test_optimizers_in_threads_of_their_own():
    models = [mlp() for _ in range(3)]  # here, with the generator of all threads

    def trained(seed):
        model, opt = fresh(models[seed])
        for step in range(6):
            opt.zero_grad()
            model(torch.full((2, 3), 0.1 * (seed + step), dtype=torch.float64)).square().mean().backward(
                create_graph=True
            )
            opt.step()
        return weights(model)

    expected = [trained(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(trained, range(3)))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_pass_in_another_thread_while_an_optimizer_is_made(monkeypatch):
    """It is known from its first group on, before that has been checked."""
    model, check = mlp(), ParameterLayout.check_added
    opt = AdaHessian(model.parameters())

    def check_in_between(layout):
        opt.backward(model(X).square().mean())
        check(layout)

    monkeypatch.setattr(ParameterLayout, "check_added", check_in_between)
    AdaHessian(mlp().parameters())
    opt.step()
    assert opt.statistics().as_dict()["hessian_step"] == 1
