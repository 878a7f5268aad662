"""What the Python code of a loss looks at: attributes, globals and closures, and what is in lists and objects there.

PyTorch's own guards (torch._dynamo) watch the same. Dynamo sees which values a call reads; here they are found by the
names in the code of the loss, of the modules' ``forward`` and of whatever these name in turn.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import itertools
import os
import sys
import types
import weakref
from array import array
from collections import UserList, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

_NONE = type(None)
PLAIN = frozenset((bool, int, float, complex, str, bytes, _NONE, torch.dtype, torch.device, torch.layout, range))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
CONSTANTS = PLAIN.union(_FUNCTIONS)  # types whose values say everything there is to say
_CONTAINERS = (list, set, deque, UserList, array, bytearray)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # looked at by themselves
_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_ASKED = ("call", "getattr", "getattribute", "get", "getitem", "missing", "len", "iter", "next", "contains", "enter")
_AS_NUMBERS = ("bool", "float", "int", "index")
_CALLED = frozenset(  # without being named
    ("forward", *(f"__{name}__" for name in (*_ASKED, *_AS_NUMBERS, *_OPERATORS, *(f"r{op}" for op in _OPERATORS))))
)
# With these in the code an attribute's name need not be there.
_ANY_NAME = {"getattr", "vars", "__dict__", "attrgetter", "asdict", "astuple"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of modules
MAX_ITEMS = 1_000  # of a list or dict that is looked into
MAX_CONSTANTS = 10_000  # of one that holds nothing but constants
MAX_PLACES = 50_000


class _Constants(tuple):
    """What is in a long list or dict, compared at once."""

    __slots__ = ()


class Place(NamedTuple):
    """Where code looks at something: an attribute or a global, or the items of a list or dict.

    Attributes:
        scope: a mapping of names; or the container, array or closure's cell.
        look: returns what is there, of ``scope``; None for mappings of names, which are asked for ``name``.
        name: the name, or None.
        then: what has been there; tensors by weak reference.
        label: what it is called.
    """

    scope: Any
    look: Callable[[Any], Any] | None
    name: str | None
    then: Any
    label: str

    def now(self) -> Any:
        """Return what is there now."""
        return self.scope.get(self.name) if self.look is None else self.look(self.scope)

    @property
    def key(self) -> tuple[int, str | None]:
        """What tells places from each other."""
        return id(self.scope), self.name

    def has_changed(self) -> bool:
        """Tell whether something else is there now."""
        return not _same(self.now(), self.then)

    def is_new(self) -> bool:
        """Tell whether code has written there for the first time, as it fills a cache."""
        return self.then is None or (self.look in _LOOKS_INTO and self.then == ())

    def is_missed(self, held: set[int] | None) -> bool:
        """Tell whether a graph would go without what code has written there in the meantime.

        What is a tensor in every step is read from the graph, unless the last step's is among its inputs.

        Args:
            held: ids of tensors that are inputs of the graph; None if they are not known.
        """
        then, now = self.then, self.now()
        if self.look not in _LOOKS_INTO:
            return _is_missed(now, then, held)
        now = now[: len(then)] if self.look is _pairs else now
        if len(now) != len(then):
            return then != ()
        return any(_is_missed(*pair, held) for pair in zip(now, then, strict=True))


class Seen:
    """What code looked at when this was made.

    Args:
        roots: modules and functions.

    Attributes:
        places: where it looks.
        modules: all modules among that, and their children.
        leaves: tensors among that which require grad, and are in no module.
        scopes: attributes of modules and objects.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self.places: list[Place] = []
        self.modules: list[nn.Module] = []
        self.scopes: list[dict[str, Any]] = []
        self._roots = roots
        self._packages = {(getattr(r, "__module__", None) or "").partition(".")[0] for r in roots}
        self._names, known = set(_CALLED), 0
        while len(self._names) != known:  # what is found last may name attributes of what was found first
            known = len(self._names)
            self._walk()
        inside = {id(p) for module in self.modules for p in module._parameters.values()}
        self.leaves = [t for t in self._tensors if t.is_leaf and t.requires_grad and id(t) not in inside]
        self._sizes = [(scope, len(scope), self._count(scope)) for scope in self.scopes]
        del self._found, self._tensors

    def holds(self) -> bool:
        """Tell whether everything is as it was."""
        for scope, look, name, then, _ in self.places:
            now = scope.get(name) if look is None else look(scope)
            if now is not then and not _same(now, then):
                return False
        return all([len(scope) == n or self._count(scope) == k for scope, n, k in self._sizes])  # noqa: C419  faster

    def _count(self, scope: dict[str, Any]) -> int:
        """Count the attributes that are named; others come and go unseen."""
        return len(self._names.intersection(scope))

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Look from now on at tensors whose numbers Python reads inside, while a graph is traced."""
        with _NumbersRead() as mode:
            yield
        for tensor in mode.found:
            self.places.append(Place(tensor, _version, None, tensor._version, "a tensor that is read by item()"))

    def changed(self) -> list[Place]:
        """Return the places where something else is now."""
        return [place for place in self.places if place.has_changed()]

    def written(self) -> list[tuple[Any, Any]]:
        """Return where something else is now: mappings of attributes, and dicts and lists of tensors; and the key."""
        found: list[tuple[Any, Any]] = []
        for place in self.changed():
            if place.look is None and place.name in place.scope:
                found.append((place.scope, place.name))
            elif place.look in (_items, _pairs) and isinstance(place.scope, (dict, list)):
                before = {id(_tensor_of(item)) for item in place.then}
                scope = place.scope
                keys = scope if isinstance(scope, dict) else range(len(scope))
                found += [(scope, k) for k in keys if isinstance(scope[k], Tensor) and id(scope[k]) not in before]
        return found

    def has_created(self) -> bool:
        """Tell whether modules or objects have attributes that they had not."""
        return any(len(scope) != n for scope, n, _ in self._sizes)

    def leave_out(self, keys: set[tuple[int, str | None]]) -> None:
        """Do not look at these places any more."""
        self.places = [place for place in self.places if place.key not in keys] if keys else self.places

    # ---- the walk ----------------------------------------------------------------------------------------------------

    def _walk(self) -> None:
        self.places, self.modules, self.scopes = [], [], []
        self._tensors: list[Tensor] = []
        self._found: dict[int, Any] = {}
        self._waiting: list[tuple[Any, str]] = [(root, type(root).__name__) for root in self._roots]
        while self._waiting and len(self.places) < MAX_PLACES:
            self._look_into(*self._waiting.pop())

    def _place(self, scope: Any, look: Callable[[Any], Any] | None, name: str | None, label: str) -> None:
        value = scope.get(name) if look is None else look(scope)
        if value.__class__ is _Constants:
            if set(map(type, value)) <= CONSTANTS:
                self.places.append(Place(scope, look, name, value, label))
            else:
                self.places.append(Place(scope, len, name, len(scope), label))
            return
        items = value if look in _LOOKS_INTO else (value,)
        then = tuple(map(_held, items)) if look in _LOOKS_INTO else _held(value)
        self.places.append(Place(scope, look, name, then, label))
        self._waiting += [(item, label) for item in items if item.__class__ not in PLAIN]

    def _look_into(self, value: Any, label: str) -> None:
        kind = value.__class__
        if kind in PLAIN or id(value) in self._found:
            return
        self._found[id(value)] = value
        if isinstance(value, Tensor):
            self._tensors.append(value)
        elif value is os.getenv or (value is os and not self._names.isdisjoint(("environ", "getenv"))):
            self._place(os.environ, _pairs, None, "os.environ")
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._waiting += [(value.__func__, label), (value.__self__, label)]
        elif isinstance(value, functools.partial):
            self._waiting += [(part, label) for part in (value.func, *value.args, value.keywords)]
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, ContextVar):
            self._place(value, _in_context, None, value.name)
        elif isinstance(value, types.ModuleType):
            if not self._foreign(value.__name__):
                for name in self._names.intersection(vars(value)):
                    self._place(vars(value), None, name, f"{value.__name__}.{name}")
        elif isinstance(value, (type, Enum)):
            self._members(value if isinstance(value, type) else kind, None)
        elif isinstance(value, np.ndarray):
            if value.size <= MAX_ITEMS and value.dtype != object:
                self.places.append(Place(value, np.asarray, None, value.copy(), label))
        elif isinstance(value, (tuple, frozenset)):
            self._waiting += [(item, label) for item in _items(value)]
        elif isinstance(value, (Mapping, *_CONTAINERS)):
            self._place(value, _pairs if isinstance(value, Mapping) else _items, None, label)
        elif not isinstance(value, (*_FUNCTIONS, np.generic)):
            self._object(value)

    def _function(self, function: types.FunctionType) -> None:
        if self._foreign(function.__module__):
            return
        names, global_names = _named_by(function.__code__)
        self._names.update(names)
        for name in global_names:
            if name in function.__globals__ or not hasattr(builtins, name):
                self._place(function.__globals__, None, name, name)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._place(cell, _contents, None, name)
        if function.__defaults__:
            self._place(function, _defaults, None, function.__qualname__)
        if function.__kwdefaults__:
            self._waiting.append((function.__kwdefaults__, function.__qualname__))

    def _module(self, module: nn.Module) -> None:
        self.modules.append(module)
        self._waiting += [(child, "") for child in module._modules.values() if child is not None]
        kind, attributes = type(module), vars(module)
        self.scopes.append(attributes)
        self._waiting += [(hook, "") for name in HOOKS for hook in attributes[name].values()]
        ours, every = not self._foreign(kind.__module__), _is_layer(kind) or not self._names.isdisjoint(_ANY_NAME)
        for name, value in attributes.items():
            if name not in _OF_EVERY_MODULE and (name in self._names or (every and value.__class__ in CONSTANTS)):
                self._place(attributes, None, name, f"{kind.__name__}.{name}")
        if "forward" not in attributes:
            self.places.append(Place(attributes, None, "forward", None, f"{kind.__name__}.forward"))
        if ours:
            self._members(kind, attributes)

    def _object(self, value: Any) -> None:
        kind, attributes = type(value), getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self.scopes.append(attributes)
            every = not self._names.isdisjoint(_ANY_NAME)
            for name in list(attributes):
                if name in self._names or (every and attributes[name].__class__ in CONSTANTS):
                    self._place(attributes, None, name, f"{kind.__name__}.{name}")
        self._members(kind, attributes if isinstance(attributes, dict) else None)
        for base in kind.__mro__:
            slots = vars(base).get("__slots__", ())
            for name in self._names.intersection((slots,) if isinstance(slots, str) else slots):
                self._place(value, functools.partial(_attribute, name), None, f"{kind.__name__}.{name}")

    def _members(self, kind: type, attributes: dict[str, Any] | None) -> None:
        """Look at what a class has of the names, and at attributes that an object may get in its place."""
        taken: set[str] = set()
        for base in kind.__mro__:
            if base is object or self._foreign(base.__module__):
                continue
            for name in self._names.intersection(vars(base)).difference(taken):
                taken.add(name)
                self._place(vars(base), None, name, f"{kind.__name__}.{name}")
                member = vars(base)[name]
                inside = [getattr(member, part, None) for part in ("fget", "__func__", "func", "__wrapped__")]
                self._waiting += [(part, name) for part in inside if part is not None]
                if attributes is not None and name not in attributes and name not in _CALLED:
                    self.places.append(Place(attributes, None, name, None, f"{kind.__name__}.{name}"))

    def _foreign(self, module: str | None) -> bool:
        """Tell whether code is a library's, and not that of the modules."""
        top = (module or "").partition(".")[0]
        return _is_library(top) and (top not in self._packages or top in _BELOW)


_BELOW = {"torch", "numpy", "adahessian_fused", "builtins"}  # whose functions look at nothing that changes


@functools.cache
def _is_library(top: str) -> bool:
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return top in _BELOW or top in sys.stdlib_module_names or "site-packages" in file or "dist-packages" in file


def _is_layer(kind: type) -> bool:
    """Tell whether a module has attributes that PyTorch's own code looks at."""
    return any(base.__module__.startswith("torch.nn") and base is not nn.Module for base in kind.__mro__)


@functools.lru_cache(maxsize=16384)
def _named_by(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return all that a function's code names, attributes for instance, and the globals among that."""
    loads = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    names, of_globals = frozenset(code.co_names), frozenset(loads)
    if not names.isdisjoint({*_ANY_NAME, "hasattr", "globals"}):
        constants = frozenset(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
        names, of_globals = names | constants, of_globals | (constants if "globals" in names else set())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            more, more_globals = _named_by(constant)
            names, of_globals = names | more, of_globals | more_globals
    return names, of_globals


class _NumbersRead(TorchFunctionMode):
    """Collects tensors with data whose numbers are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


_READS = {Tensor.item, Tensor.tolist, *(getattr(Tensor, f"__{name}__") for name in _AS_NUMBERS)}


def _version(tensor: Tensor) -> int:
    return tensor._version


def _same(now: Any, then: Any) -> bool:
    if now is then:
        return True
    if then.__class__ is weakref.ref:
        return then() is now
    if then.__class__ is _Constants:
        try:
            return now.__class__ is _Constants and now == then
        except RuntimeError:  # something else is there, a tensor
            return False
    if isinstance(then, np.ndarray):
        return isinstance(now, np.ndarray) and now.dtype == then.dtype and np.array_equal(now, then)
    if now.__class__ is not then.__class__:
        return False
    if isinstance(then, tuple):
        return len(now) == len(then) and all(map(_same, now, then))
    return (then.__class__ in CONSTANTS or isinstance(then, np.generic)) and bool(now == then)


def _is_missed(now: Any, then: Any, held: set[int] | None) -> bool:
    if _same(now, then):
        return False
    if then.__class__ is weakref.ref:
        return held is None or id(then()) in held
    if isinstance(then, Tensor):
        return held is None or id(then) in held
    if isinstance(then, (tuple, list, dict)):
        was, now = (_pairs(x) if isinstance(x, dict) else x for x in (then, now))
        if now.__class__ is not was.__class__ or len(now) != len(was):
            now = (None,) * len(was)
        return any(_is_missed(new, old, held) for new, old in zip(now, was, strict=True))
    return then is not None and then.__class__ in PLAIN


def _held(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, Tensor) else value


def _tensor_of(held: Any) -> Any:
    return held() if held.__class__ is weakref.ref else held


def _items(container: Collection[Any]) -> tuple[Any, ...]:
    return _up_to(len(container), container)


def _pairs(mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
    return _up_to(len(mapping), itertools.chain.from_iterable(mapping.items()))


def _up_to(length: int, items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(items) if length <= MAX_ITEMS else _Constants(items) if length <= MAX_CONSTANTS else (length,)


def _in_context(variable: ContextVar[Any]) -> Any:
    return variable.get(None)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _defaults(function: types.FunctionType) -> tuple[Any, ...]:
    return function.__defaults__ or ()


def _attribute(name: str, owner: Any) -> Any:
    return getattr(owner, name, None)


_LOOKS_INTO = (_items, _pairs, _defaults)
