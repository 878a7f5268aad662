"""Activation checkpoints: what is recomputed runs with the operators that its forward pass ran with."""

from __future__ import annotations

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, fresh, weights
from published import AdaHessian
from test_friendly import CASES
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from ways import WAYS
from zoo import Encoder

from adahessian_fused import curvature_friendly


def products(run, tensors, inside=True) -> list[Tensor]:
    """Gradients of a loss, and their products with ones, differentiated outside the mode that it was computed in."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with curvature_friendly() if inside else nullcontext():
        loss = run(*leaves).float().pow(3).mean()
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    found = torch.autograd.grad(grads, leaves, [torch.ones_like(g) for g in grads], materialize_grads=True)
    return [*(g.detach() for g in grads), *found]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_operator(device, name, dtype):
    """Under autocast too, which the recomputation restores by itself."""
    run, tensors = CASES[name].run, CASES[name].tensors(device, torch.float32)
    with torch.autocast(device, dtype) if dtype else nullcontext():
        found = products(lambda *ts: checkpoint(run, *ts, use_reentrant=False), tensors)
        assert_same(found, products(run, tensors))


def test_nested(device):
    run, tensors = CASES["layer_norm"].run, CASES["layer_norm"].tensors(device, torch.float64)

    def inner(x, w, b):
        return checkpoint(run, x.tanh(), w, b, use_reentrant=False).relu()

    found = products(lambda *ts: checkpoint(inner, *ts, use_reentrant=False), tensors)
    assert_same(found, products(lambda x, w, b: run(x.tanh(), w, b).relu(), tensors))


def test_a_forward_outside_the_mode(device):
    """Its recomputation in a backward pass inside the mode is PyTorch's."""
    run, tensors = CASES["layer_norm"].run, CASES["layer_norm"].tensors(device, torch.float64)
    loss = checkpoint(run, *tensors, use_reentrant=False).float().pow(3).mean()
    with curvature_friendly():
        found = torch.autograd.grad(loss, tensors)
    assert_same(found, products(run, tensors, inside=False)[:3])


def test_selective(device):
    """As far as PyTorch goes with it: a region is recomputed once, for the gradient, and not again for the product."""
    aten, tensors = torch.ops.aten, CASES["layer_norm"].tensors(device, torch.float64)

    def run(x, w, b):
        return F.layer_norm(x @ x.mT, (3,), w[:3], b[:3]).relu()

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    def loss():
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        with curvature_friendly():
            return checkpoint(run, *tensors, use_reentrant=False, context_fn=contexts).float().pow(3).mean()

    assert_same(torch.autograd.grad(loss(), tensors), products(run, tensors)[:3])
    with pytest.raises(RuntimeError, match=r"selective context_fn cannot be differentiated twice.*without context_fn"):
        AdaHessian(tensors).backward(loss())


class Model(nn.Module):
    """Attention, norms and a convolution; ``often``: in checkpoints."""

    def __init__(self, often: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.often, self.conv, self.norm, self.encoder = (
            often,
            nn.Conv1d(8, 8, 3, padding=1),
            nn.LayerNorm(8),
            Encoder(),
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in (lambda x: self.conv(x.mT).mT, self.norm, self.encoder):
            x = checkpoint(part, x, use_reentrant=False) if self.often else part(x)
        return x


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["backward", "closure_returns_loss", "train_step"])
def test_training(device, way, dtype):
    """Steps with curvature and without, as the same model without checkpoints takes them."""
    x, found = torch.randn(4, 6, 8, device=device), []
    for often in (True, False):
        model, opt = fresh(Model(often).to(device), lr=0.01, update_each=2)
        with curvature_friendly(model, opt) if way == "backward" else nullcontext():
            for _ in range(4):
                with torch.autocast(device, dtype) if dtype else nullcontext():
                    WAYS[way](opt, lambda x, m=model: m(x).float().square().mean(), x)
        found.append(weights(model))
    assert_same(*found)
