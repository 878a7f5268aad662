"""Several optimizers in one loss: its curvature goes to all of them, out of one Hessian-vector product."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .curvature import Curvature, differentiate

if TYPE_CHECKING:
    from .hessian_step import HessianStep

_numbers = itertools.count()
_alive: weakref.WeakValueDictionary[int, HessianStep] = weakref.WeakValueDictionary()


def register(step: HessianStep) -> None:
    """Have the steps of an optimizer take part in the passes of others, as long as it lives."""
    _alive[next(_numbers)] = step


def awaiting(steps: Sequence[HessianStep]) -> list[HessianStep]:
    """Return the steps of other optimizers that wait for curvature, in the order in which they were made.

    They differentiate the losses of the given ones as these do: with the same fraction of a batch, and twice. Of
    optimizers that have a parameter in common the last one counts, and none that has one of the given ones'.
    """
    if len(_alive) == 1:  # the given one's
        return []
    taken = set(itertools.chain(*(map(id, step.layout.params()) for step in steps)))
    found = []
    for ref in reversed(_alive.valuerefs()):  # a copy: other threads make optimizers, too
        step = ref()
        optimizer = None if step is None else step.layout.optimizer  # alive as long as it is looked at
        if optimizer is None or step in steps:
            continue
        own = set(map(id, step.layout.params()))
        if taken.isdisjoint(own) and step.is_due and all(map(step.takes_part_with, steps)):
            found.append(step)
        taken |= own
    return found[::-1]


def expecting(step: HessianStep) -> bool:
    """Tell whether the loss that an optimizer's pass is about to compute may give curvature to another one."""
    return any(other not in step.strangers and other.is_unmixed() for other in awaiting([step]))


def joining(steps: Sequence[HessianStep], leaves: Iterable[Tensor]) -> list[HessianStep]:
    """Return the steps of other optimizers that a pass over some leaves is the first of, or one of.

    Those whose gradients are left from their last step, as a GAN's discriminator's are when the generator's loss comes,
    do not wait for this pass's curvature.
    """
    waiting = awaiting(steps)
    reached = set(map(id, leaves)) if waiting else set()
    concerned = [step for step in waiting if step.concerns(reached)]
    for step in steps:
        step.strangers.update(set(waiting).difference(concerned))
    return [step for step in concerned if step.is_unmixed()]


def place(steps: Sequence[HessianStep]) -> None:
    """Give each step a probe of its own, unless it has begun with one: equal ones would not be independent."""
    if len(steps) == 1:
        steps[0].place = 0 if steps[0].curvature is None else steps[0].place
        return
    seeds = {step.probe_seed for step in steps if step.curvature is not None}
    for step in steps:
        if step.curvature is None:
            step.place = next(place for place in itertools.count() if step.seed_at(place) not in seeds)
            seeds.add(step.probe_seed)


def products(
    steps: Sequence[HessianStep], leaves: Sequence[Tensor], grads: Sequence[Tensor | None], **options: Any
) -> list[Curvature]:
    """Differentiate gradients along the probes of several steps: in one product, as far as their options are alike.

    Args:
        steps: those of optimizers, all of them due.
        leaves: of a loss.
        grads: their gradients, with their graph.
        options: as of :func:`~adahessian_fused.curvature.differentiate`.
    """
    retain_graph = options.pop("retain_graph", False)
    place(steps)
    parts, seeds = [], list[int]()
    alike: dict[Any, list[int]] = {}
    for i, step in enumerate(steps):
        wide, curvature = step.layout.options, step.new_curvature()
        parts.append((curvature, *step.due_pairs(leaves, grads), wide["probe"]))
        alike.setdefault((wide["n_samples"], wide["hvp_dtype"], seeds.count(curvature.seed)), []).append(i)
        seeds.append(curvature.seed)
    for number, members in enumerate(alike.values()):
        wide, last = steps[members[0]].layout.options, number + 1 == len(alike)
        differentiate(
            [parts[i] for i in members],
            n_samples=wide["n_samples"],
            precision=wide["hvp_dtype"],
            retain_graph=retain_graph or not last,
            **options,
        )
    return [curvature for curvature, *_ in parts]
