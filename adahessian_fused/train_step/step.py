"""TrainStep: a training step as one call."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import hvp
from ..curvature import draw_probe
from ..optimizer import AdaHessian
from .compiled import Compiled
from .cuda_graph import Captured
from .derivatives import Derivatives, Flat, Kind, Whole

logger = logging.getLogger("adahessian_fused")

MAX_GRAPHS = 8  # of one TrainStep
EAGER_BEFORE = 5  # steps of a further kind (a shorter last batch, say) before it gets a graph of its own


class TrainStep:
    r"""A training step as one call: forward pass, gradients, Hessian-vector product and update.

    ::

        train_step = TrainStep(model, loss_fn, optimizer)
        for inputs, targets in batches:
            loss = train_step(inputs, targets)
            scheduler.step()

    computes ``loss_fn(model(inputs), targets)`` and does what ``optimizer.step(closure)`` does with it, in a graph that
    is compiled (and on CUDA captured) once for steps with curvature and once for steps without. The update is the
    optimizer's own, so parameters, states, hyperparameters and hooks stay where they are: change the learning rate,
    save checkpoints and look at ``p.grad`` as ever. Autocast around the call applies to the forward pass.

    A graph is made for each kind of step: which groups use curvature, shapes and dtypes of the batch and of the
    parameters, training or eval mode of each module, autocast. The first step with and the first without curvature are
    compiled at once, further kinds (a shorter last batch) after a few steps of theirs; above ``MAX_GRAPHS`` steps run
    eagerly, with a warning. What else the model's Python code decides on, such as a dropout rate that is lowered during
    training, is fixed when the graph is made: use ``compile=False, cuda_graph=False`` for such models.

    Args:
        model: called as ``model(inputs)``; with ``*inputs`` or ``**inputs`` if they are a tuple or a dict.
        loss_fn: from outputs and targets to the mean loss.
        optimizer: :class:`~adahessian_fused.AdaHessian` over parameters of the model (or of ``loss_fn``).
        hessian_fraction: r in (0, 1]: curvature from the first r of the batch, at 1 + 2r instead of 3 times the price
            of a first-order step. The two parts of the batch go through the model one after the other, so batch norm
            normalises, and updates its statistics, with each.
        compile: compile the graph with TorchInductor; the first step takes minutes.
        cuda_graph: replay the graph as a CUDA graph; "auto" if the model is on a CUDA device.
        grad_scaler: scales the loss and takes the optimizer's step.

    Raises:
        TypeError: ``optimizer`` is not an AdaHessian.
        ValueError: an argument is out of its range, or ``optimizer`` does not differentiate twice (``hvp``).
        RuntimeError: from a call, with ``cuda_graph=True``: the step cannot be captured.

    Warns:
        UserWarning: from a call: a graph cannot be made, and this kind of step runs eagerly from now on.

    Example:
        >>> import torch, adahessian_fused
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = adahessian_fused.AdaHessian(model.parameters(), lr=0.1)
        >>> step = adahessian_fused.TrainStep(model, torch.nn.functional.mse_loss, opt, compile=False)
        >>> step(torch.ones(8, 3), torch.ones(8, 1)).shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        optimizer: AdaHessian,
        hessian_fraction: float = 1.0,
        compile: bool = True,
        cuda_graph: bool | str = "auto",
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(optimizer, AdaHessian):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; expected adahessian_fused.AdaHessian")
        if optimizer.param_groups[0]["hvp"] != "autograd":
            raise ValueError(f'optimizer has hvp={optimizer.param_groups[0]["hvp"]!r}; TrainStep is hvp="autograd"')
        if compile and optimizer.param_groups[0]["hvp_dtype"] == "tf32":
            raise ValueError(
                'optimizer has hvp_dtype="tf32", which cannot be switched on for a part of a compiled graph; expected '
                "hvp_dtype=torch.bfloat16, or TrainStep(..., compile=False)"
            )
        if not 0 < hessian_fraction <= 1:
            raise ValueError(f"hessian_fraction={hessian_fraction}; expected a number in (0, 1]")
        if cuda_graph not in (True, False, "auto"):
            raise ValueError(f'cuda_graph={cuda_graph!r}; expected True, False or "auto"')
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.hessian_fraction, self.compile, self.cuda_graph = hessian_fraction, compile, cuda_graph
        self.grad_scaler = grad_scaler
        # A compiled model cannot be differentiated twice; what it was made of can.
        self._whole = Whole(getattr(model, "_orig_mod", model), loss_fn)
        self._graphs: dict[Kind, _Graph | None] = {}  # None: it cannot be made
        self._seen: Counter[Kind] = Counter()

    def __call__(self, inputs: Any, targets: Any) -> Tensor:
        """Take a step; returns the loss before it, detached."""
        opt = self.optimizer
        opt.zero_grad()
        params = [(n, p) for n, group in enumerate(opt.param_groups) for p in group["params"] if p.requires_grad]
        if not params:
            raise RuntimeError("no parameter of the optimizer requires grad")
        scale = None
        if self.grad_scaler is not None and self.grad_scaler.is_enabled():
            scale = self.grad_scaler.scale(torch.ones((), device=params[0][1].device))
        kind, tensors = self._kind(params, (inputs, targets), scale is not None)
        graph = self._graph(kind, params, scale, tensors)
        draw = _Probes(opt, params)
        if graph is None:
            loss_of, leaves = self._whole, [p for _, p in params]
            found = kind.differentiate(loss_of, leaves, (inputs, targets), draw, scale)
        else:
            found = graph(params, draw, scale, tensors)
        with torch.no_grad():
            self._hand_over(params, found, draw)
        if scale is None:
            opt.step()
        else:
            self.grad_scaler.step(opt)
            self.grad_scaler.update()
        return found.loss

    def _kind(self, params: Sequence[tuple[int, Tensor]], batch: Any, scaled: bool) -> tuple[Kind, list[Tensor]]:
        """What kind of step is coming, and the tensors of its batch."""
        due, device = self.optimizer._due(), params[0][1].device.type
        leaves, structure = pytree.tree_flatten(batch)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        described = [*tensors, *(p for _, p in params)]
        kind = Kind(
            due=tuple(i for i, (n, _) in enumerate(params) if due[n]),
            n_samples=self.optimizer.param_groups[0]["n_samples"],
            hvp_dtype=self.optimizer.param_groups[0]["hvp_dtype"],
            fraction=self.hessian_fraction,
            autocast=(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
            scaled=scaled,
            training=tuple(module.training for module in self._whole.modules()),
            structure=structure,
            constants=tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves),
            tensors=tuple((t.shape, t.stride(), t.dtype, t.device) for t in described),
        )
        return kind, tensors

    # ---- graphs ------------------------------------------------------------------------------------------------------

    def _graph(
        self, kind: Kind, params: Sequence[tuple[int, Tensor]], scale: Tensor | None, tensors: Sequence[Tensor]
    ) -> _Graph | None:
        """The graph for a kind of step; None if it is to run eagerly."""
        on_cuda = params[0][1].is_cuda
        capture = on_cuda if self.cuda_graph == "auto" else self.cuda_graph
        if not (capture or self.compile):
            return None
        if kind in self._graphs:
            graph = self._graphs[kind]
            if graph is None or graph.fits(params):
                return graph
        self._seen[kind] += 1
        first_of_its_order = not any(bool(k.due) == bool(kind.due) for k in self._graphs)
        if not first_of_its_order and self._seen[kind] <= EAGER_BEFORE and kind not in self._graphs:
            return None
        if len(self._graphs) >= MAX_GRAPHS and kind not in self._graphs:
            if self._seen[kind] == EAGER_BEFORE + 1:
                warnings.warn(
                    f"TrainStep has made {MAX_GRAPHS} graphs, for as many kinds of steps (shapes of the batch, modes "
                    "of modules, groups that are due); steps of further kinds run eagerly",
                    stacklevel=4,
                )
            return None
        self._graphs[kind] = self._make(kind, params, scale, tensors, capture=bool(capture))
        return self._graphs[kind]

    def _make(
        self,
        kind: Kind,
        params: Sequence[tuple[int, Tensor]],
        scale: Tensor | None,
        tensors: Sequence[Tensor],
        *,
        capture: bool,
    ) -> _Graph | None:
        begin = time.perf_counter()
        try:
            graph = _Graph(self._whole, kind, params, scale, tensors, compiled=self.compile, capture=capture)
        except Exception as error:  # anything may go wrong in a compiler
            if self.cuda_graph is True:
                raise RuntimeError(f"TrainStep cannot make a CUDA graph of this step: {error}") from error
            lines = str(error).strip().splitlines() or [""]
            warnings.warn(
                f"TrainStep runs this kind of step eagerly, because it cannot be "
                f"{'captured as a CUDA graph' if capture else 'compiled'}: {type(error).__name__}: {lines[0]}",
                stacklevel=5,
            )
            return None
        order = "with" if kind.due else "without"
        logger.info("TrainStep made a graph for steps %s curvature in %.1f s", order, time.perf_counter() - begin)
        return graph

    # ---- the optimizer -----------------------------------------------------------------------------------------------

    def _hand_over(self, params: Sequence[tuple[int, Tensor]], found: Derivatives, draw: _Probes) -> None:
        """Gradients to ``p.grad`` and products to the optimizer, as its own backward() leaves them."""
        opt = self.optimizer
        average = opt._start_average(found.grads)
        hvp.accumulate_grads([p for _, p in params], found.grads)
        opt._finish_average(average)
        if not opt.needs_hessian or not (found.probed or average):
            return
        curvature = opt._gathered()
        entries = opt._ensure([params[i][1] for i in found.probed])
        for sample, products in enumerate(found.products):
            curvature.take(
                dict(zip(entries, products, strict=True)),
                probe=opt.param_groups[0]["probe"],
                n_samples=opt.param_groups[0]["n_samples"],
                sample=sample,
                z=draw.drawn[sample],
            )
        opt._curvature = curvature


class _Probes:
    """Draws the probes of the coming step."""

    def __init__(self, optimizer: AdaHessian, params: Sequence[tuple[int, Tensor]]) -> None:
        self._optimizer, self._params = optimizer, params
        self.drawn: list[dict] = []

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int], sample: int) -> list[Tensor]:
        """Z of the parameters with these numbers."""
        opt = self._optimizer
        entries = opt._ensure([self._params[i][1] for i in numbers])
        options = opt.param_groups[0]
        z = draw_probe(entries, opt._tools, probe=options["probe"], seed=opt._probe_seed, sample=sample)
        self.drawn.append(z)
        return [z[entry] for entry in entries]


class _Graph:
    """A compiled or captured kind of step."""

    def __init__(
        self,
        whole: Whole,
        kind: Kind,
        params: Sequence[tuple[int, Tensor]],
        scale: Tensor | None,
        tensors: Sequence[Tensor],
        *,
        compiled: bool,
        capture: bool,
    ) -> None:
        state = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
        name_of = {id(t): name for name, t in state.items()}
        missing = [tuple(p.shape) for _, p in params if id(p) not in name_of]
        if missing:
            raise RuntimeError(f"parameters of shape {missing[0]} are the optimizer's, but not in model or loss_fn")
        self._whole = whole
        names = [name_of[id(p)] for _, p in params]
        self._others = [name for name in state if name not in names]
        self._addresses: list[int] | None = None
        self._flat = Flat(kind, whole, names, self._others)
        inputs = self._inputs(params, [[p for _, p in params]] * kind.n_samples, scale, tensors)
        self._run: Compiled | Flat | Captured = Compiled(self._flat, inputs) if compiled else self._flat
        if capture:
            n_fixed = len(names) + len(self._others)
            self._run = Captured(self._run, inputs, n_fixed)
            self._addresses = [t.data_ptr() for t in inputs[:n_fixed]]
            self._n_fixed = n_fixed

    def _inputs(
        self,
        params: Sequence[tuple[int, Tensor]],
        probes: Sequence[Sequence[Tensor]],
        scale: Tensor | None,
        tensors: Sequence[Tensor],
    ) -> list[Tensor]:
        """The flat function's inputs; ``probes``: for each sample one tensor a parameter."""
        state = {**dict(self._whole.named_parameters()), **dict(self._whole.named_buffers())}
        due = self._flat.kind.due
        return [
            *(p.detach() for _, p in params),
            *(state[name].detach() for name in self._others),
            *(sample[i].detach() for sample in probes for i in due),
            *([] if scale is None else [scale]),
            *tensors,
        ]

    def fits(self, params: Sequence[tuple[int, Tensor]]) -> bool:
        """Whether everything a CUDA graph has the address of is still there."""
        if self._addresses is None:
            return True
        now = self._inputs(params, [], None, [])
        return [t.data_ptr() for t in now] == self._addresses

    def __call__(
        self, params: Sequence[tuple[int, Tensor]], draw: _Probes, scale: Tensor | None, tensors: Sequence[Tensor]
    ) -> Derivatives:
        probed = self._flat.found.probed
        probes = []
        for sample in range(self._flat.kind.n_samples if probed else 0):
            of_parameter = [p for _, p in params]  # any tensor will do where there is no product
            for i, z in zip(probed, draw(probed, sample), strict=True):
                of_parameter[i] = z
            probes.append(of_parameter)
        if not probed:
            probes = [[p for _, p in params]] * self._flat.kind.n_samples
        return self._flat.unpack(self._run(*self._inputs(params, probes, scale, tensors)))
