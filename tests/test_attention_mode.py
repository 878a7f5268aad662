"""Attention in the mode: PyTorch's function with every argument, dropout, checkpoints, transforms, modules."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models import assert_same
from published import AdaHessian
from tolerances import assert_error, relative_error
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from watching import Operators, nodes
from ways import WAYS

from adahessian_fused import TrainStep, curvature_friendly
from adahessian_fused.friendly import attention_dropout

MATH, P = SDPBackend.MATH, 0.3


def heads(device, *, length=6, size=4, dtype=torch.float64, number=2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, number, length, size, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]


def product(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of the squares, and their product with ones."""
    grads = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)
    return [*grads, *torch.autograd.grad(grads, inputs, [torch.ones_like(t) for t in inputs])]


def test_the_choice_of_a_kernel_is_the_users(device):
    qkv = heads(device, size=8, dtype=torch.float32)
    with curvature_friendly():
        ours = F.scaled_dot_product_attention(*qkv)
        with sdpa_kernel(MATH):
            theirs = F.scaled_dot_product_attention(*qkv)
    assert "_ForwardBackward" in nodes(ours)
    assert "_ForwardBackward" not in nodes(theirs)
    assert not any("ScaledDotProduct" in name for name in nodes(theirs))


def seeded(*args, **options) -> Tensor:
    torch.manual_seed(1)
    return F.scaled_dot_product_attention(*args, dropout_p=P, **options)


def shown_mask(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """The mask, 0 or 1 / (1 - P), that attention has with this seed: what it makes of the unit vectors shows it."""
    keys = k.shape[2]
    units = torch.eye(keys, dtype=v.dtype, device=v.device).expand(*v.shape[:2], keys, keys)
    with curvature_friendly():
        dropped = seeded(q, k, units.requires_grad_(), **options)
    weights = F.scaled_dot_product_attention(q, k, units, **options)
    return torch.where(weights > 0, dropped / weights, 0).detach()


WITH_DROPOUT = {
    "plain": {},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.rand(7, 9, generator=torch.Generator().manual_seed(0)) > 0.3},
    "bias": {"attn_mask": torch.randn(2, 1, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))},
    "lower_right": {"attn_mask": causal_lower_right(7, 9)},
    "scale": {"scale": 0.2},
    "grouped": {"enable_gqa": True},
}


def with_dropout(device: str, name: str) -> tuple[list[Tensor], dict]:
    """Query, key and value, and options of attention."""
    torch.manual_seed(0)
    kv_heads = 2 if name == "grouped" else 4
    shapes = (2, 4, 7, 4), (2, kv_heads, 9, 4), (2, kv_heads, 9, 5)
    options = {k: t.to(device) if type(t) is Tensor else t for k, t in WITH_DROPOUT[name].items()}
    return [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes], options


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_has_one_mask(device, name):
    """All passes, a third one by autograd's operators too, drop the weights that the forward pass drops."""
    qkv, options = with_dropout(device, name)
    mask = shown_mask(*qkv, **options)
    assert 0 < (mask == 0).sum() < mask.numel()

    def formula(q, k, v):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        eye = torch.eye(k.shape[2], dtype=k.dtype, device=device).expand(*k.shape[:2], -1, -1)
        with sdpa_kernel(MATH):
            p = F.scaled_dot_product_attention(q, k, eye, **{n: o for n, o in options.items() if n != "enable_gqa"})
        return (mask * p) @ v

    found = []
    for function in (lambda *qkv: seeded(*qkv, **options), formula):
        with curvature_friendly():
            first_and_second = product(function(*qkv), qkv)
            penalty = sum(
                g.square().sum() for g in torch.autograd.grad(function(*qkv).square().sum(), qkv, create_graph=True)
            )
            second_of_penalty = torch.autograd.grad(penalty, qkv, create_graph=True)
            third = torch.autograd.grad(sum(g.sum() for g in second_of_penalty), qkv)
        found.append([*first_and_second, *second_of_penalty, *third])
    assert_error(*found, 1e-12)


@pytest.mark.parametrize("name", ["plain", "causal", "grouped"])
def test_gradgradcheck_with_the_mask_held(device, name):
    qkv, options = with_dropout(device, name)
    with curvature_friendly():
        assert torch.autograd.gradgradcheck(lambda *qkv: seeded(*qkv, **options), [t[:1, :, :3] for t in qkv])


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_other_probabilities_are_pytorchs(device, p):
    said = []
    for context in (curvature_friendly(), nullcontext()):
        with context:
            try:
                said.append(F.scaled_dot_product_attention(*heads(device), dropout_p=p).isnan().all())
            except RuntimeError as error:
                said.append(str(error))
    assert said[0] == said[1]


@pytest.mark.parametrize("p", [-0.1, math.nan])
def test_what_is_no_probability(device, p):
    with curvature_friendly(), pytest.raises(ValueError, match=f"dropout_p={p}; expected 0 <= dropout_p <= 1"):
        F.scaled_dot_product_attention(*heads(device), dropout_p=p)


def test_dropout_in_checkpoints(device):
    """The pass is computed again with the mask that it had; the next one has another."""
    qkv = heads(device)
    results = []
    for around in (lambda f, *x: f(*x), partial(checkpoint, use_reentrant=False)):
        torch.manual_seed(1)
        with curvature_friendly():
            y = around(partial(F.scaled_dot_product_attention, dropout_p=P), *qkv)
            again = around(partial(F.scaled_dot_product_attention, dropout_p=P), *qkv)
        assert not torch.equal(y, again)
        results.append([y, *product(y, qkv)])
    assert_same(*results)


def test_a_mask_with_a_gradient(device):
    """Falls back, and says so."""
    qkv, bias = heads(device), torch.randn(6, 6, dtype=torch.float64, device=device, requires_grad=True)
    with curvature_friendly(), pytest.warns(UserWarning, match="attn_mask .* needs a gradient: .* math kernel"):
        ours = product(F.scaled_dot_product_attention(*qkv, attn_mask=bias), [*qkv, bias])
    with sdpa_kernel(MATH):
        theirs = product(F.scaled_dot_product_attention(*qkv, attn_mask=bias), [*qkv, bias])
    assert_same(ours, theirs)


@pytest.mark.parametrize("transform", ["grad", "hessian", "forward_ad", "no_grad", "frozen"])
def test_transforms(device, transform):
    """They differentiate the math kernel, as often as they like."""
    q, k, v = (t.detach() for t in heads(device, length=3))

    def f(q):
        return F.scaled_dot_product_attention(q, k, v).square().sum()

    def run():
        if transform == "grad":
            return torch.func.grad(lambda q: torch.func.grad(f)(q).square().sum())(q)
        if transform == "hessian":
            return torch.func.hessian(f)(q)
        if transform == "forward_ad":
            with torch.autograd.forward_ad.dual_level():
                return torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(q, q))).tangent
        with torch.no_grad() if transform == "no_grad" else nullcontext():
            return f(q)

    with curvature_friendly():
        found = run()
    with sdpa_kernel(MATH):
        assert_error([found], [run()], 1e-13)


@pytest.mark.parametrize("empty", ["keys", "queries", "batch"])
def test_nothing_to_attend_to(device, empty):
    qkv = heads(device)
    q, k, v = (t[:0] for t in qkv) if empty == "batch" else qkv
    q, k, v = (q[:, :, :0], k, v) if empty == "queries" else (q, k[:, :, :0], v[:, :, :0])
    with curvature_friendly():
        y = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v))


def test_nested_tensors_are_refused(device):
    x = torch.nested.nested_tensor([torch.randn(n, 2, 4, device=device) for n in (3, 5)], layout=torch.jagged)
    x = x.requires_grad_().transpose(1, 2)
    with (
        curvature_friendly(),
        pytest.raises(RuntimeError, match=r"nested tensors cannot be differentiated twice.*padded"),
    ):
        F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    "way", ["create_graph", "backward", "hook_backward", "function", "closure_standard", "train_step"]
)
@pytest.mark.filterwarnings("ignore:(flex_attention called|Using backward\\(\\) with create_graph=True)")
def test_flex_attention_is_refused(device, way, monkeypatch):
    """Nothing has changed afterwards. On a CPU it has no first derivative either, by decree."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *qkv: None)
    p = nn.Parameter(torch.randn(3, 1, 2, 16, 8, device=device))
    before, opt = p.detach().clone(), AdaHessian([p])
    with pytest.raises(
        RuntimeError, match=r"flex_attention cannot be differentiated twice.*scaled_dot_product_attention"
    ):
        WAYS[way](opt, lambda: flex_attention(*p).square().mean())
    assert torch.equal(p, before)


@pytest.mark.parametrize("shape", [(2, 3, 6, 4), (3, 2, 6, 4), (2, 2, 7, 6, 4)], ids=str)
def test_errors_are_pytorchs(shape):
    q, k, _ = heads("cpu")
    said = []
    for context in (nullcontext(), curvature_friendly()):
        with context, pytest.raises(RuntimeError) as error:
            F.scaled_dot_product_attention(q, k, torch.randn(shape, dtype=q.dtype))
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_autocast(device, dtype, mask):
    """The same casts, so the same numbers, and a product as good as the math kernel's."""
    qkv = heads(device, dtype=torch.float32)
    mask = {"bool": torch.eye(6) == 0, "float": torch.eye(6), None: None}[mask]
    mask = None if mask is None else mask.to(device)
    found = []
    for context in (curvature_friendly(), sdpa_kernel(MATH), nullcontext()):
        with context, torch.autocast(device, dtype):
            y = F.scaled_dot_product_attention(*qkv, attn_mask=mask)
        first = [y, *torch.autograd.grad(y.float().square().sum(), qkv, retain_graph=True)]
        found.append(first if isinstance(context, nullcontext) else [*first, *product(y, qkv)[3:]])
    ours, math_kernel, theirs = found
    assert_same(ours[:4], theirs)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    with sdpa_kernel(MATH):
        wide = None if mask is None or mask.dtype == torch.bool else mask.double()
        exact = product(F.scaled_dot_product_attention(*exact, attn_mask=mask if wide is None else wide), exact)[3:]
    assert relative_error(ours[4:], exact) <= 2 * relative_error(math_kernel[4:], exact)


class Encoder(nn.Module):
    """A transformer's layer with a key padding mask, and attention beside a default device's mode."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
        self.encoder, self.attention = nn.TransformerEncoder(layer, 1), nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        padding[0, -2:] = True
        y = self.encoder(x, src_key_padding_mask=padding)
        causal = nn.Transformer.generate_square_subsequent_mask(len(y), device=x.device, dtype=x.dtype)
        return y + self.attention(y, y, y, need_weights=False, attn_mask=causal, is_causal=True)[0]


@pytest.mark.parametrize("around", [False, True], ids=["", "default_device"])
def test_modules(device, around):
    model, x = Encoder().to(device, torch.float64), torch.randn(3, 5, 8, dtype=torch.float64, device=device)
    with curvature_friendly(), torch.device(device) if around else nullcontext():
        y = model(x)
    assert "_ForwardBackward" in nodes(y)
    if device == "cpu":  # on CUDA PyTorch's fused kernels have no float64
        assert not any("ScaledDotProduct" in name or "Softmax" in name for name in nodes(y))
    ours = product(y, list(model.parameters()))
    with sdpa_kernel(MATH):
        assert_error(ours, product(model(x), list(model.parameters())), 1e-11)


def test_train_step_has_the_fused_operators(device):
    model, x = Encoder().to(device), torch.randn(3, 5, 8, device=device)
    opt = AdaHessian(model.parameters())
    step = TrainStep(model, lambda y, _: y.square().mean(), opt, compile=False)
    step(x, x)
    with Operators() as seen:
        step(x, x)
    assert "attention_double_backward" in seen.counts
    assert "_softmax" not in seen.counts


@pytest.mark.parametrize("p", [0.0, P])
def test_memory_is_linear(device, p):
    """Of a tensor of T x T there are no more than some rows at a time."""
    (q, k, v), largest = heads(device, length=1024, dtype=torch.float32), []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor))
            return found

    with Largest():
        with curvature_friendly():
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        product(y, [q, k, v])
    assert max(largest) <= 4 * 1024 * max(attention_dropout.ROWS, 8)
