"""Models that enter the mode by themselves, on the steps of their optimizers that use curvature."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from .mode import Mode, off, on

_SLOT = "_compiled_call_impl"  # nn.Module calls what is there; neither pickles nor copies of a module have it
_told: weakref.WeakKeyDictionary[nn.Module, tuple[Told, ...]] = weakref.WeakKeyDictionary()  # about compiled modules
_thread = threading.local()  # .told: who was told about the module whose call this thread is in


class Told:
    """The handle of a model that was told: until ``remove()``, or the end of a ``with``.

    Args:
        model: it and all of its submodules are told.
        optimizers: whose steps count; they are not kept alive.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        _know_what_is_compiled()
        self._optimizers = [weakref.ref(opt) for opt in optimizers]
        self._calls = [_call_of(module) for module in model.modules()]
        for call in self._calls:
            call.told += (self,)
        _told.clear()

    def due(self) -> bool:
        """Tell whether the coming step of any of the optimizers differentiates twice."""
        for ref in self._optimizers:
            opt: Any = ref()
            if opt is not None and opt.needs_hessian and opt.param_groups[0]["hvp"] == "autograd":
                return True
        return False

    def also(self, call: _Call) -> None:
        """Have been told of a module around the model, too."""
        self._calls.append(call)

    def remove(self) -> None:
        """Leave the model as it was before."""
        for call in self._calls:
            call.told = tuple(told for told in call.told if told is not self)
            module = call.module()
            if not call.told and module is not None and module.__dict__.get(_SLOT) is call:
                del module.__dict__[_SLOT]
                if call.compiled is not None:
                    module.__dict__[_SLOT] = call.compiled
        self._calls = []
        _told.clear()

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


class _Call:
    """What a told module's ``__call__`` does; it is dropped where the module is copied or pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.compiled: Callable[..., Any] | None = module.__dict__.get(_SLOT)  # by module.compile()
        self.told: tuple[Told, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module: in the mode if curvature is due, and otherwise as ever."""
        if torch.compiler.is_compiling():
            return self.module()._call_impl(*args, **kwargs)
        caller = sys._getframe(1)  # replicas of nn.DataParallel have the very object that the original has
        module = caller.f_locals["self"] if caller.f_code is _CALLER else self.module()
        call = module._call_impl if self.compiled is None else self.compiled
        if getattr(_thread, "told", ()) == self.told:  # decided when the module around it was called
            return call(*args, **kwargs)
        return _call_within(self.told, module.training, call, module._call_impl, args, kwargs)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


def _call_within(
    told: tuple[Told, ...],
    training: bool,
    call: Callable[..., Any],
    in_mode: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Call a module that was told: as ``in_mode`` in the mode if curvature is due, or else as ``call``."""
    within, _thread.told = getattr(_thread, "told", ()), told
    try:
        kept = training and torch.is_grad_enabled() and not torch._C._get_tracing_state()
        if not (kept and any([each.due() for each in told]) and not on() and not off()):  # noqa: C419  faster
            return call(*args, **kwargs)
        with Mode():
            return in_mode(*args, **kwargs)
    finally:
        _thread.told = within


class _Compiled:
    """What ``torch.compile`` makes of modules is called as they are, if they or a part of them were told."""

    def __get__(self, compiled: Any, kind: type) -> Callable[..., Any] | None:
        if compiled is None:
            return None
        if compiled not in _told:
            _told[compiled] = _told_of(compiled._orig_mod)
        return functools.partial(self._call, compiled) if _told[compiled] else None

    def _call(self, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compiled._call_impl(*args, **kwargs)
        call = compiled._call_impl
        return _call_within(_told[compiled], compiled._orig_mod.training, call, call, args, kwargs)


@functools.cache
def _know_what_is_compiled() -> None:
    """Let models be compiled after they were told, for all of the process."""
    from torch._dynamo.eval_frame import OptimizedModule  # slow to import

    OptimizedModule._compiled_call_impl = _Compiled()  # type: ignore[assignment]
    original = nn.Module.compile

    @functools.wraps(original)
    def compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        call = self.__dict__.get(_SLOT)
        original(self, *args, **kwargs)
        told = _told_of(self)
        if told and not isinstance(call, _Call):  # of a part of it, as the model that DDP wraps
            compiled = self.__dict__.pop(_SLOT)
            call = _call_of(self)
            self.__dict__[_SLOT], call.told = compiled, told
            for each in told:
                each.also(call)
        if isinstance(call, _Call):
            call.compiled, self.__dict__[_SLOT] = self.__dict__[_SLOT], call

    nn.Module.compile = compile  # type: ignore[method-assign]


def _told_of(module: nn.Module) -> tuple[Told, ...]:
    """Return who was told about a module or a part of it."""
    calls = [inner.__dict__.get(_SLOT) for inner in module.modules()]
    return tuple(dict.fromkeys(each for call in calls if isinstance(call, _Call) for each in call.told))


_CALLER = nn.Module._wrapped_call_impl.__code__


def _call_of(module: nn.Module) -> _Call:
    """Return the call of a module, in its place."""
    call = module.__dict__.get(_SLOT)
    if not isinstance(call, _Call):
        call = module.__dict__[_SLOT] = _Call(module)
    return call


@overload
def curvature_friendly() -> Mode: ...
@overload
def curvature_friendly(model: nn.Module, *optimizers: Optimizer) -> Told: ...
def curvature_friendly(
    model: nn.Module | None = None, *optimizers: Optimizer
) -> contextlib.AbstractContextManager[Any]:
    """Give operators a double backward of a few kernels: what a Hessian-vector product needs.

    Tell a model once, after making it and its optimizer::

        opt = AdaHessian(model.parameters())
        curvature_friendly(model, opt)

    From then on its forward passes run in the mode on the steps of ``opt`` that use curvature, so that every way of
    stepping costs what closures cost, and differentiates attention and embedding bags twice. Off-steps, eval mode and
    ``torch.no_grad()`` are left alone; so are the state dict, hooks, copies and pickles, which know nothing of it. A
    loss that goes through several models (of a GAN, say) needs each of them told, and a model that several optimizers'
    losses go through all of these optimizers. What ``torch.compile`` makes of it, before or after, runs as it was
    written on steps with curvature, and compiled on all others.

    Without arguments it is a context manager for a forward pass::

        with curvature_friendly():
            loss = loss_fn(model(inputs), targets)
        opt.backward(loss)

    ``opt.step(closure)``, ``opt.backward(function)``, ``opt.backward_split`` and ``TrainStep`` enter it by themselves.

    * Batch, layer, group, instance and RMS norm, convolutions (also transposed) and ReLU: PyTorch composes their double
      backward of dozens of small operators; here it is one fused kernel for a norm (:mod:`.formulas` has the formula)
      and three convolutions' for a convolution. Forward and first backward are PyTorch's own kernels, with the same
      results and the same running statistics.
    * ``cross_entropy`` of rows and their classes: one pass over the softmax.
    * ``embedding_bag`` gets a double backward, for dense gradients, and ``weight_norm`` one that is right.
    * ``scaled_dot_product_attention``, by itself or in ``nn.MultiheadAttention``, runs on the fused kernels that
      PyTorch chooses and gets a double backward that keeps a few rows of the scores at a time
      (:mod:`.attention_double_backward` has the formula). With dropout inside, all passes draw the same mask again,
      on a CPU by kernels of its own: other random numbers than PyTorch's, of the same generator. With a mask that
      needs a gradient it runs on the math backend, which keeps all scores, and warns; nested tensors are refused.
    * LSTM, GRU and RNN layers: their double backward has one product for all time steps where PyTorch's has one for
      each (:mod:`.recurrence` has the formulas). Their values are PyTorch's up to rounding.
    * Activation checkpoints (``use_reentrant=False``) are recomputed with the operators of their forward pass.

    Everything else stays PyTorch's: operators without a gradient, functorch transforms and forward-mode AD, tensor
    subclasses, nested, sparse and complex tensors, SyncBatchNorm in a process group. Derivatives of every order are
    right, so a loss may hold gradients.

    Args:
        model: the module that is called, or one that has it as a submodule.
        optimizers: those whose losses go through the model.

    Returns:
        A context manager, or for a model a handle: ``handle.remove()``, or ``with curvature_friendly(model, opt): ...``
        for a while.

    Raises:
        TypeError: the arguments are not a module and its optimizers.
    """
    if model is None:
        return Mode()
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise TypeError(f"model is of type {found}; expected curvature_friendly(model, opt) or no arguments")
    if not optimizers:
        raise TypeError("curvature_friendly(model) has no optimizer; expected curvature_friendly(model, opt)")
    for opt in optimizers:
        if not hasattr(opt, "needs_hessian"):
            raise TypeError(f"optimizer is of type {type(opt).__name__}; expected adahessian_fused.AdaHessian")
    return Told(model, optimizers)
