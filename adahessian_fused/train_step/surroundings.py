"""What a step's graph depends on beside the batch: settings of PyTorch, modules, and what Python code sees.

What Python code looks at is :mod:`.seen`'s.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .seen import HOOKS, Seen

_GLOBAL_HOOKS = [hooks for name, hooks in vars(nn_module).items() if name.startswith("_global_") and "hooks" in name]
_FILLED_BY: dict[type, Callable[[Any, Any], None]]
_FILLED_BY = {list: list.extend, deque: deque.extend, set: set.update, dict: dict.update}
_PRECISIONS: tuple[Any, ...]
_PRECISIONS = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_KINDS_OF_DEVICES = ("cpu", "cuda")


def settings() -> tuple[Hashable, ...]:
    """Return the global settings that a graph has in it."""
    return (
        *(torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS_OF_DEVICES),
        *(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        *(torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        *(getattr(place, "fp32_precision", None) for place in _PRECISIONS),
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        *(torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        *(torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        *(torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()),
        *map(tuple, _GLOBAL_HOOKS),
    )


def walk(*modules: nn.Module) -> list[nn.Module]:
    """Return the modules and all that they are made of, each once: ``modules()``, faster."""
    found = {id(module): module for module in modules}
    waiting = [*modules]
    while waiting:
        for child in waiting.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def of_modules(modules: Iterable[nn.Module], trained: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Return modules, their children, modes, hooks, parameters and buffers: whose they are, not what they hold.

    Args:
        modules: all modules, children included.
        trained: the parameters to differentiate by; which of them is which is part of it.
    """
    number = {id(p): i for i, p in enumerate(trained)}
    found: list[Hashable] = []
    for module in modules:
        found += module, module.training, *module._modules.values()
        for name in HOOKS:
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


def modules_around(loss_fn: Callable[..., Any], params: Sequence[Tensor]) -> list[nn.Module]:
    """Find the modules that a loss function looks at, and those that hold parameters which are in none of them."""
    found = Seen([loss_fn]).modules
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
def kept(seen: Seen) -> Iterator[None]:
    """Give modules and objects back the attributes they had, and lists and dicts what was in them."""
    scopes = [(scope, dict(scope)) for scope in seen.scopes]
    containers = [(place, copy.copy(place.scope)) for place in seen.places if type(place.scope) in _FILLED_BY]
    try:
        yield
    finally:
        for scope, before in scopes:
            for name in scope.keys() | before.keys():
                if name not in before:
                    del scope[name]
                elif scope.get(name, before) is not before[name]:
                    scope[name] = before[name]
        for place, items in containers:
            if place.has_changed():
                place.scope.clear()
                _FILLED_BY[type(place.scope)](place.scope, items)


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
