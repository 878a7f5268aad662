"""A step that is compiled or captured once and run with other numbers since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from .. import hvp
from ..curvature import Memory
from .compiled import Compiled
from .cuda_graph import Captured
from .derivatives import Derivatives, FlatFunction, LossModule, StepSpec
from .seen import Seen

Memories = dict[int, Memory]  # of each optimizer


class Probes(Protocol):
    """Draws the probes of a step."""

    def __call__(self, numbers: Sequence[int], sample: int, memory: Memories | None = None) -> Sequence[Tensor]:
        """Draw z of the parameters with these numbers, for the step."""

    def draw(self, numbers: Sequence[int], sample: int, memory: Memories | None) -> Sequence[Tensor]:
        """Draw it, for nothing but the memory it is in."""


class Graph:
    """A compiled or captured step.

    Args:
        module: the loss function.
        spec: what the step computes.
        params: parameters to differentiate by.
        probes: of the step that it is made in.
        scale: GradScaler's factor on the loss.
        tensors: those of a batch.
        seen: what Python code looks at.
        check: called once Python has run, with the ids of the tensors that the graph holds, or None; it may object.
        compiled: compile it with TorchInductor.
        capture: capture it as a CUDA graph.
        pool: of another captured graph, to share its memory.

    Attributes:
        pool: the memory of a captured graph.
    """

    def __init__(
        self,
        module: LossModule,
        spec: StepSpec,
        params: Sequence[Tensor],
        probes: Probes,
        scale: Tensor | None,
        tensors: Sequence[Tensor],
        seen: Seen,
        check: Callable[[set[int] | None], None],
        *,
        compiled: bool,
        capture: bool,
        pool: Any = None,
    ) -> None:
        self._module, self.pool = module, None
        self._addresses: list[int] | None = None
        self._flat = FlatFunction(spec, module, params, seen)
        # A captured graph reads the probes where they are drawn.
        self._memory: list[Memories | None] = [{} if capture else None for _ in range(spec.n_samples)]
        due = list(spec.due)
        z: Sequence[Sequence[Tensor]] = [[params[i] for i in due]] * spec.n_samples  # like them
        if capture and due:
            z = [probes.draw(due, sample, memory) for sample, memory in enumerate(self._memory)]
        fixed, others = self._fixed(params), self._others(z, scale, tensors)
        module.tracing = True
        try:
            with hvp.treating(hvp.Refused()):
                inputs = [*fixed, *others]
                self._run: Compiled | FlatFunction = Compiled(self._flat, inputs, check) if compiled else self._flat
                if capture:
                    self._captured = Captured(self._run, inputs, len(fixed), len(due) * spec.n_samples, pool)
                    if not compiled:
                        check(None)
                    self.pool, self._addresses = self._captured.pool, self._addresses_of(fixed)
        finally:
            module.tracing = False

    def _fixed(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters, and whatever else is in the modules, in the order of the flat function's inputs."""
        state, trained = self._module.places(), set(map(id, params))
        others = [t for t, _ in state.values() if id(t) not in trained]
        return [t.detach() for t in (*params, *others)]

    def _others(self, z: Sequence[Sequence[Tensor]], scale: Tensor | None, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs after those; ``z``: for each sample one tensor for each parameter that is due."""
        return [
            *(probe.detach() for sample in z for probe in sample),
            *([] if scale is None else [scale]),
            *(t.detach() for t in tensors),
        ]

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Tell whether everything that was found when this was made, and a CUDA graph has the address of, is there."""
        if isinstance(self._run, Compiled) and not self._run.fits():
            return False
        return self._addresses is None or self._addresses_of(self._fixed(params)) == self._addresses

    def _addresses_of(self, fixed: Sequence[Tensor]) -> list[int]:
        held = self._run.held if isinstance(self._run, Compiled) else []
        return list(map(Tensor.data_ptr, (*fixed, *held)))

    def __call__(
        self, params: Sequence[Tensor], probes: Probes, scale: Tensor | None, tensors: Sequence[Tensor]
    ) -> Derivatives:
        """Run with other numbers; gradients, and Hz with them, have been through the leaves' own hooks."""
        due, probed = self._flat.spec.due, self._flat.found.probed
        z: list[Sequence[Tensor]] = []
        for sample, memory in enumerate(self._memory):
            of_due = {i: params[i] for i in due}  # any tensor will do where there is no product
            of_due |= zip(probed, probes(probed, sample, memory) if probed else (), strict=True)
            z.append(list(of_due.values()))
        others = self._others(z, scale, tensors)
        # What a captured graph has the addresses of is not looked for again: it fits.
        outputs = self._run(*self._fixed(params), *others) if self._addresses is None else self._captured(*others)
        found = self._flat.unpack(outputs)
        leaves = [*params, *(t for t in tensors if t.requires_grad)]
        grads, products = list(found.grads), list(map(list, found.products))
        for i, (leaf, g) in enumerate(zip(leaves, grads, strict=True)):
            if g is not None and leaf._backward_hooks:  # graphs do not call them
                at = [n for n, number in enumerate(probed) if number == i]
                h = [of_sample[n] for of_sample in products for n in at]
                grads[i], h = hvp.after_hooks(leaf._backward_hooks.values(), g, h)
                for of_sample, product in zip(products, h, strict=bool(at)):
                    of_sample[at[0]] = product
        return found._replace(grads=grads, products=products)
