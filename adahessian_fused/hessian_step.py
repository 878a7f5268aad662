"""What the coming step gathers before its update: gradients, and curvature where it is due."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hvp, sharing
from .bucket import Entry, compute_dtype
from .checks import check_grad, integer
from .curvature import Curvature, Memory, draw_probe, mixed
from .distributed.average import GradientAverage, average_curvature
from .distributed.ranks import Ranks, Together, agreed, batch_weight
from .distributed.sharded import EXACT_IS_REFUSED, any_sharded, groups_of, make_twice_differentiable, part_of
from .layout import ParameterLayout
from .looks import note_gradients
from .record import StepRecord, is_zero
from .schedule import Schedule

Differentiate = Callable[..., None]


class NoCurvatureError(RuntimeError):
    """A step needs curvature, and its gradients have no graph to take it from."""


class Gathered(NamedTuple):
    """What a step is made of.

    Attributes:
        entries: the parameters that have a gradient.
        grads: their gradients.
        due: for each group, whether it uses new curvature.
        curvature: Hz, or D; None where nothing is due.
    """

    entries: Sequence[Entry]
    grads: list[Tensor]
    due: Sequence[bool]
    curvature: Curvature | None


class HessianStep:
    """Gradients and curvature of the coming step, whichever way they come: one object for all steps, one by one.

    Backward passes of ours run inside :meth:`passing`, average their gradients between :meth:`start_average` and
    :meth:`finish_average`, and leave their Hz in :attr:`curvature`. :meth:`take` does all that with what was computed
    elsewhere. :meth:`finish` completes both over backward passes and ranks, and :meth:`close` ends the step.

    Args:
        layout: of the optimizer's parameters.
        together: who trains one model with this optimizer.

    Attributes:
        schedule: when curvature is due.
        evaluation: differentiates the losses of the closure that a strategy evaluates just now.
        before_closure: what was noted of all gradients before the closure that runs just now.
        unfinished: what is left of an update that has failed, for the gradients as they are.
        record: of gradients that have their curvature, and of those that have not.
        place: number of this step's probe, where several optimizers share a product.
        strangers: steps of other optimizers that a pass of this one has had nothing for.
        written: whether gradients were written to between their passes and ``scaler.step(opt)``; None before that.
        warned: of such gradients.
    """

    def __init__(self, layout: ParameterLayout, together: Together) -> None:
        self.layout, self._together, self.schedule = layout, together, Schedule(layout)
        self.evaluation: Differentiate | None = None
        self.before_closure: Any = None
        self.unfinished: Any = None
        self.place = 0
        self.strangers: weakref.WeakSet[HessianStep] = weakref.WeakSet()
        self.written: bool | None = None
        self.warned = False
        self.record = StepRecord()
        self._graphs = hvp.Graphs(self._awaited, self._begin_graph, self._end_graph)
        sharing.register(self)

    @property
    def curvature(self) -> Curvature | None:
        """What has been gathered so far; it follows the parameters when these are laid out anew."""
        return self.layout.attached  # type: ignore[return-value]

    @curvature.setter
    def curvature(self, value: Curvature | None) -> None:
        self.layout.attached = value

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that train one model together; None for a process on its own.

        Raises:
            RuntimeError: there are several processes, and nothing tells.
        """
        if self._together.open:
            self.find_ranks(must=True)
        return self._together.ranks

    def find_ranks(self, *, must: bool = False) -> None:
        """Look for the ranks that train one model together, unless they are known, and take the first one's seed."""
        together, params = self._together, list(self.layout.params())
        if together.open:
            together.find(params, must=must)
        if together.ranks is not None:
            self.layout.cover_all_trained()
            together.ranks.look_for_ddps(params)
            together.ranks.watch(self.layout.trained())
        groups = groups_of(params) if together.ranks is None else [together.ranks.group]
        if any_sharded(params):
            make_twice_differentiable()
        if groups:
            self.layout.set_option("seed", agreed(self.layout.options["seed"], groups, params[0].device))

    @property
    def is_due(self) -> bool:
        """Whether the coming step uses new curvature in any group."""
        return any(self._due())

    def _due(self) -> list[bool]:
        """Tell for each group whether the coming step uses new curvature, or name an option that is wrong."""
        try:
            return self.schedule.due()
        except (TypeError, ArithmeticError):
            self.layout.check_options()
            raise

    @property
    def probe_seed(self) -> int:
        """Key of the probe's generator on this rank."""
        return self.seed_at(self.place)

    def seed_at(self, place: int) -> int:
        """Return the key of the probe with a number of its own among those of optimizers that share a product."""
        options = self.layout.options
        seed, ranks = mixed(options["seed"], 0, place) if place else options["seed"], self._together.ranks
        return ranks.probe_seed(seed) if ranks is not None and options["probe_per_rank"] else seed

    def new_curvature(self) -> Curvature:
        """Return a place for the curvature of one backward pass."""
        return Curvature(self.layout.backends, self.probe_seed)

    def draw(self, params: Sequence[Tensor], sample: int, memory: Memory | None = None) -> list[Tensor]:
        """Draw this step's probe of some parameters; ``memory`` is :func:`draw_probe`'s."""
        entries, seed = self.layout.ensure(params), self.probe_seed
        kind = {"probe": self.layout.options["probe"], "seed": seed, "sample": sample, "memory": memory}
        z = draw_probe(entries, self.layout.backends, **kind)
        return [z[entry] for entry in entries]

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check_whole_batch(self) -> None:
        """Raise if the curvature is to come from a part of the mini-batch."""
        fraction = self.layout.options["hessian_fraction"]
        if fraction != 1:
            self.layout.check_options()
            raise RuntimeError(
                f"hessian_fraction={fraction} needs the mini-batch, to take a part of it; write "
                "opt.backward_split(loss_fn, *batch) instead of loss.backward(), opt.backward(loss) or a closure"
            )

    def check_not_sharded(self, leaves: Sequence[Tensor] | None = None) -> None:
        """Raise if parameters are sharded and curvature is to come from a graph in which they are not.

        Args:
            leaves: of the graph; None if there is none.
        """
        strategy = self.layout.options["hvp"]
        if strategy == "finite_difference" or not any_sharded(list(self.layout.params())):
            return
        params = self.layout.trained()
        if not any_sharded(params):
            return
        found = set(map(id, leaves or ()))
        if strategy != "autograd" or not any(id(p) in found for p in params if any_sharded((p,))):
            raise RuntimeError(EXACT_IS_REFUSED.format(strategy))

    def _check_graphs(self, params: Sequence[Tensor]) -> None:
        """Raise unless the gradients of some parameters carry a graph that curvature can come from."""
        strategy, left = self.layout.options["hvp"], self.layout.left
        if strategy == "autograd" and (hvp.has_graph([p.grad for p in params]) or self._graphs.seen):
            self._check_unmixed()
            self._graphs.check()
        elif left is not None and not left.changed():
            raise NoCurvatureError(hvp.USED)
        elif all(map(is_zero, params)):
            raise NoCurvatureError(hvp.CLEARED)
        else:
            raise NoCurvatureError(hvp.NO_CURVATURE if strategy == "autograd" else hvp.NEEDS_FUNCTION.format(strategy))

    def _awaited(self) -> list[Tensor]:
        """Return the parameters whose curvature a ``loss.backward(create_graph=True)`` may be meant for."""
        optimizer = self.layout.optimizer  # alive as long as it is looked at
        wanted = optimizer is not None and self.is_due and self.layout.options["hvp"] == "autograd"
        return self.layout.trained() if wanted else []

    def _check_unmixed(self) -> None:
        if self.record.added:
            raise RuntimeError(hvp.MIXED)

    def _begin_graph(self) -> Collection[int]:
        """Forget the curvature of gradients that are gone, as a ``backward(create_graph=True)`` adds others.

        Returns:
            Ids of parameters whose gradient holds more than that of such passes.
        """
        params = self.layout.trained()
        self._drop_zeroed(params)
        return self.record.mixed_in(params)

    def _end_graph(self, added: Collection[int]) -> None:
        self.record.note_pass(self.layout.trained(), added, of_graphs=True)

    # ---- beside other optimizers -------------------------------------------------------------------------------------

    def takes_part_with(self, other: HessianStep) -> bool:
        """Tell whether a pass of another optimizer can leave curvature here."""
        mine, theirs = self.layout.options, other.layout.options
        alike = all(mine[name] == theirs[name] for name in ("hvp", "hessian_fraction"))
        return alike and mine["hvp"] == "autograd" and self.evaluation is None

    def concerns(self, leaves: Collection[int]) -> bool:
        """Tell whether a pass over the leaves with these ids is one over parameters that are trained here.

        With several ranks also if another one may use them in this pass, in which all take part.
        """
        trained, ranks = self.layout.trained(), self._together.ranks
        if ranks is None or not trained:  # as of an optimizer that is gone
            return any(id(p) in leaves for p in trained)
        return ranks.concern(trained, leaves)

    def is_unmixed(self) -> bool:
        """Tell whether the gradients are this step's, so far, and have their curvature; zeros and None are."""
        added = self.record.added
        return all(is_zero(p) for p in self.layout.trained() if added is None or id(p) in added)

    # ---- backward passes ---------------------------------------------------------------------------------------------

    def begin_pass(self) -> list[Tensor]:
        """Begin a backward pass of ours; returns what is trained here.

        Raises:
            RuntimeError: there are gradients of this step without their curvature.
        """
        params = self.layout.trained()
        self._drop_zeroed(params)
        self.record.begin_pass(params)
        return params

    def _drop_zeroed(self, params: Sequence[Tensor]) -> None:
        """Forget the curvature of gradients that were zeroed or dropped behind our back (``model.zero_grad()``)."""
        zeroed = self.record.zeroed(params)
        if not zeroed:
            return
        # Zeroed in place under no_grad, they have kept the graph that they came with.
        hvp.release_graph([p.grad for p in params if id(p) in zeroed and p.grad is not None])
        if all(id(p) in zeroed or p.grad is None for p in params):
            self.forget()
        elif self.curvature is not None:
            gone = [entry for entry in self.layout.entries.values() if id(entry.owner) in zeroed]
            self.curvature = self.curvature.without(gone)

    def due_params(self) -> list[Tensor]:
        """Return what is trained here and uses new curvature in the coming step."""
        return self.layout.trained(self.schedule.due())

    def due_pairs(self, leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Entry], list[Tensor]]:
        """Return what is trained here and due, and its gradients among those of all leaves, if they have a graph."""
        due, of = self.schedule.due(), dict(zip(map(id, leaves), grads, strict=True))
        params, own = [], []
        for p in self.layout.trained():
            g = of.get(id(p))
            if g is not None:
                params.append(p)
                own.append(g)
        entries, with_graph = [], []
        for entry, g in zip(self.layout.ensure(params), own, strict=True):
            if g.layout is not torch.strided:
                check_grad(g, entry.name)
            if due[entry.group] and g.requires_grad:
                entries.append(entry)
                with_graph.append(g)
        return entries, with_graph

    def with_all(self, curvature: Curvature | None = None) -> Curvature:
        """Return what has been gathered, with that of one more pass."""
        if self._together.ranks is not None:
            self._together.ranks.curvature_averaged = False
        curvature = curvature or self.new_curvature()
        return curvature if self.curvature is None else self.curvature.plus(curvature)

    def report_overflow(self, *, scaled: bool) -> None:
        """Tell ``scaler.unscale_(opt)``, which may be the next call, if the unscaled curvature is not finite.

        All ranks hear the same.
        """
        if not scaled:
            return
        with torch.no_grad():
            agree = None if self.ranks is None or self.ranks.silent else self.ranks.largest
            self.curvature.report([p.grad for p in self.layout.trained() if p.grad is not None], agree)

    def take(
        self,
        leaves: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        probed: Sequence[Tensor],
        probes: Sequence[Sequence[Tensor]],
        products: Sequence[Sequence[Tensor]],
    ) -> None:
        """Take in gradients and Hz that were computed elsewhere, as a backward pass of ours leaves them.

        Args:
            leaves: of the loss.
            grads: their gradients.
            probed: the parameters that have a product.
            probes: for each sample, z of these.
            products: for each sample, their Hz.
        """
        average = self.start_average(leaves, grads)
        hvp.accumulate_grads(leaves, grads)
        hvp.run_accumulated(leaves, grads)
        self.finish_average(average)
        if self.is_due:
            self.take_products(probed, probes, products)

    def take_products(
        self, probed: Sequence[Tensor], probes: Sequence[Sequence[Tensor]], products: Sequence[Sequence[Tensor]]
    ) -> None:
        """Take in Hz that was computed elsewhere, see :meth:`take`."""
        curvature, entries, options = self.with_all(), self.layout.ensure(probed), self.layout.options
        for sample, (z, h) in enumerate(zip(probes, products, strict=True)):
            curvature.take(
                dict(zip(entries, h, strict=True)),
                probe=options["probe"],
                n_samples=options["n_samples"],
                sample=sample,
                z=dict(zip(entries, z, strict=True)),
            )
        self.curvature = curvature

    def take_nothing(self, *, with_curvature: bool) -> None:
        """Take part in the other ranks' backward pass without having any examples."""
        own = set(map(id, self.layout.trained()))
        others = [step for step in sharing.awaiting([self]) if step.concerns(own) and step.is_unmixed()]
        with passing([step for step in (self, *others) if step.is_due]):
            if with_curvature:
                self.curvature = self.with_all()
            self.finish_average(self.start_average())
            for step in others:  # of which other ranks may have had something
                step.curvature = step.with_all() if with_curvature else step.curvature
                step.finish_average(None)

    def take_graph(self, params: Sequence[Tensor]) -> None:
        """Take in the curvature of gradients that ``loss.backward(create_graph=True)`` left.

        Raises:
            RuntimeError: none of them has a graph, or a part of it is missing.
        """
        grads = [p.grad for p in params]
        self._check_graphs(params)
        self.check_whole_batch()
        with_graph = hvp.differentiable(grads)
        self.check_not_sharded([params[i] for i in with_graph])
        leaves, roots = [params[i] for i in with_graph], [grads[i] for i in with_graph]
        graph = hvp.explore(roots)
        reached = {id(leaf) for leaf in graph.leaves}
        others = [step for step in sharing.awaiting([self]) if step.concerns(reached) and step.has_graphs()]
        for step in others:  # whose graphs end here
            more = [p for p in step.layout.trained() if p.grad is not None and p.grad.requires_grad]
            leaves, roots = leaves + more, roots + [p.grad for p in more]
        graph = hvp.explore(roots) if others else graph
        hvp.check_gradients(graph)
        try:
            found, *given = sharing.products([self, *others], leaves, roots)
        except RuntimeError as error:
            if "backward through the graph a second time" in str(error):
                raise RuntimeError(hvp.SPENT) from error
            raise
        self.curvature = self.with_all(found)
        for step, curvature in zip(others, given, strict=True):
            step.begin_with(curvature)
        own = set(map(id, params))  # whose graph goes when the step is sure
        hvp.release_graph([leaf.grad for leaf in graph.leaves if id(leaf) not in own and leaf.grad is not None])

    def has_graphs(self) -> bool:
        """Tell whether the curvature is in the graphs of ``loss.backward(create_graph=True)``, all of them whole."""
        grads = [p.grad for p in self.layout.trained() if p.grad is not None]
        whole = self.curvature is None and self._graphs.seen and hvp.has_graph(grads) and self._graphs.are_whole
        return whole and not self.record.added

    def begin_with(self, curvature: Curvature) -> None:
        """Take in the curvature of all gradients there are, which another optimizer has differentiated with its own."""
        self.curvature = self.with_all(curvature)
        self.finish_average(None)
        self.record.note_pass(self.layout.trained())

    def _take_diagonal(self, hessian: Sequence[Tensor | None], entries: Sequence[Entry]) -> None:
        """Take in curvature that the user brings: D for each parameter, in the order of the groups."""
        params = list(self.layout.params())
        if not isinstance(hessian, Sequence | Tensor):
            raise TypeError(
                f"hessian is of type {type(hessian).__name__}; expected a list of tensors, one for each parameter"
            )
        if len(hessian) != len(params):
            raise ValueError(f"hessian has {len(hessian)} entries; expected {len(params)}, one for each parameter")
        given = {p: part_of(h, p) if isinstance(h, Tensor) else h for p, h in zip(params, hessian, strict=True)}
        for entry in entries:
            h = given[entry.owner]
            if not isinstance(h, Tensor) or h.shape != entry.param.shape:
                what = f"of shape {tuple(h.shape)}" if isinstance(h, Tensor) else repr(h)
                raise ValueError(f"hessian of {entry.name} is {what}; expected shape {tuple(entry.param.shape)}")
        same = all(given[entry.owner].dtype == entry.param.dtype for entry in entries)
        d = {
            entry: entry.stored(given[entry.owner].to(entry.param.device), None if same else entry.bucket.compute_dtype)
            for entry in entries
        }
        curvature = self.new_curvature()
        curvature.unscaled = True
        curvature.add(d, sample=0, is_hvp=False)
        if self.ranks is not None:
            self.ranks.curvature_averaged = False
        self.curvature = curvature

    # ---- several ranks -----------------------------------------------------------------------------------------------

    def batch_weight(self, batch_size: int) -> Tensor:
        """Return the factor on the mean loss of this rank's examples, see :meth:`AdaHessian.batch_weight`."""
        first = self.layout.trained()[0]
        like = torch.ones((), dtype=compute_dtype(first.dtype), device=first.device)
        n = integer(batch_size)
        if n is None or n < 0:
            raise ValueError(f"batch_size={batch_size!r}; expected a number of examples")
        return like if self.ranks is None else batch_weight(batch_size, self.ranks.group, like)

    def start_average(
        self, leaves: Sequence[Tensor] = (), grads: Sequence[Tensor | None] = ()
    ) -> GradientAverage | None:
        """Begin to average gradients over the ranks, those that DDP has of other optimizers' parameters too.

        Args:
            leaves: of a loss.
            grads: their gradients, which come on top of ``p.grad``.

        Returns:
            What :meth:`finish_average` waits for; None if there are no ranks, or inside no_sync().
        """
        if self.ranks is None or self.ranks.silent:
            return None
        trained = self.layout.trained()
        params, of = trained + self.ranks.beside(trained), dict(zip(map(id, leaves), grads, strict=True))
        self.ranks.watch(trained)
        return GradientAverage(self.ranks, params, [of.get(id(p)) for p in params])

    def finish_average(self, average: GradientAverage | None) -> None:
        """Wait for the means; with None the gradients are this rank's own from now on."""
        if average is not None:
            average.finish()
        elif self._together.ranks is not None:
            self._together.ranks.grads_averaged = False

    @property
    def averages_itself(self) -> bool:
        """Whether the gradients of an ordinary backward pass would still have to be averaged here."""
        ranks = self._together.ranks
        return ranks is not None and not ranks.silent and not ranks.averages_first_order

    def average_local(self, *, with_curvature: bool = True) -> None:
        """Average what other backward passes than ours have left on this rank, and take in their curvature."""
        if self.ranks is None or self.ranks.grads_averaged:
            return
        params = [p for p in self.layout.trained() if p.grad is not None]
        wanted = with_curvature and self.curvature is None and self.is_due
        if wanted and params:
            self._check_graphs(params)
        trained = self.layout.trained()
        self.ranks.watch(trained)
        average = GradientAverage(self.ranks, trained)
        if wanted and params:
            self.take_graph(params)
        elif wanted:  # another rank may use these parameters
            self.curvature = self.with_all()
        average.finish()

    def average_curvature(self, due: Sequence[bool]) -> None:
        """Average the curvature of the groups that are due over the ranks, unless it is already."""
        ranks = self._together.ranks
        if ranks is not None and self.curvature is not None and not ranks.curvature_averaged:
            entries = self.layout.ensure(self.layout.trained(due))
            average_curvature(ranks, self.curvature, entries)

    # ---- from the passes to the update -------------------------------------------------------------------------------

    def finish(self, hessian: Sequence[Tensor | None] | None = None) -> Gathered:
        """Complete gradients and curvature, over all backward passes and ranks.

        Args:
            hessian: D for each parameter, in place of the backward passes' curvature.

        Raises:
            NoCurvatureError: it is due, and there is none.
            ValueError: a function ``update_each`` returned what is no number of steps.
            RuntimeError: some of the gradients have their curvature, and some not; or parameters or averaged gradients
                are not the same on all ranks.
        """
        self.schedule.check()
        ranks = self.ranks
        averaged = ranks is not None and ranks.grads_averaged
        if ranks is not None:
            self.average_local(with_curvature=hessian is None)
        entries, grads = self.layout.with_gradients()
        if averaged:
            ranks.check_grads([(entry.name, g) for entry, g in zip(entries, grads, strict=True)])
        if not entries:
            return Gathered((), [], (), None)
        due = self._due()
        if hessian is None:
            self.complete(entries, grads, due)
        else:
            self._take_diagonal(hessian, entries)
            due = [True] * len(due)
            hvp.release_graph(grads)
        if ranks is not None:
            self.average_curvature(due)
        if ranks is not None and any(due):
            trained = self.layout.ensure(self.layout.trained())
            ranks.check_same([(entry.name, entry.param) for entry in trained])
        return Gathered(entries, grads, due, self.curvature)

    def complete(self, entries: Sequence[Entry], grads: Sequence[Tensor], due: Sequence[bool]) -> None:
        """Take in what the gradients' graphs still hold of the curvature, and cut them from these.

        Whichever way the backward passes went.
        """
        with_graph = hvp.has_graph(grads)
        if self.curvature is None:
            if all(due) or (any(due) and any(due[entry.group] for entry in entries)):
                self.take_graph([entry.owner for entry in entries])
        elif with_graph:
            raise RuntimeError(hvp.TWO_WAYS)
        else:
            self._check_unmixed()
        if with_graph:
            hvp.release_graph(grads)

    # ---- one step after the other ------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Drop what has been gathered: its gradients are gone, or their step is done."""
        self.record.forget()
        self.curvature = self.unfinished = self.written = None
        self.place = 0
        self._graphs.clear()

    def zero(self, reset: Callable[[], None], *, to_none: bool) -> None:
        """Reset the gradients by a function; ``to_none``: they do not become zeros."""
        self.forget()
        if self._together.ranks is not None:
            self._together.ranks.reset()
        if self.before_closure is None:
            reset()
        else:  # called by a closure, maybe in a mode, which would be told of every gradient
            with torch._C.DisableTorchFunction():
                reset()
                self.before_closure = note_gradients(list(self.layout.params()))  # zeros are not its backward()'s
        if not to_none:
            self.begin()

    def go_on_with(self, layout: ParameterLayout) -> None:
        """Go on with a new layout of the same parameters, whose states have been replaced."""
        held, placed = self.curvature, set(map(id, layout.params()))
        old = [entry for entry in self.layout.entries.values() if id(entry.owner) in placed]
        self.layout, self.schedule, self.unfinished = layout, Schedule(layout), None
        with contextlib.suppress(RuntimeError):  # averaged in another way than the options say now
            if held is not None:
                self.curvature = held.handed_over(list(zip(old, layout.ensure([e.owner for e in old]), strict=True)))

    def begin(self) -> None:
        """Note the gradients as they are, if the coming step is due: none of them is foreign to it."""
        self.record.begin(self.layout.params() if self.is_due else None)

    def close(self) -> None:
        """End the step, and be ready for the gradients of the next one."""
        self.begin()  # before what has been noted of the same gradients goes: half of it serves again
        self.forget()
        if self._together.ranks is not None:
            self._together.ranks.stepped()


class passing:  # noqa: N801  a class costs every step less than a generator
    """Surround a backward pass of ours: its gradients join those of the steps that have their curvature.

    Args:
        due: the steps of all optimizers that wait for curvature.

    Raises:
        RuntimeError: there are gradients of a step without their curvature.
    """

    def __init__(self, due: Iterable[HessianStep]) -> None:
        self._due = due

    def __enter__(self) -> None:
        self._begun: list[tuple[StepRecord, list[Tensor]]] = []
        try:
            for step in self._due:
                self._begun.append((step.record, step.begin_pass()))
        except BaseException as error:
            self.__exit__(error)
            raise

    def __exit__(self, error: object, *more: object) -> None:
        for record, params in reversed(self._begun):
            record.end_pass(params, failed=error is not None)
