"""Scaled dot-product attention in the mode: which kernels it runs, its double backward, and what is left to PyTorch."""

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

from adahessian_fused import TrainStep, backends, curvature_friendly
from adahessian_fused.friendly import attention_double_backward as op
from adahessian_fused.friendly import attention_dropout
from adahessian_fused.reference import philox4x32

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
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]


def check(function, given: list) -> None:
    """Results against the formulas in float64; a rounding of S changes P by as much, relatively."""
    expected = op.attention_double_backward(*in_float64(given))
    dtype, wide = given[4].dtype, given[7].dtype
    for found, exact in zip(function(*given), expected, strict=True):
        assert found.dtype == dtype
        error = (found.double() - exact).norm() / exact.norm()
        assert error <= 32 * torch.finfo(wide).eps + (torch.finfo(dtype).eps if dtype != wide else 0), error


P = 0.3


def dropout(device: str, offset: int = 2**35 - 8) -> tuple[Tensor, int, float]:
    """A mask; it begins where the counter's words, of 32 bits, overflow."""
    return torch.tensor([-3 << 40 | 5, offset], device=device), attention_dropout.threshold(P), 1 / (1 - P)


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_against_the_formulas(device, name, dtype, drops):
    check(op.run, arguments(name, dtype, device) + list(dropout(device) if drops else ()))


def passes(given: list) -> list[tuple]:
    """Forward and backward pass with dropout: operator, plain version and arguments."""
    _, _, _, grad, *qkv, logsumexp, bias, scale, diagonal = given
    of_all = (bias, scale, diagonal, *dropout(grad.device.type))
    return [
        (attention_dropout.forward, attention_dropout.attention_forward, [*qkv, *of_all]),
        (attention_dropout.backward, attention_dropout.attention_backward, [grad, *qkv, logsumexp, *of_all]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_passes_with_dropout_against_the_formulas(device, name, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for function, plain, given in passes(arguments(name, dtype, device)):
        for found, expected in zip(function(*given), plain(*in_float64(given)), strict=True):
            eps = torch.finfo(found.dtype).eps if found.dtype != wide else 0
            error = (found.double() - expected).norm() / expected.norm()
            assert error <= 32 * torch.finfo(wide).eps + eps, error


def by_autograd(given: list, mask: Tensor | float = 1.0) -> tuple[Tensor, ...]:
    return all_by_autograd(given, mask)[-4:]


def all_by_autograd(given: list, mask: Tensor | float) -> tuple[Tensor, ...]:
    """The output, its gradients, and theirs."""
    a, b, c, *inputs, _, bias, scale, diagonal = given
    grad, query, key, value = inputs = [t.detach().requires_grad_() for t in inputs]
    k, v = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = scale * query @ k.mT + (0 if bias is None else bias)
    if diagonal is not None:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(diagonal), -math.inf)
    y = (mask * torch._safe_softmax(scores, -1)) @ v
    grads = torch.autograd.grad(y, inputs[1:], grad, create_graph=True)
    return y, *grads, *torch.autograd.grad(grads, inputs, (a, b, c))


AGAINST_AUTOGRAD = ["causal", "grouped", "values_of_another_size", "bias", "bias_of_keys"]


@pytest.mark.parametrize("name", AGAINST_AUTOGRAD)
def test_the_formulas_against_autograd(name):
    given = arguments(name, torch.float64, "cpu")
    assert_error(op.attention_double_backward(*given), by_autograd(given), 1e-13)


def kept(random: Tensor, shape: tuple[int, ...], least: int) -> Tensor:
    return attention_dropout.is_kept(random, shape, slice(0, shape[2]), shape[3], least)


@pytest.mark.parametrize("name", [*AGAINST_AUTOGRAD, "unseen_rows"])
def test_the_formulas_with_dropout_against_autograd(name):
    given = arguments(name, torch.float64, "cpu")
    random, least, factor = dropout("cpu")
    mask = factor * kept(random, (*given[4].shape[:3], given[5].shape[2]), least).double()
    found = [t for _, plain, arguments in passes(given) for t in plain(*arguments)]
    del found[1]  # the logsumexp
    found += op.attention_double_backward(*given, random, least, factor)
    assert_error(found, all_by_autograd(given, mask), 1e-13)


def test_the_mask_is_philoxs():
    """Word offset + n of the stream for weight n, as curand numbers them, whichever rows and keys are asked for."""
    (seed, offset), least, _ = dropout("cpu")
    shape, rows = (2, 3, 5, 7), slice(1, 4)
    numbers = (offset + torch.arange(2 * 3 * 5 * 7)).view(shape)
    call, zero = numbers // 4, torch.zeros_like(numbers)
    words = torch.stack(philox4x32((call % 2**32, call // 2**32, zero, zero), int(seed)), -1)
    expected = words.gather(-1, (numbers % 4)[..., None])[..., 0] >= least
    found = attention_dropout.is_kept(torch.stack([seed, offset]), shape, rows, 6, least)
    assert torch.equal(found, expected[:, :, rows, :6])


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.3, 0.5, 0.9999])
def test_the_threshold_is_curands(p):
    """A word is kept if its number in (0, 1], in float32, is above p."""
    least, uniform = attention_dropout.threshold(p), lambda word: torch.tensor(word).float() * 2**-32 + 2**-33
    assert uniform(least) > p
    assert least == 0 or not uniform(least - 1) > torch.tensor(p)
    assert abs(least / 2**32 - p) < 2**-24


def test_statistics_of_the_mask():
    """1 - p are kept, independently of the neighbour and of the same weight of other heads, batches and draws."""
    shape, least = (2, 2, 128, 128), attention_dropout.threshold(P)
    torch.manual_seed(0)
    one, other = (kept(torch.randint(2**60, (2,)) * 4, shape, least).double() - (1 - P) for _ in range(2))
    pairs = [(one, other), (one[0], one[1]), (one[:, 0], one[:, 1]), (one[..., 1:], one[..., :-1])]
    pairs += [(one[:, :, 1:], one[:, :, :-1]), (one, one.mT)]
    for x, y in [(one, torch.full_like(one, (P * (1 - P)) ** 0.5)), *pairs]:
        assert abs((x * y).mean()) < 4 * P * (1 - P) / x.numel() ** 0.5 * (2 if x is one else 1)


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
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
def test_interpreted_triton(device, name, dtype, drops):
    reason = backends.unavailable_reason("triton", device)
    if reason is not None or device == "cuda":
        pytest.skip(reason or "not interpreted")
    given = arguments(name, dtype, device, n=1 + (name == "small_grouped")) + list(dropout(device) if drops else ())
    check(backends.get("triton").attention_double_backward, given)


@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("name", ["small_grouped", "small_bias"])
def test_parts_of_a_batch_that_is_larger_than_a_grid(monkeypatch, device, name, drops):
    """They have the mask of the whole batch."""
    name_of_module = "adahessian_fused.kernels.attention_double_backward"
    module = pytest.importorskip(name_of_module, reason="Triton is not installed")
    if device == "cuda" or backends.unavailable_reason("triton", device) is not None:
        pytest.skip("not interpreted")
    given = arguments(name, torch.float32, device, n=6) + list(dropout(device) if drops else ())
    whole = module.attention_double_backward(*given)
    monkeypatch.setattr(module, "MAX_GRID", 5)
    for found, expected in zip(module.attention_double_backward(*given), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("batch", [1 << 14, 1 << 17], ids=str)
def test_grids_that_cuda_takes(monkeypatch, batch):
    """Windows' attention has many heads in all: dimensions of a grid but the first end at 65,535."""
    name = "adahessian_fused.kernels.attention_double_backward"
    module, grids = pytest.importorskip(name, reason="Triton is not installed"), []
    launch = type("Kernel", (), {"__getitem__": lambda _, grid: lambda *_, **__: grids.append(grid)})()
    for kernel in ("queries", "keys"):
        monkeypatch.setattr(module, f"attention_{kernel}_kernel", launch)
    monkeypatch.setattr(module, "on", lambda *_: nullcontext())
    q, k = (torch.empty(batch, 6, n, 16, dtype=torch.bfloat16, device="meta") for n in (65, 64))
    bias = torch.empty(65, 64, device="meta")
    results = module.attention_double_backward(q, k, k, q, q, k, k, q[..., 0].float(), bias, 1.0, None)
    assert [r.shape for r in results] == [q.shape, q.shape, k.shape, k.shape]
    assert all(max(grid[1:]) <= 65535 for grid in grids)
    assert sum(heads * part for _, heads, part in grids) == 2 * 6 * batch


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
        with_dropout = [function(*its) for function, _, its in passes(given)]
        results.append([*op.run(*given), *op.run(*given, *dropout("cpu")), *with_dropout[0], *with_dropout[1]])
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
    given = arguments(name, torch.float32, device)
    for function, *_, its in [(op.run, given), (op.run, [*given, *dropout(device)]), *passes(given)]:
        assert set(torch.library.opcheck(function, its, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dims", [(0, None, 1, 0, 0, None, 2, 0), (None, None, None, 0, None, None, None, None)])
@pytest.mark.parametrize("name", ["grouped", "bias_of_keys", "bias_of_rows"])
@pytest.mark.parametrize("drops", [False, True], ids=["", "dropout"])
def test_vmap(device, name, dims, drops):
    """With dropout, whose mask is the same for all."""
    given = arguments(name, torch.float64, device) + list(dropout(device) if drops else ())
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
