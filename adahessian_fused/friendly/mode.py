"""The mode that puts operators with a cheap double backward in the place of PyTorch's."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import checkpoint

from .attention import attention, is_causal_bias, math_kernel, with_attention
from .batch_norm import batch_norm, instance_norm, torch_batch_norm, torch_instance_norm
from .convolution import convolution
from .cross_entropy import cross_entropy
from .embedding_bag import embedding_bag
from .gelu import gelu
from .recurrent import layers
from .relu import relu, relu_
from .row_norm import group_norm, layer_norm, rms_norm
from .weight_norm import weight_norm

OPERATORS: dict[Callable, Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    torch.batch_norm: torch_batch_norm,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    torch.instance_norm: torch_instance_norm,
    torch.conv1d: convolution(1),
    torch.conv2d: convolution(2),
    torch.conv3d: convolution(3),
    torch.conv_transpose1d: convolution(1, transposed=True),
    torch.conv_transpose2d: convolution(2, transposed=True),
    torch.conv_transpose3d: convolution(3, transposed=True),
    F.relu: relu,
    F.relu_: relu_,
    torch.relu: relu,
    torch.relu_: relu_,
    Tensor.relu: relu,
    Tensor.relu_: relu_,
    F.gelu: gelu,
    F.embedding_bag: embedding_bag,
    F.cross_entropy: cross_entropy,
    F.scaled_dot_product_attention: attention,
    torch._weight_norm: weight_norm,
    torch.lstm: layers("lstm"),
    torch.gru: layers("gru"),
    torch.rnn_tanh: layers("tanh"),
    torch.rnn_relu: layers("relu"),
}
OTHERWISE = {F.scaled_dot_product_attention: math_kernel}  # for what ours are not for
DEVICES = ("cpu", "cuda")
PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)  # fake ones stand for plain ones while a graph is traced


class _Settings:
    """What is the process's, not the thread's: kept as the mode needs it while any thread is inside it.

    What ``torch.compile`` has compiled runs as it was written.
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.RLock(), 0
        self._stance: Any = None  # of compiled code, while it is another than the process's own

    def _change(self) -> None:
        if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
            self._stance = _ForcedEager()

    def _change_back(self) -> None:
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._change()
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._change_back()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Put them back, inside it, to what they were before."""
        with self._lock:
            self._change_back()
        try:
            yield
        finally:
            with self._lock:
                if self._users:
                    self._change()


class _ForcedEager:
    """``torch.compiler.set_stance("force_eager")``, from where it is made until its end, in a tenth of the time."""

    def __init__(self) -> None:
        self._set, eager = _stances()
        self._before = self._set(eager)

    def __exit__(self, *error: object) -> None:
        self._set(self._before)


@functools.cache
def _stances() -> tuple[Callable[[Any], Any], Any]:
    """Return how to set the compiler's stance, which returns the one before, and the stance of no compiled code."""
    from torch._dynamo.eval_frame import DynamoStance, _set_stance  # slow to import

    return _set_stance, DynamoStance("force_eager")


_settings = _Settings()
_thread = threading.local()  # .off: whether the mode is suspended


class Mode(TorchFunctionMode):
    """Puts operators in the place of PyTorch's: :func:`~adahessian_fused.curvature_friendly`."""

    replaced: frozenset[Callable] = frozenset((*OPERATORS, F.multi_head_attention_forward))

    def __enter__(self) -> Any:
        _settings.enter()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            _settings.leave()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.replaced:
            return func(*args, **kwargs) if kwargs else func(*args)
        return self.replace(func, *args, **(kwargs or {}))

    def replace(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what is in the place of one of the functions in ``replaced``."""
        if func is F.multi_head_attention_forward and not off():
            func = with_attention(functools.partial(self._run, F.scaled_dot_product_attention), func)
        return self._run(func, *args, **kwargs)

    def _run(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ours = OPERATORS.get(func)
        if ours is None or off():
            return func(*args, **kwargs)
        arguments = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (tuple, list)) else (a,))]
        if not _differentiable(arguments):
            ours = OTHERWISE.get(func, func) if _recorded(arguments) else func
        return ours(*args, **kwargs)


class Recurrent(Mode):
    """Has our recurrent layers only: they are one operator for all time steps in a graph that is traced."""

    replaced = frozenset((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu))


def off() -> bool:
    """Tell whether this thread runs PyTorch's own operators although it is in the mode, or about to enter it."""
    return getattr(_thread, "off", False)


def on() -> bool:
    """Tell whether this thread runs our operators."""
    if off() or not torch._C._len_torch_function_stack():
        return False
    return any(isinstance(mode, Mode) for mode in _get_current_function_mode_stack())


@contextmanager
def plain() -> Iterator[None]:
    """Run PyTorch's own operators inside it, whatever modes are entered around or in it."""
    before, _thread.off = off(), True
    try:
        with _settings.suspended():
            yield
    finally:
        _thread.off = before


class _Checkpoint(checkpoint._CheckpointFrame):
    """Non-reentrant activation checkpoint whose recomputation runs the operators that its forward pass ran."""

    def __init__(self, recompute_fn: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        was_on, was_off = on(), off()

        def recompute(*inputs: Any) -> None:
            alike = (on(), off()) == (was_on, was_off)
            with nullcontext() if alike else Mode() if was_on else plain():
                recompute_fn(*inputs)

        super().__init__(recompute, *args, **kwargs)


# For all of the process: a mode may be entered between the two passes.
checkpoint._CheckpointFrame = _Checkpoint  # type: ignore[misc]


def _differentiable(arguments: list) -> bool:
    """Tell whether these are ordinary tensors whose operator autograd, and nothing else, is about to record."""
    tensors = [a for a in arguments if isinstance(a, Tensor) and not is_causal_bias(a)]
    return _recorded(arguments) and not _transformed() and all(map(_ordinary, tensors))


def _recorded(arguments: list) -> bool:
    """Tell whether the operator of these is about to be recorded."""
    if torch.compiler.is_dynamo_compiling():
        return False
    records = torch.is_grad_enabled() and any(a.requires_grad for a in arguments if isinstance(a, Tensor))
    return records or _transformed()


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _ordinary(t: Tensor) -> bool:
    plain = type(t) in PLAIN and t.layout is torch.strided and not t.is_nested
    return plain and t.device.type in DEVICES and not t.is_complex() and t.numel() > 0
