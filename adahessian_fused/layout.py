"""Which parameters live in which flat buffers: laid out once, and anew when anything about them changes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .bucket import Bucket, Entry, by_bucket, make_buckets, stored_dtype
from .checks import check_apart, check_grad, check_group, check_hvp_dtype, check_param, has_off_steps
from .distributed import sharded
from .looks import holds, looks_of
from .record import GradientRecord

_LAYOUT, _GRAD, _PARAMS = attrgetter("layout"), attrgetter("grad"), itemgetter("params")
_REQUIRES_GRAD = attrgetter("requires_grad")

# Options that hold for the whole optimizer although they are stored in every parameter group.
OPTIMIZER_WIDE = (
    *("n_samples", "probe", "seed", "hvp", "hvp_dtype", "hessian_fraction", "fd_epsilon"),
    *("capturable", "master_weights", "probe_per_rank"),
)


def block_length(shape: Sequence[int], block_size: int | str, kernel: int | None = None) -> int:
    """Return the length b of the averaging blocks (Eq. 7) of a parameter of this shape.

    "auto" is ``kernel``, or else the spatial size of what has four or five axes, and 1 for everything else: of three
    axes are stacks of matrices and embeddings of positions more often than kernels of one spatial axis. "conv2d" is the
    spatial size of what has four axes; "row" the last axis; "tensor" the whole parameter; an int is taken as it is.

    Args:
        shape: of the parameter.
        block_size: option of its group.
        kernel: what :func:`kernels_of` knows about it.
    """
    if block_size == "auto":
        b = kernel or (math.prod(shape[2:]) if len(shape) in (4, 5) else 1)
    elif block_size == "conv2d":
        b = math.prod(shape[2:]) if len(shape) == 4 else 1
    elif block_size == "row":
        b = shape[-1] if shape else 1
    elif block_size == "tensor":
        b = math.prod(shape)
    else:
        b = int(block_size)
    return max(b, 1)


def kernels_of(model: nn.Module) -> dict[Tensor, int]:
    """Return the spatial size of the convolution kernel that a parameter is; 1 for all others.

    Convolutions are modules with a ``kernel_size``, kernels their parameters with these sizes behind the first two
    axes, also where a parametrization has made several tensors of one.
    """
    kernels: dict[Tensor, int] = dict.fromkeys(model.parameters(), 1)
    for module in model.modules():
        size = getattr(module, "kernel_size", None)
        for p in () if size is None else module.parameters():
            spatial = tuple(p.shape[2:])
            if spatial and spatial == (tuple(size) if isinstance(size, Iterable) else (size,) * len(spatial)):
                kernels[p] = math.prod(spatial)
    return kernels


class Attached(Protocol):
    """What is held for entries beside their states and has to follow them to other buckets."""

    def follow(self, pairs: Sequence[tuple[Entry, Entry]]) -> Callable[[], None]:
        """Prepare to move, from the first entry of each pair to the second; return what completes the move.

        Raises:
            RuntimeError: it cannot be moved.
        """


class ParameterLayout:
    """The entries and buckets of an optimizer's parameters, as of the last look at them.

    Args:
        optimizer: whose groups and state are laid out; it is not kept alive.
        backends: the backend of each device type.
        kernels: spatial sizes, as of :func:`kernels_of`.
        state_dtype: as AdaHessian's.
        on_all_ranks: lay out everything that is trained, whatever has a gradient on this rank.

    Attributes:
        entries: those of all parameters that have had a gradient, by the parameter's id: its own hash is slow.
        buckets: those they are in.
        stepped: those of the last step that was not skipped; empty once they are in other groups.
        left: the gradients that step has left, of the first and the last of these.
        attached: what follows the entries; None for nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        backends: Mapping[str, Any],
        kernels: Mapping[Tensor, int],
        state_dtype: torch.dtype | None,
        *,
        on_all_ranks: bool,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.backends, self.state_dtype = backends, state_dtype
        self._kernels, self._on_all_ranks = kernels, on_all_ranks
        self.entries: dict[int, Entry] = {}
        self.buckets: list[Bucket] = []
        self.stepped: Sequence[Entry] = []
        self.left: GradientRecord | None = None
        self.attached: Attached | None = None
        self._lookup = _Lookup()
        # What the buckets were made for: contents of the state, options and parameters of the groups.
        self._contents: tuple[list[dict[str, Any]], list[Any]] = [], []
        self._options: list[tuple[int | str, str, bool, bool, int]] = []
        self._placed: list[Tensor] = []

    def cover_all_trained(self) -> None:
        """Lay out everything that is trained from now on, as with ``on_all_ranks``."""
        self._on_all_ranks, self._placed = True, []

    # ---- what the optimizer shows ------------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, if it is still there."""
        return self._optimizer()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups; none of an optimizer that is gone, as another thread's may be at any time."""
        optimizer = self._optimizer()
        return [] if optimizer is None else optimizer.param_groups

    @property
    def options(self) -> dict[str, Any]:
        """The options that are the same for all groups."""
        return self._optimizer().param_groups[0]

    def set_option(self, name: str, value: Any) -> None:
        """Set an option that is the same for all groups, and for those to come."""
        for options in (self._optimizer().defaults, *self.groups):
            options[name] = value

    @property
    def _state(self) -> dict[Tensor, dict[str, Any]]:
        return self._optimizer().state

    def params(self) -> Iterator[Tensor]:
        """Yield all parameters, in the order of the groups."""
        return chain.from_iterable(map(_PARAMS, self.groups))

    def drop_gradients(self) -> None:
        """Set all gradients to None."""
        for p in self.params():
            p.grad = None

    def trained(self, chosen: Sequence[bool] | None = None) -> list[Tensor]:
        """Return everything that wants a gradient; of the chosen groups, if any are named."""
        groups = self.groups if chosen is None else compress(self.groups, chosen)
        return list(filter(_REQUIRES_GRAD, chain.from_iterable(map(_PARAMS, groups))))

    def kernel_of(self, param: Tensor) -> int | None:
        """Return the spatial size of the convolution kernel that a parameter is, as far as it is known."""
        return self._kernels.get(param)

    def block_of(self, param: Tensor, group: Mapping[str, Any]) -> int:
        """Return the length of a parameter's averaging blocks by the options of its group."""
        return block_length(param.shape, group["block_size"], self.kernel_of(param))

    def blocks(self) -> list[str]:
        """Return the names of the parameters that are averaged, each with the length of its blocks."""
        lengths = [(name, min(self.block_of(p, self.groups[n]), p.numel())) for n, name, p in self._named()]
        return [f"{name} ({b})" for name, b in lengths if b > 1]

    # ---- entries -----------------------------------------------------------------------------------------------------

    def ensure(self, params: Sequence[Tensor]) -> list[Entry]:
        """Return the entries of parameters; rebuild the buckets first if anything about them or the groups changed."""
        parts = [sharded.local(p) for p in params] if sharded.any_sharded(params) else params
        found = self._lookup.entries(params, parts, self.entries) if self._is_as_before(self.params()) else None
        if found is None:
            self._rebuild(params)
            self._options, self._placed, self._lookup = self._averaged(), list(self.params()), _Lookup()
            found = [self.entries[id(p)] for p in params]
        return found

    def _averaged(self) -> list[tuple[int | str, str, bool, bool, int]]:
        """Return what the layout depends on in each group."""
        return [
            (group["block_size"], group["averaging"], _keeps_diag(group), bool(group["shrink"]), len(group["params"]))
            for group in self.groups
        ]

    def _is_as_before(self, params: Iterable[Tensor]) -> bool:
        """Tell whether groups, of these parameters, and states are as the buckets were made for."""
        placed = all(map(is_, params, self._placed))
        return placed and self._averaged() == self._options and holds(self._state, *self._contents)

    def with_gradients(self) -> tuple[list[Entry], list[Tensor]]:
        """Return the entries of the parameters that have a gradient, and their gradients."""
        params = list(self.params())
        found = self._lookup.with_gradients(params) if self._is_as_before(params) else None
        if found is not None:
            return found
        grads = list(map(_GRAD, params))
        if not all(map(is_not, grads, repeat(None))):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        entries = self.ensure(params) if params else []
        if not set(map(_LAYOUT, grads)) <= {torch.strided}:
            for entry, grad in zip(entries, grads, strict=True):
                check_grad(grad, entry.name)
        if sharded.any_sharded(params):
            grads = [sharded.part_of(grad, p) for grad, p in zip(grads, params, strict=True)]
        return entries, grads

    def by_bucket(self, entries: Sequence[Entry]) -> dict[Bucket, list[Entry]]:
        """Return the entries of each bucket, in the bucket's order."""
        return {self.buckets[0]: list(entries)} if len(self.buckets) == 1 else by_bucket(entries)

    def with_state(self) -> list[Entry]:
        """Return the entries of the parameters that have been stepped, or loaded."""
        return self.ensure([p for p in self.params() if "exp_avg" in self._state.get(p, ())])

    def of_groups(self, chosen: Sequence[bool]) -> list[Entry]:
        """Return entries of all that is trained in the chosen groups; of what had no gradient yet temporary ones."""
        known, new = [], []
        for number, (n, name, p) in enumerate(self._named()):
            if chosen[n] and p.requires_grad and "exp_avg" in self._state.get(p, ()):
                known.append(p)
            elif chosen[n] and p.requires_grad:
                entry = Entry(p, name, number, n, {})
                entry.describe(self.block_of(p, self.groups[n]), self.groups[n]["averaging"])
                new.append(entry)
        make_buckets(new, with_states=False)
        return self.ensure(known) + new

    def check_options(self, groups: Iterable[dict[str, Any]] | None = None) -> None:
        """Raise unless the options of some groups, by default of all, are right."""
        for group in self.groups if groups is None else groups:
            check_group(group)
            if group["hvp_dtype"] is not None:
                for dtype in {p.dtype for p in group["params"] if p.requires_grad}:
                    check_hvp_dtype(group["hvp_dtype"], group["hvp"], dtype)
            sharded.check_options(group, has_group=self._on_all_ranks)

    def check_added(self) -> None:
        """Raise unless the last group is all right, and goes with the others."""
        number, group, first = len(self.groups) - 1, self.groups[-1], self.options
        self.check_options([group])
        for name in OPTIMIZER_WIDE:
            if group[name] != first[name]:
                raise ValueError(f"{name}={group[name]!r}; expected {first[name]!r}, it is the same for all groups")
        if len(set(map(id, group["params"]))) < len(group["params"]):
            raise ValueError(f"group {number} has a parameter more than once; expected it in one place")
        for i, p in enumerate(group["params"]):
            if p.requires_grad:
                check_param(p, f"parameter {i} of group {number}")
                stored_dtype(p.dtype, self.state_dtype)
                self.backends[p.device.type]  # raises where no backend can run
        trained = [(name, sharded.local(p)) for _, name, p in self._named() if p.requires_grad]
        new = {_memory(sharded.local(p)) for p in group["params"] if p.requires_grad}
        check_apart((name, part) for name, part in trained if _memory(part) in new)

    # ---- laying out --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rebuild(self, params: Iterable[Tensor]) -> None:
        """Sort all parameters that have had a gradient, before a checkpoint too, into new buckets with their state.

        An error leaves everything as it was.
        """
        wanted = set(params).union(p for p, state in self._state.items() if "exp_avg" in state)
        if self._on_all_ranks:  # the same layout on all of them, whatever each has used
            wanted.update(self.trained())
        new = self._described(wanted)
        make_buckets(
            new.values(),
            capturable=self.options["capturable"],
            master_weights=self.options["master_weights"],
            keep_diag=any(_keeps_diag(group) for group in self.groups),
            keep_means=any(group["shrink"] > 0 for group in self.groups),
            state_dtype=self.state_dtype,
        )
        pairs = [(entry, new[key]) for key, entry in self.entries.items() if key in new]
        for old, fresh in pairs:
            fresh.missed.copy_(old.missed)
            fresh.used_mean, fresh.hyper = old.used_mean, old.hyper
        follow = None if self.attached is None else self.attached.follow(pairs)
        self._lay_out(new, pairs)
        if follow is not None:
            follow()

    def _described(self, wanted: set[Tensor]) -> dict[int, Entry]:
        """Return new entries of parameters, as the groups are now; everything about them is checked."""
        self.check_options()
        entries: dict[int, Entry] = {}
        for param_id, (number, name, p) in enumerate(self._named()):
            if p in wanted:
                if id(p) in entries:
                    raise ValueError(f"{name} is {entries[id(p)].name}, too; expected it in one place")
                check_param(p, name)
                self.backends[p.device.type]  # raises where no backend can run
                entry = entries[id(p)] = Entry(p, name, param_id, number, self._state.get(p, {}))
                entry.describe(self.block_of(p, self.groups[number]), self.groups[number]["averaging"])
        check_apart((entry.name, entry.param) for entry in entries.values())
        return entries

    def _named(self) -> Iterator[tuple[int, str, Tensor]]:
        """Yield group number, name and parameter of all parameters."""
        for number, group in enumerate(self.groups):
            for name, p in zip(_names(group, number), group["params"], strict=True):
                yield number, name, p

    def _lay_out(self, new: dict[int, Entry], pairs: Sequence[tuple[Entry, Entry]]) -> None:
        """Put new entries in the place of the old ones, which stay the same objects, and their views into the state."""
        if len(pairs) < len(self.entries) or any(old.group != fresh.group for old, fresh in pairs):
            self.stepped = []  # by other hyperparameters than those of their groups now
        for entry in self.entries.values():
            if id(entry.owner) not in new:  # not in any group; its state shall not keep all buffers alive
                entry.state.update({k: x.clone() for k, x in entry.state.items() if isinstance(x, Tensor)})
        for old, fresh in pairs:
            old.become(fresh)
            new[id(old.owner)] = old
        for entry in new.values():
            entry.publish()
            self._state[entry.owner] = entry.state
        self.entries, self._contents = new, self._state_contents()
        self.buckets = list(dict.fromkeys(entry.bucket for entry in new.values()))

    def _state_contents(self) -> tuple[list[dict[str, Any]], list[Any]]:
        states = list(self._state.values())
        return states, list(chain.from_iterable(map(dict.values, states)))


def _keeps_diag(group: Mapping[str, Any]) -> bool:
    """Tell whether the diagonal of a Hessian step is used on the steps after it."""
    return group["off_step"] == "stale" and has_off_steps(group)


def _memory(tensor: Tensor) -> Any:
    """Return where the storage of a tensor is; None of a subclass, which may have none of its own."""
    return tensor.untyped_storage().data_ptr() if type(tensor) in (Tensor, nn.Parameter) else None


def _names(group: Mapping[str, Any], number: int) -> Sequence[str]:
    """Return what to call a group's parameters; names it was made with do not tell once its list was edited."""
    names: Sequence[str] = group.get("param_names", ())
    count = len(group["params"])
    return names if len(names) == count else [f"parameter {i} of group {number}" for i in range(count)]


class _Lookup:
    """The entries that were looked up last, and what their parameters were like then."""

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._entries: list[Entry | None] = []
        self._then: Any = None

    def with_gradients(self, params: list[Tensor]) -> tuple[list[Entry], list[Tensor]] | None:
        """Return the entries of the parameters of the last look-up and their gradients, the plain case in one go.

        None if these are other parameters, or look otherwise now, or some gradient is not an ordinary tensor.
        """
        grads = None if self._then is None else self._then.gradients(params, self._params)
        return None if grads is None else (self._entries, grads)

    def entries(
        self, params: Sequence[Tensor], parts: Sequence[Tensor], known: Mapping[int, Entry]
    ) -> list[Entry] | None:
        """Return the entries of parameters; None if one has none, or is not what its entry was made for any more.

        Args:
            params: the parameters.
            parts: what this rank has of each.
            known: all entries, by the id of their parameter, whose own hash is slow.
        """
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self._params, self._entries, self._then = list(params), list(map(known.get, map(id, params))), None
        if self._then is None or not self._then.same(list(parts)):
            # A list is faster than a generator.
            if None in self._entries or not all([entry.fits() for entry in self._entries]):  # noqa: C419
                return None
            check_apart((entry.name, part) for entry, part in zip(self._entries, parts, strict=True))
            self._then = looks_of(parts)
        return self._entries
