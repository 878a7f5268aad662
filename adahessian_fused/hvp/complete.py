"""Whether the graph of a gradient is complete: code of somebody's own may have computed a part of it without one.

The backward pass of a :class:`torch.autograd.Function` is a linear map of the gradient that it is given. Its result is
differentiated again by way of the operators it is made of, and silently taken for constant where they left no graph:
under ``no_grad``, in NumPy, by ``detach()``, with an inner backward pass, or marked ``once_differentiable``. What can
be seen is

* in every pass, a result without a graph that leads to the gradient it was computed from, although that has one;
* of a kind of Function that is new, a result that changes with a tensor kept for it, but has no graph that leads there;
* numbers that a Function keeps without a graph, that are no inputs of it and with which its result changes. They are
  made of its inputs, mostly, and would be differentiated as if they were constants. What is no floating-point number,
  and masks of zeros and one other number, are constant almost everywhere.

The identity, a straight-through estimator, a reversal of gradients or an all-reduce keep nothing and pass. A Function
whose numbers are constants indeed says ``twice_differentiable = True``.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import HIDDEN_NUMBERS, HOOK_WITHOUT_GRAPH, NO_GRAPH, WRONG_NORM, WRONG_WEIGHT_NORM, explanation, naming_ddp
from .graph import WEIGHT_NORM, Graph, explore, nodes
from .intercept import BackwardObserver
from .replay import Replay
from .treatment import Hook, Parts, Treatment, accumulating, beside_the_graph, is_number, name_of, numbers_in, treating

_CUT = {  # names of nodes behind which a graph silently ends
    "torch::autograd::Error": "a torch.autograd.Function whose backward is marked once_differentiable",
    "CheckpointFunctionBackward": "torch.utils.checkpoint with use_reentrant=True",
    "FlexAttentionAutogradOpBackward": "flex_attention",
}
_known: set[tuple[Any, ...]] = set()  # kinds of Functions that are complete
_helpers: set[type] = set()  # what their backward is made of, which nobody differentiates twice


class examined(treating):  # noqa: N801
    """Surround a backward pass that keeps its graph; what it yields says at the end what second derivatives lack.

    Args:
        graph: that of the loss.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph, self._found, self._later = graph, list[str](), list[tuple[Node, bool]]()
        super().__init__(_Examined(graph, self._found))

    def __enter__(self) -> list[str]:  # type: ignore[override]
        graph, found = self._graph, self._found
        found += filter(None, (*map(_wrong, graph.wrong), *map(_cut, graph.functions)))
        functions = graph.functions
        self._handles = [n.register_hook(_Examination(n, graph, found, self._later)) for n in functions]
        super().__enter__()
        return found

    def __exit__(self, kind: object, *error: object) -> None:  # type: ignore[override]
        super().__exit__(kind, *error)
        for handle in self._handles:
            handle.remove()
        for node, whole in self._later if kind is None else ():
            problem = _computed_again(node, self._graph, whole=whole)
            if problem is not None:
                self._found.append(problem)


class Graphs(BackwardObserver):
    """What gradients of ``loss.backward(create_graph=True)`` lack; much of it they do not show afterwards.

    Args:
        wanted: method that returns the parameters whose curvature the coming step takes from such gradients.
        begin: method that is called before a pass over any of them.
        end: method that is called after it, with what ``begin`` has returned.

    Attributes:
        seen: whether there was such a pass.
    """

    of_graphs = True

    def __init__(
        self, wanted: Callable[[], Sequence[Tensor]], begin: Callable[[], Any], end: Callable[[Any], None]
    ) -> None:
        self._wanted, self._begin = weakref.WeakMethod(wanted), weakref.WeakMethod(begin)
        self._end = weakref.WeakMethod(end)
        self.clear()
        self.watch()

    def clear(self) -> None:
        """Begin with the passes of another step."""
        self.seen = False
        self._found: list[str] = []

    @property
    def are_whole(self) -> bool:
        """Whether nothing was missing in the passes of this step."""
        return not self._found

    def check(self) -> None:
        """Raise if anything was missing in the passes of this step."""
        refuse(self._found)

    @contextlib.contextmanager
    def around(self, tensors: Any, create_graph: bool) -> Iterator[None]:
        """Look at a pass that keeps its graph."""
        wanted = self._wanted()
        params = wanted() if wanted is not None else []
        graph = explore([tensors] if isinstance(tensors, Tensor) else tensors) if params else None
        if graph is None or {id(leaf) for leaf in graph.leaves}.isdisjoint(map(id, params)):
            with naming_ddp():
                yield
            return
        begin, end = self._begin(), self._end()  # of an optimizer that another thread may let go
        noted = begin() if begin is not None else None
        if all(p.grad is None for p in params):  # by model.zero_grad()
            self.clear()
        try:
            with naming_ddp(), examined(graph) as found, accumulating(graph.leaves, beside_the_graph):
                yield
        finally:
            if end is not None:
                end(noted)
        self.seen = True
        self._found += found


def check_gradients(graph: Graph) -> None:
    """Raise if gradients that somebody has computed lack a part of their graph, as far as they show it.

    A loss that is linear in what a Function returns leaves no trace of the Function in them.

    Args:
        graph: that of the gradients.
    """
    refuse(map(_wrong, [node for node in graph.wrong if node.name() == WEIGHT_NORM]))  # others are the gradients' own
    refuse(map(_cut, graph.functions))
    doubts = [(node, _computed_again(node, graph, whole=True)) for node in graph.functions]
    refuse(problem for node, problem in doubts if type(node) not in _helpers)


class _Examination:
    """Looks at what the backward of a Function is given and what it returns."""

    def __init__(self, node: Node, graph: Graph, found: list[str], later: list[tuple[Node, bool]]) -> None:
        self._node, self._graph, self._found, self._later = node, graph, found, later

    def __call__(self, results: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
        sources = {g.grad_fn for g in grads if g is not None and g.grad_fn is not None}
        problem = None
        for result in filter(is_number, results):
            reached = list(_between(result, self._graph, sources))
            problem = problem or next(filter(None, (_cut(n) for n in reached if n not in self._graph.nodes)), None)
            if sources.isdisjoint(reached) and sources and _not_zero(result):
                problem = problem or NO_GRAPH.format(_name(self._node))
        if problem is None:
            constant = not sources and not any(result.requires_grad for result in filter(is_number, results))
            try:
                problem = _unseen(self._node, self._graph, whole=constant)
            except RuntimeError:  # a checkpoint gives what its Functions have kept once only in a pass
                self._later.append((self._node, constant))
        if problem is not None:
            self._found.append(problem)


class _Examined(Treatment):
    """Of hooks: what they return, or make of what they are given, has to lead to it."""

    def __init__(self, graph: Graph, found: list[str]) -> None:
        self._graph, self._found = graph, found

    def __call__(self, hook: Hook, args: Sequence[Any]) -> Any:
        given = [(t, t._version, t.grad_fn) for arg in args for t in numbers_in(arg)]
        with Parts([t for t, _, fn in given if fn is not None]) as parts:
            results = hook(*args)
        problem = self._lost(hook, given, numbers_in(results), parts)
        if problem is not None:
            self._found.append(problem)
        return results

    def _lost(
        self, hook: Hook, given: Sequence[tuple[Tensor, int, Any]], results: Sequence[Tensor], parts: Parts
    ) -> str | None:
        sources = {fn for _, _, fn in given if fn is not None}
        written = any(t._version != version and t.grad_fn is fn for t, version, fn in given)
        new = [r for r in results if not any(r is t for t, _, _ in given)]
        lost = any(sources.isdisjoint(_between(r, self._graph, sources)) and _not_zero(r) for r in new)
        lost = lost or (bool(new) and parts.cut_off) or any(map(parts.lacks_a_part, [*new, *(t for t, _, _ in given)]))
        return HOOK_WITHOUT_GRAPH.format(name_of(hook)) if sources and (written or lost) else None


def after_hooks(hooks: Iterable[Hook], grad: Tensor, products: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return what a leaf's hooks make of its gradient, and what becomes of the gradient's derivatives Hz.

    Args:
        hooks: called one after the other.
        grad: without a graph.
        products: Hz for each sample.

    Raises:
        RuntimeError: a hook changes the gradient without a graph of how.
    """
    if not products:
        for hook in hooks:
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad, []
    found: list[str] = []
    leaf = grad.detach().requires_grad_()
    with torch.enable_grad():
        begin = end = leaf.clone()  # hooks may write to it
        examined = _Examined(explore([begin])._replace(nodes=set()), found)
        for hook in list(hooks):
            changed = examined(hook, (end,))
            end = end if changed is None else changed
        refuse(found)
        if end is begin and not begin._version:
            return grad, list(products)
        if not end.requires_grad:  # zeros
            return end, [torch.zeros_like(h) for h in products]
        seed = torch.zeros_like(end, requires_grad=True)
        [pulled] = torch.autograd.grad(end, leaf, seed, create_graph=True)
    return end.detach(), [torch.autograd.grad(pulled, seed, h, retain_graph=True)[0] for h in products]


def refuse(problems: Iterable[str | None]) -> None:
    """Raise if second derivatives lack anything; the message names the Function."""
    for problem in problems:
        if problem is not None:
            raise RuntimeError(explanation(problem, "autograd"))


def _cut(node: Node) -> str | None:
    return _CUT.get(node.name())


def _wrong(node: Any) -> str | None:
    """Name what PyTorch differentiates wrong; batch norm by fixed statistics is right."""
    name = node.name()
    if name == WEIGHT_NORM:
        return WRONG_WEIGHT_NORM
    operator = "layer_norm" if "LayerNorm" in name else "batch_norm"
    return WRONG_NORM.format(operator) if getattr(node, "_saved_train", True) else None


def _name(node: Node) -> str:
    cls = getattr(type(node), "_forward_cls", None)
    return node.name() if cls is None else f"the torch.autograd.Function {cls.__qualname__}"


def _between(result: Tensor, graph: Graph, sources: set[Node]) -> Iterator[Node]:
    """Yield nodes of a result, up to those of ``graph`` and to ``sources``."""
    return nodes([] if result.grad_fn is None else [result.grad_fn], graph.nodes | sources)


def _not_zero(tensor: Tensor) -> bool:
    """Tell whether any element may differ from zero; numbers are not known while a graph is traced."""
    return type(tensor) is not Tensor or tensor.is_meta or bool(tensor.detach().any())


# ---- kinds of Functions that have not been seen ----------------------------------------------------------------------


def _computed_again(node: Any, graph: Graph, *, whole: bool) -> str | None:
    """Tell the same between passes: a checkpoint's forward is run again for it, of which nothing is left."""
    if not _is_new(node, whole=whole):
        return None
    replay = Replay()
    try:
        if not node.__dict__ and not node._raw_saved_tensors:
            return None
        return replay(lambda: _unseen(node, graph, whole=whole))
    except RuntimeError:  # it can be computed no more
        return None
    finally:
        replay.rewind()


def _unseen(node: Any, graph: Graph, *, whole: bool) -> str | None:
    """Tell what is wrong with a Function of a kind that has not been seen; ``whole``: with its results too."""
    if not _is_new(node, whole=whole) or next(_kept(node), None) is None:
        return None
    n_constants = sum(parent is None for parent, _ in node.next_functions)
    problem = _hides(node, n_constants) or _forgets(node, graph, whole=whole)
    if problem is None:
        _known.add(_kind(node, whole=whole))
    return problem


def _kind(node: Any, *, whole: bool) -> tuple[Any, ...]:
    without = tuple(parent is None for parent, _ in node.next_functions)
    return type(node)._forward_cls, without, node.needs_input_grad, whole


def _is_new(node: Any, *, whole: bool) -> bool:
    """Tell whether it is a Function of others of a kind that is not known to be complete."""
    if not isinstance(node, BackwardCFunction) or _kind(node, whole=whole) in _known:
        return False
    cls: Any = type(node)._forward_cls  # type: ignore[attr-defined]
    ours = cls.__module__.startswith((__package__.split(".")[0], "torch.")) and "torch._library" not in cls.__module__
    return not ours and not getattr(cls, "twice_differentiable", False)


def _saved(node: Any) -> list[Tensor | None]:
    return list(node.saved_tensors)


def _kept(node: Any) -> Iterator[Any]:
    """Yield the tensors and arrays that a Function has kept for its backward."""
    waiting = [*_saved(node), *node.__dict__.values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
            yield value
        elif isinstance(value, (tuple, list)):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()


def _hides(node: Any, n_constants: int) -> str | None:
    """Tell whether a Function uses more numbers without a graph than it has inputs without one."""
    inputs = {parent.variable.data_ptr() for parent, _ in node.next_functions if hasattr(parent, "variable")}
    numbers: set[int] = set()
    for value in _kept(node):
        if not isinstance(value, Tensor):
            numbers.add(value.__array_interface__["data"][0])
        elif not value.requires_grad and is_number(value) and not _is_mask(value):
            numbers.add(value.data_ptr())
        elif not value.requires_grad:
            n_constants -= 1
    if (numbers & inputs or len(numbers) > max(n_constants, 0)) and not _ignores_them(node):
        return HIDDEN_NUMBERS.format(_name(node))
    return None


def _is_hidden(value: Any) -> bool:
    return is_number(value) and not value.requires_grad and not _is_mask(value)


@torch.enable_grad()
def _ignores_them(node: Any) -> bool:
    """Tell whether a Function's results stay the same when numbers change that it keeps without a graph."""
    attributes = {name: _changed(value) for name, value in node.__dict__.items() if _is_hidden(value)}
    saved = _saved(node)
    moved = [_changed(t) if _is_hidden(t) else t for t in saved]
    if sum(map(_is_hidden, _kept(node))) > len(attributes) + sum(map(_is_hidden, saved)) or _has_arrays(node):
        return False  # in lists, or NumPy's
    try:
        grads = [torch.ones(m.shape, dtype=m.dtype, device=m.device) for m in node._input_metadata]
        results = _call(node, saved, grads), _call(node, moved, grads, attributes)
        return all(map(torch.equal, *results))
    except Exception:  # somebody's code may raise anything when it is called out of turn
        return False


def _has_arrays(node: Any) -> bool:
    return any(not isinstance(value, Tensor) for value in _kept(node))


def _changed(tensor: Tensor) -> Tensor:
    """Return other numbers of about the same size."""
    factors = torch.linspace(1.03, 1.1, tensor.numel(), dtype=torch.float64, device=tensor.device)
    return tensor * factors.to(tensor.dtype).view(tensor.shape)


def _is_mask(tensor: Tensor) -> bool:
    """Tell whether there are zeros and one other number."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.numel() < 2:
        return False
    zero, size = tensor == 0, tensor.detach().abs()
    return bool(zero.any() & (zero | (size == size.amax())).all())


@torch.enable_grad()
def _forgets(node: Any, graph: Graph, *, whole: bool) -> str | None:
    """Tell whether results depend on what is kept, or if ``whole`` on the gradient, but not by their graph.

    Its backward is called once more with copies of both.
    """
    saved = _saved(node)
    copies = [
        t if t is None or not (is_number(t) and t.requires_grad) else t.detach().requires_grad_().view_as(t)
        for t in saved
    ]
    try:
        grads = [torch.ones(m.shape, dtype=m.dtype, device=m.device).requires_grad_() for m in node._input_metadata]
        grads = [g.view_as(g) for g in grads]
        results = _call(node, copies, grads)
        sources = {t.grad_fn for t in (*copies, *grads) if t is not None and t.grad_fn is not None}
        reached = {n for result in results for n in _between(result, graph, sources)}
        _helpers.update(type(n) for n in reached if isinstance(n, BackwardCFunction))
        cut = next(filter(None, map(_cut, reached - graph.nodes)), None)
        if whole and cut:
            return cut
        if whole and any(g.grad_fn not in reached for g in grads) and any(map(_not_zero, results)):
            return NO_GRAPH.format(_name(node))
        for i, copy in enumerate(copies):
            if copy is saved[i] or copy.grad_fn in reached:
                continue
            moved = _call(node, [*copies[:i], _changed(copy), *copies[i + 1 :]], grads)
            if not all(map(torch.equal, results, moved)):
                return NO_GRAPH.format(_name(node))
    except Exception:  # somebody's code may raise anything when it is called out of turn
        pass
    return None


class _OutOfTurn(Exception):  # noqa: N818  caught where it is called, as whatever somebody's code raises
    """A call would wait for other ranks."""


class _NotTogether(TorchDispatchMode):
    """Inside it nothing waits for other ranks, which may have no such call: what would do so is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.lstrip("_").startswith("c10d"):
            raise _OutOfTurn
        return func(*args, **(kwargs or {}))


def _call(
    node: Any, saved: Sequence[Tensor | None], grads: Sequence[Tensor], attributes: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Call a Function's backward with these saved tensors, and attributes in the place of its own."""
    own = {**node.__dict__, **(attributes or {})}
    context = SimpleNamespace(**own, saved_tensors=tuple(saved), needs_input_grad=node.needs_input_grad)
    with _NotTogether() if dist.is_available() and dist.is_initialized() else contextlib.nullcontext():
        results = node._forward_cls.backward(context, *grads)
    return [r for r in (results if isinstance(results, tuple) else (results,)) if is_number(r)]
