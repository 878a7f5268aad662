"""Which way to compute Hessian-vector products suits a model: accuracy, cost and what fails, measured on one batch."""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from .checks import CHOICES, check_count
from .hvp.errors import LACKS, operator_in
from .hvp.finite_difference import epsilon_of
from .hvp.kinks import kinks
from .optimizer import AdaHessian

TRUSTED = 0.1
"""Relative error of Hz up to which a strategy is trusted. The noise of a single probe is many times as large."""

SAMPLES = 3
DISTANCES = {torch.float64: (2.0**-16, 2.0**-20, 2.0**-24), torch.float32: (2.0**-9, 2.0**-11, 2.0**-13)}
"""Of the gradients whose differences Hz has to agree with, by the precision they are computed in."""

AGREES = 0.01
"""Relative error of Hz, against these differences, above which something is constant for autograd alone."""

DIFFERENCE = "finite_difference"
LossFn = Callable[..., Tensor]

LOWER = {"autograd, bfloat16": torch.bfloat16, "autograd, tf32": "tf32"}
"""Double backward with ``hvp_dtype``, of float32 models."""


@dataclass(frozen=True)
class StrategyCheck:
    """How one strategy did.

    Attributes:
        strategy: value of ``AdaHessian(hvp=...)``, with that of ``hvp_dtype`` behind it.
        product_error: largest relative error |Hz - exact| / |exact| of three probes; None if it failed.
        gradient_error: largest relative error of the gradients that came with them.
        time: duration of a gradient with curvature, in first-order gradients.
        memory: peak of allocated memory above what is held anyway, in that of a first-order gradient; None on a CPU.
        failure: the error, if there was one.
        operator: the operator it is about, if torch names one.
        pays: False for a lower precision that is no faster here than the model's own.
        kinks: with finite differences, operators at which the gradient jumps, or may jump, which one batch need not
            show; and "fd_epsilon" if a larger distance gives another Hz.
        along_z: that of :class:`HvpCheck`.
    """

    strategy: str
    product_error: float | None = None
    gradient_error: float | None = None
    time: float | None = None
    memory: float | None = None
    failure: str | None = None
    operator: str | None = None
    pays: bool = True
    kinks: tuple[str, ...] = ()
    along_z: float | None = None

    @property
    def trusted(self) -> bool:
        """Whether it works, and Hz is right to a tenth, on more than this batch as far as can be told."""
        right = self.product_error is not None and self.product_error <= TRUSTED
        return right and not self.kinks and not self._doubted

    @property
    def _doubted(self) -> bool:
        return self.along_z is not None and self.along_z > AGREES

    @property
    def verdict(self) -> str:
        """The result in words."""
        return "".join(self._words)

    @property
    def _words(self) -> tuple[str, str]:
        """The result in a few words, and the rest of the sentence."""
        if self.failure is not None:
            if self.operator is not None:
                return "fails", f": {self.operator} {LACKS[self.strategy.split(',')[0]]}"
            return "fails", f": {(self.failure or 'RuntimeError').splitlines()[0]}"
        if self._doubted:
            what = "double backward" if self.strategy == DIFFERENCE else "Hz"
            return f"{what} is off by {self.along_z:.1%}", f" from the change of g along z {_DOUBTS}"
        if self.product_error is None or self.product_error > TRUSTED:
            return "WRONG for this model", ""
        if self.kinks:
            return f"cannot tell: {', '.join(self.kinks)}", ""
        return "can be trusted" if self.pays else "can be trusted, no gain", ""


@dataclass(frozen=True)
class HvpCheck:
    """What :func:`check_hvp` found.

    Attributes:
        reference: what the errors are relative to.
        strategies: a check for each strategy.
        seconds: duration of a first-order gradient.
        along_z: relative error of the reference, where that is a double backward, against differences of gradients
            along a probe; None where these do not agree with one another, as at a kink.
    """

    reference: str
    strategies: tuple[StrategyCheck, ...]
    seconds: float
    along_z: float | None = None

    def __getitem__(self, strategy: str) -> StrategyCheck:
        """Return the check of one strategy."""
        return next(check for check in self.strategies if check.strategy == strategy)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table, as text."""

        def number(value: float | None, form: str) -> str:
            return "-" if value is None else format(value, form)

        return [
            (
                check.strategy,
                number(check.product_error, ".1e"),
                number(check.gradient_error, ".1e"),
                number(check.time, ".2f"),
                number(check.memory, ".2f"),
                check._words[0],
            )
            for check in self.strategies
        ]

    def show(self) -> None:
        """Print the table, and below it why what fails does."""
        rows = [_COLUMNS, *self.rows()]
        widths = [2 + max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("".join(map(str.ljust, row, widths)).rstrip())
        doubts = f" {_DOUBTS}" if self.along_z is not None and self.along_z > AGREES else ""
        print(
            f"Errors of Hz and g relative to {self.reference}; time and memory of g and Hz relative to "
            f"those of g alone, which takes {self.seconds * 1e3:.3g} ms. Differences of g along z: "
            + ("cannot tell." if self.along_z is None else f"Hz is off by {self.along_z:.1e}{doubts}.")
        )
        for check in self.strategies:
            if check.failure is not None:
                print(f"{check.strategy} {check.verdict.rstrip('.')}.")


_COLUMNS = ("hvp", "Hz", "g", "time", "memory", "verdict")
_DOUBTS = "(detach, rounding, a Function?)"


def check_hvp(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Sequence[Any],
    *,
    fd_epsilon: float | None = None,
    repeats: int = 3,
    show: bool = True,
) -> HvpCheck:
    """Compare the ways to compute Hessian-vector products on a model and batch of your own.

    Every strategy runs on a copy of the model, so parameters, gradients and buffers stay as they are, and so does the
    state of torch's random numbers. Exact is double backward of a copy in float64, with attention in plain operators.
    Whether finite differences cross a kink (ReLU, max pooling) on one batch is a matter of luck: where the graph of the
    loss has any, or functions of somebody's own, or another distance gives another Hz, the verdict is "cannot tell".
    Nor is exact believed unseen: differences of gradients along z, at several distances, have to give the same Hz. They
    do not where gradients depend on what autograd takes for constant, be it meant (a target after ``detach()``) or not
    (a Function that hides numbers). Where double backward fails, central differences in float64 take its place: right
    for smooth models only. Where random numbers (dropout on a GPU) come out differently in float64, the copy keeps the
    model's own precision.

    Args:
        model: the model, in the mode it is trained in.
        loss_fn: computes the loss as ``loss_fn(model, *batch)``, with the model it is given.
        batch: its other arguments.
        fd_epsilon: as for :class:`~adahessian_fused.AdaHessian`.
        repeats: timed runs of each strategy, of which the median counts.
        show: print the table.

    Returns:
        Errors, costs and failures.

    Raises:
        TypeError: the model is no module, the batch no sequence, what ``loss_fn`` returns no tensor, or it cannot be
            called like that.
        ValueError: no parameter of the model requires a gradient, the loss depends on none, or is not one number.

    Example:
        >>> import torch, adahessian_fused
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> x, y = torch.randn(16, 3), torch.randn(16, 1)
        >>> result = adahessian_fused.check_hvp(model, lambda m, x, y: (m(x) - y).square().mean(), (x, y), show=False)
        >>> result["finite_difference"].trusted
        True
    """
    _check_arguments(model, batch)
    check_count("repeats", repeats)
    with _random_numbers_kept():
        runs = {name: _Run(model, loss_fn, batch, name, fd_epsilon) for name in _names(model)}
        reference, exact, precise = _exact(model, loss_fn, batch)
        along_z = _along_z(precise, exact)
        plain = _Run(model, loss_fn, batch, "first order", fd_epsilon)
        checks: list[StrategyCheck] = []
        seconds: dict[str, list[float]] = {name: [] for name in [*runs, plain.name]}
        memory: dict[str, int] = {}
        errors = {name: run.errors(exact) for name, run in runs.items()}
        kinked = _kinks(model, loss_fn, batch, fd_epsilon, exact)
        working = [plain, *(run for name, run in runs.items() if isinstance(errors[name], tuple))]
        for _ in range(repeats):
            for run in working:  # in turn, so that a busy machine slows down all of them
                elapsed, memory[run.name] = run.cost()
                seconds[run.name].append(elapsed)
    base = statistics.median(seconds[plain.name])
    for name, error in errors.items():
        if isinstance(error, RuntimeError):
            message = str(error.__cause__ or error)
            checks.append(StrategyCheck(name, failure=message, operator=operator_in(message)))
            continue
        used = memory[name] / memory[plain.name] if memory[plain.name] else None
        took = statistics.median(seconds[name])
        pays = name not in LOWER or took < statistics.median(seconds["autograd"])
        crossed = kinked if name == DIFFERENCE else ()
        checks.append(StrategyCheck(name, *error, took / base, used, pays=pays, kinks=crossed, along_z=along_z))
    result = HvpCheck(reference, tuple(checks), base, along_z)
    if show:
        result.show()
    return result


def check_along_z(model: nn.Module, loss_fn: LossFn, batch: Sequence[Any]) -> float | None:
    """Compare Hz with the change of the gradient along z, in float64 and at several distances.

    Every Hessian step looks for parts of the gradient that have no graph; this looks at the numbers alone, whatever the
    graph says. It works on a copy of the model, and costs some five gradients in float64: once in a thousand steps is
    nothing.

    Args:
        model: the model, in the mode it is trained in; of one inside DistributedDataParallel its ``module``.
        loss_fn: computes the loss as ``loss_fn(model, *batch)``, with the model it is given.
        batch: its other arguments.

    Returns:
        The relative error; None where differences at several distances do not agree with one another, as at a kink, or
        where there is no Hz. Above a hundredth, gradients depend on what autograd takes for constant.

    Example:
        >>> import torch, adahessian_fused
        >>> model = torch.nn.Linear(3, 1)
        >>> loss_of = lambda model, x, y: (model(x) - y).exp().mean()
        >>> adahessian_fused.check_along_z(model, loss_of, (torch.randn(16, 3), torch.randn(16, 1))) < 1e-6
        True
    """
    _check_arguments(model, batch)
    with _random_numbers_kept():
        _, exact, run = _exact(model, loss_fn, batch)
        return _along_z(run, exact)


def _check_arguments(model: Any, batch: Any) -> None:
    """Raise unless there is a model to differentiate, and a batch to hand over with a star."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; expected a torch.nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of the model requires a gradient; expected one at least")
    if isinstance(batch, Tensor | Mapping | Iterator) or not isinstance(batch, Iterable):
        raise TypeError(
            f"batch is of type {type(batch).__name__}; expected a tuple or list of what loss_fn(model, *batch) takes, "
            "such as (inputs, targets)"
        )


def _called(loss_fn: LossFn, model: nn.Module, batch: Sequence[Any]) -> Any:
    try:
        return loss_fn(model, *batch)
    except TypeError as error:
        raise TypeError(
            f"loss_fn(model, *batch) failed: {error}; expected a function of the model and of what is in the batch, "
            "such as lambda model, x, y: nn.CrossEntropyLoss()(model(x), y)"
        ) from error


def _number(loss: Any) -> Tensor:
    """Return what ``loss_fn`` has returned, or raise unless it is a loss; no RuntimeError, which is a result."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned a value of type {type(loss).__name__}; expected the loss, a tensor")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}; expected one number, for example its mean")
    return loss


def _kinks(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Sequence[Any],
    epsilon: float | None,
    exact: Callable[[int], tuple[Tensor, Tensor]],
) -> tuple[str, ...]:
    """Return why finite differences may be wrong on other batches: names of operators, or "fd_epsilon"."""
    eager = getattr(model, "_orig_mod", model)
    torch.manual_seed(0)
    found = kinks(_Run(eager, loss_fn, batch, "first order", epsilon).loss())
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if not found and dtypes <= {torch.float32, torch.float64}:
        wider = 8 * (epsilon or epsilon_of(dtypes))
        error = _Run(model, loss_fn, batch, DIFFERENCE, wider).errors(exact)
        found = ["fd_epsilon"] if isinstance(error, tuple) and error[0] > TRUSTED else []
    return tuple(found)


def _along_z(run: _Run, exact: Callable[[int], tuple[Tensor, Tensor]]) -> float | None:
    """Return the error of Hz against differences of gradients, on which several distances and both sides agree."""
    dtypes = {p.dtype for p in run.params}
    if run.hvp != "autograd" or len(dtypes) > 1 or not dtypes.issubset(DISTANCES):
        return None
    (here, product), found = exact(0), list[Tensor]()
    tolerance = AGREES / 10 if dtypes == {torch.float64} else AGREES
    for distance in DISTANCES[dtypes.pop()]:
        plus, minus = run.gradient(distance), run.gradient(-distance)
        found.append((plus - minus) / (2 * distance))
        error = _relative(product, found[-1])
        if error <= tolerance:
            return error
        one_sided = (plus - here) / distance, (here - minus) / distance
        if _relative(*one_sided) <= 0.1 and any(_relative(f, found[-1]) <= tolerance / 2 for f in found[:-1]):
            return error
    return None


def _names(model: nn.Module) -> list[str]:
    """Return the rows of a model: a lower precision where there is float32, and TF32 on CUDA."""
    params = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype == torch.float64 for p in params) or not any(p.dtype == torch.float32 for p in params):
        return [*CHOICES["hvp"]]
    lower = list(LOWER)[: 1 + any(p.is_cuda for p in params)]
    return ["autograd", *lower, *(name for name in CHOICES["hvp"] if name != "autograd")]


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield


class _Run:
    """A strategy on a copy of the model; ``first order`` is the gradient alone."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, batch: Sequence[Any], name: str, epsilon: float | None
    ) -> None:
        self.name, self.model = name, copy.deepcopy(model)
        self.loss = lambda: _number(_called(loss_fn, self.model, batch))
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.hvp = hvp = name if name in CHOICES["hvp"] else "autograd"
        low = LOWER.get(name)
        self._buffers = [(b, b.clone()) for b in self.model.buffers()]
        epsilon = epsilon if hvp == "finite_difference" else None
        self._options: dict[str, Any] = {"hvp": hvp, "hvp_dtype": low, "fd_epsilon": epsilon}

    def once(self, seed: int, *, with_curvature: bool = True) -> AdaHessian:
        """Compute gradients, and curvature for the probe of this seed, from the same state each time."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        for p in self.params:
            p.grad = None
        torch.manual_seed(0)
        opt = AdaHessian(self.params, seed=seed, **self._options)
        # A loss that is given, so that PyTorch's own double backward is judged.
        loss = self.loss() if self._options["hvp"] == "autograd" else self.loss
        opt.backward(loss, curvature=float(with_curvature and self.name != "first order"))
        return opt

    def gathered(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the gradient and Hz, all parameters in one vector each."""
        opt = self.once(seed)
        if all(p.grad is None for p in self.params):
            raise ValueError(
                "the loss depends on no parameter of the model; expected loss_fn(model, *batch) to use the model that "
                "it is given, which is a copy"
            )
        products = {id(entry.param): h for entry, h in opt.coming_step.curvature.products.items()}
        return _flat([p.grad for p in self.params], self.params), _flat(
            [products.get(id(p)) for p in self.params], self.params
        )

    def gradient(self, distance: float) -> Tensor:
        """Return the gradient at p + distance * z for the probe of seed 0, in one vector."""
        weights = [p.detach() for p in self.params]
        held, opt = [p.clone() for p in weights], AdaHessian(self.params, seed=0)
        torch._foreach_add_(weights, opt.coming_step.draw(self.params, 0), alpha=distance)
        try:
            self.once(0, with_curvature=False)
        finally:
            torch._foreach_copy_(weights, held)
        return _flat([p.grad for p in self.params], self.params)

    def errors(self, exact: Callable[[int], tuple[Tensor, Tensor]]) -> tuple[float, float] | RuntimeError:
        """Return the largest relative errors of Hz and gradient, or why there are none."""
        found = []
        for seed in range(SAMPLES):
            try:
                ours = self.gathered(seed)
            except RuntimeError as error:
                return error
            found.append([_relative(a, b) for a, b in zip(ours, exact(seed), strict=True)])
        gradient, product = (max(column) for column in zip(*found, strict=True))
        return product, gradient

    def cost(self) -> tuple[float, int]:
        """Measure seconds, and bytes of memory above what is held anyway (0 on a CPU)."""
        device = self.params[0].device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        self.once(0)
        if on_gpu:
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        return elapsed, torch.cuda.max_memory_allocated(device) - held if on_gpu else 0


def _flat(tensors: Sequence[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(p) if t is None else t).detach().double().reshape(-1)
            for t, p in zip(tensors, params, strict=True)
        ]
    )


def _relative(found: Tensor, exact: Tensor) -> float:
    scale = exact.norm()
    return float((found - exact).norm() / scale) if scale > 0 else float(found.norm())


def _exact(
    model: nn.Module, loss_fn: LossFn, batch: Sequence[Any]
) -> tuple[str, Callable[[int], tuple[Tensor, Tensor]], _Run]:
    """Return the name of the reference, a function that computes gradient and Hz for a probe's seed, and its run.

    Raises:
        RuntimeError: not even first-order gradients can be computed.
    """
    eager = getattr(model, "_orig_mod", model)  # what torch.compile has compiled
    candidates = {
        "double backward in float64": ("autograd", True),
        "central differences in float64, right for smooth models only": ("finite_difference", True),
        "double backward in the precision of the model": ("autograd", False),
        "central differences in the precision of the model, right for smooth models only": ("finite_difference", False),
    }
    for name, (hvp, in_double) in candidates.items():
        precise = copy.deepcopy(eager).double() if in_double else eager
        data = pytree.tree_map_only(Tensor, _to_double, tuple(batch)) if in_double else batch
        run = _Run(precise, loss_fn, data, hvp, None)

        @functools.cache
        def gathered(seed: int, run: _Run = run) -> tuple[Tensor, Tensor]:
            with sdpa_kernel(SDPBackend.MATH):
                return run.gathered(seed)

        try:
            if _same_loss(run, _Run(eager, loss_fn, batch, hvp, None)):
                gathered(0)
                return name, gathered, run
        except RuntimeError as error:
            failure = error
    raise failure


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _same_loss(a: _Run, b: _Run) -> bool:
    """Tell whether two copies see the same random numbers: dropout on a GPU draws others in another precision."""
    losses = []
    for run in (a, b):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(float(run.loss()))
    return abs(losses[0] - losses[1]) <= 0.02 * abs(losses[1])
