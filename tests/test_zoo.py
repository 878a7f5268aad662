"""Models of many kinds train by every way of stepping: v against a plain double backward in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from fuzz.layouts import length
from fuzz.oracle import block_means
from models import probe
from published import AdaHessian
from tolerances import UNITS, assert_share, effect, unit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from ways import WAYS
from zoo import ZOO, Animal

from adahessian_fused import curvature_friendly, split_batch

OPTIONS = {"lr": 0.0, "betas": (0.9, 0.0)}  # v is the square of this step's D


def as_double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def diagonal(animal: Animal, batch, h: int) -> list[Tensor | None]:
    """Block means of |D| by PyTorch's own operators, after h Hessian steps; None where there is no gradient."""
    model, params = animal.model, list(animal.model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = animal.reference(model, *map(as_double, batch))
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    used = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
    z = [probe(params[i], i, h) for i in used]
    products = torch.autograd.grad([grads[i] for i in used], [params[i] for i in used], z, materialize_grads=True)
    means = (block_means(a * b, length(a, "auto")).abs() for a, b in zip(z, products, strict=True))
    found = dict(zip(used, means, strict=True))
    zeros = [None if g is None else torch.zeros_like(g) for g in grads]
    return [found.get(i, zero) for i, zero in enumerate(zeros)]


def expected(animal: Animal, batch, h: int = 0) -> list[tuple[Tensor, Tensor] | None]:
    """|D|, and what float32 may do to its norm: a rounding of each weight, to it or to all; a product has two operands.

    None where there is no gradient.
    """

    def of(model: nn.Module) -> list[Tensor]:
        return [d for d in diagonal(animal._replace(model=model), batch, h) if d is not None]

    twin = copy.deepcopy(animal.model)
    found = diagonal(animal, batch, h)
    moved = effect(of, twin, [d for d in found if d is not None])
    bounds = iter(2 * UNITS * unit(torch.float32) * (moved + moved.norm()))
    return [None if d is None else (d, next(bounds)) for d in found]


FROM_LOSS = ("create_graph", "backward", "hook_backward")  # the model has to be told
OTHERS = ("function", "closure_returns_loss", "closure_standard", "train_step", "backward_split")


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("name", ZOO)
def test_every_way_of_stepping(name):
    torch.manual_seed(0)
    animal = ZOO[name]()
    animal.model.train()
    twin = animal._replace(model=copy.deepcopy(animal.model).double())
    half = copy.deepcopy(twin)
    wanted = dict.fromkeys((*FROM_LOSS, *OTHERS), expected(twin, animal.batch))
    if animal.mean:
        wanted["backward_split"] = expected(half, split_batch(animal.batch, 0.5)[0])
    else:
        del wanted["backward_split"]
    for way, d in wanted.items():
        model = copy.deepcopy(animal.model)
        opt = AdaHessian(model.parameters(), **OPTIONS, hessian_fraction=0.5 if way == "backward_split" else 1.0)
        with curvature_friendly(model, opt) if way in FROM_LOSS else nullcontext():
            WAYS[way](opt, lambda *batch, m=model: animal.loss(m, *batch), *animal.batch)
        compare(way, opt, model, d)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("way", [*FROM_LOSS, "closure_returns_loss", "closure_standard"])
def test_a_penalty_now_and_then(way):
    """The first steps have no gradient in their loss, so their graphs are of another kind."""
    torch.manual_seed(0)
    animal = ZOO["gradient_penalty"]()
    twin, model = copy.deepcopy(animal.model).double(), animal.model
    opt = AdaHessian(model.parameters(), **OPTIONS)
    with curvature_friendly(model, opt) if way in FROM_LOSS else nullcontext():
        for h in range(3):
            loss = animal.loss if h == 2 else lambda m, real, fake, mix: m(fake).square().mean()
            WAYS[way](opt, lambda *batch, loss=loss: loss(model, *batch), *animal.batch)
    compare(way, opt, model, expected(animal._replace(model=twin), animal.batch, h=2))


def compare(way: str, opt: AdaHessian, model: nn.Module, wanted: list[tuple[Tensor, Tensor] | None]) -> None:
    assert any(pair is not None and pair[0].any() for pair in wanted)
    for (name, p), pair in zip(model.named_parameters(), wanted, strict=True):
        assert (pair is None) == (p not in opt.state), f"{way}: {name}"
        if pair is not None:
            error, (d, bound) = (opt.hessian_diag(p) - pair[0]).norm(), pair
            assert_share(float(error / bound), f"{way}: D of {name} is off by {error:.3g} of {d.norm():.3g}")
