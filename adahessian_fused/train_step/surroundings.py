"""What a step's graph depends on beside the batch: settings of PyTorch, modules, and what Python code sees.

PyTorch's own guards (torch._dynamo) watch the same. Nothing here looks into lists or dicts.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_NONE = type(None)
_PLAIN = (bool, int, float, complex, str, bytes, _NONE, torch.dtype, torch.device)
_CALLED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
CONSTANTS = frozenset((*_PLAIN, *_CALLED))  # types whose values say everything there is to say
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [hooks for name, hooks in vars(nn_module).items() if name.startswith("_global_") and "hooks" in name]
Seen = dict[Hashable, dict[str, Hashable]]  # values of each owner by their names
_LOOKED_AT = CONSTANTS | {Tensor}
_KINDS_OF_DEVICES = ("cpu", "cuda")


def settings() -> tuple[Hashable, ...]:
    """Return the global settings that a graph has in it."""
    return (
        *(torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS_OF_DEVICES),
        *(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        *(torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        *(torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        *(torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        *(torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()),
        *map(tuple, _GLOBAL_HOOKS),
    )


def walk(module: nn.Module) -> list[nn.Module]:
    """Return the module and all that it is made of, each once: ``modules()``, faster."""
    found = {id(module): module}
    waiting = [module]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def of_modules(modules: Iterable[nn.Module], trained: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Return the modules themselves, their modes, hooks, parameters and buffers: whose they are, not what they hold.

    Args:
        modules: all modules, children included.
        trained: the parameters to differentiate by; which of them is which is part of it.
    """
    number = {id(p): i for i, p in enumerate(trained)}
    found: list[Hashable] = []
    for module in modules:
        found += module, module.training
        for name in _HOOKS:
            hooks = getattr(module, name)
            if hooks:
                found.append((name, *hooks))
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                # Tied tensors have one number wherever they are.
                found += (name, None) if t is None else (name, number.setdefault(id(t), len(number)), described(t))
    return tuple(found)


def described(tensor: Tensor) -> tuple[Hashable, ...]:
    """Return everything about a tensor but its numbers."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def seen_by(modules: Iterable[nn.Module], loss_fn: Callable[..., Any]) -> Seen:
    """Return the plain values and functions that Python code looks at, and which tensor it is.

    They are attributes of the modules, and globals and closures of their forward functions and of the loss.
    """
    found: Seen = {}
    for module in modules:
        found[module] = {
            name: id(value) if value.__class__ is Tensor else value
            for name, value in module.__dict__.items()
            if value.__class__ in _LOOKED_AT
        }
        for scope, name in _globals_of_forward(type(module)):
            _add(found, id(scope), name, scope.get(name))
    for owner, name, value in _around(loss_fn):
        _add(found, owner, name, value)
    return found


def modules_around(loss_fn: Callable[..., Any], params: Sequence[Tensor]) -> list[nn.Module]:
    """Find the modules that a loss function sees, and those that hold parameters which are in none of them."""
    found = [value for _, _, value in _around(loss_fn) if isinstance(value, nn.Module)]
    found += [loss_fn] if isinstance(loss_fn, nn.Module) else []
    missing = set(map(id, params)).difference(id(p) for module in found for p in module.parameters())
    if missing:
        alive = [each for each in gc.get_objects() if issubclass(type(each), nn.Module) and "_modules" in each.__dict__]
        more = [module for module in alive if not missing.isdisjoint(map(id, module._parameters.values()))]
        seen: set[int] = set()
        while more:  # and what they are a part of
            found += more
            seen.update(map(id, more))
            more = [m for m in alive if id(m) not in seen and not seen.isdisjoint(map(id, m._modules.values()))]
    return outermost(found)


def outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return those of the modules that are no part of another, each once."""
    inner = {id(child) for module in modules for child in module.modules() if child is not module}
    return list({id(module): module for module in modules if id(module) not in inner}.values())


@contextlib.contextmanager
def attributes_kept(modules: Sequence[nn.Module]) -> Iterator[set[tuple[Hashable, str]]]:
    """Give modules back the attributes they had; yields a set that then has the names of those that were written."""
    written: set[tuple[Hashable, str]] = set()
    before = [(module, dict(module.__dict__)) for module in modules]
    try:
        yield written
    finally:
        for module, attributes in before:
            written.update((module, name) for name in _changed(attributes, module.__dict__))
            module.__dict__.clear()
            module.__dict__.update(attributes)


def written_since(before: Seen, now: Seen) -> set[Any]:
    """Return the names, with their owners, of what :func:`seen_by` has found to be another."""
    return {(owner, name) for owner, values in now.items() for name in _changed(before.get(owner, {}), values)}


@contextlib.contextmanager
def no_buffer_replaced(module: nn.Module) -> Iterator[None]:
    """Raise RuntimeError if a buffer becomes another tensor inside."""
    before = [(inner, dict(inner._buffers)) for inner in module.modules()]
    yield
    for inner, buffers in before:
        for name, buffer in buffers.items():
            if inner._buffers.get(name) is not buffer:
                raise RuntimeError(
                    f"{type(inner).__name__} replaces its buffer {name}, which a graph cannot; expected it to write to "
                    f"it, as self.{name}.copy_(...) does"
                )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> set[str]:
    missing = object()
    return {name for name in before.keys() | now.keys() if now.get(name, missing) is not before.get(name, missing)}


def _add(found: Seen, owner: Hashable, name: str, value: Any) -> None:
    if value.__class__ in CONSTANTS or isinstance(value, (Tensor, nn.Module)):
        found.setdefault(owner, {})[name] = value if value.__class__ in CONSTANTS else id(value)


def _globals_of_forward(kind: type) -> list[tuple[dict[str, Any], str]]:
    forward = getattr(kind, "forward", None)
    ours = kind.__module__.partition(".")[0] != "torch" and isinstance(forward, types.FunctionType)
    return _globals(forward) if ours else []


@functools.lru_cache(maxsize=4096)
def _globals(function: types.FunctionType) -> list[tuple[dict[str, Any], str]]:
    """Return the globals that a Python function names."""
    scope, names, codes = function.__globals__, set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [(scope, name) for name in sorted(names) if name in scope]


def _around(function: Any, depth: int = 3) -> Iterator[tuple[Hashable, str, Any]]:
    """Yield globals, closure, defaults and arguments of a function, of those it calls, and of its object."""
    if isinstance(function, functools.partial):
        yield from ((id(function), str(i), value) for i, value in enumerate(function.args))
        yield from ((id(function), name, value) for name, value in function.keywords.items())
        yield from _around(function.func, depth)
    elif isinstance(function, types.MethodType):
        yield from _around(function.__self__, depth)
        yield from _around(function.__func__, depth)
    elif isinstance(function, types.FunctionType):
        if depth == 0 or (function.__module__ or "").partition(".")[0] == "torch":
            return
        found: list[tuple[Hashable, str, Any]]
        found = [(id(scope), name, scope.get(name)) for scope, name in _globals(function)]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                found.append((id(cell), name, cell.cell_contents))
            except ValueError:  # not assigned yet
                continue
        found += [(id(function), str(i), value) for i, value in enumerate(function.__defaults__ or ())]
        found += [(id(function), name, value) for name, value in (function.__kwdefaults__ or {}).items()]
        for owner, name, value in found:
            yield owner, name, value
            if isinstance(value, (*_CALLED, functools.partial)) and value is not function:
                yield from _around(value, depth - 1)
    elif not isinstance(function, (nn.Module, type)) and hasattr(function, "__dict__"):
        yield from ((id(function), name, value) for name, value in vars(function).items())
        yield from _around(vars(type(function)).get("__call__"), depth - 1)
