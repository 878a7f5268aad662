"""Gradients that others write to: during a step, and while its loss is evaluated several times."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import hvp
from .distributed.sharded import part_of
from .looks import note_gradients, version_of

Versions = list[tuple[Tensor | None, int]]  # gradients, and how often each had been written to


def versions(params: Iterable[Tensor]) -> Versions:
    """Return the gradients of parameters and how often each has been written to."""
    grads = [p.grad for p in params]
    return [(grad, -1 if grad is None else version_of(grad)) for grad in grads]


class GradientRecord(hvp.BackwardObserver):
    """Gradients as a pass or a step of the optimizer has left them.

    One that is another tensor now, or has been written to, may have been zeroed, clipped or added to by a backward pass
    of others. The last is noticed while the record watches.

    Args:
        params: whose gradients.
        of_graphs: passes with ``create_graph=True`` are not others'.

    Attributes:
        added: ids of parameters whose gradient other backward passes have added to.
        ours: whether a pass of the optimizer is under way.
    """

    def __init__(self, params: Iterable[Tensor], *, of_graphs: bool = False) -> None:
        # As quick as can be: every step leaves one, and few are looked at.
        self._params, self._of_graphs = list(params), of_graphs
        self._grads, self._versions = note_gradients(self._params)
        self.added: set[int] = set()
        self.ours = False
        self._thread = threading.get_ident()

    @functools.cached_property
    def _left(self) -> dict[int, tuple[Any, int]]:
        return dict(zip(map(id, self._params), zip(self._grads, self._versions, strict=True), strict=True))

    def changed(self, params: Iterable[Tensor] | None = None) -> list[Tensor]:
        """Return those of some parameters, by default its own, whose gradient is not as it was left."""
        return [p for p in (self._params if params is None else params) if not self._same(p)]

    def _same(self, p: Tensor) -> bool:
        grad, version = self._left.get(id(p), (None, -1))
        now = p.grad
        if now is None or grad is None:
            return now is None and version == -1
        return now is grad() and version_of(now) == version

    @contextlib.contextmanager
    def around(self, tensors: Any, create_graph: bool) -> Iterator[None]:
        """Look at a pass of others."""
        with contextlib.nullcontext() if create_graph and self._of_graphs else super().around(tensors, create_graph):
            yield

    def before(self, tensors: Any) -> GradientRecord | None:
        """Return the gradients before a backward pass, unless it is another thread's and concerns others' leaves.

        Those of ours that no pass of this thread writes to must not be read while another one does.
        """
        return None if self.ours or not self._concerned(tensors) else GradientRecord(self._params)

    def _concerned(self, tensors: Any) -> bool:
        if threading.get_ident() == self._thread:
            return True
        ours = set(map(id, self._params))
        leaves = hvp.explore([tensors] if isinstance(tensors, Tensor) else tensors).leaves
        return any(id(leaf) in ours for leaf in leaves)

    def after(self, before: GradientRecord | None) -> None:
        """Note which of them it has changed."""
        if before is not None:
            self.added.update(map(id, before.changed()))


def is_zero(p: Tensor) -> bool:
    """Tell whether a parameter has no gradient, or one of zeros."""
    return p.grad is None or not bool(part_of(p.grad, p).detach().any())


class StepRecord:
    """The gradients of one step after the other: which parts of them have their curvature, and which have not.

    Attributes:
        added: ids of parameters whose gradient other passes have added to since this step's first; None before that.
    """

    def __init__(self) -> None:
        self._record: GradientRecord | None = None  # of this step, from its first pass on
        self._left: GradientRecord | None = None  # of the gradients after the last step, if the coming one is due

    @property
    def added(self) -> set[int] | None:
        return None if self._record is None else self._record.added

    def begin(self, params: Iterable[Tensor] | None) -> None:
        """Note gradients as the last step leaves them: none is foreign to the coming one. None if that is not due."""
        self._left = None if params is None else GradientRecord(params)

    def forget(self) -> None:
        """Forget the passes of this step."""
        if self._record is not None:
            self._record.close()
        self._record = None

    def begin_pass(self, params: Iterable[Tensor]) -> None:
        """Begin a backward pass of the optimizer.

        Raises:
            RuntimeError: there are gradients of this step without their curvature.
        """
        if self.mixed_in(params):
            raise RuntimeError(hvp.MIXED)
        if self._record is not None:
            self._record.ours = True

    def end_pass(self, params: Iterable[Tensor], *, failed: bool) -> None:
        """End it."""
        if not failed:
            self.note_pass(params)
        elif self._record is not None:
            self._record.ours = False

    def note_pass(self, params: Iterable[Tensor], added: Iterable[int] = (), *, of_graphs: bool = False) -> None:
        """Note what a pass has left, and watch for others'; the arguments are :class:`GradientRecord`'s."""
        self.forget()
        self._record = GradientRecord(params, of_graphs=of_graphs)
        self._record.added.update(added)
        self._record.watch()

    def mixed_in(self, params: Iterable[Tensor]) -> set[int]:
        """Return ids of parameters whose gradient holds a part of this step that has no curvature."""
        if self._record is not None:
            return self._record.added
        present = [p for p in params if p.grad is not None]
        return {id(p) for p in self._left.changed(present) if not is_zero(p)} if self._left and present else set()

    def is_written_to(self) -> bool:
        """Tell whether gradients have been written to since their passes, and not by another pass."""
        record = self._record
        return record is not None and not record.added and any(p.grad is not None for p in record.changed())

    def zeroed(self, params: Iterable[Tensor]) -> set[int]:
        """Return ids of parameters whose gradient was zeroed since the passes, by ``model.zero_grad()`` say."""
        if self._record is None:
            return set()
        found = {id(p) for p in self._record.changed(params) if is_zero(p)}
        self._record.added -= found
        return found


class OtherLeaves(hvp.BackwardObserver):
    """Leaves that are not the optimizer's, while it evaluates a loss several times: they get the mean gradient, once.

    Args:
        params: the optimizer's.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._ours, self._thread = set(map(id, params)), threading.get_ident()
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._found: dict[int, list[Tensor]] = {}
        self._evaluations, self._hooks = 0, contextlib.ExitStack()
        self._all: dict[int, tuple[Tensor, Tensor | None]] = {}

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Surround one evaluation; the gradients are afterwards what they were when its backward pass began."""
        self.watch()
        try:
            with self._hooks:
                yield
            self._evaluations += 1
            for number, (leaf, _) in self._before.items():
                if leaf.grad is not None:
                    self._found.setdefault(number, []).append(leaf.grad.detach())
        finally:
            self.close()
            for leaf, grad in self._before.values():
                leaf.grad = grad
            self._all |= self._before
            self._before = {}

    def before(self, tensors: Any) -> None:
        """Set aside the gradients of the leaves of these tensors."""
        if threading.get_ident() != self._thread:
            return
        for leaf in hvp.explore([tensors] if isinstance(tensors, Tensor) else tensors).leaves:
            if id(leaf) not in self._ours and id(leaf) not in self._before:
                self._before[id(leaf)] = leaf, leaf.grad
                leaf.grad = None
                self._hooks.enter_context(hvp.accumulating([leaf], hvp.later))

    def finish(self) -> list[Tensor]:
        """Add the means over the evaluations; returns the leaves."""
        leaves = [self._all[number][0] for number in self._found]
        with torch.no_grad():
            means = [sum(found[1:], start=found[0]) / self._evaluations for found in self._found.values()]
        hvp.accumulate_grads(leaves, means)
        return leaves
