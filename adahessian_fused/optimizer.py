"""The optimizer: schedules, styles of stepping and state; no arithmetic (that is the backends')."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from operator import attrgetter, is_, is_not
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends, hvp
from .amp import FollowsGradScaler
from .checks import check_grad, check_group, check_hvp_dtype, check_param, check_state_dtype
from .curvature import Curvature, by_bucket, initial_seed
from .distributed import sharded
from .distributed.ranks import Ranks, agreed, several_ranks
from .layout import Entry, Found, block_length, kernels_of, make_buckets, stored_dtype
from .statistics import Observable
from .update import HyperTable, Part, Parts, prepared_update

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn.parallel import DistributedDataParallel

_LAYOUT, _GRAD, _GROUP = attrgetter("layout"), attrgetter("grad"), attrgetter("group")
# Its name differs between versions of torch, which have one or the other or both.
_check_graph_capture = next(
    vars(torch.optim.Optimizer)[name]
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
    if name in vars(torch.optim.Optimizer)
)

# Options that hold for the whole optimizer although they are stored in every parameter group.
_OPTIMIZER_WIDE = (
    *("n_samples", "probe", "seed", "hvp", "hvp_dtype", "hessian_fraction", "fd_epsilon"),
    *("capturable", "master_weights", "probe_per_rank"),
)


def _keeps_diag(group: dict[str, Any]) -> bool:
    """Whether the diagonal of a Hessian step is used on the steps after it."""
    return group["off_step"] == "stale" and group["update_each"] > 1


def _names(group: dict[str, Any], number: int) -> Sequence[str]:
    """What to call the parameters of a group; the names it was made with do not tell once its list was edited."""
    names: Sequence[str] = group.get("param_names", ())
    count = len(group["params"])
    return names if len(names) == count else [f"parameter {i} of group {number}" for i in range(count)]


class AdaHessian(Observable, FollowsGradScaler):
    """AdaHessian (Yao et al. 2021, Algorithm 1) on fused kernels.

    ::

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) Ds^2
        p <- p (1 - lr wd) - lr / (1 - beta1^t) * m / ((sqrt(v) / sqrt(1 - beta2^h))^k + eps)

    with Ds the block mean (Eq. 7) of Hutchinson's estimate z * Hz (Eq. 6), z a Rademacher probe,
    t the step and h the number of Hessian updates so far. Four ways to step::

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
        averaging: "signed" averages D (Eq. 7), "abs" averages magnitudes as the official code does. Per group.
        update_each: Hutchinson frequency: curvature at steps 1, 1 + f, 1 + 2f, ... Per group.
        dense_steps: curvature on each of the first N steps, too, while little is known of it. Per group.
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
        n_samples: probes averaged in a Hessian step.
        probe: "rademacher" or "gaussian".
        seed: key of the probe's generator. None: ``torch.initial_seed()``, which ``torch.manual_seed`` sets; PyTorch's
            own generators are left alone. Ranks take the first one's; of several without ``process_group`` and sharded
            parameters each takes 0.
        hvp: how Hessian-vector products are computed. "autograd": double backward. "forward_over_reverse": tangents
            through forward and backward pass. "finite_difference": the difference of two gradients, for smooth models;
            it needs first-order derivatives only and costs two steps, not three. The last two evaluate the loss
            themselves: ``opt.step(closure)`` or ``opt.backward(lambda: loss_fn(model(x), y))``.
        hvp_dtype: precision of the second differentiation's matrix products, convolutions and attention of float32
            tensors: None, ``torch.bfloat16`` or, on CUDA, "tf32". Loss and gradients stay bit for bit what they are.
            For ``hvp="autograd"``, and not for float64 parameters.
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
        process_group: the ranks that train this model together, each with its part of the batch: a group of
            torch.distributed, or the DistributedDataParallel module that wraps the model. Gradients and block means of
            the diagonal become means over the ranks. Sharded parameters (FSDP2) need none.
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
        averaging: str = "signed",
        update_each: int = 1,
        dense_steps: int = 0,
        off_step: str = "hold",
        unmeasured: str = "hold",
        nonfinite: str = "keep",
        clip: float | None = None,
        shrink: float = 0.0,
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
        process_group: ProcessGroup | DistributedDataParallel | None = None,
        probe_per_rank: bool = True,
    ) -> None:
        check_state_dtype(state_dtype)
        self.backend, self.state_dtype = backend, state_dtype
        self._ranks = None if process_group is None else Ranks(process_group)
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
            "dense_steps": dense_steps,
            "off_step": off_step,
            "unmeasured": unmeasured,
            "nonfinite": nonfinite,
            "clip": clip,
            "shrink": shrink,
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
        self._agree_on_seed(given=seed is not None)

    def _agree_on_seed(self, *, given: bool) -> None:
        """Take the first rank's seed, where ranks train one model together: they draw alike, or apart on purpose."""
        groups = sharded.groups_of(self._params()) if self._ranks is None else [self._ranks.group]
        seed = self.param_groups[0]["seed"]
        if groups:
            seed = agreed(seed, groups, next(self._params()).device)
        elif not given and several_ranks():  # nobody to ask; what averages gradients needs the same probe everywhere
            seed = 0
        for options in (self.defaults, *self.param_groups):
            options["seed"] = seed

    # ---- parameters and their layout ---------------------------------------------------------------------------------

    def _reset(self) -> None:
        """Forget everything that can be derived from ``state`` and ``param_groups``."""
        super()._reset()
        self._entries: dict[int, Entry] = {}  # by id of the parameter, whose own hash is slow
        self._seen: tuple[list[dict[str, Any]], list[Any]] = [], []
        self._hyper = HyperTable()
        self._tools = backends.ByDevice(self.backend)
        self._options: list[tuple[int | str, str, bool, bool, int]] = []
        self._placed: list[Tensor] = []
        self._found = Found()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; checked as a whole, and not added if anything is wrong with it."""
        if isinstance(param_group["params"], nn.Module):
            self._kernels = {**self._kernels, **kernels_of(param_group["params"])}
            param_group["params"] = param_group["params"].parameters()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            for name in _OPTIMIZER_WIDE:
                first = self.param_groups[0][name]
                if group[name] != first:
                    raise ValueError(f"{name}={group[name]!r}; expected {first!r}, it is the same for all groups")
            sharded.check_options(group, has_group=self._ranks is not None)
            number = len(self.param_groups) - 1
            if len(set(map(id, group["params"]))) < len(group["params"]):
                raise ValueError(f"group {number} has a parameter more than once; expected it in one place")
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    check_param(p, f"parameter {i} of group {number}")
                    stored_dtype(p.dtype, self.state_dtype)
                    check_hvp_dtype(group["hvp_dtype"], group["hvp"], p.dtype)
                    backends.choose(self.backend, p.device.type)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        group["step"] = 0  # whatever another optimizer has counted in this dict
        if self._ranks is not None:
            self._ranks.watch([p for p in group["params"] if p.requires_grad])
        self._leave()

    def _ensure(self, params: Sequence[Tensor]) -> list[Entry]:
        """The entries of parameters; the buckets are rebuilt if anything about them or the groups changed."""
        options = [
            (group["block_size"], group["averaging"], _keeps_diag(group), group["shrink"] > 0, len(group["params"]))
            for group in self.param_groups
        ]
        parts = [sharded.local(p) for p in params] if sharded.any_sharded(params) else params
        as_before = options == self._options and all(map(is_, self._params(), self._placed))
        found = self._found.entries(params, parts, self._entries) if as_before and not self._state_replaced() else None
        if found is None:
            self._rebuild(params)
            self._options, self._placed, self._found = options, list(self._params()), Found()
            found = [self._entries[id(p)] for p in params]
        return found

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _state_contents(self) -> tuple[list[dict[str, Any]], list[Any]]:
        states = list(self.state.values())
        return states, list(chain.from_iterable(map(dict.values, states)))

    def _state_replaced(self) -> bool:
        """Whether ``state``, or anything in it, is another object than after the last rebuild."""
        now, (states, contents) = self.state.values(), self._seen
        return not (
            len(now) == len(states)
            and sum(map(len, now)) == len(contents)
            and all(map(is_, now, states))
            and all(map(is_, chain.from_iterable(map(dict.values, now)), contents))
        )

    @torch.no_grad()
    def _rebuild(self, params: Iterable[Tensor]) -> None:
        """Sort all parameters that have had a gradient, before a checkpoint too, into new buckets with their state.

        An error leaves everything as it was.
        """
        wanted = set(params).union(p for p, state in self.state.items() if "exp_avg" in state)
        if self._ranks is not None:  # the same layout on all of them, whatever each has used
            wanted.update(p for _, p in self._trained())
        new = self._described(wanted)
        first = self.param_groups[0]
        make_buckets(
            new.values(),
            capturable=first["capturable"],
            master_weights=first["master_weights"],
            keep_diag=any(_keeps_diag(group) for group in self.param_groups),
            keep_means=any(group["shrink"] > 0 for group in self.param_groups),
            state_dtype=self.state_dtype,
        )
        pairs = [(entry, new[key]) for key, entry in self._entries.items() if key in new]
        for old, fresh in pairs:
            fresh.missed.copy_(old.missed)
            fresh.used_mean = old.used_mean
        curvature, diags = self._curvature, {}
        if curvature is not None:
            if any(old.probe_words() != fresh.probe_words() for old, fresh in pairs if old in curvature.products):
                curvature.settle()
            diags = curvature.moved(pairs)
        self._lay_out(new, pairs)
        if curvature is not None:
            curvature.diags = diags
            curvature.products = {e: h for e, h in curvature.products.items() if self._entries.get(id(e.owner)) is e}

    def _described(self, wanted: set[Tensor]) -> dict[int, Entry]:
        """New entries of parameters, as the groups are now; everything about them is checked."""
        entries: dict[int, Entry] = {}
        param_id = 0
        for number, group in enumerate(self.param_groups):
            check_group(group)
            for name, p in zip(_names(group, number), group["params"], strict=True):
                if p in wanted:
                    if id(p) in entries:
                        raise ValueError(f"{name} is {entries[id(p)].name}, too; expected it in one place")
                    check_param(p, name)
                    self._tools[p.device.type]  # raises where no backend can run
                    entry = entries[id(p)] = Entry(p, name, param_id, number, self.state.get(p, {}))
                    entry.describe(group["block_size"], group["averaging"], self._kernel_of(p))
                param_id += 1
        return entries

    def _lay_out(self, new: dict[int, Entry], pairs: Sequence[tuple[Entry, Entry]]) -> None:
        """Put new entries in the place of the old ones, which stay the same objects, and their views into ``state``."""
        if len(pairs) < len(self._entries) or any(old.group != fresh.group for old, fresh in pairs):
            self._stepped = []  # by other hyperparameters than those of their groups now
        for entry in self._entries.values():
            if id(entry.owner) not in new:  # not in any group; its state shall not keep all buffers alive
                entry.state.update({k: x.clone() for k, x in entry.state.items() if isinstance(x, Tensor)})
        for old, fresh in pairs:
            old.become(fresh)
            new[id(old.owner)] = old
        for entry in new.values():
            entry.publish()
            self.state[entry.owner] = entry.state
        self._entries, self._seen = new, self._state_contents()

    def _with_gradients(self) -> tuple[list[Entry], list[Tensor]]:
        """The parameters that have a gradient, and their gradients."""
        params = list(self._params())
        grads = list(map(_GRAD, params))
        if not all(map(is_not, grads, repeat(None))):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        entries = self._ensure(params) if params else []
        if not set(map(_LAYOUT, grads)) <= {torch.strided}:
            for entry, grad in zip(entries, grads, strict=True):
                check_grad(grad, entry.name)
        if sharded.any_sharded(params):
            grads = [sharded.part_of(grad, p) for grad, p in zip(grads, params, strict=True)]
        return entries, grads

    def __repr__(self) -> str:
        """As ``torch.optim.Optimizer``'s, and what is averaged over blocks."""
        averaged = []
        for number, group in enumerate(self.param_groups):
            for name, p in zip(_names(group, number), group["params"], strict=True):
                b = min(block_length(p.shape, group["block_size"], self._kernel_of(p)), p.numel())
                averaged += [f"{name} ({b})"] if b > 1 else []
        more = f" and {len(averaged) - 8} more" if len(averaged) > 8 else ""
        text = super().__repr__().removesuffix(")")
        return f"{text}Averaged over blocks: {', '.join(averaged[:8]) or 'nothing'}{more}\n)"

    # ---- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        gradients, until it returns.
        """
        _check_graph_capture(self)
        try:
            return self._take(closure, hessian)
        except BaseException:
            self._drop_scale()
            raise

    def _take(self, closure: Callable[[], Any] | None, hessian: Sequence[Tensor | None] | None) -> Any:
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None and self._has_still(unfinished[2]):
            return self._finish(*unfinished[:2])
        loss = None if closure is None else self._evaluate(closure)
        if not self.state and closure is None and self._is_blank():
            return loss
        self._average_local(hessian)
        entries, grads = self._with_gradients()
        if not entries:
            return loss
        due = self._due()
        if hessian is None:
            self._from_backward(entries, grads, due)
        else:
            self._from_user(hessian, entries)
            due = [True] * len(due)
        hvp.release_graph(grads)
        self._average_curvature(due)
        return self._finish(self._parts(entries, grads, due, self._curvature), loss)

    def _is_blank(self) -> bool:
        """Whether the first step has lr = 0 and gradients of zero, by which torch.distributed.checkpoint makes states.

        They are made, and nothing is counted.
        """
        grads = [(p, p.grad) for _, p in self._trained() if p.grad is not None]
        still = all(float(group["lr"]) == 0 for group in self.param_groups)
        if not still or not grads or any(g.requires_grad or bool(sharded.part_of(g, p).any()) for p, g in grads):
            return False
        self._ensure([p for p, _ in grads])
        return True

    def _parts(
        self, entries: Sequence[Entry], grads: list[Tensor], due: Sequence[bool], curvature: Curvature | None
    ) -> Parts:
        """What there is to do now that gradients and curvature are known."""
        grad_scale, found_inf = self._scale_and_flag(curvature)
        end = partial(self._end, entries, due)
        if found_inf is not None and not self.param_groups[0]["capturable"]:
            if found_inf.item() != 0:
                return Parts([self._close, end])
            found_inf = None
        if curvature is not None:
            self._refuse_nonfinite(curvature, [entry for entry in entries if due[entry.group]])
        prepare = partial(self._prepare, entries, grads, due, curvature, grad_scale, found_inf)
        return Parts([*self._before_update(entries, grads, due), prepare, self._close, end])

    def _prepare(
        self,
        entries: Sequence[Entry],
        grads: list[Tensor],
        due: Sequence[bool],
        curvature: Curvature | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> list[Part]:
        """The updates of all buckets, after everything in them that needs memory or may fail."""
        rescaled = grad_scale is not None and curvature is not None and curvature.unscaled
        if curvature is not None and (rescaled or curvature.must_fold(self._entries.values())):
            curvature.fold()
        grad_of = dict(zip(entries, grads, strict=True))
        updates = []
        for bucket, in_bucket in by_bucket(entries).items():
            groups = self._hyper.on(bucket.steps.device, self.param_groups)
            for kind, members in self._by_kind(in_bucket, due).items():
                update = prepared_update(
                    bucket,
                    members,
                    grads if len(members) == len(entries) else [grad_of[entry] for entry in members],
                    kind,
                    curvature,
                    groups,
                    self._tools[bucket.device.type],
                    seed=self._probe_seed,
                    rounding_seed=self.param_groups[0]["seed"],
                    grad_scale=None if grad_scale is None else grad_scale.to(bucket.device),
                    found_inf=None if found_inf is None else found_inf.to(bucket.device),
                )
                updates.append(update)
        count = partial(self._count_step, set(map(_GROUP, entries)), found_inf)
        return [*chain.from_iterable(zip(*updates, strict=True)), count, partial(self._settle, entries)]

    def _before_update(self, entries: Sequence[Entry], grads: Sequence[Tensor], due: Sequence[bool]) -> Iterable[Part]:
        """What a subclass does first in a step that is taken (with ``capturable``: that the device may still skip)."""
        return ()

    def _settle(self, entries: Sequence[Entry]) -> None:
        if self._uncertain is not None and self._uncertain[0].device.type == "cpu":
            self._settle_count()
        self._stepped = entries

    def _close(self) -> None:
        """Be ready for the gradients of the next step."""
        self._forget()
        self._leave()
        if self._ranks is not None:
            self._ranks.stepped()

    def _end(self, entries: Sequence[Entry], due: Sequence[bool]) -> None:
        """Tell of what was not as one expects; warnings may be errors."""
        if any(due):
            self._warn_of_missed(entries)
            self._tell_of_missed()

    def _finish(self, parts: Parts, loss: Any) -> Any:
        """Do what is left of a step and return the loss.

        An error that comes when something is updated is raised when all else is, if that can be done without another;
        if not, the next :meth:`step` goes on from there.
        """
        try:
            parts.do()
        except BaseException:
            if parts.begun:
                try:
                    with contextlib.suppress(Exception):
                        parts.do()
                finally:
                    self._unfinished = parts, loss, self._grad_versions()
            raise
        return loss

    def _has_still(self, grads: Sequence[tuple[Tensor | None, int]]) -> bool:
        """Whether gradients are those of a step that has failed; GradScaler writes to them each time it looks."""
        now, scaled = self._grad_versions(), getattr(self, "found_inf", None) is not None
        return len(now) == len(grads) and all(
            g is h and (scaled or v == w) for (g, v), (h, w) in zip(now, grads, strict=True)
        )

    def _by_kind(self, entries: Sequence[Entry], due: Sequence[bool]) -> dict[str, list[Entry]]:
        """Split entries by where the curvature of this step comes from."""
        if all(due):
            return {"fresh": list(entries)}
        kinds: dict[str, list[Entry]] = {}
        for entry in entries:
            if due[entry.group]:
                kind = "fresh"
            elif self.param_groups[entry.group]["off_step"] == "stale" and "hessian_diag" in entry.views:
                kind = "stale"
            else:
                kind = "hold"
            kinds.setdefault(kind, []).append(entry)
        return kinds
