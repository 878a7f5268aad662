"""curvature_friendly: each operator against PyTorch's own, and its double backward against finite differences."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_within, unit
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from watching import nodes

from adahessian_fused import AdaHessian, backends, curvature_friendly
from adahessian_fused.friendly import gelu

MEAN, VAR = torch.tensor([0.3, -0.2]), torch.tensor([1.5, 0.4])
BAGS = torch.tensor([1, 2, 3, 3, 2, 4]), torch.tensor([0, 2, 2, 5])
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of tiny operators: threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def activations_of_any_size(monkeypatch):
    """Ours for the few elements of a test, too."""
    monkeypatch.setattr("adahessian_fused.friendly.relu.SMALL", 0)
    monkeypatch.setattr("adahessian_fused.friendly.gelu.SMALL", 0)


class Case(NamedTuple):
    """An operator of some tensors: input, weight and so on."""

    run: Callable[..., Tensor]
    shapes: Sequence[Sequence[int]]
    memory_format: torch.memory_format = torch.contiguous_format

    def tensors(self, device: str, dtype: torch.dtype, frozen: int | None = None) -> list[Tensor]:
        """Random arguments; the one numbered ``frozen`` does not require grad."""
        torch.manual_seed(1)
        tensors = [torch.randn(shape, dtype=dtype).to(device) for shape in self.shapes]
        tensors[0] = tensors[0].contiguous(memory_format=self.memory_format)
        return [t.requires_grad_(i != frozen) for i, t in enumerate(tensors)]


def batch_norm(x, w=None, b=None):
    return F.batch_norm(x, None, None, w, b, True)


def frozen_batch_norm(x, w=None, b=None):
    return F.batch_norm(x, MEAN.to(x), VAR.to(x), w, b, False)


def frozen_instance_norm(x, w, b):
    return F.instance_norm(x, MEAN.to(x), VAR.to(x), w, b, use_input_stats=False)


def conv(dims, **options):
    return lambda *tensors: getattr(F, f"conv{dims}d")(*tensors, **options)


def transposed(dims, **options):
    return lambda *tensors: getattr(F, f"conv_transpose{dims}d")(*tensors, **options)


def bag(mode, **options):
    def run(weight, samples=None):
        indices, offsets = (t.to(weight.device) for t in BAGS)
        return F.embedding_bag(indices, weight, offsets, mode=mode, per_sample_weights=samples, **options)

    return run


def flat_bag(weight, samples=None):
    indices = BAGS[0].to(weight.device).view(3, 2)
    return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=samples, padding_idx=3)


def cross_entropy(**options):
    return lambda x: F.cross_entropy(x, torch.tensor([2, 0, 1, -100 if not options else 1]).to(x.device), **options)


def attention(mask=None, **options):
    """Of query, key and value; ``mask`` makes one of the shape that broadcasts to the scores'."""

    def run(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask and mask(q), **options)

    return run


def seen(*shape):
    """Which keys may be seen: all but some, and one row none at all."""
    return lambda q: (
        (torch.arange(math.prod(shape)).view(shape) % 3 != 1).to(q.device)
        & (torch.arange(shape[-2])[:, None] != 3).to(q.device)
    )


def added(*shape):
    return lambda q: torch.arange(math.prod(shape)).view(shape).sin().to(q)


W2, W4, IMAGES, HEADS = (2,), (4,), (2, 4, 3, 2), [(1, 2, 4, 2)] * 3
WIDE = [(1, 2, 3, 2), (1, 2, 5, 2), (1, 2, 5, 2)]
CASES = {
    "batch_norm_1d": Case(batch_norm, [(5, 2), W2, W2]),
    "batch_norm_2d": Case(batch_norm, [(3, 2, 2, 2), W2, W2]),
    "batch_norm_2d_channels_last": Case(batch_norm, [(3, 2, 2, 2), W2, W2], LAST),
    "batch_norm_3d": Case(batch_norm, [(2, 2, 2, 1, 3), W2, W2]),
    "batch_norm_not_affine": Case(batch_norm, [(3, 2, 4)]),
    "batch_norm_frozen": Case(frozen_batch_norm, [(3, 2, 2, 2), W2, W2]),
    "batch_norm_frozen_channels_last": Case(frozen_batch_norm, [(3, 2, 2, 2), W2, W2], LAST),
    "batch_norm_frozen_not_affine": Case(frozen_batch_norm, [(3, 2, 2)]),
    "layer_norm": Case(lambda x, w, b: F.layer_norm(x, (4,), w, b), [(3, 4), W4, W4]),
    "layer_norm_two_dimensions": Case(lambda x, w, b: F.layer_norm(x, (2, 3), w, b), [(3, 2, 3), (2, 3), (2, 3)]),
    "layer_norm_of_everything": Case(lambda x, w, b: F.layer_norm(x, (4,), w, b), [(4,), W4, W4]),
    "layer_norm_no_bias": Case(lambda x, w: F.layer_norm(x, (4,), w), [(3, 4), W4]),
    "layer_norm_not_affine": Case(lambda x: F.layer_norm(x, (4,)), [(2, 3, 4)]),
    "rms_norm": Case(lambda x, w: F.rms_norm(x, (4,), w), [(3, 4), W4]),
    "rms_norm_not_affine": Case(lambda x: F.rms_norm(x, (2, 3), eps=1e-3), [(3, 2, 3)]),
    "group_norm": Case(lambda x, w, b: F.group_norm(x, 2, w, b), [IMAGES, W4, W4]),
    "group_norm_channels_last": Case(lambda x, w, b: F.group_norm(x, 2, w, b), [IMAGES, W4, W4], LAST),
    "group_norm_no_pixels": Case(lambda x, w, b: F.group_norm(x, 2, w, b), [(3, 4), W4, W4]),
    "group_norm_not_affine": Case(lambda x: F.group_norm(x, 2), [(2, 4, 3)]),
    "instance_norm": Case(lambda x, w, b: F.instance_norm(x, None, None, w, b), [IMAGES, W4, W4]),
    "instance_norm_channels_last": Case(lambda x: F.instance_norm(x), [IMAGES], LAST),
    "instance_norm_frozen": Case(frozen_instance_norm, [(2, 2, 3), W2, W2]),
    "conv1d": Case(conv(1, stride=2, padding=1), [(2, 2, 5), (3, 2, 3), (3,)]),
    "conv2d": Case(conv(2, padding=(1, 0), dilation=(1, 2)), [(2, 2, 3, 5), (3, 2, 3, 2), (3,)]),
    "conv2d_channels_last": Case(conv(2, stride=2, padding=1), [(2, 2, 4, 3), (3, 2, 3, 3), (3,)], LAST),
    "conv2d_no_bias": Case(conv(2), [(2, 2, 3, 3), (3, 2, 2, 2)]),
    "conv2d_groups": Case(conv(2, groups=2), [(2, 4, 3, 3), (4, 2, 2, 2), (4,)]),
    "conv2d_depthwise": Case(conv(2, groups=2, padding=1), [(2, 2, 3, 3), (2, 1, 3, 3)]),
    "conv2d_same": Case(conv(2, padding="same", dilation=2), [(2, 2, 4, 3), (3, 2, 3, 3), (3,)]),
    "conv2d_same_uneven": Case(conv(2, padding="same"), [(2, 2, 3, 3), (2, 2, 2, 4), (2,)]),
    "conv2d_valid": Case(conv(2, padding="valid"), [(2, 2, 3, 3), (3, 2, 2, 2)]),
    "conv2d_one_image": Case(conv(2), [(2, 3, 3), (3, 2, 2, 2), (3,)]),
    "conv3d": Case(conv(3, padding=1), [(1, 2, 2, 2, 2), (2, 2, 3, 3, 2), (2,)]),
    "conv_transpose1d": Case(transposed(1, stride=2), [(2, 2, 3), (2, 3, 2), (3,)]),
    "conv_transpose2d": Case(
        transposed(2, stride=2, padding=1, output_padding=1, groups=2), [(1, 2, 3, 2), (2, 2, 2, 3), (4,)]
    ),
    "conv_transpose3d": Case(transposed(3), [(1, 2, 2, 1, 2), (2, 1, 2, 2, 1)]),
    "relu": Case(F.relu, [(4, 3)]),
    "relu_in_place": Case(lambda x: F.relu(x * 2, inplace=True), [(4, 3)]),
    "gelu": Case(F.gelu, [(4, 3)]),
    "gelu_permuted": Case(lambda x: F.gelu(x.mT), [(4, 3)]),
    "cross_entropy": Case(cross_entropy(), [(4, 3)]),
    "cross_entropy_sum": Case(cross_entropy(reduction="sum", ignore_index=2), [(4, 3)]),
    "cross_entropy_each": Case(cross_entropy(reduction="none", ignore_index=1), [(4, 3)]),
    "attention": Case(attention(), HEADS),
    "attention_causal": Case(attention(is_causal=True), HEADS),
    "attention_causal_wide": Case(attention(is_causal=True), WIDE),
    "attention_causal_tall": Case(attention(is_causal=True, scale=0.7), [(1, 2, 5, 2), (1, 2, 3, 2), (1, 2, 3, 2)]),
    "attention_lower_right": Case(attention(lambda q: causal_lower_right(3, 5)), WIDE),
    "attention_upper_left": Case(attention(lambda q: causal_upper_left(3, 5)), WIDE),
    "attention_seen": Case(attention(seen(4, 4)), HEADS),
    "attention_seen_of_a_batch": Case(attention(seen(1, 1, 1, 4)), HEADS),
    "attention_causal_seen": Case(attention(seen(4, 4), is_causal=True), HEADS),
    "attention_added": Case(attention(added(1, 2, 4, 4)), HEADS),
    "attention_added_to_rows": Case(attention(added(1, 2, 4, 1)), HEADS),
    "attention_grouped": Case(attention(is_causal=True, enable_gqa=True), [(1, 4, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2)]),
    "attention_permuted": Case(
        lambda q, k, v: attention(is_causal=True)(*(t.transpose(1, 2) for t in (q, k, v))), [(1, 4, 2, 2)] * 3
    ),
    "embedding_bag_sum": Case(bag("sum"), [(5, 3)]),
    "embedding_bag_sum_weighted": Case(bag("sum", padding_idx=3), [(5, 3), (6,)]),
    "embedding_bag_mean": Case(bag("mean"), [(5, 3)]),
    "embedding_bag_mean_padded": Case(bag("mean", padding_idx=-3), [(5, 3)]),
    "embedding_bag_max": Case(bag("max"), [(5, 3)]),
    "embedding_bag_max_padded": Case(bag("max", padding_idx=3, include_last_offset=True), [(5, 3)]),
    "embedding_bag_2d": Case(flat_bag, [(5, 3), (3, 2)]),
}
FROZEN = [(name, i) for name, case in CASES.items() for i in (None, *range(len(case.shapes))) if len(case.shapes) > 1]
FROZEN += [(name, None) for name, case in CASES.items() if len(case.shapes) == 1]


def friendly(case: Case) -> Callable[..., Tensor]:
    """The operator inside curvature_friendly, and only if that has something in its place."""

    def run(*tensors: Tensor) -> Tensor:
        with curvature_friendly():
            y = case.run(*tensors)
        # On CUDA PyTorch has no fused attention in float64, nor for heads this small with a mask.
        without = y.is_cuda and any("Softmax" in name for name in nodes(y))
        assert "_ForwardBackward" in nodes(y) or without, nodes(y)
        return y

    return run


@pytest.mark.parametrize(("name", "frozen"), FROZEN, ids=[f"{n}-{i}" for n, i in FROZEN])
def test_double_backward(device, name, frozen):
    tensors = CASES[name].tensors(device, torch.float64, frozen)
    # Every element once; where something is frozen, one direction of them.
    assert torch.autograd.gradgradcheck(friendly(CASES[name]), tensors, fast_mode=frozen is not None)


def gradient_of_gradient(run: Callable[..., Tensor], n: int, grad: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Gradients of ``grad`` and the first n tensors; the others are the cotangents of those that require grad."""
    inputs = [t for t in tensors[:n] if t.requires_grad]
    grads = torch.autograd.grad(run(*tensors[:n]), inputs, grad, create_graph=True)
    found = torch.autograd.grad(grads, [grad, *inputs], tensors[n:], create_graph=True, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize(("name", "frozen"), FROZEN, ids=[f"{n}-{i}" for n, i in FROZEN])
def test_third_derivative(device, name, frozen):
    """What a loss that holds a gradient needs: the double backward has a derivative, and that has one again."""
    run, tensors = friendly(CASES[name]), CASES[name].tensors(device, torch.float64, frozen)
    cotangents = [torch.randn_like(t).requires_grad_() for t in tensors if t.requires_grad]
    grad = torch.randn_like(run(*tensors)).requires_grad_()
    double = functools.partial(gradient_of_gradient, run, len(tensors))
    assert torch.autograd.gradcheck(double, [grad, *tensors, *cotangents], fast_mode=True)
    if frozen is None:
        constants = [v.detach() for v in cotangents]
        assert torch.autograd.gradcheck(double, [grad, *tensors, *constants], fast_mode=True)
        assert torch.autograd.gradgradcheck(double, [grad, *tensors, *cotangents], fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_cotangents_add_up(device, name):
    """A Hessian-vector product needs the gradients together; gradgradcheck looks at one at a time."""
    tensors = CASES[name].tensors(device, torch.float64)
    y = friendly(CASES[name])(*tensors)
    inputs = [torch.randn_like(y, requires_grad=True), *tensors]
    grads = torch.autograd.grad(y, tensors, inputs[0], create_graph=True)
    cotangents = [torch.randn_like(g) for g in grads]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    apart = [torch.autograd.grad(g, inputs, v, **options) for g, v in zip(grads, cotangents, strict=True)]
    together = torch.autograd.grad(grads, inputs, cotangents, **options)
    to_differentiate = torch.autograd.grad(grads, inputs, cotangents, create_graph=True, **options)
    for found, by_formulas, *terms in zip(together, to_differentiate, *apart, strict=True):
        assert_within(found, sum(terms), 1e-12 * sum(terms).abs() + 1e-12, "cotangent")
        assert_within(by_formulas, found, 1e-12 * found.abs() + 1e-12, "cotangent to be differentiated again")


def first_order(run: Callable[..., Tensor], case: Case, device: str, dtype: torch.dtype, made_in=None) -> list[Tensor]:
    """Output and gradients of an operator; its random arguments are drawn in the dtype ``made_in``."""
    given = case.tensors(device, made_in or dtype)
    tensors = [t.detach().to(dtype).requires_grad_() for t in given]
    y = run(*tensors)
    torch.manual_seed(2)
    return [y, *torch.autograd.grad(y, tensors, torch.randn_like(y, dtype=made_in or dtype).to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("rms_norm")])
def test_first_order_is_pytorchs_bit_for_bit(device, name, dtype):
    case = CASES[name]
    if dtype == torch.bfloat16 and name == "embedding_bag_2d":
        pytest.skip("PyTorch has no bfloat16 kernel for it")
    found, expected = (first_order(run, case, device, dtype) for run in (friendly(case), case.run))
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a, b)


def test_running_statistics_of_instance_norm(device):
    x, found = torch.randn(3, 2, 4, device=device, requires_grad=True), []
    for mode in (contextlib.nullcontext(), curvature_friendly()):
        norm = torch.nn.InstanceNorm1d(2, affine=True, track_running_stats=True).to(device)
        with mode:
            norm(x)
        found.append([*norm.buffers()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_double_backward_of_weight_norm(device, dim):
    """PyTorch's own is wrong; its values and first derivatives are right."""
    v = torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    g = torch.norm_except_dim(v, 2, dim).detach().square().requires_grad_()

    def run(v, g):
        with curvature_friendly():
            return torch._weight_norm(v, g, dim)

    assert_within(run(v, g), torch._weight_norm(v, g, dim), 8 * unit(v.dtype) * run(v, g).detach().abs(), "result")
    assert torch.autograd.gradgradcheck(run, (v, g))


def rms_norm_bounds(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Of y and the gradients of x and w, from the magnitudes that are added up in them; 1 / rms = r.

    A mean of n numbers and its cube take 3 n / 2 + 12 roundings at most; where eps is left to PyTorch, it is that of
    the dtype, which moves r^3 by 3 / 2 eps / mean(x^2) of itself.
    """
    x, *weight = (t.detach().double() for t in case.tensors(device, dtype))
    torch.manual_seed(2)
    g = torch.randn_like(x, dtype=dtype).double()
    gw, over = g * sum(weight) if weight else g, tuple(range(1, x.dim()))
    r = x.square().mean(over, keepdim=True).rsqrt()
    roundings = 3 / 2 * x[0].numel() + 12 + float(3 * r.square().max())
    of_x = r * gw.abs() + x.abs() * r**3 * (gw * x).abs().mean(over, keepdim=True)
    sizes = [(x * r * (sum(weight) if weight else 1)).abs(), of_x, *[(g * x * r).abs().sum(0) for _ in weight]]
    return [roundings * unit(dtype) * size for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("rms_norm")])
def test_first_order_of_rms_norm(device, name, dtype):
    case = CASES[name]  # on a CPU PyTorch composes it of operators that each round
    found = first_order(friendly(case), case, device, dtype)
    expected = first_order(case.run, case, device, torch.float64, made_in=dtype)
    for a, b, bound in zip(found, expected, rms_norm_bounds(case, device, dtype), strict=True):
        assert a.dtype == dtype
        assert_within(a, b, bound, "result")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 5, 1000])
def test_the_double_backward_of_gelu(n, dtype):
    """The native kernel, where there is one, against the formula in float64; registered for graphs and vmap."""
    torch.manual_seed(0)
    v, grad, x = tensors = [3 * torch.randn(n, 2).to(dtype) for _ in range(3)]
    exact = gelu.gelu_double_backward(v.double(), grad.double(), x.double())
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 16 + torch.finfo(dtype).eps
    error = (gelu.run(*tensors) - exact).abs()
    # x^2 is rounded, by which the exponential of its half is as wrong as x^2 is large
    assert (error <= eps * (1 + x.double().square()) * (v * grad).double().abs() + torch.finfo(dtype).tiny).all()
    assert gelu.run(v, grad, torch.full_like(x, torch.nan)).isnan().all()
    found = torch.library.opcheck(
        gelu.run, tensors, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )
    assert set(found.values()) == {"SUCCESS"}
    batched = torch.vmap(gelu.run, in_dims=(1, 1, None))(v, grad, x[:, 0].contiguous())
    assert torch.equal(batched[1], gelu.run(v[:, 1].contiguous(), grad[:, 1].contiguous(), x[:, 0].contiguous()))


@pytest.mark.parametrize(
    "change", [lambda t: t[:1], lambda t: t.long(), lambda t: t.mT], ids=["shape", "dtype", "strides"]
)
def test_the_native_double_backward_of_gelu_refuses(change):
    if backends.unavailable_reason("native") is not None:
        pytest.skip("no native library")
    tensors = [torch.randn(4, 4) for _ in range(3)]
    for i in range(2):
        given = [change(t) if i == n else t for n, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match=r"gelu_double_backward: .* expected contiguous"):
            gelu.run(*given)


def test_the_double_backward_of_gelu_takes_no_more_than_its_results():
    """PyTorch's own takes several times that, which was the peak of a transformer's step."""
    x, grad, v = (torch.randn(4096, requires_grad=True) for _ in range(3))
    with curvature_friendly():
        (g,) = torch.autograd.grad(F.gelu(x), x, grad, create_graph=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(g, (grad, x), v)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(itertools.accumulate(sizes)) < 2.1 * x.nbytes


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("small", [True, False])
def test_a_relu_of_few_elements_is_pytorchs(small, inplace, device, monkeypatch):
    monkeypatch.setattr("adahessian_fused.friendly.relu.SMALL", 6 if small else 5)
    x = torch.randn(6, device=device, requires_grad=True)
    with curvature_friendly():
        y = F.relu(x * 2, inplace)
    assert (type(y.grad_fn).__name__ == "ReluBackward0") == small


SIGNS = {
    "l1_loss": lambda y: F.l1_loss(y, torch.ones_like(y)),
    "abs": lambda y: (y - 1).abs_().mean(),
    "itself": lambda y: y.abs().sum(),
}


@pytest.mark.parametrize("loss", SIGNS)
@pytest.mark.parametrize("layer", [torch.nn.GroupNorm(2, 4), torch.nn.LayerNorm(6), torch.nn.Identity()], ids=str)
def test_zeros_without_memory(layer, loss):
    """What autograd gives for the derivative of a sign is no tensor that a kernel may read."""
    torch.manual_seed(0)
    p, layer, found = torch.randn(3, 4, 6).double().requires_grad_(), layer.double(), []
    for mode in (contextlib.nullcontext(), curvature_friendly()):
        opt = AdaHessian([p], lr=0.0, seed=0)
        with mode:
            value = SIGNS[loss](layer(p))
        opt.backward(value)
        opt.step()
        found.append(opt.hessian_diag(p))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
