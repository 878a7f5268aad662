"""Models whose operators have first-order derivatives only: finite differences work, the others name the operator."""

from __future__ import annotations

import gc
import re
import threading

import pytest
import strategies
import torch
from models import assert_same, mlp, weights
from published import AdaHessian
from strategies import compare, exact, optimizer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from ways import STYLES, WAYS


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(1, -1, 3, 2, 2).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 3))

    def forward(self, x):
        return nn.functional.embedding_bag(torch.arange(8).reshape(4, 2), self.weight, mode="sum").tanh()


def _summed(model):
    """Bag's loss without embedding_bag."""
    return nn.functional.embedding(torch.arange(8).reshape(4, 2), model.weight).sum(1).tanh().square().mean()


def reentrant(model):
    return torch.utils.checkpoint.checkpoint(model, strategies.numbers(model).requires_grad_(), use_reentrant=True)


def first_order_only(name):
    """Model, loss, and the same loss in operators that can be differentiated twice."""
    torch.manual_seed(0)
    if name == "flash":
        model = Attention().double()
        x = torch.randn(5, 4, dtype=torch.float64)

        def plain(m):
            with sdpa_kernel(SDPBackend.MATH):
                return m(x).square().mean()

        return model, lambda m: m(x).square().mean(), plain
    if name == "embedding_bag":
        model = Bag().double()
        return model, strategies.square, _summed
    if name == "compiled":
        model = mlp()
        compiled = torch.compile(model, backend="aot_eager")
        return model, lambda m: compiled(strategies.numbers(m)).square().mean(), strategies.square
    if name == "mse_loss":
        return mlp(), lambda m: nn.functional.mse_loss(m(strategies.numbers(m)), strategies.numbers(m)[:, :2]), None
    return mlp(), lambda m: reentrant(m).square().mean(), strategies.square


ONLY_FIRST = ("flash", "embedding_bag", "compiled", "reentrant_checkpoint")


@pytest.mark.filterwarnings("ignore:.*global hooks")
@pytest.mark.parametrize("name", ONLY_FIRST)
def test_finite_differences_where_there_is_no_double_backward(name):
    torch.compiler.reset()
    model, loss, plain = first_order_only(name)
    g, hz = exact(model, plain)
    opt = optimizer(model, "finite_difference")

    def closure():
        opt.zero_grad()
        value = loss(model)
        value.backward()
        return value

    opt.step(closure)
    compare(opt, model, g, hz, "finite_difference")


def _train_through_ddp(as_views):
    model, loss = strategies.build("mlp")
    g, hz = exact(model, loss)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_views)
    for _ in range(2):  # the first backward pass moves the buffers
        parallel(strategies.numbers(model)).sum().backward()
    opt = optimizer(model, "finite_difference", update_each=2)

    def closure():
        opt.zero_grad()
        parallel(strategies.numbers(model)).square().mean().backward()

    opt.step(closure)
    compare(opt, model, g, hz, "finite_difference")
    opt.step(closure)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("as_views", [False, True])
def test_finite_differences_through_ddp(as_views, tmp_path):
    """DDP's gradients may be views of buffers that the next backward pass overwrites."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _train_through_ddp(as_views)
    finally:
        # DDP first: as the last to know the group it would wait, holding the interpreter, for threads that want it.
        gc.collect()
        torch.distributed.destroy_process_group()


NAMED = {
    ("flash", "autograd"): r"_scaled_dot_product_flash_attention\w* cannot be differentiated twice.*SDPBackend\.MATH",
    ("flash", "forward_over_reverse"): r"_scaled_dot_product_flash_attention\w* has no forward-mode derivative.*MATH",
    ("embedding_bag", "autograd"): r"_embedding_bag\w* cannot be differentiated twice",
    ("embedding_bag", "forward_over_reverse"): r"_embedding_bag has no forward-mode derivative",
    ("compiled", "autograd"): r"cannot be differentiated twice",
    ("compiled", "forward_over_reverse"): r"Function without jvp \(.*\) has no forward-mode derivative",
    ("mse_loss", "forward_over_reverse"): r"such as mse_loss\) has no forward-mode derivative",
    ("reentrant_checkpoint", "autograd"): r"use_reentrant=True cannot be differentiated twice.*use_reentrant=False",
}


@pytest.mark.filterwarnings("ignore:.*global hooks")
@pytest.mark.parametrize(("name", "hvp"), NAMED, ids=["-".join(key) for key in NAMED])
def test_operators_without_a_derivative_are_named(name, hvp):
    torch.compiler.reset()
    model, loss, plain = first_order_only(name)
    opt, before = optimizer(model, hvp), weights(model)
    error = None
    try:
        opt.backward(loss(model) if hvp == "autograd" else lambda: loss(model))
    except RuntimeError as raised:
        error = raised
    if error is None and (name, hvp) == ("compiled", "forward_over_reverse"):  # newer versions of torch can
        g, hz = exact(model, plain)
        opt.step()
        return compare(opt, model, g, hz, hvp)
    assert re.search(f'(?s){NAMED[name, hvp]}.*hvp="finite_difference"', str(error))
    assert (error.__cause__ is None) == (name == "reentrant_checkpoint")
    assert_same(weights(model), before)


@pytest.mark.parametrize("name", ["flash", "embedding_bag"])
def test_functions_get_a_double_backward(name):
    """opt.backward(function) runs it inside curvature_friendly()."""
    model, loss, plain = first_order_only(name)
    g, hz = exact(model, plain)
    opt = optimizer(model, "autograd")
    opt.backward(lambda: loss(model))
    opt.step()
    compare(opt, model, g, hz, "autograd")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


def test_once_differentiable_functions_do_not_pass_as_linear(device):
    p = nn.Parameter(torch.ones(3, device=device))
    with pytest.raises(RuntimeError, match="once_differentiable cannot be differentiated twice"):
        AdaHessian([p]).backward(Once.apply(p).square().sum())


@pytest.mark.filterwarnings("ignore:.*global hooks")
@pytest.mark.parametrize("name", ["compiled", "mse_loss"])
def test_forward_mode_beside_other_threads(name):
    """Whose random numbers are told from this one's by a dispatch mode, which forward mode does not stand."""
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        test_operators_without_a_derivative_are_named(name, "forward_over_reverse")
    finally:
        done.set()
        other.join()


@torch.library.custom_op("adahessian_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("adahessian_tests::slope", mutates_args=())
def slope(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return 3 * x**2 * g


cube.register_autograd(
    lambda ctx, g: slope(*ctx.saved_tensors, g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("way", [*STYLES, "train_step"])
def test_operators_whose_backward_has_no_derivative_are_named(way):
    p = nn.Parameter(torch.ones(2))
    opt = AdaHessian([p])
    message = (
        r"adahessian_tests\.slope\.default cannot be differentiated twice.*torch\.library\.register_autograd for it"
    )
    with pytest.raises(RuntimeError, match=message):
        WAYS[way](opt, lambda: cube(p).square().sum())
    assert p.eq(1).all()
