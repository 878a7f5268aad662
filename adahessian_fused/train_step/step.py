"""TrainStep: a training step as one call."""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import hvp, sharing
from ..checks import fits, warn
from ..fraction import flatten
from ..hessian_step import HessianStep, passing
from ..optimizer import AdaHessian
from .derivatives import Constant, Derivatives, LossModule, OfModel, StepSpec
from .graph import Graph, Memories
from .seen import CONSTANTS, Seen
from .surroundings import described, kept, modules_around, of_modules, outermost, settings, walk

logger = logging.getLogger("adahessian_fused")

MAX_GRAPHS = 8  # of one TrainStep
MAX_SURROUNDINGS = 16  # that are remembered, with what is in them
EAGER_BEFORE = 5  # steps of a further kind (a shorter last batch, say) before it gets a graph of its own


class TrainStep:
    r"""A training step as one call: forward pass, gradients, Hessian-vector product and update.

    ::

        train_step = TrainStep(model, loss_fn, optimizer)
        for inputs, targets in batches:
            loss = train_step(inputs, targets)
            scheduler.step()

    computes ``loss_fn(model(inputs), targets)`` and does what ``optimizer.step(closure)`` does with it, in a graph that
    is compiled (and on CUDA captured) once for steps with curvature and once for steps without. Any other loss is a
    function of the batch::

        train_step = TrainStep(lambda x, y, weight: loss_fn(model(x), y, weight) + penalty(model), optimizer)
        loss = train_step(x, y, weight)

    The update is the optimizer's own, so parameters, states, hyperparameters and hooks stay where they are: change the
    learning rate, save checkpoints and look at ``p.grad`` as ever. Autocast around the call applies to the forward
    pass. With ``AdaHessian(..., hessian_fraction=r)`` curvature is that of the first r of the batch, at 1 + 2r instead
    of 3 times the price of a first-order step; the two parts go through the model one after the other, so batch norm
    normalises, and updates its statistics, with each.

    A graph is made for each kind of step: which groups use curvature; shapes and dtypes in the batch, and what is no
    tensor in it; which parameters are trained; modules, their modes and hooks; autocast and PyTorch's other settings;
    and what the Python code of the loss and of the modules' ``forward`` looks at, also behind functions and methods of
    yours: attributes (a dropout rate), globals, closures and defaults, the environment, what is in lists, dicts (of up
    to 1,000 entries, or 10,000 constants), arrays and objects there. Floating-point numbers in a batch become tensors
    where the loss can do with them, and so do ints that change, so that a temperature that is lowered needs no further
    graph. The first step with and the first without curvature are compiled at once, further kinds (a shorter last
    batch) after a few steps of theirs; ``adahessian_fused``'s logger tells, all but the first as warnings. Above
    ``MAX_GRAPHS`` steps run eagerly, with a warning. Buffers that are written to, and tensors that ``forward`` leaves
    in attributes, lists and dicts, are as after an eager step; where it counts in a Python number, or reads what its
    last call has left, steps run eagerly, with a warning that names it. What no code names (random numbers of Python,
    files, the clock) is fixed when the graph is made: use ``compile=False, cuda_graph=False`` for such models.
    docs/troubleshooting.md lists it.

    Args:
        model: called as ``model(inputs)``; with ``*inputs`` or ``**inputs`` if they are a tuple or a mapping. Left out
            if the loss is a function of the batch.
        loss_fn: from outputs and targets to the mean loss; or, without ``model``, from a batch. It may return more
            than the loss: a tuple or list that begins with it, or a mapping with "loss".
        optimizer: :class:`~adahessian_fused.AdaHessian`.
        hessian_fraction: the optimizer's, whose option it is; None is the same.
        compile: compile the graph with TorchInductor; the first step takes minutes.
        cuda_graph: replay the graph as a CUDA graph; "auto" if the parameters are on a CUDA device.
        modules: what the loss uses, if it cannot be found from its code and from the optimizer's parameters.
        grad_scaler: scales the loss and takes the optimizer's step.

    Raises:
        TypeError: ``optimizer`` is not an AdaHessian, or ``loss_fn`` cannot be called or is a class, or does not take
            outputs and targets where there is a model.
        ValueError: an argument is out of its range, ``hessian_fraction`` is not the optimizer's, or ``optimizer`` does
            not differentiate twice (``hvp``).
        RuntimeError: from a call: the loss depends on no parameter of the optimizer; or, with ``cuda_graph=True``, the
            step cannot be captured.

    Warns:
        UserWarning: from a call: a graph cannot be made, and this kind of step runs eagerly from now on.

    Example:
        >>> import torch, adahessian_fused
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = adahessian_fused.AdaHessian(model.parameters(), lr=0.1)
        >>> step = adahessian_fused.TrainStep(model, torch.nn.functional.mse_loss, opt, compile=False)
        >>> step(torch.ones(8, 3), torch.ones(8, 1)).shape
        torch.Size([])
        >>> step = adahessian_fused.TrainStep(lambda x: (model(x).square().mean(), model(x)), opt, compile=False)
        >>> loss, outputs = step(torch.ones(8, 3))
    """

    def __init__(
        self,
        model: Any = None,
        loss_fn: Any = None,
        optimizer: Any = None,
        hessian_fraction: float | None = None,
        compile: bool = True,
        cuda_graph: bool | str = "auto",
        *,
        modules: Sequence[nn.Module] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if optimizer is None and (isinstance(loss_fn, Optimizer) or loss_fn is None):
            model, loss_fn, optimizer = None, model, loss_fn
        elif loss_fn is None:
            model, loss_fn = None, model
        if not isinstance(optimizer, AdaHessian):
            raise TypeError(f"optimizer is of type {type(optimizer).__name__}; expected adahessian_fused.AdaHessian")
        if not callable(loss_fn) or isinstance(loss_fn, type):
            raise TypeError(f"loss_fn is {loss_fn!r}; expected a function or a module, such as nn.MSELoss()")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(
                f"model is of type {type(model).__name__}; expected a torch.nn.Module, or TrainStep(loss_of, "
                "optimizer) for a function loss_of(*batch)"
            )
        if model is not None and not fits(loss_fn, 2):
            raise TypeError(
                f"loss_fn is of type {type(loss_fn).__name__}, which cannot be called with outputs and targets; "
                "expected TrainStep(model, loss_fn, optimizer), in this order, or for a loss_of(model, x, y) "
                "TrainStep(lambda x, y: loss_of(model, x, y), optimizer)"
            )
        if optimizer.param_groups[0]["hvp"] != "autograd":
            raise ValueError(f'optimizer has hvp={optimizer.param_groups[0]["hvp"]!r}; TrainStep is hvp="autograd"')
        if compile and optimizer.param_groups[0]["hvp_dtype"] == "tf32":
            raise ValueError(
                'optimizer has hvp_dtype="tf32", which cannot be switched on for a part of a compiled graph; expected '
                "hvp_dtype=torch.bfloat16, or TrainStep(..., compile=False)"
            )
        fraction = optimizer.param_groups[0]["hessian_fraction"]
        if hessian_fraction not in (None, fraction):
            raise ValueError(
                f"hessian_fraction={hessian_fraction!r}, but the optimizer's is {fraction!r}; expected "
                f"AdaHessian(..., hessian_fraction={hessian_fraction!r}), which TrainStep follows"
            )
        if compile not in (True, False):
            raise ValueError(f"compile={compile!r}; expected True or False")
        if cuda_graph not in (True, False, "auto"):
            raise ValueError(f'cuda_graph={cuda_graph!r}; expected True, False or "auto"')
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.compile, self.cuda_graph, self.grad_scaler = compile, cuda_graph, grad_scaler
        self._module = self._put_together(modules)
        self._graphs: dict[StepSpec, Graph | None] = {}  # None: it cannot be made
        self._seen: Counter[StepSpec] = Counter()
        self._numbers: dict[int, Any] = {}  # numbers among the leaves of a batch, as they were first
        self._as_constants = False  # the loss cannot do with tensors in their place
        self._seen_before: list[Seen] = []  # what Python code has looked at
        self._written: set[Any] = set()  # places that it writes to, and so no surroundings
        self._counts = False  # whether it does so for itself, as no graph can
        self._filled = False  # whether a step has run after which its caches are filled
        self._met: dict[int, Any] = {}  # surroundings by number
        self._failure, self._said = "", False

    def _put_together(self, modules: Sequence[nn.Module] | None) -> LossModule:
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.model is None:
            found = modules_around(self.loss_fn, params) if modules is None else modules
            return LossModule(self.loss_fn, outermost(found))
        # A compiled model cannot be differentiated twice; what it was made of can.
        model = getattr(self.model, "_orig_mod", self.model)
        rest = set(map(id, params)).difference(map(id, model.parameters()))
        found = modules_around(self.loss_fn, [p for p in params if id(p) in rest]) if modules is None else modules
        return LossModule(OfModel(model, self.loss_fn), outermost([model, *found]))

    @property
    def hessian_fraction(self) -> float:
        """The optimizer's."""
        return self.optimizer.param_groups[0]["hessian_fraction"]

    def __repr__(self) -> str:
        made = ["with" if spec.due else "without" for spec, graph in self._graphs.items() if graph is not None]
        graphs = ", ".join(f"{count} {which} curvature" for which, count in Counter(made).items())
        name = getattr(self.loss_fn, "__qualname__", type(self.loss_fn).__name__)
        model = "" if self.model is None else f"{type(self.model).__name__}, "
        return f"TrainStep({model}{name}, {type(self.optimizer).__name__}; graphs: {graphs or 'none'})"

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the graphs, which are made anew."""
        empty: dict[str, Any] = {"_graphs": {}, "_seen": Counter(), "_met": {}, "_written": set(), "_seen_before": []}
        return self.__dict__ | empty

    def __call__(self, *batch: Any) -> Any:
        """Take a step; returns the loss before it, detached, and whatever the loss function returned with it."""
        return self._step(batch, graphs=True)

    def eager(self, *batch: Any) -> Any:
        """Take the same step without a graph, for debugging."""
        return self._step(batch, graphs=False)

    def _step(self, batch: tuple[Any, ...], *, graphs: bool) -> Any:
        if self.model is not None and len(batch) != 2:
            raise TypeError(
                f"TrainStep(model, loss_fn, opt) was called with a batch of {len(batch)}; expected inputs and targets, "
                "or TrainStep(loss_of, opt) with a function that computes the loss of whatever it is called with"
            )
        opt = self.optimizer
        opt.zero_grad()
        trained = opt.layout.trained()
        if not trained:
            raise RuntimeError("no parameter of the optimizer requires grad")
        seen = self._look()
        params = [*trained, *self._others(trained, seen, batch)]
        steps = [opt.coming_step, *sharing.joining([opt.coming_step], params)]
        place = {id(p): i for i, p in enumerate(p for step in steps for p in step.layout.trained())}
        params.sort(key=lambda p: place.get(id(p), len(place)))  # as each optimizer has its own
        scale = None
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            scale = self.grad_scaler.scale(torch.ones((), device=params[0].device))
        capture = params[0].is_cuda if self.cuda_graph == "auto" else bool(self.cuda_graph)
        graphs = graphs and (capture or self.compile) and not self._counts
        spec, tensors = self._spec(steps, params, batch, scaled=scale is not None)
        graph, probes = None, _Probes(steps, params)
        if graphs:
            graph, tensors = self._graph(steps, params, batch, spec, seen, tensors, probes, scale, capture=capture)
        given = [t for t in tensors if t.requires_grad]
        if graph is not None:
            found = graph(params, probes, scale, tensors)
        else:
            known = set(map(id, params))  # and what was computed from them before the step
            given = [leaf for leaf in dict.fromkeys(hvp.explore(given).leaves) if id(leaf) not in known]
            found = spec.differentiate(self._module, [*params, *given], batch, probes, scale)
        own, others = found.grads[: len(trained)], found.grads[len(trained) :]
        if opt.coming_step.ranks is None and all(grad is None for grad in own):  # of which another rank may have some
            shapes = ", ".join(str(tuple(p.shape)) for p in trained[:3]) + (", ..." if trained[3:] else "")
            raise RuntimeError(
                f"parameters of shape {shapes} are the optimizer's, but not in model or "
                "loss_fn, and nothing would be trained; expected an optimizer of parameters that the loss depends on"
            )
        with torch.no_grad(), passing([step for step in steps[1:] if step.is_due]):
            others = [g if g is None else g.clone() for g in others]  # of a captured graph, which writes to its own
            opt.coming_step.take([*params, *given], [*own, *others], *probes.of(0, found))
            for number, step in enumerate(steps[1:], start=1):
                step.take_products(*probes.of(number, found))
                step.finish_average(None)
        if scale is None:
            opt.step()
        else:
            self.grad_scaler.step(opt)
            self.grad_scaler.update()
        return found.result

    def _others(self, trained: Sequence[Tensor], seen: Seen, batch: Any) -> list[Tensor]:
        """Return what else the loss may look at that requires grad: parameters of other optimizers, and leaves."""
        modules = walk(self._module, *seen.modules)
        found = [*(p for module in modules for p in module._parameters.values() if p is not None), *seen.leaves]
        known = {id(leaf) for leaf in (*trained, *flatten(batch)[0])}
        return [p for number, p in {id(p): p for p in found}.items() if p.requires_grad and number not in known]

    def _spec(
        self, steps: Sequence[HessianStep], params: Sequence[Tensor], batch: Any, *, scaled: bool
    ) -> tuple[StepSpec, list[Tensor]]:
        """Return what the coming step computes, its surroundings left out, and the tensors of its batch."""
        device, due = params[0].device, {id(p) for step in steps for p in step.due_params()}
        leaves, structure = flatten(batch)
        constants = tuple(self._constant(i, leaf) for i, leaf in enumerate(leaves))
        tensors = _tensors(leaves, constants, device)
        spec = StepSpec(
            due=tuple(i for i, p in enumerate(params) if id(p) in due),
            n_samples=self.optimizer.param_groups[0]["n_samples"],
            hvp_dtype=self.optimizer.param_groups[0]["hvp_dtype"],
            fraction=self.hessian_fraction,
            autocast=(
                *(device.type, torch.is_autocast_enabled(device.type)),
                torch.get_autocast_dtype(device.type),
            ),
            scaled=scaled,
            structure=structure,
            constants=constants,
            tensors=tuple(map(described, tensors)),
        )
        return spec, tensors

    def _constant(self, i: int, leaf: Any) -> Any:
        """Return what leaf number i of the batch is to a graph: a tensor, a number given as one, or a constant."""
        if isinstance(leaf, Tensor):
            return Tensor
        if type(leaf) not in (int, float) or self._as_constants:
            return Constant(type(leaf), leaf)
        changed = self._numbers.setdefault(i, leaf) != leaf
        return type(leaf) if changed or type(leaf) is float else Constant(int, leaf)

    # ---- graphs ------------------------------------------------------------------------------------------------------

    def _look(self) -> Seen:
        """Return what Python code looks at, as it has been met before if nothing of it has changed."""
        for seen in reversed(self._seen_before):
            if seen.holds():
                return seen
        if len(self._seen_before) == MAX_GRAPHS and self.compile:
            what = next((place.label for place in self._seen_before[-1].changed()), "what the loss looks at")
            warn(
                f"{what} has changed for the {MAX_GRAPHS}th time, and a graph of TrainStep holds it fixed: steps run "
                "eagerly first, and then wait for graphs; expected what changes often in the batch, as in step(x, y, "
                "number), or in a tensor that is written to"
            )
        seen = Seen([*self._module.parts, self.loss_fn])
        seen.leave_out(self._written)
        self._seen_before = [*self._seen_before[1 - MAX_SURROUNDINGS :], seen]
        return seen

    def _surroundings(self, params: Sequence[Tensor], seen: Seen) -> int:
        """Return the number of the present surroundings among those that have been met."""
        modules = walk(self._module, *seen.modules)
        now = (seen, settings(), list(map(id, params)), of_modules(modules, params))
        for number, met in reversed(self._met.items()):
            if met == now:
                return number
        number = max(self._met, default=0) + 1
        self._met[number] = now
        if len(self._met) > MAX_SURROUNDINGS:
            del self._met[min(self._met)]
        return number

    def _graph(
        self,
        steps: Sequence[HessianStep],
        params: Sequence[Tensor],
        batch: Any,
        spec: StepSpec,
        seen: Seen,
        tensors: list[Tensor],
        probes: _Probes,
        scale: Tensor | None,
        *,
        capture: bool,
    ) -> tuple[Graph | None, list[Tensor]]:
        """Return the graph for a step, None if it is to run eagerly, and the tensors of the batch for it."""
        if not self._can_be_in_a_graph(spec, batch):
            return None, tensors
        spec = replace(spec, surroundings=self._surroundings(params, seen))
        if spec in self._graphs:
            graph = self._graphs[spec]
            if graph is None or graph.fits(params):
                return graph, tensors
        self._seen[spec] += 1
        first_of_its_order = not any(bool(k.due) == bool(spec.due) for k in self._graphs)
        if not first_of_its_order and self._seen[spec] <= EAGER_BEFORE and spec not in self._graphs:
            return None, tensors
        if len(self._graphs) >= MAX_GRAPHS and spec not in self._graphs:
            if self._seen[spec] == EAGER_BEFORE + 1:
                warn(
                    f"TrainStep has made {MAX_GRAPHS} graphs, for as many kinds of steps (shapes of the batch, modes "
                    "of modules, groups that are due, numbers in Python); steps of further kinds run eagerly",
                )
            return None, tensors
        graph = self._make(params, spec, seen, tensors, probes, scale, capture=capture)
        if graph is None and not self._failure:
            return None, tensors
        if graph is None and not self._as_constants and {int, float}.intersection(spec.constants):
            # Some of the loss is nothing for tensors: numbers are a part of the kind from now on.
            self._as_constants = True
            self._graphs = {k: g for k, g in self._graphs.items() if not {int, float}.intersection(k.constants)}
            spec, tensors = self._spec(steps, params, batch, scaled=scale is not None)
            return self._graph(steps, params, batch, spec, seen, tensors, probes, scale, capture=capture)
        if graph is None:
            warn(
                f"TrainStep runs this kind of step eagerly, because it cannot be "
                f"{'captured as a CUDA graph' if capture else 'compiled'}: {self._failure}",
            )
        self._graphs[spec] = graph
        return graph, tensors

    def _check_written(self, seen: Seen, held: set[int] | None) -> None:
        """Raise if Python code has written what the coming steps may look at, and a graph would not have."""
        changed = seen.changed()
        if not self._filled and (seen.has_created() or any(place.is_new() for place in changed)):
            self._filled = True
            raise _CachesError
        missed = [place for place in changed if place.is_missed(held)]
        self._written |= {place.key for place in changed}
        for each in self._seen_before:
            each.leave_out(self._written)
        if missed:
            self._counts = True
            raise RuntimeError(
                f"the loss writes to {missed[0].label}, and a graph would hold it fixed; expected a buffer that is "
                "written to, as in self.count.add_(1) or self.state.copy_(...), or what the loss returns with it"
            )

    def _can_be_in_a_graph(self, spec: StepSpec, batch: Any) -> bool:
        """Tell whether steps with such a batch are alike; warn once if not."""
        others = [c.kind.__name__ for c in spec.constants if isinstance(c, Constant) and not _is_constant(c.value)]
        derived = any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in flatten(batch)[0])
        if not (others or derived):
            return True
        if not self._said:
            self._said = True
            what = f"a {others[0]}" if others else "a tensor that was computed with gradients"
            warn(
                f"TrainStep runs eagerly, because the batch has {what}; expected tensors, numbers and strings, in "
                "tuples, lists, mappings and dataclasses, and gradients to begin in the loss function",
            )
        return False

    def _make(
        self,
        params: Sequence[Tensor],
        spec: StepSpec,
        seen: Seen,
        tensors: Sequence[Tensor],
        probes: _Probes,
        scale: Tensor | None,
        *,
        capture: bool,
    ) -> Graph | None:
        """Make a graph; return None if there cannot be one, and then ``_failure`` says why, or is empty if not yet."""
        begin, order = time.perf_counter(), "with" if spec.due else "without"
        # In mid-training it is unexpected, and heard without any logging set up.
        level = logging.WARNING if self._graphs else logging.INFO
        way = "the compiler may take minutes" if self.compile else "a capture takes some steps' time"
        logger.log(level, "TrainStep makes a graph for steps %s curvature; %s", order, way)
        try:
            with kept(seen):
                # Graphs never run at once, and what one leaves is used before the next one runs: they share memory.
                pool = next((g.pool for g in self._graphs.values() if g is not None and g.pool is not None), None)
                how: dict[str, Any] = {"compiled": self.compile, "capture": capture, "pool": pool}
                check = functools.partial(self._check_written, seen)
                graph = Graph(self._module, spec, params, probes, scale, tensors, seen, check, **how)
        except _CachesError:
            self._failure = ""
            return None
        except Exception as error:  # anything may go wrong in a compiler
            lines = str(error).strip().splitlines() or [""]
            self._failure = f"{type(error).__name__}: {lines[0]}"
            if self.cuda_graph is True and (self._as_constants or not {int, float}.intersection(spec.constants)):
                raise RuntimeError(f"TrainStep cannot make a CUDA graph of this step: {error}") from error
            return None
        logger.info("TrainStep made a graph for steps %s curvature in %.1f s", order, time.perf_counter() - begin)
        return graph


class _CachesError(Exception):
    """Python code has filled caches, which it will find in the next step."""


class _Probes:
    """Draws the probes of the coming step, of all optimizers that share its product."""

    def __init__(self, steps: Sequence[HessianStep], params: Sequence[Tensor]) -> None:
        sharing.place([step for step in steps if step.is_due])
        self._steps, self._params = steps, params
        owner = {id(p): number for number, step in enumerate(steps) for p in step.due_params()}
        self._owners = [owner.get(id(p)) for p in params]
        self._drawn: list[list[Tensor]] = []

    def __call__(self, numbers: Sequence[int], sample: int, memory: Memories | None = None) -> list[Tensor]:
        """Draw z of the parameters with these numbers, and note it as this step's."""
        self._drawn.append(self.draw(numbers, sample, memory))
        return self._drawn[-1]

    @torch.no_grad()
    def draw(self, numbers: Sequence[int], sample: int, memory: Memories | None) -> list[Tensor]:
        """Draw it; ``memory`` has :func:`adahessian_fused.curvature.draw_probe`'s of each optimizer."""
        z: dict[int, Tensor] = {}
        for number, step in enumerate(self._steps):
            own = [i for i in numbers if self._owners[i] == number]
            place = None if memory is None else memory.setdefault(number, {})
            z |= zip(own, step.draw([self._params[i] for i in own], sample, place) if own else (), strict=True)
        return [z[i] for i in numbers]

    def of(self, number: int, found: Derivatives) -> tuple[list[Tensor], list[list[Tensor]], list[list[Tensor]]]:
        """Return the parameters of an optimizer that have products, their probes and these products."""
        own = [k for k, i in enumerate(found.probed) if self._owners[i] == number]
        return (
            [self._params[found.probed[k]] for k in own],
            [[z[k] for k in own] for z in self._drawn],
            [[h[k] for k in own] for h in found.products],
        )


def _is_constant(value: Any) -> bool:
    return type(value) in CONSTANTS or isinstance(value, (Enum, type))


def _tensors(leaves: Sequence[Any], constants: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Return the tensors of a batch, and the numbers that are given as tensors."""
    dtypes = {float: torch.float64, int: torch.int64}
    return [
        leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=dtypes[c], device=device)
        for leaf, c in zip(leaves, constants, strict=True)
        if not isinstance(c, Constant)
    ]
