"""Gradients and curvature from losses that are evaluated for the purpose, as often as a strategy needs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import hvp
from .checks import check_grad
from .curvature import Curvature
from .distributed.average import GradientAverage, average_curvature
from .distributed.sharded import EXACT_IS_REFUSED, any_sharded
from .hvp.finite_difference import FiniteDifference
from .hvp.forward_over_reverse import ForwardOverReverse
from .hvp.replay import mean_of
from .layout import Entry, make_buckets
from .record import OtherLeaves, Record, is_zero
from .segments import Segment, Steps
from .state import PortableState
from .update import Parts

Differentiate = Callable[..., None]

STRATEGIES: dict[str, type[FiniteDifference] | type[ForwardOverReverse]] = {
    "finite_difference": FiniteDifference,
    "forward_over_reverse": ForwardOverReverse,
}


class EvaluatesLosses(PortableState):
    """Optimizer that knows when curvature is due and lets a strategy evaluate the loss for it."""

    _curvature: Curvature | None = None
    _record: Record | None = None  # of this step, from its first pass on
    _unfinished: tuple[Parts, Any, list[tuple[Tensor | None, int]]] | None = (
        None  # what has failed, its loss, gradients
    )
    _uncertain: tuple[Tensor, tuple[int, ...]] | None = None  # whether the device has skipped a step of these groups
    _left: Record | None = None  # of the gradients after the last step, if the coming one has curvature
    _entries: dict[int, Entry]
    _tools: Mapping[str, Any]
    _warned = False  # of ranks without a process group

    def _ensure(self, params: Sequence[Tensor]) -> list[Entry]:
        raise NotImplementedError

    def _due(self) -> list[bool]:
        """Whether the coming step uses new curvature, for each group."""
        self._settle_count()
        return [
            (group["step"] % group["update_each"] == 0 or group["step"] < group["dense_steps"])
            and any(p.requires_grad for p in group["params"])
            for group in self.param_groups
        ]

    @property
    def needs_hessian(self) -> bool:
        """Whether the coming step uses new curvature: ``loss.backward(create_graph=opt.needs_hessian)``."""
        return any(self._due())

    def _trained(self) -> list[tuple[int, Tensor]]:
        """Group number and parameter of everything that wants a gradient."""
        return [(n, p) for n, group in enumerate(self.param_groups) for p in group["params"] if p.requires_grad]

    # ---- the schedule ------------------------------------------------------------------------------------------------

    def _count_step(self, numbers: Collection[int], found_inf: Tensor | None) -> None:
        """Count a step of these groups; with ``found_inf`` one that the device may skip, which is asked for later."""
        for number in numbers:
            self.param_groups[number]["step"] += 1
        self._uncertain = None if found_inf is None else (found_inf, tuple(numbers))

    def _settle_count(self) -> None:
        """Take back the count of a step that GradScaler has skipped on the device, where the schedule depends on it."""
        scheduled = any(group["update_each"] > 1 for group in self.param_groups)
        if self._uncertain is None or (not scheduled and self._uncertain[0].is_cuda) or _capturing():
            return
        found_inf, numbers = self._uncertain
        skipped = found_inf.item() != 0
        self._uncertain = None
        for number in numbers if skipped else ():
            self.param_groups[number]["step"] -= 1

    def _tell_of_missed(self) -> None:
        """Warn once of parameters whose gradients keep coming between the Hessian steps of their group."""
        buckets = {entry.bucket for entry in self._entries.values()}
        if all(group["update_each"] == 1 for group in self.param_groups) or any(
            bucket.steps.device.type != "cpu" for bucket in buckets
        ):
            return
        every = torch.tensor([group["update_each"] for group in self.param_groups], device="cpu")
        most = torch.zeros_like(every)  # updates of anybody in each group
        for bucket in buckets:
            groups = bucket.segments[:, Segment.GROUP]
            most.scatter_reduce_(0, groups, bucket.steps[:, Steps.HESSIAN_STEP], "amax")
        for bucket in buckets:
            groups = bucket.segments[:, Segment.GROUP]
            steps, updates, f = bucket.steps[:, Steps.STEP], bucket.steps[:, Steps.HESSIAN_STEP], every[groups]
            # Whoever has its gradients on Hessian steps has steps / f updates at least; late comers lack one.
            missed = (f > 1) & (steps >= 2 * f) & (2 * (updates + 1) * f <= steps + f) & (updates < most[groups])
            for row in missed.nonzero().flatten().tolist():
                entry = next(e for e in self._entries.values() if e.bucket is bucket and e.row == row)
                if entry.param_id not in self._told:
                    self._told.add(entry.param_id)
                    warnings.warn(
                        f"{entry.name} has had {int(steps[row])} gradients but curvature {int(updates[row])} times: "
                        f"they come between the Hessian steps of its group, update_each={int(f[row])} apart; "
                        "expected a group of its own, which counts its own steps, or update_each=1",
                        stacklevel=8,
                    )

    # ---- what a step has gathered ------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._forget()
        self._left, self._uncertain = None, None
        self._told: set[int] = set()  # numbers of parameters that have been warned of

    def _forget(self) -> None:
        """The step is done, or its gradients are dropped."""
        if self._record is not None:
            self._record.close()
        self._curvature = self._record = self._unfinished = None

    def _leave(self) -> None:
        """Take down the gradients as they are, if the coming step has curvature: none of them is foreign to it."""
        self._left = Record([p for _, p in self._trained()]) if self.needs_hessian else None

    @contextlib.contextmanager
    def _passing(self) -> Iterator[None]:
        """Around a backward pass of ours: its gradients join those of the step that have their curvature."""
        if not self.needs_hessian:
            yield
            return
        params = [p for _, p in self._trained()]
        self._drop_zeroed(params)
        record = self._record or Record(())
        if self._record is None:
            record.added.update(id(p) for p in self._foreign(params))
        if record.added:
            raise RuntimeError(hvp.MIXED)
        record.ours = True
        try:
            yield
        except BaseException:
            record.ours = False
            raise
        self._keep_record()

    def _keep_record(self) -> None:
        if self._record is not None:
            self._record.close()
        self._record = Record(p for _, p in self._trained())
        self._record.watch()

    def _foreign(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Parameters whose gradient has been written to since the last step, though by no pass of this one."""
        return [] if self._left is None else [p for p in self._left.changed(params) if not is_zero(p)]

    def _drop_zeroed(self, params: Sequence[Tensor]) -> None:
        """Forget the curvature of gradients that were zeroed or dropped behind our back (``model.zero_grad()``)."""
        if self._record is None:
            return
        zeroed = {id(p) for p in self._record.changed(params) if is_zero(p)}
        self._record.added -= zeroed
        if all(id(p) in zeroed or p.grad is None for p in params):
            self._forget()
        elif zeroed and self._curvature is not None:
            gone = [entry for entry in self._entries.values() if id(entry.owner) in zeroed]
            self._curvature = self._curvature.without(gone)

    def _with(self, curvature: Curvature) -> Curvature:
        """What has been gathered, with that of one more pass."""
        if self._ranks is None:
            self._warn_if_not_alone()
        else:
            self._ranks.curvature_averaged = False
        return curvature if self._curvature is None else self._curvature.plus(curvature)

    def _gathered(self) -> Curvature:
        """What this step's curvature is to be added to."""
        return self._with(Curvature(self._tools, self._probe_seed))

    @torch.no_grad()
    def _report_overflow(self, *, scaled: bool) -> None:
        """Tell ``scaler.unscale_(opt)``, which may be the next call, if the unscaled curvature is not finite.

        All ranks hear the same.
        """
        if scaled:
            agree = None if self._ranks is None or self._ranks.silent else self._ranks.largest
            self._curvature.report([p.grad for _, p in self._trained() if p.grad is not None], agree)

    # ---- several ranks -----------------------------------------------------------------------------------------------

    @property
    def _probe_seed(self) -> int:
        """Key of the probe's generator on this rank."""
        seed = self.param_groups[0]["seed"]
        per_rank = self._ranks is not None and self.param_groups[0]["probe_per_rank"]
        return self._ranks.probe_seed(seed) if per_rank else seed

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Inside it :meth:`backward` leaves gradients and curvature on their rank, as DDP's ``no_sync`` does.

        For all but the last of several micro-batches, forward passes included::

            with opt.no_sync():
                opt.backward(loss_fn(model(x1), y1) / 2)
            opt.backward(loss_fn(model(x2), y2) / 2)

        Without a process group it does nothing.
        """
        return contextlib.nullcontext() if self._ranks is None else self._ranks.no_sync()

    def _start_average(self, grads: Sequence[Tensor | None] | None = None) -> GradientAverage | None:
        """Begin to average ``p.grad`` plus ``grads`` over the ranks; None if there are none, or inside no_sync()."""
        return None if self._ranks is None or self._ranks.silent else self._averaging(grads)

    def _averaging(self, grads: Sequence[Tensor | None] | None = None) -> GradientAverage:
        params = [p for _, p in self._trained()]
        self._ranks.watch(params)
        return GradientAverage(self._ranks, params, grads)

    def _finish_average(self, average: GradientAverage | None) -> None:
        if average is not None:
            average.finish()
        elif self._ranks is not None:
            self._ranks.grads_averaged = False

    def _average_curvature(self, due: Sequence[bool]) -> None:
        if self._ranks is not None and self._curvature is not None and not self._ranks.curvature_averaged:
            entries = self._ensure([p for n, p in self._trained() if due[n]])
            average_curvature(self._ranks, self._curvature, entries)

    def _check_differentiable(self) -> None:
        """Raise if parameters are sharded and curvature is to come from a graph."""
        way = self.param_groups[0]["hvp"]
        if way != "finite_difference" and any_sharded([p for _, p in self._trained()]):
            raise RuntimeError(EXACT_IS_REFUSED.format(way))

    def _warn_if_not_alone(self) -> None:
        """Warn once if there are ranks that nobody has told about."""
        if not self._warned and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._warned = True
            if self.param_groups[0]["hvp"] != "finite_difference":
                warnings.warn(
                    f"torch.distributed has {dist.get_world_size()} ranks, but this optimizer has no process_group: "
                    "its curvature, and the gradient of opt.backward(), are those of this rank's batch alone, and "
                    "ranks drift apart; expected AdaHessian(..., process_group=torch.distributed.group.WORLD)",
                    stacklevel=2,
                )

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate_loss(
        self,
        loss_fn: Callable[[], Tensor],
        gradient: Tensor | None,
        scale: Callable[[Tensor], Tensor] | None,
        weight: float,
    ) -> Tensor:
        """Gradients and curvature of a function that returns the loss, by a strategy that evaluates it."""
        inverse_scale = None

        def evaluate(differentiate: Differentiate) -> Tensor:
            nonlocal inverse_scale
            loss = loss_fn()
            hvp.check_loss(loss, gradient)
            if scale is not None:
                inverse_scale = 1 / scale(torch.ones((), dtype=torch.float32, device=loss.device))
            differentiate(loss if scale is None else scale(loss), gradient=gradient)
            return loss.detach()

        return self._repeat(evaluate, lambda: {"weight": weight, "inverse_scale": inverse_scale})

    def _repeat(self, evaluate: Callable[[Differentiate], Any], scales: Callable[[], dict[str, Any]]) -> Any:
        """Let the strategy evaluate a loss; leaves gradients in ``p.grad`` and their curvature.

        Args:
            evaluate: computes the loss, differentiates it with the function it is given, and returns its value.
            scales: factors on the products, asked for after the evaluations.

        Returns:
            The mean of what ``evaluate`` has returned, or the first if it is no number.
        """
        options, params, due = self.param_groups[0], self._trained(), self._due()
        self._check_differentiable()
        curvature, values = Curvature(self._tools, self._probe_seed), []
        # Those that FSDP has made of sharded parameters are leaves, too, and its own business.
        others = OtherLeaves(p for _, p in params)
        sharded = any_sharded([p for _, p in params])

        def evaluate_all(differentiate: Differentiate) -> Any:
            def seen(loss: Tensor, **options: Any) -> None:
                if not sharded:
                    others.before(loss)
                differentiate(loss, **options)

            with contextlib.nullcontext() if sharded else others.evaluation():
                return evaluate(seen)

        strategy = STRATEGIES[options["hvp"]](
            [p for _, p in params],
            self._probed(due),
            self._tools,
            evaluate_all,
            probe=options["probe"],
            seed=self._probe_seed,
            epsilon=options["fd_epsilon"],
        )
        alone = contextlib.nullcontext() if self._ranks is None else self._ranks.evaluating()
        with self._passing():
            with _own_grads([p for _, p in params]), alone, strategy, torch.no_grad():
                for sample in range(options["n_samples"]):
                    found, grads, products = strategy(sample)
                    values += found
                    if sample == 0:
                        gradient, kept = grads, [i for i, g in enumerate(grads) if g is not None]
                        entries = dict(zip(kept, self._ensure([params[i][1] for i in kept]), strict=True))
                        for i, entry in entries.items():
                            check_grad(grads[i], entry.name)
                    curvature.take(
                        {entries[i]: products[i] for i in kept if due[params[i][0]] and products[i] is not None},
                        probe=options["probe"],
                        n_samples=options["n_samples"],
                        sample=sample,
                        **scales(),
                    )
                    del grads, products  # before the next ones come
            total = self._with(curvature)
            hvp.accumulate_grads([p for _, p in params], gradient)
            self._curvature = total
            leaves = others.finish()
            if options["hvp"] != "finite_difference":  # whose evaluations are backward passes, each with its hooks
                hvp.run_post_accumulate_hooks([p for _, p in params], gradient)
                hvp.run_post_accumulate_hooks(leaves, leaves)
            self._finish_average(self._start_average())
        self._report_overflow(scaled=scales().get("inverse_scale") is not None)
        return mean_of(values)

    def _probed(self, due: Sequence[bool]) -> list[Entry]:
        """Entries of the parameters whose curvature is due; for those that have not had a gradient, temporary ones."""
        known, new, number = [], [], 0
        for n, group in enumerate(self.param_groups):
            for p in group["params"]:
                if due[n] and p.requires_grad and "exp_avg" in self.state.get(p, ()):
                    known.append(p)
                elif due[n] and p.requires_grad:
                    entry = Entry(p, f"parameter {number}", number, n, {})
                    entry.describe(group["block_size"], group["averaging"], self._kernel_of(p))
                    new.append(entry)
                number += 1
        make_buckets(new, with_states=False)
        return self._ensure(known) + new


@contextlib.contextmanager
def _own_grads(params: Sequence[Tensor]) -> Iterator[None]:
    """Inside it ``p.grad`` begins as None; afterwards it is again what it was."""
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in zip(params, before, strict=True):
            p.grad = grad


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
