"""The optimizer: what it is given, who gives g and D, who updates; no arithmetic (that is the backends')."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import amp, backends, closures, hooks, state, statistics
from .backward import backward, backward_split
from .bucket import Entry
from .checks import check_given_diagonal, check_state_dtype, warn
from .curvature import initial_seed
from .distributed.ranks import Together
from .distributed.sharded import local
from .hessian_step import Gathered, HessianStep, NoCurvatureError
from .layout import ParameterLayout, kernels_of
from .profiling import hooked_step, profiled, uncompiled, without_grad
from .record import GradientRecord, Versions, versions
from .update import HyperTable, Part, Parts, prepared_updates

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

_GROUP, _NONFINITE = attrgetter("group"), itemgetter("nonfinite")
# Options that pickles from before lack, as they were then.
_ADDED = {
    "hvp_dtype": None,
    "warmup": 0,
    "clip": None,
    "dense_steps": 0,
    "shrink": 0.0,
    "nesterov": False,
    "cautious": False,
    "nonfinite": "keep",
    "unmeasured": "move",
}
# Its name differs between versions of torch, which have one or the other or both.
_check_graph_capture = next(
    vars(torch.optim.Optimizer)[name]
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if name in vars(torch.optim.Optimizer)
)
_MAY_CAPTURE = torch.accelerator.current_accelerator() is not None  # of what this PyTorch was built for


class AdaHessian(torch.optim.Optimizer):
    """AdaHessian (Yao et al. 2021, Algorithm 1) on fused kernels.

    ::

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) Ds^2
        p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / ((sqrt(v) / sqrt(1 - beta2^h))^k + eps)

    with Ds the block mean (Eq. 7, of magnitudes) of Hutchinson's estimate z * Hz (Eq. 6), z a Rademacher probe,
    t the step and h the number of Hessian updates so far. By default m is a step ahead (``nesterov``) and no element
    moves against its gradient's descent (``cautious``), by more than lr (``clip``) or, in the first steps, far in
    proportion to its parameter (``warmup``); ``recipes.published`` has the paper's rules.
    Four ways to step::

        loss.backward(create_graph=True); opt.step()   # as with every other AdaHessian
        opt.backward(loss); opt.step()                 # no reference cycle; may be called for several micro-batches
        opt.step(closure)                              # the closure returns the loss, with or without backward()
        opt.step(hessian=[...])                        # a diagonal of your own, one tensor a parameter

    ``curvature_friendly(model, opt)``, called once, makes the second derivatives of the first two as cheap as those of
    closures, and has attention and embedding bags differentiated twice.

    Args:
        params: parameters or parameter groups; or the model, in the place of either ``model.parameters()`` or a group's
            ``"params"``, which tells the kernels of its convolutions from other parameters.
        lr: learning rate; a number or a tensor.
        betas: decay rates of the moving averages of the gradient and the squared diagonal.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        hessian_power: k in [0, 1].
        block_size: length b of the averaging blocks in logical row-major order: an int, "row" (last axis), "tensor",
            "auto" (spatial size of convolution kernels, 1 for everything else; kernels are those of the model, if it is
            given, or else parameters of four and five axes) or "conv2d" (the same for four axes only). ``repr`` says
            what is averaged. Per group.
        averaging: "abs" averages magnitudes as the official code does, "signed" averages D (Eq. 7). Per group.
        update_each: Hutchinson frequency: curvature at steps 1, 1 + f, 1 + 2f, ...; or a function: ``update_each(h)``
            steps from the group's Hessian step number h, from 0 and those of ``dense_steps`` included, to the next.
            A function is not in the state dict; loading one leaves the group its own. Per group.
        warmup: N: in a parameter's first N steps, while little is known of its curvature, no element moves by more than
            a fifth of the mean magnitude of the parameter's elements (0.1 if that is less), beside ``clip``; and the
            group's first N steps all have curvature. Per group.
        dense_steps: curvature on each of the first so many steps; None: as many as ``warmup``. Per group.
        off_step: on the steps between, "hold" leaves v and h alone, "stale" feeds the last diagonal in again. Per
            group.
        unmeasured: what becomes of an element with a gradient and no curvature so far (v = 0): a row of an embedding
            that was not in any batch of a Hessian step, or a parameter the loss is linear in. "hold": it collects
            momentum and does not move before it has curvature; "move": it moves by m / eps, as in the published code.
            With ``hessian_power=0`` every element moves. Per group.
        nonfinite: where curvature is infinite or NaN although the gradient is not, as below a norm or a root at zero:
            "keep" goes on with the curvature of the steps before, element by element (an averaging block as a whole),
            warns once for a parameter and counts in :meth:`statistics`; "raise" changes nothing and raises an error,
            for which every Hessian step reads its curvature once more and waits for it. Per group.
        clip: bound c of an element's update before it is multiplied by lr: m / (1 - beta1^t) / denominator is cut at
            +-c, as in Sophia (Liu et al. 2023); None: it is not. Per group.
        shrink: c in v_hat <- (n v_hat + c mean(v_hat)) / (n + c), n = (1 - beta2^h) / (1 - beta2): an element whose
            curvature was measured in few steps borrows its parameter's, as much as from c measurements. The mean is
            that of the last Hessian step before, in the first one its own. 0: it does not. Per group.
        nesterov: what moves the parameter is m after the same gradient once more, beta1 m + (1 - beta1) g, over the sum
            of its weights, 1 - beta1^(t + 1), as in NAdam (Dozat 2016). Per group.
        cautious: elements that momentum would move against their present gradient's descent, and those whose gradient
            is zero, do not move (Liang et al. 2024, "Cautious Optimizers", without the factor that makes up for them);
            weight decay goes on. Per group.
        n_samples: probes averaged in a Hessian step.
        probe: "rademacher" or "gaussian".
        seed: key of the probe's generator. None: ``torch.initial_seed()``, which ``torch.manual_seed`` sets; PyTorch's
            own generators are left alone. Ranks take the first one's.
        hvp: how Hessian-vector products are computed. "autograd": double backward. "forward_over_reverse": tangents
            through forward and backward pass. "finite_difference": the difference of two gradients, for smooth models;
            it needs first-order derivatives only and costs two steps, not three. The last two evaluate the loss
            themselves: ``opt.step(closure)`` or ``opt.backward(lambda: loss_fn(model(x), y))``.
        hvp_dtype: precision of the second differentiation's matrix products and convolutions of float32 tensors (not
            of attention on PyTorch's fused kernels): None, ``torch.bfloat16`` or, on CUDA, "tf32". Loss and gradients
            stay bit for bit what they are. For ``hvp="autograd"``, and not for float64 parameters.
        hessian_fraction: r in (0, 1]: curvature from the first r of each mini-batch, with :meth:`backward_split`.
        fd_epsilon: distance of finite differences; None for
            :data:`~adahessian_fused.hvp.finite_difference.EPSILON` of the coarsest dtype, of the parameters or that the
            loss computes in.
        backend: "native", "triton", "reference", or "auto" for the best that can run.
        maximize: ascend instead of descending. Per group.
        capturable: keep the step counts on the device, so that CUDA graphs can capture a step; no host synchronisation.
        master_weights: keep float32 copies of 16-bit parameters. What others write to a parameter is taken over at the
            next step, except for in-place writes through ``p.data`` (``p.data.copy_(x)``), which leave no trace: write
            to ``p`` itself under ``torch.no_grad()``, or call ``torch.autograd.graph.increment_version(p)``.
        state_dtype: dtype of exp_avg and exp_hessian_diag_sq. None: float32, float64 for float64 parameters.
            ``torch.bfloat16``: half the memory and traffic, rounded stochastically, without bias, from random bits that
            depend on the seed, the step, the parameter and the element alone. Not for float64 parameters.
        process_group: the ranks that train this model together, each with its part of the batch. Gradients and block
            means of the diagonal become means over them. None: in one of several processes the group of the
            DistributedDataParallel module that wraps the model, found by itself, made before or after the optimizer;
            sharded parameters (FSDP2, tensor parallelism) need none. A group of torch.distributed, for models that
            nothing wraps, or a DistributedDataParallel module; "alone": this process trains a model of its own.
        probe_per_rank: with a process group, every rank draws probes of its own, which average like further samples;
            False: all ranks draw the same, and Hz is the product with the mean Hessian.

    Raises:
        ValueError, TypeError: a hyperparameter or parameter out of its range; the message says what was expected.
        RuntimeError: ``backend`` cannot run on the parameters' device; or, from :meth:`step`, there is no curvature.

    Example:
        >>> import torch, adahessian_fused
        >>> model = torch.nn.Linear(3, 1)
        >>> opt = adahessian_fused.AdaHessian(model.parameters(), lr=0.1)
        >>> loss = model(torch.ones(8, 3)).square().mean()
        >>> opt.backward(loss)
        >>> opt.step()
        >>> opt.hessian_diag(model.weight).shape
        torch.Size([1, 3])
    """

    layout_type: ClassVar[type[ParameterLayout]] = ParameterLayout
    table_type: ClassVar[type[HyperTable]] = HyperTable
    state_dtype: torch.dtype | None = None  # of what was pickled before there was such an option

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]] | nn.Module,
        lr: float | Tensor = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        block_size: int | str = "auto",
        averaging: str = "abs",
        update_each: int | Callable[[int], int] = 1,
        warmup: int = 20,
        dense_steps: int | None = None,
        off_step: str = "hold",
        unmeasured: str = "hold",
        nonfinite: str = "keep",
        clip: float | None = 1.0,
        shrink: float = 0.0,
        nesterov: bool = True,
        cautious: bool = True,
        n_samples: int = 1,
        probe: str = "rademacher",
        seed: int | None = None,
        hvp: str = "autograd",
        hvp_dtype: torch.dtype | str | None = None,
        hessian_fraction: float = 1.0,
        fd_epsilon: float | None = None,
        backend: str = "auto",
        maximize: bool = False,
        capturable: bool = False,
        master_weights: bool = False,
        state_dtype: torch.dtype | None = None,
        process_group: ProcessGroup | DistributedDataParallel | str | None = None,
        probe_per_rank: bool = True,
    ) -> None:
        check_state_dtype(state_dtype)
        self.backend, self.state_dtype = backend, state_dtype
        self._together = Together(process_group)
        self._kernels = kernels_of(params) if isinstance(params, nn.Module) else {}
        self._reset()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "block_size": block_size,
            "averaging": averaging,
            "update_each": update_each,
            "warmup": warmup,
            "dense_steps": dense_steps,
            "off_step": off_step,
            "unmeasured": unmeasured,
            "nonfinite": nonfinite,
            "clip": clip,
            "shrink": shrink,
            "nesterov": nesterov,
            "cautious": cautious,
            "n_samples": n_samples,
            "probe": probe,
            "seed": initial_seed() if seed is None else seed,
            "hvp": hvp,
            "hvp_dtype": hvp_dtype,
            "hessian_fraction": hessian_fraction,
            "fd_epsilon": fd_epsilon,
            "maximize": maximize,
            "capturable": capturable,
            "master_weights": master_weights,
            "probe_per_rank": probe_per_rank,
        }
        super().__init__(params.named_parameters() if isinstance(params, nn.Module) else params, defaults)
        self.coming_step.find_ranks()

    def _reset(self) -> None:
        """Forget everything that can be derived from ``state`` and ``param_groups``."""
        self._lay_out_anew()
        self.coming_step = HessianStep(self.layout, self._together)

    def _lay_out_anew(self) -> None:
        """Forget where states were, and what has been told of them."""
        self.layout = self.layout_type(
            self,
            backends.ByDevice(self.backend),
            self._kernels,
            self.state_dtype,
            on_all_ranks=self._together.ranks is not None,
        )
        self._table = self.table_type()
        self._warned: set[str] = set()  # names of parameters whose curvature was not finite
        self._told_of_length = False  # of first steps
        self._empty = 0  # steps without any gradient before the first one with some

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; checked as a whole, and not added if anything is wrong with it."""
        params, named = param_group["params"], any("param_names" in group for group in self.param_groups[:1])
        if isinstance(params, nn.Module):
            self._kernels.update(kernels_of(params))
            param_group["params"] = params.named_parameters() if named else params.parameters()
        elif named and not ("param_names" in param_group or isinstance(params, set)):  # which PyTorch refuses
            params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
            if not any(isinstance(p, tuple) for p in params):
                number = len(self.param_groups)
                param_group["param_names"] = [f"parameter {i} of group {number}" for i in range(len(params))]
        param_group["step"] = 0  # whatever another optimizer has counted in this dict; before other threads see it
        super().add_param_group(param_group)
        try:
            self.layout.check_added()
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self.coming_step.begin()

    profile_hook_step = staticmethod(hooked_step)  # type: ignore[assignment]  # by which PyTorch wraps step()

    def __repr__(self) -> str:
        """Return ``torch.optim.Optimizer``'s text, and what is averaged over blocks."""
        averaged = self.layout.blocks()
        more = f" and {len(averaged) - 8} more" if len(averaged) > 8 else ""
        text = super().__repr__().removesuffix(")")
        return f"{text}Averaged over blocks: {', '.join(averaged[:8]) or 'nothing'}{more}\n)"

    # ---- the step ----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, hessian: Sequence[Tensor | None] | None = None) -> Any:
        """Perform one optimization step.

        Args:
            closure: reevaluates the model; returns the loss, after ``backward()`` or without it.
            hessian: a diagonal D for each parameter, in the order of the groups, instead of Hutchinson's estimate; None
                where a parameter has no gradient. It is averaged over the blocks like any other.

        Returns:
            What the closure returned.

        An error changes nothing. If it comes when some of the parameters are updated (of several dtypes or devices),
        the others still are before it is raised, or else by the next call. So a call may be repeated, with the same
        gradients, until it returns; after ``loss.backward(create_graph=True)`` one that failed while it differentiated
        the gradients' graph says that this is used up.
        """
        return self._step(closure, hessian)

    @uncompiled  # and not step(), of which torch 2.10 would lose self
    @without_grad
    def _step(self, closure: Callable[[], Any] | None, hessian: Sequence[Tensor | None] | None) -> Any:
        if _MAY_CAPTURE:
            _check_graph_capture(self)
        coming = self.coming_step
        if coming.before_closure is not None or coming.evaluation is not None:
            raise RuntimeError(
                "opt.step() was called by the closure of opt.step(closure); expected a closure that computes the loss "
                "and leaves the step to the call that it is given to"
            )
        try:
            if coming.unfinished is not None:
                (parts, loss, *then), coming.unfinished = coming.unfinished, None
                if self._are_still(*then):
                    return self._do(parts, loss)
            loss = None if closure is None else closures.run(self, closure)
            if hessian is not None:
                self._check_given_diagonal()
            gathered = coming.finish(hessian)  # g and D
            if gathered.entries:
                return self._do(self._update(gathered), loss)
            self._count_empty()
            return loss
        except BaseException as error:
            if isinstance(error, NoCurvatureError) and closure is None and state.is_blank_step(self.layout):
                return None  # the states are made, and nothing is counted
            amp.drop_scale(self)
            raise

    def _update(self, gathered: Gathered) -> Parts:
        """Return what is to be done to parameters and states, now that gradients and curvature are known."""
        entries, grads, due, curvature = gathered
        grad_scale, found_inf = amp.scale_and_flag(self, self.coming_step, curvature)
        if found_inf is not None and not self.param_groups[0]["capturable"]:
            if found_inf.item() != 0:
                return Parts([self.coming_step.close])
            found_inf = None
        if curvature is not None and "raise" in map(_NONFINITE, self.param_groups):
            fresh = [entry for entry in entries if due[entry.group]]
            statistics.refuse_nonfinite(curvature, fresh, self.param_groups)
        updates = partial(
            prepared_updates,
            *gathered,
            self.layout,
            self._table,
            seed=self.coming_step.probe_seed,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )
        groups = set(map(_GROUP, entries)) if len(self.param_groups) > 1 else {0}
        count = partial(self.coming_step.schedule.count, groups, found_inf)
        before = [*self._before_update(entries, grads, due)]
        return Parts([*([*before, updates] if before else updates()), count, partial(self._end, entries, due)])

    def _before_update(self, entries: Sequence[Entry], grads: Sequence[Tensor], due: Sequence[bool]) -> Iterable[Part]:
        """Return what a subclass does first in a step that is taken, or with ``capturable`` may still be skipped."""
        return ()

    def _check_given_diagonal(self) -> None:
        """Raise if there are options that a diagonal of the user's would leave without effect."""
        check_given_diagonal(self.param_groups[0])

    def _end(self, entries: Sequence[Entry], due: Sequence[bool]) -> None:
        """End the step, and tell of what was not as one expects; warnings may be errors."""
        self.coming_step.schedule.settle_on_host()
        self.layout.stepped = entries
        self.layout.left = GradientRecord((entries[0].owner, entries[-1].owner))  # not all, which would take time
        self.coming_step.close()
        if any(due):
            statistics.warn_of_nonfinite(self.layout.by_bucket(entries), self._warned)
            self.coming_step.schedule.warn_of_missed()
        if not self._told_of_length:
            self._told_of_length = statistics.warn_of_long_steps(self.layout, entries, self._table)

    def _count_empty(self) -> None:
        """Tell, once, that gradients never come."""
        self._empty += not self.layout.stepped
        if self._empty == 3 and not self.layout.stepped:
            warn(
                "opt.step() has been called three times, and no parameter has had a gradient: nothing moves. Call "
                "opt.backward(loss) before each opt.step(), and opt.zero_grad() before that, not between; and give "
                "AdaHessian the parameters of the model that computes the loss, which a copy of it has not"
            )

    def _do(self, parts: Parts, loss: Any) -> Any:
        """Do what is left of a step and return the loss; if that fails half-way, the next :meth:`step` goes on."""
        try:
            parts.finish()
        except BaseException:
            if parts.begun:
                self.coming_step.unfinished = parts, loss, versions(self.layout.params()), self._places()
            raise
        return loss

    def _places(self) -> list[int]:
        """Return the addresses that what is left of a step may know: of parameters and gradients."""
        tensors = [t for p in self.layout.params() if p.grad is not None for t in (p, p.grad)]
        return [local(tensor).data_ptr() for tensor in tensors]

    def _are_still(self, grads: Versions, places: Sequence[int]) -> bool:
        """Tell whether gradients are those of a failed step; GradScaler writes to them each time it looks."""
        now, scaled = versions(self.layout.params()), getattr(self, "found_inf", None) is not None
        same = len(now) == len(grads) and all(
            g is h and (scaled or v == w) for (g, v), (h, w) in zip(now, grads, strict=True)
        )
        return same and places == self._places()

    # ---- gradients and curvature -------------------------------------------------------------------------------------

    @property
    def needs_hessian(self) -> bool:
        """Whether the coming step uses new curvature: ``loss.backward(create_graph=opt.needs_hessian)``."""
        return self.coming_step.is_due

    @uncompiled
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
        gradient that ``loss.backward()`` gives it, parameters of other optimizers too, and of other AdaHessians the
        curvature, if theirs is due and their gradients begin with this step.

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
        return backward(
            _unwrapped(self).coming_step,
            loss,
            gradient=gradient,
            retain_graph=retain_graph,
            grad_scaler=grad_scaler,
            curvature=curvature,
            batch_size=batch_size,
        )

    @uncompiled
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
        return backward_split(self, loss_fn, batch, grad_scaler)

    def hook_backward(self) -> hooks.BackwardHook:
        """Gather curvature in ``loss.backward()``, wherever it is called, from now on when it is due.

        For trainers that call ``loss.backward()`` and ``opt.step()`` themselves. One call is enough, before or after
        the trainer wraps the optimizer::

            opt = AdaHessian(model.parameters(), lr=0.15)
            opt.hook_backward()
            curvature_friendly(model, opt)  # optional: cheap second derivatives, and those of attention

        On steps with curvature, a loss that depends on parameters of this optimizer is differentiated as by
        ``opt.backward(loss)``, once for all optimizers that are hooked. Off-steps, other losses and calls
        with ``create_graph=True`` or ``inputs=...`` stay PyTorch's. What is hooked is ``Tensor.backward``;
        ``torch.autograd.backward`` is not.

        Returns:
            A handle like those of PyTorch's hooks: ``handle.remove()``, or ``with opt.hook_backward(): ...``. The hook
            ends with the optimizer, and when another optimizer of any of its parameters is hooked. Copies of the
            optimizer have none.

        Raises:
            ValueError: ``hvp`` is a strategy that evaluates the loss itself.
        """
        return hooks.hook_backward(_unwrapped(self))

    @uncompiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop curvature that was gathered with them."""
        # PyTorch's way to None takes ten times the time.
        reset = self.layout.drop_gradients if set_to_none else partial(super().zero_grad, set_to_none)
        self.coming_step.zero(reset, to_none=set_to_none)

    def batch_weight(self, batch_size: int) -> Tensor:
        """Return the factor on this rank's mean loss of ``batch_size`` examples, if ranks differ in that number.

        What ``opt.backward(loss, batch_size=n)`` does, for closures, ``opt.backward_split`` and ``loss.backward()``::

            loss = loss_fn(model(x), y) * opt.batch_weight(len(x))

        Every rank has to call it. It is 1 without a process group.
        """
        return self.coming_step.batch_weight(batch_size)

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Leave gradients and curvature of :meth:`backward` on their rank inside it, as DDP's ``no_sync`` does.

        For all but the last of several micro-batches, forward passes included::

            with opt.no_sync():
                opt.backward(loss_fn(model(x1), y1) / 2)
            opt.backward(loss_fn(model(x2), y2) / 2)

        Without a process group it does nothing.
        """
        ranks = self.coming_step.ranks
        return contextlib.nullcontext() if ranks is None else ranks.no_sync()

    # ---- GradScaler --------------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True: the update divides by the loss scale.

        ``GradScaler.step`` asks for this right before it looks for infinities in the gradients: the moment to compute
        curvature that only :meth:`step` would have computed. Asking again changes nothing.

        False inside closures: GradScaler does not take them, so gradients carry no scale there and may be clipped,
        which is what Lightning wants to know.
        """
        if self.coming_step.before_closure is not None or self.coming_step.evaluation is not None:
            return False
        amp.complete_curvature(self.coming_step)
        return True

    def unscale_(self, grad_scaler: torch.amp.GradScaler) -> None:
        """Divide the gradients by the loss scale, and the curvature too: ``scaler.unscale_(opt)`` for this optimizer.

        Works with every way to get gradients of a scaled loss, once all of the step's backward passes are done::

            scaler.scale(loss).backward(create_graph=opt.needs_hessian)
            opt.unscale_(scaler)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()

        After ``opt.backward(loss, grad_scaler=scaler)``, which divides the curvature at once, ``scaler.unscale_(opt)``
        does as well.

        Args:
            grad_scaler: what has scaled the loss.

        Raises:
            RuntimeError: gradients of this step are unscaled already.
            ValueError: a gradient is float16, which GradScaler does not unscale.
        """
        if grad_scaler.is_enabled():
            amp.complete_curvature(self.coming_step, grad_scaler)
            grad_scaler.unscale_(self)

    # ---- looking at it -----------------------------------------------------------------------------------------------

    def hessian_diag(self, param: Tensor) -> Tensor:
        """Return the root-mean-square Hessian diagonal, sqrt(v / (1 - beta2^h)): a new tensor like the parameter.

        Raises:
            RuntimeError: the parameter has not seen any curvature yet.
            ValueError: it is not a parameter of this optimizer.
        """
        return statistics.hessian_diag(self, param)

    @torch.no_grad()
    def statistics(self) -> statistics.Statistics:
        """Return norms of parameters, gradients, last update and diagonal, in all and for each group.

        Call it after :meth:`step`, and before ``zero_grad()`` if the gradients or the last update matter. Everything is
        computed here, from the state; a step that nobody asks about costs nothing more. This does not wait for the
        device (reading the result does), and meanwhile needs memory for a few copies of the largest parameter. With
        sharded parameters every rank has to call it, and all get the same.

        Example:
            >>> import torch, adahessian_fused
            >>> model = torch.nn.Linear(3, 1)
            >>> opt = adahessian_fused.AdaHessian(model.parameters(), lr=0.1)
            >>> opt.backward(model(torch.ones(8, 3)).square().mean())
            >>> opt.step()
            >>> opt.statistics().as_dict()["hessian_step"]
            1.0
        """
        return statistics.statistics(self.layout, self._table)

    # ---- states ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict, as ``torch.optim.Optimizer.state_dict``; every tensor owns its memory.

        The state of parameters that are in no group any more, which PyTorch cannot number, is left out.
        """
        with state.without_removed(self):
            return state.portable(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of another AdaHessian, or of Adam, AdamW or Adamax.

        Of another AdaHessian its options come along, and what its code has built in where this optimizer has left the
        option at its default (``warmup``, ``clip``, ``nesterov``, ``cautious``, ``off_step``; its averaging where both
        ``block_size`` and ``averaging`` are). Of Adam's family ``exp_avg`` and the count of steps are taken, no
        options, and curvature is due at once. A warning tells what was taken and what is unknown.

        ``state_dtype`` stays as it is: float32 moving averages are rounded to nearest, bfloat16 ones widened. Gradients
        that are there, and the curvature gathered with them, are for the next :meth:`step`, as without loading.

        Raises:
            ValueError: the state dict has other groups or parameters than this optimizer, or is of another one.

        Warns:
            UserWarning: it is not from this class.
        """
        source, coming = state.source_of(state_dict), self.coming_step
        super().load_state_dict(state.with_own_options(state_dict, self.param_groups, source))
        state.take_states(self, state_dict, source, self.state_dtype)
        self._lay_out_anew()
        coming.go_on_with(self.layout)
        self.coming_step = coming
        state.warn_of_source(source, self.param_groups[0])

    def __getstate__(self) -> dict[str, Any]:
        """Return what deepcopy and pickle keep: the state dict's content with the parameters themselves."""
        result = super().__getstate__()
        result["state"] = type(self.state)(self.state.default_factory, state.own_memory(self.state))
        result |= {"backend": self.backend, "state_dtype": self.state_dtype, "_kernels": self._kernels}
        return {**result, "_together": self._together}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and give groups that another optimizer saved the options they lack."""
        super().__setstate__(state)
        self.__dict__.setdefault("_kernels", {})
        self.__dict__.setdefault("_together", Together(None))
        self._reset()
        self.defaults = {**_ADDED, **self.defaults}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)


def _unwrapped(opt: Any) -> Any:
    """Return the optimizer in Lightning's wrapper, which has our methods as well, but old attributes."""
    return vars(opt).get("_optimizer", opt)
