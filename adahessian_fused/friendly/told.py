"""Models that enter the mode by themselves, on the steps of their optimizers that use curvature."""

from __future__ import annotations

import contextlib
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
_thread = threading.local()  # .told: who was told about the module whose call this thread is in


class Told:
    """The handle of a model that was told: until ``remove()``, or the end of a ``with``.

    Args:
        model: it and all of its submodules are told.
        optimizers: whose steps count; they are not kept alive.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = [weakref.ref(opt) for opt in optimizers]
        self._calls = [_call_of(module) for module in model.modules()]
        for call in self._calls:
            call.told += (self,)

    def due(self) -> bool:
        """Whether the coming step of any of the optimizers differentiates twice."""
        optimizers = [ref() for ref in self._optimizers]
        return any(
            opt.needs_hessian and opt.param_groups[0]["hvp"] == "autograd"  # type: ignore[attr-defined]
            for opt in optimizers
            if opt is not None
        )

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
        within = getattr(_thread, "told", ())
        if within == self.told:  # decided when the module around it was called
            return call(*args, **kwargs)
        _thread.told = self.told
        try:
            if not self._due(module):
                return call(*args, **kwargs)
            with Mode():
                return module._call_impl(*args, **kwargs)
        finally:
            _thread.told = within

    def _due(self, module: nn.Module) -> bool:
        if not (module.training and torch.is_grad_enabled()) or torch._C._get_tracing_state() or on() or off():
            return False
        return any(told.due() for told in self.told)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


_CALLER = nn.Module._wrapped_call_impl.__code__


def _call_of(module: nn.Module) -> _Call:
    """The call of a module, in its place."""
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
    losses go through all of these optimizers. What ``torch.compile`` has compiled, told afterwards, runs as it was
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
      (:mod:`.attention_double_backward` has the formula). With dropout inside, or a mask that needs a gradient, it
      runs on the math backend, which keeps all of them; that of nested tensors is refused.
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
        raise TypeError(f"model is a {type(model).__name__}; expected curvature_friendly(model, opt) or no arguments")
    if not optimizers:
        raise TypeError("curvature_friendly(model) has no optimizer; expected curvature_friendly(model, opt)")
    for opt in optimizers:
        if not hasattr(opt, "needs_hessian"):
            raise TypeError(f"optimizer is a {type(opt).__name__}; expected adahessian_fused.AdaHessian")
    return Told(model, optimizers)
