"""The second differentiation in lower precision: its matrix products and convolutions, and nothing else.

A single probe's noise is many times the diagonal it estimates, so that half a percent of rounding in Hz is nothing
beside it, while the second differentiation has two thirds of a step's products.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..checks import warn

NOTHING = contextlib.nullcontext()
aten = torch.ops.aten
Precision = torch.dtype | str
_GOLDEN = 0.6180339887

_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


def second_pass(precision: Precision | None, grads: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Enter the context in which ``grads`` are differentiated again: products of float32 numbers in this precision.

    Args:
        precision: None, ``torch.bfloat16`` or "tf32", as ``hvp_dtype`` of :class:`~adahessian_fused.AdaHessian`.
        grads: what is about to be differentiated.

    Warns:
        UserWarning: once, if there is nothing to do: no product is in float32, or "tf32" on a CPU.
    """
    if precision is None:
        return NOTHING
    if precision == "tf32":
        if not any(g.is_cuda and g.dtype == torch.float32 for g in grads) and _first_time("tf32"):
            warn(
                'hvp_dtype="tf32" has nothing to do: no gradient is in float32 on a CUDA device; expected '
                "hvp_dtype=torch.bfloat16 on a CPU, or None",
            )
        return tf32()
    assert isinstance(precision, torch.dtype)
    return LowPrecisionProducts(precision)


class LowPrecisionProducts(TorchDispatchMode):
    """Inside it, products and convolutions of float32 tensors are computed in ``dtype`` and returned in float32.

    Their operands are rounded, the sums are accumulated in float32 and rounded once. What else there is (sums,
    activations, norms) stays in float32, and what is sparse or not in float32 stays as it is.

    Two results of 8 bits cancel to exactly nothing now and then. Such a zero in Hz would be a v of zero, so a step of
    lr m / eps: hundreds, where float32 has a small number. Hence :meth:`wide` makes of the few numbers that a result
    can be the many that it may have been.

    A tensor is a factor twice in a Hessian-vector product, often transposed the second time. It is rounded once: what
    it has become is kept for as long as its storage is alive and has not been written to, and until the mode is left.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.lowered = dtype, 0
        self._half = torch.finfo(dtype).eps / 4  # of the unit roundoff
        self._rounded: dict[tuple, tuple[StorageWeakRef, Tensor]] = {}
        self._alive = 0  # entries after the last sweep
        self._full = contextlib.ExitStack()

    def __enter__(self) -> Any:
        self._full.enter_context(_full_accumulation())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._rounded.clear()
            self._full.close()
        if not self.lowered and error[0] is None and _first_time("nothing in float32"):
            warn(
                f"hvp_dtype={self.dtype} has nothing to do: the second differentiation has no product or convolution "
                "in float32, because of autocast, a 16-bit model or a loss without any; expected hvp_dtype=None",
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = _PRODUCTS.get(func)
        if func.name() in _ON_CUDA and args[0].device.type == "cuda":
            product = _ON_CUDA[func.name()]
        if product is None:
            return func(*args, **(kwargs or {}))
        first, last, compute = product
        factors = args[first:last]
        if any(t.dtype is not torch.float32 or t.layout is not torch.strided for t in factors):
            return func(*args, **(kwargs or {}))
        self.lowered += 1
        return compute(self, func, *args, **(kwargs or {}))

    def low(self, t: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
        """Return the tensor in the lower precision, from before if it has been rounded already."""
        if type(t) not in _PLAIN or t._is_zerotensor():
            return _to(t, self.dtype, memory_format)
        shape, stride, storage = t.shape, t.stride(), t.untyped_storage()
        order = sorted(range(len(stride)), key=stride.__getitem__, reverse=True)  # the same for a transposed view
        layout = tuple((shape[i], stride[i]) for i in order)
        # The weak reference keeps the address from being given to another storage.
        key = (storage._cdata, t.storage_offset(), layout, t._version, memory_format)
        known = self._rounded.get(key)
        if known is None:
            low = _to(t, self.dtype, memory_format)
            self._sweep()
            self._rounded[key] = StorageWeakRef(storage), low.permute(order)
            return low
        return known[1].permute(sorted(range(len(order)), key=order.__getitem__))

    def wide(self, t: Tensor) -> Tensor:
        """Return a result in float32, each column times a factor of its own in 1 -+ half a unit roundoff.

        The factors are different for every product: multiples of the golden ratio, spread evenly and without state.
        """
        n, begin = t.shape[-1], 37 * self.lowered % 4096
        factors = torch.arange(begin, begin + n, dtype=torch.float32, device=t.device)
        factors = factors.mul_(_GOLDEN).frac_().mul_(2 * self._half).add_(1 - self._half)
        return t * factors

    def _sweep(self) -> None:
        """Drop what has been made of tensors that are gone; now and then, so that it costs little."""
        if len(self._rounded) >= 2 * self._alive + 16:
            self._rounded = {key: entry for key, entry in self._rounded.items() if not entry[0].expired()}
            self._alive = len(self._rounded)


# ---- the operators ---------------------------------------------------------------------------------------------------


def _product(mode: LowPrecisionProducts, func: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    return mode.wide(func(mode.low(a), mode.low(b)))


def _added(
    product: Callable[..., Tensor], mode: LowPrecisionProducts, func: Callable[..., Tensor], *args: Any, **kw: Any
) -> Tensor:
    """Return ``beta * c + alpha * a @ b``; the sum is one of float32 numbers."""
    c, a, b = args
    beta, alpha = kw.get("beta", 1), kw.get("alpha", 1)
    found = _product(mode, product, a, b)
    found = found if alpha == 1 else found * alpha
    return found if beta == 0 else torch.add(found, c, alpha=beta)


def _convolution(
    mode: LowPrecisionProducts,
    func: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *geometry: Any,
) -> Tensor:
    inside, outside = _formats(x, weight)
    bias = None if bias is None else bias.to(mode.dtype)
    found = func(mode.low(x, inside), mode.low(weight, inside), bias, *geometry)
    return found.to(torch.float32, memory_format=outside)


def _convolution_backward(
    mode: LowPrecisionProducts, func: Callable[..., Any], grad: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    inside, outside = _formats(x, weight)
    d_x, d_weight, d_bias = func(*(mode.low(t, inside) for t in (grad, x, weight)), *rest)
    return (
        None if d_x is None else d_x.to(torch.float32, memory_format=outside),
        None if d_weight is None else _like(mode.wide(d_weight.flatten(1)).view(d_weight.shape), d_weight, outside),
        None if d_bias is None else mode.wide(d_bias),
    )


def _attention(mode: LowPrecisionProducts, func: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
    """Return the gradients in float32; the logsumexp and the bias stay in it, as sums do."""
    return tuple(t.to(torch.float32) for t in func(*map(mode.low, args[:7]), *args[7:]))


def _like(found: Tensor, low: Tensor, outside: torch.memory_format) -> Tensor:
    return found if outside is torch.contiguous_format else torch.empty_like(low, dtype=found.dtype).copy_(found)


def _formats(x: Tensor, weight: Tensor) -> tuple[torch.memory_format | None, torch.memory_format]:
    """Return the memory formats in which a convolution is computed and returned.

    oneDNN's convolutions of 16-bit numbers are up to three times as fast in channels_last.
    """
    last = torch.channels_last
    if x.dim() != 4 or any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, weight)):
        return None, torch.preserve_format
    return (last if x.device.type == "cpu" else None), torch.contiguous_format


def _to(t: Tensor, dtype: torch.dtype, memory_format: torch.memory_format | None) -> Tensor:
    low = t.to(dtype)
    return low if memory_format is None else low.contiguous(memory_format=memory_format)  # faster than both at once


# Operator: the factors' places among its arguments, and what to compute instead.
_PRODUCTS: dict[Callable[..., Any], tuple[int, int, Callable[..., Any]]] = {
    aten.mm.default: (0, 2, _product),
    aten.bmm.default: (0, 2, _product),
    aten.addmm.default: (1, 3, functools.partial(_added, aten.mm.default)),
    aten.baddbmm.default: (1, 3, functools.partial(_added, aten.bmm.default)),
    aten.convolution.default: (0, 2, _convolution),
    aten.convolution_backward.default: (0, 3, _convolution_backward),
}
# Where tensor cores have such products: a CPU's kernel multiplies in float32 whatever it is given.
_ON_CUDA = {"adahessian_fused::attention_double_backward": (0, 7, _attention)}


# ---- switches of PyTorch ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Use TF32 for CUDA's products and convolutions of float32 numbers: factors of 10 bits, sums of 23."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


@contextlib.contextmanager
def _full_accumulation() -> Iterator[None]:
    """Have cuBLAS add up parts of bfloat16 products in float32."""
    matmul, name = torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    before = getattr(matmul, name)
    if hasattr(matmul, f"{name}_split_k"):
        before = before, getattr(matmul, f"{name}_split_k")
    try:
        setattr(matmul, name, False)
        yield
    finally:
        setattr(matmul, name, before)


def bfloat16_gain(n: int = 384, rounds: int = 20) -> float:
    """Measure how many times as fast as float32's this processor's products of bfloat16 numbers are, in milliseconds.

    It is near 2 with instructions for them (AVX512_BF16), more with matrix units (AMX), and below 1 without. The two
    take turns and the fastest of each counts, so that other work on the processor does not decide.
    """
    factors = [torch.ones(n, n, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)]
    seconds = [math.inf, math.inf]
    for _ in range(rounds):
        for i, a in enumerate(factors):
            start = time.perf_counter()
            torch.mm(a, a)
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds[0] / seconds[1]


_said: set[str] = set()


def _first_time(what: str) -> bool:
    first = what not in _said
    _said.add(what)
    return first
