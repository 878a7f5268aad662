"""Loss, gradients and Hessian-vector products of one step, as one function that can be traced or captured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import hvp
from ..fraction import Structure, flatten, split_batch
from ..friendly import curvature_friendly
from ..friendly.mode import Recurrent
from ..hvp.errors import naming_the_operator
from .seen import Seen
from .surroundings import no_buffer_replaced

_REQUIRES_GRAD = attrgetter("requires_grad")
Probe = Callable[[list[int], int], Sequence[Tensor]]


class Derivatives(NamedTuple):
    """What a step computes before its update; gradients and products carry the factor ``scale``."""

    result: Any  # what the loss function returned, detached
    grads: list[Tensor | None]  # of all leaves
    probed: list[int]  # numbers of the parameters that have a product
    products: list[list[Tensor]]  # for each sample, of those


class OfModel:
    """A loss of outputs and targets, and a model, as one function of a batch."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any]) -> None:
        self.model, self.loss_fn = model, loss_fn

    def __call__(self, inputs: Any, targets: Any) -> Any:
        """Return the loss; inputs may be one argument of the model, or a tuple or mapping of several."""
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        else:
            outputs = self.model(*inputs) if isinstance(inputs, (tuple, list)) else self.model(inputs)
        return self.loss_fn(outputs, targets)


class LossModule(nn.Module):
    """A loss function and the modules it uses."""

    def __init__(self, loss_fn: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._loss_fn = (loss_fn,)  # a module would be registered once more
        self.tracing = self._called = False

    def forward(self, *batch: Any) -> Any:
        """Return what the loss function returns."""
        if not self.tracing:
            try:
                result = self._loss_fn[0](*batch)
            except Exception as error:
                if self._called or type(error) not in (TypeError, ValueError, IndexError, RuntimeError):
                    raise
                raise type(error)(_what_failed(self._loss_fn[0], batch, error)) from error
            self._called = True
            return result
        with (
            no_buffer_replaced(self),
            # What torch.compile was told of is traced as it was before.
            torch._dynamo.config.patch(error_on_nested_fx_trace=False),
            # oneDNN's LSTM is an operator that TorchInductor cannot call, and other layers would be unrolled.
            _without_onednn(),
            Recurrent(),
        ):
            return self._loss_fn[0](*batch)

    def places(self) -> dict[int, tuple[Tensor, list[str]]]:
        """Return each parameter and buffer, by its id, and the names of all places where it is."""
        found: dict[int, tuple[Tensor, list[str]]] = {}
        for prefix, module in self.named_modules():  # one that is registered twice comes once
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    found.setdefault(id(tensor), (tensor, []))[1].append(f"{prefix}.{name}")
        return found


def _what_failed(loss_fn: Callable[..., Any], batch: Sequence[Any], error: Exception) -> str:
    """Say how the loss was called for the first time, and how else it could be."""
    given = ", ".join(f"{type(x).__name__} {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)[:40] for x in batch)
    called, expected = "loss_of(*batch)", "a loss_of(x, y) of the batch alone, or TrainStep(model, loss_fn, opt)"
    if isinstance(loss_fn, OfModel):
        called = "loss_fn(model(inputs), targets)"
        expected = "TrainStep(loss_of, opt) for a loss_of(inputs, targets) that calls the model itself"
    return f"TrainStep called {called} with {given}, which failed: {error}; expected {expected}"


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class Constant(NamedTuple):
    """Something in a batch that is no tensor."""

    kind: type
    value: Any


def loss_in(value: Any) -> Tensor:
    """Find the loss in what a loss function returned: a tensor, the first of several, or the one called "loss"."""
    loss = value
    if isinstance(value, Mapping):
        loss = value.get("loss")
    elif isinstance(value, (tuple, list)) and value:
        loss = value[0]
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss function returned a {type(value).__name__}; expected the loss, or a tuple or list that begins "
            'with it, or a mapping with "loss"'
        )
    if loss.numel() != 1:
        raise RuntimeError(f"the loss has shape {tuple(loss.shape)}; expected one number, for example its mean")
    return loss


@dataclass(frozen=True)
class StepSpec:
    """Everything but numbers that decides what a step computes: steps of one kind can share a graph.

    What :mod:`surroundings` does not see of what Python code looks at is not among it.
    """

    due: tuple[int, ...]  # numbers of the parameters that need curvature
    n_samples: int
    hvp_dtype: hvp.Precision | None
    fraction: float
    autocast: tuple[str, bool, torch.dtype]
    scaled: bool
    structure: Structure  # of the batch
    constants: tuple[Any, ...]  # for each leaf of it Tensor, or float or int for a number that is given as a tensor
    tensors: tuple[Any, ...]  # shape, strides, dtype, device and requires_grad of the batch's
    surroundings: int = 0  # their number

    def differentiate(
        self, loss_of: Callable[..., Any], params: Sequence[Tensor], batch: Any, probe: Probe, scale: Tensor | None
    ) -> Derivatives:
        """Differentiate a loss once, and a second time if any parameter is due.

        With a fraction r < 1 the batch is cut in two: the gradient is made of both parts, with weights r and 1 - r, and
        the products are those of the first.

        Args:
            loss_of: returns the mean loss of a batch, alone or with more, see :func:`loss_in`.
            params: leaves of its graph: what the optimizer trains, and then others.
            batch: its arguments.
            probe: the probes z of the parameters with these numbers, for a sample.
            scale: GradScaler's factor on the loss.
        """
        split = self.due and self.fraction < 1
        first, rest, share = split_batch(batch, self.fraction) if split else (batch, None, 1.0)
        result, grads = self._gradients(loss_of, params, first, scale, create_graph=bool(self.due))
        probed = [i for i in self.due if grads[i] is not None and grads[i].requires_grad]
        products = []
        for sample in range(self.n_samples if probed else 0):
            z, roots = probe(probed, sample), [grads[i] for i in probed]
            with naming_the_operator("autograd"), hvp.second_pass(self.hvp_dtype, roots), hvp.without_hooks(params):
                found = torch.autograd.grad(
                    roots,
                    [params[i] for i in probed],
                    z,
                    retain_graph=sample + 1 < self.n_samples,
                    allow_unused=True,
                    materialize_grads=True,
                )
            products.append(list(found))
        grads = [g if g is None else g.detach() for g in grads]
        if share < 1:
            rest_result, rest_grads = self._gradients(loss_of, params, rest, scale, create_graph=False)
            result = _joined(result, rest_result, share)
            grads = [_mean(g, other, share) for g, other in zip(grads, rest_grads, strict=True)]
        return Derivatives(result, grads, probed, products)

    def _gradients(
        self,
        loss_of: Callable[..., Any],
        params: Sequence[Tensor],
        batch: Any,
        scale: Tensor | None,
        *,
        create_graph: bool,
    ) -> tuple[Any, list[Tensor | None]]:
        device, enabled, dtype = self.autocast
        friendly = curvature_friendly() if create_graph else contextlib.nullcontext()
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled), friendly:
            value = loss_of(*batch)
        loss = loss_in(value)
        with torch.autocast(device, enabled=False):
            scaled = loss if scale is None else loss * scale
            if create_graph:
                grads = hvp.first_order(scaled, params, None)
            else:
                grads = list(torch.autograd.grad(scaled, params, allow_unused=True))
        leaves, structure = flatten(value)
        return structure.unflatten([x.detach() if isinstance(x, Tensor) else x for x in leaves]), grads


def _joined(first: Any, rest: Any, share: float) -> Any:
    """Join what the loss function returns for both parts: means of scalars, other tensors one after the other."""
    leaves, structure = flatten(first)
    both = zip(leaves, flatten(rest)[0], strict=True)
    return structure.unflatten([_both(a, b, share) if isinstance(a, Tensor) else a for a, b in both])


def _both(a: Tensor, b: Tensor, share: float) -> Tensor:
    if a.is_floating_point() and a.numel() == b.numel() == 1:
        return a.lerp(b, 1 - share)
    return torch.cat((a, b)) if a.ndim and b.ndim and a.shape[1:] == b.shape[1:] else a


def _mean(a: Tensor | None, b: Tensor | None, share: float) -> Tensor | None:
    """Average two gradients, ``share`` the weight of the first; None is zero."""
    if a is not None and b is not None:
        return a.lerp(b, 1 - share)
    return a * share if a is not None else None if b is None else b * (1 - share)


class FlatFunction:
    """A kind of step as a function from a list of tensors to a list of tensors, for tracing and capturing.

    Inputs: the parameters, the modules' other parameters and buffers (updated in place), the probes of each sample for
    each parameter that is due, the scale if there is one, and the tensors of the batch. ``found`` says afterwards what
    the outputs are; the last ones are tensors that Python code leaves in attributes,
    dicts and lists.

    Args:
        spec: what the step computes.
        module: the loss function.
        params: the parameters to differentiate by; those that are in no module are taken as they are. The batch's
            tensors that require grad come after them.
        seen: what Python code looked at before.
    """

    def __init__(self, spec: StepSpec, module: LossModule, params: Sequence[Tensor], seen: Seen) -> None:
        places = module.places()
        self.spec, self._module, self._seen = spec, module, seen
        self._params = [(p, places.pop(id(p), (p, []))[1]) for p in params]
        self._others = [names for _, names in places.values()]
        self.found: Derivatives | None = None  # with None or anything else in the place of tensors

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return what the loss function returned, gradients and products, those that there are."""
        rest = list(tensors)

        def take(n: int) -> list[Tensor]:
            taken = rest[:n]
            del rest[:n]
            return taken

        spec, params = self.spec, []
        state: dict[str, Tensor] = {}
        for (p, names), own in zip(self._params, take(len(self._params)), strict=True):
            params.append(own.detach().requires_grad_() if names else p)
            state |= dict.fromkeys(names, params[-1])
        for names, other in zip(self._others, take(len(self._others)), strict=True):
            state |= dict.fromkeys(names, other)
        probes = [dict(zip(spec.due, take(len(spec.due)), strict=True)) for _ in range(spec.n_samples)]
        scale = take(1)[0] if spec.scaled else None
        # Each a leaf that requires grad if the batch's does.
        leaves = [t.detach().requires_grad_(wanted) for t, (*_, wanted) in zip(rest, spec.tensors, strict=True)]
        params += filter(_REQUIRES_GRAD, leaves)
        given = iter(leaves)
        batch = [c.value if isinstance(c, Constant) else next(given) for c in spec.constants]
        with self._seen.reading():
            d = spec.differentiate(
                lambda *batch: functional_call(self._module, state, batch, tie_weights=False),
                params,
                spec.structure.unflatten(batch),
                lambda numbers, sample: [probes[sample][i] for i in numbers],
                scale,
            )
        results, structure = flatten(d.result)
        template = [Tensor if isinstance(x, Tensor) else Constant(type(x), x) for x in results]
        present = [g if g is None else True for g in d.grads]
        self.found = Derivatives((template, structure), present, d.probed, [])  # type: ignore[arg-type]
        left = [(scope, key, *flatten(scope[key])) for scope, key in self._seen.written()]
        left = [each for each in left if any(isinstance(x, Tensor) for x in each[2])]
        self._left = [
            (scope, key, [Tensor if isinstance(x, Tensor) else Constant(type(x), x) for x in leaves], structure)
            for scope, key, leaves, structure in left
        ]
        return [
            *(x for x in results if isinstance(x, Tensor)),
            *(g for g in d.grads if g is not None),
            *(h for sample in d.products for h in sample),
            *(x.detach() for _, _, leaves, _ in left for x in leaves if isinstance(x, Tensor)),
        ]

    def unpack(self, outputs: Sequence[Tensor]) -> Derivatives:
        """Put the outputs in their places; the results are copies, since a captured graph overwrites its own."""
        rest = iter(outputs)
        template, structure = self.found.result
        result = structure.unflatten([x.value if isinstance(x, Constant) else next(rest).clone() for x in template])
        grads = [None if g is None else next(rest) for g in self.found.grads]
        n_samples = self.spec.n_samples if self.found.probed else 0
        products = [[next(rest) for _ in self.found.probed] for _ in range(n_samples)]
        for scope, key, template, structure in self._left:
            scope[key] = structure.unflatten(
                [x.value if isinstance(x, Constant) else next(rest).clone() for x in template]
            )
        return Derivatives(result, grads, self.found.probed, products)
