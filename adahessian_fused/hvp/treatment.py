"""Hooks on tensors and modules: they see each gradient once, and never Hz.

The second differentiation goes through the graph of the loss once more, and autograd has no way to pass by the hooks on
it. So the functions that register hooks, ``Tensor.register_hook`` and the one behind hooks of nodes, modules and groups
of tensors, wrap them, as soon as this package is imported: a hook asks whether a pass of ours treats it in another way
than calling it. Autograd takes the answer along to its own threads, as it does with autocast.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

Hook = Callable[..., Any]

_HOOKS = attrgetter("_backward_hooks")
_KEY = __name__
_OWN = (__package__.split(".")[0], "torch.distributed")  # whose hooks are no user's, and always called
_retaining = WeakTensorKeyDictionary()  # tensors whose retain_grad() was called, by which thread


class Treatment:
    """How hooks are called in the passes that a thread begins."""

    def __call__(self, hook: Hook, args: Sequence[Any]) -> Any:
        """Return what the hook, or nothing, makes of the gradients in ``args``."""
        return hook(*args)


class Skipped(Treatment):
    """Not at all."""

    def __call__(self, hook: Hook, args: Sequence[Any]) -> None:
        """Return None: gradients stay as they are."""


class Refused(Treatment):
    """With an error, where a graph is made that would not call them; passes within are treated so, too."""

    def __call__(self, hook: Hook, args: Sequence[Any]) -> Any:
        """Raise."""
        raise RuntimeError(f"{name_of(hook)} is Python code, which a graph does not call")


def name_of(hook: Hook) -> str:
    """Return what to call a hook in a message."""
    if getattr(hook, "__module__", "") == "torch.utils.hooks":  # what PyTorch makes of them
        return "a full backward hook of a module"
    return f"the hook {getattr(hook, '__qualname__', type(hook).__qualname__)}"


def is_number(value: Any) -> bool:
    """Tell whether something is a tensor that can have a gradient."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def numbers_in(gradients: Any) -> list[Tensor]:
    """Return the tensors among what a hook is given or returns: one, several or nothing."""
    return [t for t in (gradients if isinstance(gradients, (tuple, list)) else [gradients]) if is_number(t)]


class Parts(TorchFunctionMode):
    """Follows what a hook computes from gradients, some of it without a graph, and what is made of that.

    Args:
        grads: what the hook is given, with a graph.

    Attributes:
        cut_off: whether the hook has differentiated by a tensor that was cut from the loss, as an implicit layer's
            solution is.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        super().__init__()
        self._computed = {id(t): t for t in grads}
        self._lacking: dict[int, Tensor] = {}
        self.cut_off = False

    def lacks_a_part(self, tensor: Tensor) -> bool:
        """Tell whether a part of a tensor was computed from the gradients without a graph."""
        return id(tensor) in self._lacking

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            inputs = tree_leaves(args[1] if len(args) > 1 else (kwargs or {}).get("inputs"))
            self.cut_off |= any(t.is_leaf and not isinstance(t, torch.nn.Parameter) for t in inputs)
        results, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        given = {id(t) for t in tree_leaves((args, kwargs)) if is_number(t)}
        if name.endswith("_like") or name.startswith("new_") or given.isdisjoint(self._computed):
            return results
        for result in filter(is_number, tree_leaves(results)):
            self._computed[id(result)] = result
            if not (result.requires_grad and given.isdisjoint(self._lacking)):
                self._lacking[id(result)] = result
        return results


def _present() -> Treatment | None:
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def _say(treatment: Treatment | None) -> None:
    # What is left there needs the GIL when its thread ends; older torch can only leave None.
    if treatment is None and hasattr(torch._C, "_remove_obj_from_tls"):
        torch._C._remove_obj_from_tls(_KEY)
    else:
        torch._C._stash_obj_in_tls(_KEY, treatment)


class treating:  # noqa: N801  a class costs every step less than a generator
    """Treat hooks in this way in the backward passes inside.

    Autograd takes the answer along to every node of a pass, half a microsecond each: it is given where there are hooks
    to ask for it. While a graph is traced some may be registered.
    """

    def __init__(self, treatment: Treatment) -> None:
        self._treatment = treatment

    def __enter__(self) -> None:
        self._said = _Asking.made or isinstance(self._treatment, Refused)
        if self._said:
            self._before = _present()
            self._said = not isinstance(self._before, Refused)
        if self._said:
            _say(self._treatment)

    def __exit__(self, *error: object) -> None:
        if self._said:
            _say(self._before)


def are_hooked(params: Iterable[Tensor]) -> bool:
    """Tell whether anything may be hooked in a graph with these leaves."""
    return _Asking.made or bool(_retaining.data) or any(map(_HOOKS, params))


class without_hooks(treating):  # noqa: N801
    """Surround a pass whose results are nobody's gradients: no hook is called, and ``retain_grad()`` retains nothing.

    Args:
        params: leaves of the graph, whose hooks may be older than the import of this package.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(Skipped())
        self._params = params

    def __enter__(self) -> None:
        self._silenced = [(p._backward_hooks, dict(p._backward_hooks)) for p in self._params if p._backward_hooks]
        retaining, thread = list(_retaining.items()) if _retaining.data else (), threading.get_ident()
        self._retained = [(t, t.grad) for t, by in retaining if by == thread] if retaining else ()
        for hooks, _ in self._silenced:
            hooks.clear()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hooks, kept in self._silenced:
            hooks.update(kept)
        for t, grad in self._retained:
            if t.grad is not grad:
                t.grad = None if grad is None else grad.detach()


@contextlib.contextmanager
def accumulating(params: Iterable[Tensor], call: Callable[[Hook, Tensor], None]) -> Iterator[None]:
    """Surround a pass that calls the post-accumulate hooks of some leaves as ``call(hook, leaf)``.

    What such a hook makes of ``p.grad`` is the gradient of the step, and none of the curvature's.
    """
    replaced = [(hooks, dict(hooks)) for p in params if (hooks := p._post_accumulate_grad_hooks)]
    for hooks, before in replaced:
        hooks.update((key, functools.partial(call, hook)) for key, hook in before.items() if not _is_own(hook))
    try:
        yield
    finally:
        for hooks, before in replaced:
            hooks.update((key, hook) for key, hook in before.items() if key in hooks)


def later(hook: Hook, leaf: Tensor) -> None:
    """Call no post-accumulate hook: :func:`run_accumulated` does."""


def run_accumulated(leaves: Sequence[Tensor], grads: Sequence[Tensor | None], *, own: bool = True) -> None:
    """Run what ``register_post_accumulate_grad_hook`` has registered, as the end of a backward pass does.

    Args:
        leaves: whose gradients there are.
        grads: what they were given; None is passed over.
        own: this package's and torch.distributed's, too.
    """
    hooked = [p for p, g in zip(leaves, grads, strict=True) if g is not None and p._post_accumulate_grad_hooks]
    if not hooked:
        return
    with torch.no_grad():
        for p in hooked:
            for hook in list(p._post_accumulate_grad_hooks.values()):
                if own or not _is_own(hook):
                    hook(p)


class _WithValue(Function):
    """A gradient that a hook has given another value."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def beside_the_graph(hook: Hook, leaf: Tensor) -> None:
    """Call a post-accumulate hook in a pass that keeps its graph: of what the hook computes nothing enters that."""
    grad = leaf.grad
    if grad is None or not grad.requires_grad:
        hook(leaf)
        return
    with torch.no_grad():
        leaf.grad = grad.detach().clone()
        hook(leaf)
    if leaf.grad is not None:  # whether a hook has written to what it saw, nobody knows: .data is not counted
        leaf.grad = _WithValue.apply(grad, leaf.grad.detach())


class _Asking:
    """A hook that asks how it is to be treated."""

    made = False  # whether any was

    def __init__(self, hook: Hook) -> None:
        _Asking.made = True
        functools.update_wrapper(self, hook)
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        treatment = _present()
        return self._hook(*args) if treatment is None else treatment(self._hook, args)


def _is_own(hook: Hook) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_OWN)


def _asking(hook: Hook) -> Hook:
    return hook if _is_own(hook) or isinstance(hook, _Asking) else _Asking(hook)


_registers, _registers_on_node, _retains = Tensor.register_hook, Function._register_hook, Tensor.retain_grad


@functools.wraps(_registers)
def _register_hook(self: Tensor, hook: Hook) -> Any:
    return _registers(self, _asking(hook))


@functools.wraps(_registers_on_node)
def _register_hook_on_node(hooks: Any, hook: Hook) -> Any:
    return _registers_on_node(hooks, _asking(hook))


@functools.wraps(_retains)
def _retain_grad(self: Tensor) -> None:
    _retains(self)
    if not self.is_leaf:
        _retaining[self] = threading.get_ident()


Tensor.register_hook, Tensor.retain_grad = _register_hook, _retain_grad  # type: ignore[method-assign, assignment]
Function._register_hook = staticmethod(_register_hook_on_node)  # type: ignore[method-assign]
