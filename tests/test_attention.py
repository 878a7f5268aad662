"""Scaled dot-product attention in the mode: which kernels it runs, its double backward, and what is left to PyTorch."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import assert_same
from published import AdaHessian
from tolerances import assert_error, relative_error
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from watching import Operators, nodes
from ways import WAYS

from adahessian_fused import TrainStep, backends, curvature_friendly
from adahessian_fused.friendly import attention_double_backward as op

MATH = SDPBackend.MATH


@pytest.fixture(autouse=True)
def kernel(device):
    """The operator has the device's kernel, whichever test comes first."""
    op.prepare(device)


# heads of queries and of keys, lengths, sizes of heads, diagonal, shape of the bias
SHAPES = {
    "one_tile": (2, 2, 7, 7, 8, 8, None, None),
    "causal": (2, 2, 150, 150, 8, 8, 0, None),
    "many_tiles": (1, 1, 300, 290, 16, 16, None, None),
    "wide": (2, 2, 130, 333, 5, 5, 203, None),
    "tall": (2, 2, 333, 130, 5, 5, 0, None),
    "unseen_rows": (2, 2, 140, 9, 4, 4, -131, None),
    "grouped": (6, 2, 140, 140, 8, 8, 0, None),
    "values_of_another_size": (3, 1, 20, 37, 7, 19, None, None),
    "large_heads": (1, 1, 66, 70, 128, 128, 0, None),
    "bias": (2, 1, 140, 141, 8, 8, None, (2, 2, 140, 141)),
    "bias_of_keys": (2, 2, 70, 71, 8, 8, None, (2, 1, 1, 71)),
    "bias_of_rows": (2, 2, 70, 71, 8, 8, None, (1, 2, 70, 1)),
}


def arguments(name: str, dtype: torch.dtype, device: str, n: int = 2) -> list:
    """All by position; some scores are masked, in one row all of them."""
    heads, kv_heads, length, keys, size, value_size, diagonal, shape = (SHAPES | INTERPRETED)[name]
    torch.manual_seed(0)
    q, k = (n, heads, length, size), (n, kv_heads, keys, size)
    v, y = (n, kv_heads, keys, value_size), (n, heads, length, value_size)
    a, b, c, grad, query, key, value = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (q, k, v, y, q, k, v))
    scale = size**-0.5
    scores = scale * query.double() @ key.double().repeat_interleave(heads // kv_heads, 1).mT
    bias = None
    if shape is not None:
        bias = torch.randn(shape, dtype=torch.float64)
        bias[torch.rand(shape) < 0.2] = -math.inf
        bias[:, :, 1:2] = -math.inf if shape[2] > 1 else bias[:, :, 1:2]
        scores = scores + bias
    if diagonal is not None:
        scores = scores.masked_fill(~torch.ones(length, keys, dtype=torch.bool).tril(diagonal), -math.inf)
    logsumexp = scores.logsumexp(-1).nan_to_num(neginf=0.0)
    wide = torch.promote_types(dtype, torch.float32)
    numbers = (None if t is None else t.to(device, wide) for t in (logsumexp, bias))
    return [t.to(device) for t in (a, b, c, grad, query, key, value)] + [*numbers, scale, diagonal]


def in_float64(given: list) -> list:
    return [t.double() if isinstance(t, Tensor) else t for t in given]


def check(function, given: list) -> None:
    """Results against the formulas in float64; a rounding of S changes P by as much, relatively."""
    expected = op.attention_double_backward(*in_float64(given))
    dtype, wide = given[4].dtype, given[7].dtype
    for found, exact in zip(function(*given), expected, strict=True):
        assert found.dtype == dtype
        error = (found.double() - exact).norm() / exact.norm()
        assert error <= 32 * torch.finfo(wide).eps + (torch.finfo(dtype).eps if dtype != wide else 0), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_formulas(device, name, dtype):
    check(op.run, arguments(name, dtype, device))


def by_autograd(given: list) -> tuple[Tensor, ...]:
    a, b, c, *inputs, _, bias, scale, diagonal = given
    grad, query, key, value = inputs = [t.detach().requires_grad_() for t in inputs]
    k, v = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = scale * query @ k.mT + (0 if bias is None else bias)
    if diagonal is not None:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(diagonal), -math.inf)
    p = torch._safe_softmax(scores, -1)
    grads = torch.autograd.grad(p @ v, inputs[1:], grad, create_graph=True)
    return torch.autograd.grad(grads, inputs, (a, b, c))


@pytest.mark.parametrize("name", ["causal", "grouped", "values_of_another_size", "bias", "bias_of_keys"])
def test_the_formulas_against_autograd(name):
    given = arguments(name, torch.float64, "cpu")
    assert_error(op.attention_double_backward(*given), by_autograd(given), 1e-13)


# What interpreted Triton, which takes a second for a few programs, has to do.
INTERPRETED = {
    "small_grouped": (2, 1, 5, 7, 4, 3, None, None),
    "small_causal": (1, 1, 70, 70, 8, 8, 0, None),
    "small_bias": (2, 2, 5, 40, 4, 4, 35, (1, 2, 5, 40)),
    "small_unseen_rows": (1, 1, 34, 9, 4, 4, -28, None),
}


@pytest.mark.filterwarnings("ignore:(overflow|invalid value)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_triton(device, name, dtype):
    reason = backends.unavailable_reason("triton", device)
    if reason is not None or device == "cuda":
        pytest.skip(reason or "not interpreted")
    check(backends.get("triton").attention_double_backward, arguments(name, dtype, device, n=1))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel_of", ["formulas", "native", "triton"])
@pytest.mark.parametrize("name", ["small_grouped", "small_causal", "one_tile"])
def test_saturated_softmax(device, name, kernel_of, dtype):
    """Scores of a million, whose logsumexp is rounded by more than P may be: what cancels must not leave a rest."""
    if kernel_of == "triton" and (backends.unavailable_reason("triton", device) or dtype == torch.float64):
        pytest.skip("Triton's kernel is for float32")
    functions = {"formulas": op.attention_double_backward, "native": op.run}
    function = functions.get(kernel_of) or backends.get("triton").attention_double_backward
    *others, query, key, value, _, bias, scale, diagonal = arguments(name, dtype, device, n=1)
    query *= 1e6
    scores = (scale * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT).double()
    if diagonal is not None:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(diagonal), -math.inf)
    given = [*others, query, key, value, scores.logsumexp(-1).to(dtype), bias, scale, diagonal]
    expected = by_autograd(in_float64(given))
    a, b, _, grad = others
    terms = scale * (a.norm() * key.norm() + query.norm() * b.norm()) * grad.norm() * value.norm()
    for found, exact, factor in zip(function(*given), expected, (1, key.norm(), query.norm(), 1), strict=True):
        assert (found - exact).norm() <= 8 * torch.finfo(dtype).eps * terms * factor


@pytest.fixture
def native():
    reason = backends.unavailable_reason("native")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op.NAME, "CPU")


@pytest.mark.parametrize("name", ["causal", "grouped"])
def test_the_number_of_threads_does_not_matter(native, set_threads, name):
    given, results = arguments(name, torch.float32, "cpu"), []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(op.run(*given))
    assert_same(*results[:2])
    assert_same(*results[1:])


@pytest.mark.parametrize("name", SHAPES)
def test_permuted(device, name):
    """Tensors of any strides, as heads are that were split off."""
    given = arguments(name, torch.float32, device)
    permuted = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given[:7]]
    assert_same(op.run(*permuted, *given[7:]), op.run(*given))


NAMES = ("a", "b", "c", "grad", "query", "key", "value", "logsumexp", "bias")
BAD = [
    *((name, "dtype", lambda t: t.long()) for name in NAMES),
    *((name, "length", lambda t: t[:, :, :-1]) for name in ("a", "b", "c", "grad", "value", "logsumexp", "bias")),
    *((name, "dimensions", lambda t: t[None]) for name in NAMES),
    ("key", "heads", lambda t: t[:, :1].repeat(1, 4, 1, 1)),
]


@pytest.mark.parametrize(("name", "what", "change"), BAD, ids=[f"{name}-{what}" for name, what, _ in BAD])
def test_refused(native, name, what, change):
    given = arguments("bias", torch.float32, "cpu")
    given[NAMES.index(name)] = change(given[NAMES.index(name)])
    with pytest.raises(RuntimeError, match="attention_double_backward: "):
        op.run(*given)


@pytest.mark.parametrize("name", ["causal", "bias_of_keys"])
def test_registration(device, name):
    """Schema, fake tensors and torch.compile's functionalisation."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    found = torch.library.opcheck(op.run, arguments(name, torch.float32, device), test_utils=tests)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dims", [(0, None, 1, 0, 0, None, 2, 0), (None, None, None, 0, None, None, None, None)])
@pytest.mark.parametrize("name", ["grouped", "bias_of_keys", "bias_of_rows"])
def test_vmap(device, name, dims):
    given = arguments(name, torch.float64, device)
    several, dims = list(given), (*dims, 0 if given[8] is not None and dims[0] == 0 else None)
    for i, dim in enumerate(dims):
        if dim is not None:
            several[i] = torch.stack([given[i], given[i] + 0.1], dim)
    one = [[t if dims[i] is None else t.select(dims[i], n) for i, t in enumerate(several[:9])] for n in range(2)]
    tensors = torch.vmap(lambda *t: op.run(*t, *given[9:]), in_dims=dims)(*several[:9])
    for found, *expected in zip(tensors, *(op.run(*t, *given[9:]) for t in one), strict=True):
        assert torch.allclose(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


# ---- in the mode -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_has_one_mask(device, p):
    """All passes drop the same weights, those that PyTorch's math kernel drops."""
    qkv = heads(device)
    torch.manual_seed(1)
    with curvature_friendly():
        ours = product(F.scaled_dot_product_attention(*qkv, dropout_p=p), qkv)
    torch.manual_seed(1)
    with sdpa_kernel(MATH):
        theirs = product(F.scaled_dot_product_attention(*qkv, dropout_p=p), qkv)
    assert_error(ours, theirs, 1e-12)


def test_a_mask_with_a_gradient(device):
    qkv, bias = heads(device), torch.randn(6, 6, dtype=torch.float64, device=device, requires_grad=True)
    with curvature_friendly():
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


def test_memory_is_linear(device):
    """Of a tensor of T x T there are no more than some rows at a time."""
    (q, k, v), largest = heads(device, length=1024, dtype=torch.float32), []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor))
            return found

    with Largest():
        with curvature_friendly():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        product(y, [q, k, v])
    assert max(largest) <= 4 * 1024 * max(op.ROWS, 8)
