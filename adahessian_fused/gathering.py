"""From losses to gradients and curvature: the optimizer's part before the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import hvp
from .checks import check_given_diagonal, check_grad, integer
from .curvature import Curvature
from .distributed.ranks import batch_weight
from .distributed.sharded import part_of
from .evaluation import Differentiate, EvaluatesLosses
from .fraction import split_batch
from .friendly import curvature_friendly, plain
from .layout import Entry, compute_dtype
from .profiling import profiled


class GathersCurvature(EvaluatesLosses):
    """Optimizer that differentiates losses: gradients into ``p.grad``, curvature into a :class:`Curvature`."""

    def _reset(self) -> None:
        super()._reset()
        self._inside: Differentiate | None = None  # what backward() means while a strategy evaluates a closure

    # ---- losses ------------------------------------------------------------------------------------------------------

    @profiled(lambda opt: f"Optimizer.backward#{type(opt).__name__}.backward")
    def backward(
        self,
        loss: Tensor | Callable[[], Tensor],
        *,
        gradient: Tensor | None = None,
        retain_graph: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        curvature: float | None = None,
        batch_size: int | None = None,
    ) -> Tensor | None:
        """Differentiate the loss: adds to ``p.grad`` like ``loss.backward()`` and gathers curvature if it is due.

        May be called for several micro-batches before :meth:`step`; all of them see the same probe, so the sum of their
        curvature is that of the summed loss. Off-steps cost what ``loss.backward()`` costs. Every leaf gets the
        gradient that ``loss.backward()`` gives it, parameters of other optimizers too.

        Curvature from one of m micro-batches is an unbiased estimate at a fraction of the cost::

            for i, (x, y) in enumerate(micro_batches):
                opt.backward(lambda: loss_fn(model(x), y) / m, curvature=m if i == 0 else 0)

        Args:
            loss: scalar, or with ``gradient`` a tensor of its shape; or a function that computes and returns it. Where
                curvature is due, double backward runs the function inside :class:`curvature_friendly`, and
                ``hvp="finite_difference"`` and ``"forward_over_reverse"`` need one. Finite differences call it twice
                for each sample; it has to do the same each time (random numbers of torch and buffers of modules are
                taken care of).
            gradient: as in ``Tensor.backward``.
            retain_graph: keep the graph of the loss.
            grad_scaler: scales the loss (pass it unscaled). Needed only where other code calls
                ``grad_scaler.unscale_(opt)``; otherwise ``opt.backward(grad_scaler.scale(loss))`` does as well, with
                ``opt.unscale_(grad_scaler)`` if gradients are to be clipped.
            curvature: weight of this loss's curvature, 1 unless given; 0 computes the gradient only.
            batch_size: with a process group, the number of examples of which ``loss`` is the mean on this rank, if not
                all ranks have the same number of them; every rank has to give it. A rank without any calls
                ``opt.backward(None, batch_size=0)``.

        Returns:
            The loss that a function computed, detached; with finite differences the mean over the evaluations.

        Raises:
            RuntimeError: the loss cannot be differentiated as ``hvp`` asks for; the message says what to do.
        """
        if (wrapped := vars(self).get("_optimizer")) is not None:  # Lightning's wrapper, which has our methods as well
            options = {"gradient": gradient, "retain_graph": retain_graph, "grad_scaler": grad_scaler}
            return wrapped.backward(loss, curvature=curvature, batch_size=batch_size, **options)
        given = not callable(loss)
        weight = None if batch_size is None else self.batch_weight(batch_size)
        if self._inside is not None:  # in a closure that a strategy evaluates
            loss = loss if given else loss()
            loss = loss if weight is None else loss * weight
            self._inside(loss if grad_scaler is None else grad_scaler.scale(loss), gradient=gradient)
            return None if given else loss.detach()
        options = self.param_groups[0]
        wanted = self.needs_hessian and curvature != 0
        if batch_size == 0:
            self._take_nothing(wanted)
            return None
        if wanted and curvature is None:
            self._check_whole_batch()
        scale = grad_scaler.scale if grad_scaler is not None and grad_scaler.is_enabled() else None
        if wanted and options["hvp"] != "autograd":
            if given:
                raise RuntimeError(hvp.NEEDS_FUNCTION.format(options["hvp"]))
            weighted = loss if weight is None else lambda: loss() * weight
            found = self._evaluate_loss(weighted, gradient, scale, 1.0 if curvature is None else curvature)
            return found if weight is None else found / weight
        if not given:
            with curvature_friendly() if wanted else plain():
                loss = loss()
        hvp.check_loss(loss, gradient)
        inverse_scale = None
        scaled = loss if weight is None else loss * weight
        if scale is not None:
            inverse_scale = 1 / scale(torch.ones((), dtype=torch.float32, device=loss.device))
            scaled = scale(scaled)
        if wanted:
            differentiate(
                scaled,
                [self],
                gradient=gradient,
                retain_graph=retain_graph,
                inverse_scale=inverse_scale,
                weight=1.0 if curvature is None else curvature,
            )
        else:
            self._first_order(scaled, gradient, retain_graph, by_ddp=batch_size is None and not self.needs_hessian)
        return None if given else loss.detach()

    def backward_split(
        self,
        loss_fn: Callable[..., Tensor],
        *batch: Any,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Differentiate ``loss_fn(*batch)`` with curvature from the first ``hessian_fraction`` of the mini-batch.

        The batch is cut in two; both parts contribute their share of the gradient, the first one curvature as well, so
        a step costs 1 + 2r first-order ones with double backward. For a loss that is the mean over examples the
        gradient is that of the whole batch, and so is the expected curvature. What looks across examples sees a part at
        a time: batch normalisation normalises, and updates its running statistics, with each. Off-steps, and
        ``hessian_fraction=1``, take the batch in one::

            opt.zero_grad()
            loss = opt.backward_split(lambda x, y: loss_fn(model(x), y), x, y)
            opt.step()

        Args:
            loss_fn: computes the mean loss of a batch.
            batch: its arguments; every tensor in them, in tuples, lists and dicts too, has the examples along its first
                axis.
            grad_scaler: as for :meth:`backward`.

        Returns:
            The loss of the whole batch, detached.
        """
        fraction = self.param_groups[0]["hessian_fraction"]
        if not self.needs_hessian or fraction == 1:
            return self.backward(lambda: loss_fn(*batch), grad_scaler=grad_scaler, curvature=1.0)
        if self._inside is not None:
            raise RuntimeError(
                "opt.backward_split() in a closure that is evaluated several times; call it before opt.step() instead"
            )
        first, rest, share = split_batch(batch, fraction)
        with self.no_sync() if share < 1 else contextlib.nullcontext():
            loss = self.backward(lambda: loss_fn(*first) * share, grad_scaler=grad_scaler, curvature=1 / share)
        if share < 1:
            loss += self.backward(lambda: loss_fn(*rest) * (1 - share), grad_scaler=grad_scaler, curvature=0)
        return loss

    def _check_whole_batch(self) -> None:
        """Raise if the curvature is to come from a part of the mini-batch."""
        fraction = self.param_groups[0]["hessian_fraction"]
        if fraction < 1:
            raise RuntimeError(
                f"hessian_fraction={fraction} needs the mini-batch, to take a part of it; write "
                "opt.backward_split(loss_fn, *batch) instead of loss.backward(), opt.backward(loss) or a closure"
            )

    def _first_order(self, loss: Tensor, gradient: Tensor | None, retain_graph: bool, *, by_ddp: bool) -> None:
        """The gradient alone; averaged by DDP if that has been asked to, otherwise here."""
        with self._passing():
            if self._ranks is None or (by_ddp and self._ranks.averages_first_order):
                torch.autograd.backward(loss, gradient, retain_graph=retain_graph)
                return
            leaves = hvp.explore([loss]).leaves  # without any hooks of DDP
            grads = torch.autograd.grad(loss, leaves, gradient, retain_graph=retain_graph, allow_unused=True)
            average = self._start_average(self._own(leaves, grads))
            hvp.accumulate_grads(leaves, grads, gradient)
            hvp.run_post_accumulate_hooks(leaves, grads)
            self._finish_average(average)

    # ---- several ranks -----------------------------------------------------------------------------------------------

    def batch_weight(self, batch_size: int) -> Tensor:
        """Factor on this rank's mean loss of ``batch_size`` examples, for ranks with different numbers of them.

        What ``opt.backward(loss, batch_size=n)`` does, for closures, ``opt.backward_split`` and ``loss.backward()``::

            loss = loss_fn(model(x), y) * opt.batch_weight(len(x))

        Every rank has to call it. It is 1 without a process group.
        """
        _, first = self._trained()[0]
        like = torch.ones((), dtype=compute_dtype(first.dtype), device=first.device)
        n = integer(batch_size)
        if n is None or n < 0:
            raise ValueError(f"batch_size={batch_size!r}; expected a number of examples")
        return like if self._ranks is None else batch_weight(batch_size, self._ranks.group, like)

    def _take_nothing(self, wanted: bool) -> None:
        """The part in a backward pass of a rank that has no examples."""
        with self._passing():
            if wanted:
                self._curvature = self._gathered()
            self._finish_average(self._start_average())

    def _average_local(self, hessian: Sequence[Tensor | None] | None) -> None:
        """Before a step: average what other backward passes than ours have left on this rank."""
        if self._ranks is None or self._ranks.grads_averaged:
            return
        average = self._averaging()
        due, trained = self._due(), self._trained()
        if hessian is None and self._curvature is None and any(due):
            entries = self._ensure([p for _, p in trained if p.grad is not None])
            if entries:
                self._from_graph(entries)
            else:  # another rank may use these parameters
                self._curvature = self._gathered()
        average.finish()

    # ---- curvature from a graph --------------------------------------------------------------------------------------

    def _own(self, leaves: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of this optimizer's parameters among those of all leaves."""
        of = dict(zip(map(id, leaves), grads, strict=True))
        return [of.get(id(p)) for _, p in self._trained()]

    def _products(self, params: Sequence[Tensor], grads: Sequence[Tensor], **options: Any) -> Curvature:
        """The curvature along this step's probes, from parameters and gradients with a graph, those that are due."""
        due, group_of = self._due(), {id(p): n for n, p in self._trained()}
        entries = self._ensure(params)
        pairs = [
            (entry, g)
            for entry, p, g in zip(entries, params, grads, strict=True)
            if due[group_of[id(p)]] and g.requires_grad
        ]
        for entry, g in zip(entries, grads, strict=True):
            check_grad(g, entry.name)
        first = self.param_groups[0]
        curvature = Curvature(self._tools, self._probe_seed)
        curvature.differentiate(
            pairs, probe=first["probe"], n_samples=first["n_samples"], precision=first["hvp_dtype"], **options
        )
        return curvature

    def _from_graph(self, entries: Sequence[Entry]) -> None:
        """Curvature from gradients that ``loss.backward(create_graph=True)`` left."""
        grads = [entry.owner.grad for entry in entries]
        with_graph, way = hvp.differentiable(grads), self.param_groups[0]["hvp"]
        if way != "autograd":
            raise RuntimeError(hvp.NEEDS_FUNCTION.format(way))
        if not with_graph:
            raise RuntimeError(hvp.NO_CURVATURE)
        self._check_whole_batch()
        self._check_differentiable()
        hvp.check_gradients(hvp.explore([grads[i] for i in with_graph]))
        found = self._products([entries[i].owner for i in with_graph], [grads[i] for i in with_graph])
        self._curvature = self._with(found)

    def _from_backward(self, entries: Sequence[Entry], grads: Sequence[Tensor], due: Sequence[bool]) -> None:
        """Curvature from whichever way the backward passes of this step went."""
        if self._curvature is None and any(due[entry.group] for entry in entries):
            self._from_graph(entries)
        elif self._curvature is not None and hvp.has_graph(grads):
            raise RuntimeError(hvp.TWO_WAYS)
        elif self._curvature is not None and self._record is not None and self._record.added:
            raise RuntimeError(hvp.MIXED)

    def _check_given_diagonal(self) -> None:
        check_given_diagonal(self.param_groups[0])

    def _from_user(self, hessian: Sequence[Tensor | None], entries: Sequence[Entry]) -> None:
        """Curvature the user brings: D for each parameter, in the order of the groups."""
        params = [p for group in self.param_groups for p in group["params"]]
        if len(hessian) != len(params):
            raise ValueError(f"hessian has {len(hessian)} entries; expected {len(params)}, one for each parameter")
        self._check_given_diagonal()
        given = dict(zip(params, hessian, strict=True))
        for p, h in given.items():
            given[p] = part_of(h, p) if isinstance(h, Tensor) else h
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
        self._curvature = Curvature(self._tools, self._probe_seed)
        if self._ranks is not None:
            self._ranks.curvature_averaged = False
        self._curvature.unscaled = True
        self._curvature.add(d, sample=0, draw=False)


def differentiate(
    loss: Tensor,
    optimizers: Sequence[GathersCurvature],
    *,
    gradient: Tensor | None,
    retain_graph: bool,
    inverse_scale: Tensor | None = None,
    weight: float = 1.0,
) -> None:
    """One backward pass: gradients of all leaves, and the curvature of the parameters of some optimizers.

    Either all of it is done, or an error leaves gradients and curvature as they were.

    Args:
        loss: what to differentiate.
        optimizers: those whose curvature is due.
        gradient: as in ``Tensor.backward``.
        retain_graph: keep the graph of the loss.
        inverse_scale: factor that takes GradScaler's scale out of Hz.
        weight: factor on Hz.
    """
    with contextlib.ExitStack() as stack:
        for opt in optimizers:
            opt._check_differentiable()
            stack.enter_context(opt._passing())
        graph = hvp.explore([loss])
        leaves = graph.leaves
        grads = hvp.first_order(loss, leaves, gradient, graph)
        found = []
        for number, opt in enumerate(optimizers):
            own = opt._own(leaves, grads)
            average = opt._start_average(own)  # while Hz is computed
            last = number + 1 == len(optimizers)
            curvature = opt._products(
                [p for (_, p), g in zip(opt._trained(), own, strict=True) if g is not None],
                [g for g in own if g is not None],
                retain_graph=retain_graph or not last,
                inverse_scale=inverse_scale,
                weight=weight,
            )
            found.append((opt, opt._with(curvature), average))
        hvp.accumulate_grads(leaves, grads, gradient)
        for opt, curvature, _ in found:
            opt._curvature = curvature
        hvp.run_post_accumulate_hooks(leaves, grads)
        for opt, _, average in found:
            opt._finish_average(average)
            opt._report_overflow(scaled=inverse_scale is not None)
