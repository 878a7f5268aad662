"""A step that is compiled or captured once and run with other numbers since."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import hvp
from .compiled import Compiled
from .cuda_graph import Captured
from .derivatives import Derivatives, FlatFunction, LossModule, Probe, StepSpec


class Graph:
    """A compiled or captured step.

    Args:
        module: the loss function.
        spec: what the step computes.
        params: parameters to differentiate by.
        scale: GradScaler's factor on the loss.
        tensors: those of a batch.
        compiled: compile it with TorchInductor.
        capture: capture it as a CUDA graph.
    """

    def __init__(
        self,
        module: LossModule,
        spec: StepSpec,
        params: Sequence[Tensor],
        scale: Tensor | None,
        tensors: Sequence[Tensor],
        *,
        compiled: bool,
        capture: bool,
    ) -> None:
        self._module = module
        self._addresses: list[int] | None = None
        self._flat = FlatFunction(spec, module, params)
        inputs = self._inputs(params, [params] * spec.n_samples, scale, tensors)
        module.tracing = True
        try:
            with hvp.treating(hvp.Refused()):
                self._run: Compiled | FlatFunction | Captured = Compiled(self._flat, inputs) if compiled else self._flat
                if capture:
                    fixed = self._fixed(params)
                    self._run = Captured(self._run, inputs, len(fixed))
                    self._addresses = list(map(Tensor.data_ptr, fixed))
        finally:
            module.tracing = False

    def _fixed(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters, and whatever else is in the modules, in the order of the flat function's inputs."""
        state, trained = self._module.places(), set(map(id, params))
        others = [t for t, _ in state.values() if id(t) not in trained]
        return [t.detach() for t in (*params, *others)]

    def _inputs(
        self,
        params: Sequence[Tensor],
        probes: Sequence[Sequence[Tensor]],
        scale: Tensor | None,
        tensors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Return the flat function's inputs; ``probes``: for each sample one tensor a parameter."""
        due = self._flat.spec.due
        return [
            *self._fixed(params),
            *(sample[i].detach() for sample in probes for i in due),
            *([] if scale is None else [scale]),
            *(t.detach() for t in tensors),
        ]

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Tell whether everything a CUDA graph has the address of is still there."""
        return self._addresses is None or list(map(Tensor.data_ptr, self._fixed(params))) == self._addresses

    def __call__(
        self, params: Sequence[Tensor], draw: Probe, scale: Tensor | None, tensors: Sequence[Tensor]
    ) -> Derivatives:
        """Run with other numbers; gradients, and Hz with them, have been through the leaves' own hooks."""
        probed = self._flat.found.probed
        probes: list[Sequence[Tensor]] = []
        for sample in range(self._flat.spec.n_samples if probed else 0):
            of_parameter = list(params)  # any tensor will do where there is no product
            for i, z in zip(probed, draw(probed, sample), strict=True):
                of_parameter[i] = z
            probes.append(of_parameter)
        if not probed:
            probes = [params] * self._flat.spec.n_samples
        found = self._flat.unpack(self._run(*self._inputs(params, probes, scale, tensors)))
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
