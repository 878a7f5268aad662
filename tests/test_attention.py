"""Scaled dot-product attention in the mode: which kernels it runs, its double backward, and what is left to PyTorch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from models import assert_same
from tolerances import assert_error
from torch import Tensor

from adahessian_fused import backends
from adahessian_fused.friendly import attention_double_backward as op
from adahessian_fused.friendly import attention_dropout
from adahessian_fused.reference import philox4x32


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


@pytest.mark.parametrize(("name", "drops"), [("small_grouped", False), ("small_bias", True)])
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


@pytest.mark.parametrize("length", [2**24 - 2**13, 2**24], ids=str)
@pytest.mark.parametrize("long", ["queries", "keys"])
def test_heads_whose_numbers_have_more_than_32_bits_take_plain_pytorch(monkeypatch, long, length):
    triton = SimpleNamespace(attention_double_backward=lambda *_: "triton")
    monkeypatch.setattr(op.backends, "get", lambda name: triton)
    monkeypatch.setattr(op, "attention_double_backward", lambda *_: "plain")
    queries, keys = (torch.empty(1, 1, length if long == n else 64, 128, device="meta") for n in ("queries", "keys"))
    found = op._by_triton(queries, keys, keys, queries, queries, keys, keys)
    assert found == ("plain" if length * 128 >= 2**31 else "triton")


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
