"""Random small models, stepped in random ways, against a plain double backward in float64."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
import ways
from published import AdaHessian
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adahessian_fused import TrainStep, curvature_friendly, split_batch

from . import oracle
from .drawn import HOLD_GRADIENTS, LOSSES, Attention, Checkpoint, Model, Sine

DIVERGED = 1e12  # gradients of which scores of attention, 1e16 by then, are rounded by more than 1


def largest_of(t: Tensor) -> float:
    """The size of the largest number that is finite."""
    t = t[t.isfinite()]
    return float(t.abs().max()) if t.numel() else 0.0


def of_square(d: float, off: float) -> float:
    """How far off the square of a number is, of this size, that is off."""
    return 2 * d * off + off**2


class Trial:
    """A model, its optimizer and what there is to check."""

    def __init__(self, seed: int) -> None:
        r = self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.model = Model(r)
        self.loss_name = r.choice(list(LOSSES))
        if self.loss_name == "meta" and any(isinstance(m, Checkpoint) for m in self.model.modules()):
            self.loss_name = "log"  # PyTorch's checkpoints forget what functional_call has put in a parameter's place
        if self.loss_name in HOLD_GRADIENTS and any(map(parametrize.is_parametrized, self.model.modules())):
            self.loss_name = "log"  # its gradient through weight_norm is wrong in PyTorch
        self.dtype = torch.float32 if r.random() < 0.15 else torch.float64
        self.model.to(self.dtype)
        for p in self.model.parameters():
            if r.random() < 0.1:
                p.requires_grad_(False)
        self.params = list(self.model.parameters())
        if self.params and not any(p.requires_grad for p in self.params):
            self.params[0].requires_grad_(True)
        if self.params and r.random() < 0.05:
            next(p for p in self.params if p.requires_grad).register_hook(lambda g: 2 * g)
        self.options = {
            "lr": r.choice([0.01, 0.1]), "betas": r.choice([(0.9, 0.99), (0.5, 0.0), (0.0, 0.9)]),
            "seed": r.getrandbits(40), "update_each": r.choice([1, 1, 2]), "weight_decay": r.choice([0.0, 0.1]),
            "hessian_power": r.choice([1.0, 1.0, 0.5]), "eps": r.choice([1e-2, 1e-4]),
        }  # fmt: skip
        self.block = r.choice([1, 1, 3, "row", "tensor"])
        self.fraction = r.choice([0.5, 1.0])
        self.told = r.random() < 0.5
        self.lazy = r.random() < 0.2  # another loss in later steps
        self.way = r.choice(WAYS)
        self.train_step = None

    def value(self, model: nn.Module, *batch: Tensor) -> Tensor:
        (x,) = batch
        torch.manual_seed(self.drawn)
        name = "mean_square" if self.lazy and self.step < 2 else self.loss_name
        return LOSSES[name](model, x, model(x))

    def make(self) -> AdaHessian:
        groups = [{"params": self.params[::2]}, {"params": self.params[1::2]}]
        groups = [group for group in groups if group["params"]]
        if self.way == "backward_split":
            self.options["hessian_fraction"] = self.fraction
        return AdaHessian(groups, block_size=self.block, **self.options)

    def batch(self) -> Tensor:
        x = self.model.inputs(self.random)
        return x.to(self.dtype) if x.is_floating_point() else x

    # -- the oracle

    def parts(self, x: Tensor) -> list[tuple[Tensor, float, float]]:
        """Batches, the factors on their loss, and on their curvature."""
        if self.way == "backward_split" and self.fraction < 1 and any(self.due):
            first, rest, share = split_batch((x,), self.fraction)
            return [(first[0], share, 1.0), (rest[0], 1 - share, 0.0)]
        if self.way == "accumulated":
            return [(x, 0.25, 0.25), (x.flip(0), 0.75, 0.75)]
        if self.way == "one_of_two":
            return [(x, 0.5, 1.0), (x.flip(0), 0.5, 0.0)]
        return [(x, 1.0, 1.0)]

    def expected(self, model: nn.Module, x: Tensor) -> tuple[list[Tensor | None], list[Tensor]]:
        """The gradient, and D averaged over blocks, in float64."""
        trained = [i for i, p in enumerate(self.params) if p.requires_grad]
        z = [self.probes[i] for i in trained]
        totals: list[Any] = [None] * len(self.params), [torch.zeros_like(p).double() for p in self.params]
        model = self.twin(model).double()
        params = list(model.parameters())
        for part, weight, of_curvature in self.parts(x):
            part = part.double() if part.is_floating_point() else part
            grads, products = oracle.derivatives(lambda: self.value(model, part), [params[i] for i in trained], z)  # noqa: B023
            for i, g, h, sign in zip(trained, grads, products, z, strict=True):
                if g is not None:
                    totals[0][i] = weight * g + (0 if totals[0][i] is None else totals[0][i])
                totals[1][i] += of_curvature * h * sign
        return totals[0], [oracle.block_means(d, self.length(d)) for d in totals[1]]

    def length(self, d: Tensor) -> int:
        return {"row": d.shape[-1] if d.dim() else 1, "tensor": d.numel()}.get(self.block, self.block)

    def probe(self, i: int) -> Tensor:
        order = [*range(0, len(self.params), 2), *range(1, len(self.params), 2)]
        state = self.opt.state.get(self.params[i], {})
        return oracle.probe(
            self.params[i].shape, order.index(i), int(state.get("hessian_step", 0)), self.options["seed"]
        )

    # -- a run

    def run(self) -> str:
        """Step; returns "right", or why not: an error, or a loss that is no number."""
        if not self.params:
            return "no parameters"
        self.step, self.opt = 0, self.make()
        with curvature_friendly(self.model, self.opt) if self.told else nullcontext():
            for step in range(self.random.choice([2, 4])):
                self.step = step
                found = self.one_step()
                if found != "right":
                    return found
        return "right"

    def one_step(self) -> str:
        x, self.drawn, self.before = self.batch(), self.random.getrandbits(32), copy.deepcopy(self.model)
        self.due, self.probes = self.opt.coming_step.schedule.due(), [self.probe(i) for i in range(len(self.params))]
        grads, ds = self.expected(self.before, x)
        if not any(g is not None for g in grads):
            return "linear in nothing"
        if not all(g is None or bool((g.abs() < DIVERGED).all()) for g in grads):
            return "not finite, or diverged"
        before = [p.detach().clone() for p in self.params]
        states = [
            {k: v.clone() for k, v in self.opt.state.get(p, {}).items() if isinstance(v, Tensor)} for p in self.params
        ]
        self.opt.zero_grad()
        try:
            if self.way in OWN:
                OWN[self.way](self, x)
            else:
                ways.WAYS[self.way](self.opt, lambda *batch: self.value(self.model, *batch), x)
        except (RuntimeError, NotImplementedError) as error:
            return f"{self.refused(error, before)}: {str(error)[:60]}"
        if not self.check(grads, ds, before, states, x):
            return "PyTorch's own gradient is another"  # of what it cannot, or does wrongly, differentiate twice
        return "right"

    def refused(self, error: Exception, before: list[Tensor]) -> str:
        """Why an error is right, which has changed nothing: the plain way fails, or the documentation says so."""
        assert all(map(torch.equal, before, self.params)), f"parameters changed by a step that failed: {error}"
        text = str(error)
        because = next((reason for reason, (says, true) in self.reasons().items() if says in text and true), None)
        if because is None:
            assert self.plainly_fails(), f"refused without a reason: {type(error).__name__}: {text[:300]}"
        return f"refused, {because or 'as the plain way'}"

    def reasons(self) -> dict[str, tuple[str, bool]]:
        """For each reason what the error says, and whether the model gives it."""

        def has(*kinds):
            return any(isinstance(m, kinds) for m in self.model.modules())

        untold = not self.told and self.way in FROM_LOSS
        hides = any(isinstance(m, Sine) and m.kind != "complete" for m in self.model.modules())
        norms = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
        of_gradient = untold and self.loss_name in HOLD_GRADIENTS and has(*norms, nn.TransformerEncoderLayer)
        reentrant = any(isinstance(m, Checkpoint) and m.reentrant for m in self.model.modules())
        parametrized = any(map(parametrize.is_parametrized, self.model.modules()))
        return {
            "a Function": ("torch.autograd.Function", hides or self.loss_name.startswith("hidden")),
            "a reentrant checkpoint": ("use_reentrant=True cannot be differentiated twice", reentrant),
            "weight_norm untold": ("weight_norm, whose second derivative PyTorch has wrong", untold and parametrized),
            "a gradient of a norm untold": ("_norm in a loss that holds a gradient", of_gradient),
            "attention untold": ("dot_product", untold and has(Attention, nn.TransformerEncoderLayer)),
            "bags untold": ("_embedding_bag_backward cannot", untold and has(nn.EmbeddingBag)),
        }

    def plainly_fails(self) -> bool:
        model = copy.deepcopy(self.model)
        params = [p for p in model.parameters() if p.requires_grad]
        try:
            grads = torch.autograd.grad(self.value(model, self.batch()), params, create_graph=True, allow_unused=True)
            grads = [g.sum() for g in grads if g is not None and g.requires_grad]
            if grads:
                torch.autograd.grad(sum(grads), params, allow_unused=True)
            self.value(model, self.batch()).backward()  # other leaves, too
        except RuntimeError:
            return True
        return False

    def twin(self, model: nn.Module) -> nn.Module:
        """A copy, with the parameters' hooks."""
        twin = copy.deepcopy(model)
        for copied, p in zip(twin.parameters(), self.params, strict=True):
            for hook in (p._backward_hooks or {}).values():
                copied.register_hook(hook)
        return twin

    def plain_is_alike(self, i: int, x: Tensor) -> bool:
        """Whether ``loss.backward()`` of the model as it was gives a parameter the gradient that it has."""
        model = self.twin(self.before)
        try:
            for part, weight, _ in self.parts(x):
                (weight * self.value(model, part)).backward()
        except RuntimeError:
            return False
        plain = list(model.parameters())[i].grad
        return plain is not None and torch.allclose(plain, self.params[i].grad)

    def check(self, grads, ds, before, states, x) -> bool:
        relative = 1e-9 if self.dtype == torch.float64 else 3e-3
        scale_g = max(float(g.abs().max()) for g in grads if g is not None and g.numel())
        scale_d = max(map(largest_of, ds))
        unit, right = torch.finfo(self.dtype).eps, True
        off_g, off_d = relative * (scale_g + 1e-3), relative * (scale_g + scale_d + 1e-3)
        for i, (p, g, d) in enumerate(zip(self.params, grads, ds, strict=True)):
            if g is None:
                assert torch.equal(p, before[i]), f"parameter {i} without a gradient has moved"
                continue
            noise = cache(partial(self.noise, i, x))
            sides, own = cache(partial(self.sides, i, x)), False
            try:
                self.close(p.grad, g, off_g, f"gradient of parameter {i}", lambda: noise()[0])  # noqa: B023
            except AssertionError:
                if not self.plain_is_alike(i, x):
                    raise
                right, own = False, True
                g, sides = p.grad.double(), cache(partial(self.sides, i, x, plain=True))
                d = sum(sides()) / 2  # D is the derivative of what PyTorch takes for the gradient
            state, old = self.opt.state[p], states[i]
            m, v = (old.get(k, torch.zeros_like(p)).double() for k in ("exp_avg", "exp_hessian_diag_sq"))
            d = d if self.due[i % 2] else None
            m, v = oracle.averages(m, v, g, d, self.options["betas"])
            if d is not None:  # plain autograd's may be NaN at a zero where ours is not
                v = torch.where(d.isfinite(), v, state["exp_hessian_diag_sq"].double())
            now = state["exp_avg"].double(), state["exp_hessian_diag_sq"].double()
            largest = [largest_of(m), largest_of(v)]
            self.close(now[0], m, off_g + 8 * unit * largest[0], f"m of parameter {i}", lambda: noise()[0])  # noqa: B023
            share = 1 - self.options["betas"][1]  # of D's square in v
            of_v, of_noise = of_square(scale_d, off_d), lambda: share * of_square(scale_d, noise()[1])  # noqa: B023
            if own and d is not None:  # by differences, which have errors of their own
                of_v, of_noise = of_square(largest_of(d), off_d + 1e-5 * largest_of(d)), lambda: 0.0
            of_v = share * of_v + 8 * unit * largest[1]
            try:
                self.close(now[1], v, of_v, f"v of parameter {i}", of_noise)
            except AssertionError:
                alike = d is not None and (own or self.plain_is_alike(i, x))
                if not (alike and self.is_at_a_kink(sides(), now[1], old, (now[1] - v).abs() <= of_v)):
                    raise
            t, h = int(state["step"]), int(state["hessian_step"])
            assert (t, h) == (int(old.get("step", 0)) + 1, int(old.get("hessian_step", 0)) + self.due[i % 2])
            options = {k: v for k, v in self.options.items() if k not in ("seed", "update_each", "hessian_fraction")}
            p_after = oracle.moved(before[i].double(), *now, t, h, **options)
            size = float(torch.cat([(p_after - before[i]).abs().flatten(), p_after.abs().flatten()]).max())
            self.close(p, p_after, 2000 * unit * size, f"parameter {i}")
        return right

    def sides(self, i: int, x: Tensor, *, plain: bool = False) -> list[Tensor]:
        """D by differences of gradients ahead and behind along the probe; ``plain``: of PyTorch's own ones."""
        here, ahead, behind = (self.gradient(i, x, distance, plain) for distance in (0.0, 2.0**-20, -(2.0**-20)))
        sides = [(ahead - here) * 2**20 * self.probes[i], (here - behind) * 2**20 * self.probes[i]]
        return [oracle.block_means(d, self.length(d)) for d in sides]

    def is_at_a_kink(self, sides: list[Tensor], v: Tensor, old: dict[str, Tensor], right: Tensor) -> bool:
        """Whether D differs between the two sides along the probe, and is between them wherever it is not right."""
        a, b = sides
        beta = self.options["betas"][1]
        d = ((v - beta * old.get("exp_hessian_diag_sq", torch.zeros_like(v)).double()) / (1 - beta)).clamp_min(0).sqrt()
        low, high = torch.where(a * b < 0, 0.0, torch.minimum(a.abs(), b.abs())), torch.maximum(a.abs(), b.abs())
        jump = (a - b).abs()
        bent = (jump > 1e-3 * high.max()) & (d >= low - 0.05 * jump) & (d <= high + 0.05 * jump)
        return bool((right | bent).all())

    def gradient(self, i: int, x: Tensor, distance: float, plain: bool) -> Tensor:
        """The gradient of a parameter, with the curvature's weights, beside the point along the probe."""
        trained = [k for k, p in enumerate(self.params) if p.requires_grad]
        model, total = copy.deepcopy(self.before).double(), torch.zeros_like(self.params[i]).double()
        with torch.no_grad():
            for k, p in enumerate(model.parameters()):
                p.add_(distance * self.probes[k] if k in trained else 0.0)
        model = self.twin(model)
        for part, _, of_curvature in self.parts(x):
            part = part.double() if part.is_floating_point() else part
            loss, p = partial(self.value, model, part), list(model.parameters())[i]
            if plain:
                [g] = torch.autograd.grad(loss(), [p], allow_unused=True)
            else:
                [g], _ = oracle.derivatives(loss, [p], [self.probes[i]])
            total += 0 if g is None else of_curvature * g
        return total

    def close(
        self, found: Tensor, expected: Tensor, bound: float, what: str, noise: Callable[[], float] = lambda: 0.0
    ) -> None:
        assert found is not None, f"no {what}"
        found = found.detach().double()
        off = torch.where(found.isfinite() | expected.isfinite(), (found - expected).abs(), 0.0)
        worst = float(off.max()) if off.numel() else 0.0
        # Noise is NaN next to a singularity.
        assert worst <= bound or not worst > noise(), (
            f"{what} is off by {worst:.3g}, bound {bound:.3g}: found {found.flatten()[:6].tolist()}, "
            f"expected {expected.flatten()[:6].tolist()}"
        )

    def noise(self, i: int, x: Tensor) -> list[float]:
        """What roundings do to a parameter's gradient and D.

        Both are computed again with every weight and input off by one rounding, four times. Some hundred roundings on
        the way to a number, which are as large and independent, do ten times as much.
        """
        generator, found = torch.Generator().manual_seed(0), []
        for size in (0.0, *[torch.finfo(self.dtype).eps] * 4):
            model = copy.deepcopy(self.before).double()
            batch = x.double() if x.is_floating_point() else x.clone()
            with torch.no_grad():
                for t in (*model.parameters(), batch) if x.is_floating_point() else model.parameters():
                    signs = 2 * torch.randint(0, 2, t.shape, generator=generator, dtype=torch.float64) - 1
                    t.mul_(1 + size * signs)
            found.append([numbers[i] for numbers in self.expected(model, batch)])
        return [10 * float(torch.stack([(t - ts[0]).abs().max() for t in ts]).max()) for ts in zip(*found, strict=True)]

    def describe(self) -> str:
        hooks = [i for i, p in enumerate(self.params) if p._backward_hooks]
        frozen = [i for i, p in enumerate(self.params) if not p.requires_grad]
        return (
            f"{self.model}\n{self.loss_name}, {self.way}, {'told' if self.told else 'untold'}, {self.dtype}, "
            f"step {self.step}, {hooks=}, {frozen=}, lazy={self.lazy}, block={self.block}, {self.options}"
        )


def _accumulated(trial: Trial, x: Tensor) -> None:
    for part, weight, _ in trial.parts(x):
        trial.opt.backward(trial.value(trial.model, part) * weight)
    trial.opt.step()


def _one_of_two(trial: Trial, x: Tensor) -> None:
    for part, weight, of_curvature in trial.parts(x):
        curvature = of_curvature / weight
        trial.opt.backward(lambda: trial.value(trial.model, part) * weight, curvature=curvature)  # noqa: B023
    trial.opt.step()


def _train_step(trial: Trial, x: Tensor) -> None:
    if trial.train_step is None:
        loss_fn = lambda x: trial.value(trial.model, x)  # noqa: E731
        trial.train_step = TrainStep(loss_fn, optimizer=trial.opt, compile=False, modules=[trial.model])
    trial.train_step(x)


OWN = {"accumulated": _accumulated, "one_of_two": _one_of_two, "train_step": _train_step}
FROM_LOSS = ("backward", "needs_hessian", "hook_backward", "accumulated", "one_of_two")  # the model has to be told
WAYS = (*FROM_LOSS, "function", "backward_split", "closure_returns_loss", "closure_standard", "train_step")


def case(seed: int, dtype: torch.dtype | None = None) -> str:
    """One trial; numbers of float32 that are far off are no fault where those of float64 are right."""
    trial = Trial(seed)
    if dtype is not None:
        trial.dtype = dtype
        trial.model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return trial.run()
        except AssertionError as error:
            if trial.dtype == torch.float32:
                return f"{case(seed, torch.float64)} in float64"
            raise AssertionError(f"{error}\n{trial.describe()}") from error
