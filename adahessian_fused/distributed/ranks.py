"""The processes that train one model together."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..curvature import mixed
from .sharded import any_sharded

ALONE = "alone"
CHECK_EACH = 100  # steps with curvature between two looks at whether the ranks' parameters are the same
_AVAILABLE = dist.is_available()
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes

UNKNOWN = (
    "this is one of {} processes, and nothing tells whether they train one model: its parameters are neither in a "
    "DistributedDataParallel module nor sharded (DTensor). Expected AdaHessian(..., "
    "process_group=torch.distributed.group.WORLD), or another group, over which gradients and curvature are averaged; "
    'or process_group="alone" if this process trains a model of its own'
)
OTHER_GROUP = (
    "process_group is of ranks {}, but DistributedDataParallel averages gradients of these parameters over ranks {}; "
    "expected the same ones, or process_group=None, which finds them"
)
STATIC_GRAPH = (
    "DistributedDataParallel(static_graph=True) learns in the first backward pass which parameters it averages, and "
    "steps with curvature go past its hooks: it would average none from then on; expected static_graph=False"
)
JOINED = (
    "inside join() ranks without a batch answer to the communication of DistributedDataParallel only, not to that of "
    "the curvature; expected opt.backward(loss, batch_size=len(x)) without join(), and opt.backward(None, "
    "batch_size=0) on ranks that have no batch left"
)
UNLIKE = (
    "the ranks do not train the same parameters: this one trains {}, and another one others; expected requires_grad, "
    "order and shapes to be the same on all ranks. One that a rank does not use may stay without a gradient there"
)
DIFFERENT = (
    "{} is not the same on all ranks, and would never be; expected every rank to begin with the same parameters: wrap "
    "the model in DistributedDataParallel, which sends those of the first, or send them, torch.distributed.broadcast("
    "p.data, 0) for p in model.parameters(), or call torch.manual_seed with one seed before the model is made"
)

CHANGED_APART = (
    "the gradient of {} was averaged over the ranks, and is not the same on all of them any more; expected nothing to "
    "be done to it that differs, as clip_grad_norm_ does over parameters whose gradients are this rank's own: clip "
    "this optimizer's alone, average the others' before, call hook_backward() of every AdaHessian in the loss, or wrap "
    "the model in DistributedDataParallel"
)


def batch_weight(batch_size: int, group: dist.ProcessGroup, like: Tensor) -> Tensor:
    """Return W n / (n_1 + ... + n_W) for the n examples of this rank: a factor on its mean loss.

    The mean over the W ranks of losses that are weighted so is the mean loss of all examples, also where the ranks have
    different numbers of them. Every rank of the group has to call it.

    Args:
        batch_size: number of examples on this rank; may be 0.
        group: the process group.
        like: a floating-point tensor of the dtype and on the device that the result shall have.

    Returns:
        A scalar.

    Example:
        A rank with 3 of 8 examples multiplies its mean loss with ``2 * 3 / 8`` if there are two ranks::

            loss = loss_fn(model(x), y) * batch_weight(len(x), torch.distributed.group.WORLD, like=x)
    """
    total = torch.tensor(batch_size, device=like.device)
    dist.all_reduce(total, group=group)
    return (batch_size * dist.get_world_size(group) / total.double()).to(like.dtype)


def several_ranks() -> bool:
    """Tell whether this is one of several processes of torch.distributed."""
    return _AVAILABLE and dist.is_initialized() and dist.get_world_size() > 1


def agreed(number: int, groups: Sequence[dist.ProcessGroup], device: torch.device) -> int:
    """Return the first rank's number, on all ranks of a group; group after group, as along the axes of a mesh."""
    for group in groups:
        tensor = torch.tensor(number, dtype=torch.int64, device=device)
        dist.broadcast(tensor, group=group, group_src=0)
        number = int(tensor)
    return number


def ddps_around(params: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel modules that have some of the parameters."""
    wanted = set(map(id, params))
    # Not issubclass, which asks Python code for each object, as DDP is an abstract class.
    alive = [each for each in gc.get_objects() if DistributedDataParallel in type(each).__mro__]
    return [ddp for ddp in alive if "module" in ddp._modules and not wanted.isdisjoint(map(id, ddp.parameters()))]


@contextlib.contextmanager
def without(ddps: Iterable[DistributedDataParallel]) -> Iterator[None]:
    """Keep DDP from averaging; while a strategy evaluates a closure, a rank's gradients belong to its own probe."""
    with contextlib.ExitStack() as stack:
        for ddp in ddps:
            stack.enter_context(ddp.no_sync())
        yield


class Together:
    """Who trains one model with an optimizer: named by its user, or found by what averages its gradients.

    Args:
        process_group: as AdaHessian's.

    Attributes:
        ranks: those ranks; None as long as they are not known, and for a process on its own.
    """

    def __init__(self, process_group: Any) -> None:
        self._given = process_group
        named = process_group is not None and not (isinstance(process_group, str) and process_group == ALONE)
        self.ranks = Ranks(process_group) if named else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        return Together(self._given if self.ranks is None or self._given is None else self.ranks.group)

    def __reduce__(self) -> Any:
        if self.ranks is not None and self._given is not None:
            raise TypeError(
                "an optimizer with a process_group cannot be pickled: the group is this process's own; expected "
                "optimizer.state_dict() in its place"
            )
        return Together, (self._given,)

    @property
    def open(self) -> bool:
        """Tell whether there are several processes, and it is not known whether they train together."""
        return self._given is None and self.ranks is None and several_ranks()

    def find(self, params: Sequence[Tensor], *, must: bool) -> None:
        """Look for what averages the gradients of parameters.

        Raises:
            RuntimeError: there is nothing, and there must be.
        """
        if any_sharded(params):
            self._given = ALONE  # FSDP averages, and with tensor parallelism all have the same batch
            return
        ddps = ddps_around(params)
        if ddps:
            self.ranks = Ranks(ddps)
        elif must:
            raise RuntimeError(UNKNOWN.format(dist.get_world_size()))


class Ranks:
    """A process group as an optimizer sees it, and what of the coming step has been averaged over it.

    Averaging is idempotent: what all ranks agree on stays as it is. So gradients that have been averaged before, by
    DDP for instance, may be averaged once more, with local ones added to them or not; only the traffic is lost.

    Args:
        process_group: the group; or a DistributedDataParallel module or several, whose group it is, whose ``no_sync()``
            counts here, and whose own averaging is relied on after ordinary backward passes through all of them.

    Attributes:
        grads_averaged: whether ``p.grad`` is the mean over the ranks.
        curvature_averaged: the same of the curvature that has been gathered.
        averaged_late: whether ``scaler.step(opt)`` had to average the gradients.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | DistributedDataParallel | Sequence[DistributedDataParallel]
    ) -> None:
        ddps = [process_group] if isinstance(process_group, DistributedDataParallel) else process_group
        group = process_group
        if isinstance(ddps, list) and ddps and all(isinstance(ddp, DistributedDataParallel) for ddp in ddps):
            groups = {id(ddp.process_group): ddp.process_group for ddp in ddps}
            if len(groups) > 1:
                raise ValueError(
                    "the parameters are in DistributedDataParallel modules of several process groups; expected one, or "
                    "an optimizer for each"
                )
            (group,) = groups.values()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group is a {type(process_group).__name__}; expected a torch.distributed process group, such "
                'as torch.distributed.group.WORLD, a DistributedDataParallel module, or "alone"'
            )
        self.group = group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in process_group; expected one of the group's ranks")
        self.grads_averaged = self.curvature_averaged = self.averaged_late = False
        self._silent = False
        self._watched: set[int] = set()  # ids of parameters
        self._checked = 0  # steps with curvature
        self._ddps: list[weakref.ref[DistributedDataParallel]] = []
        self._looked = self._passed_by = False  # for DDP modules; their hooks, since their last forward pass
        self._alike: set[tuple[int, ...]] = set()  # ids of parameters that all ranks have been found to average
        self._prepared: set[int] = set()  # ids of DDP modules that will average the coming backward pass
        self._rely_on(ddps if isinstance(ddps, list) else [])

    def _rely_on(self, ddps: Sequence[DistributedDataParallel]) -> None:
        own = dist.get_process_group_ranks(self.group)
        for ddp in ddps:
            others = dist.get_process_group_ranks(ddp.process_group)
            if sorted(others) != sorted(own):
                raise ValueError(OTHER_GROUP.format(own, others))
            if ddp.static_graph:
                raise RuntimeError(STATIC_GRAPH)
        self._ddps = [weakref.ref(ddp) for ddp in ddps]
        for ddp in ddps:
            ddp.register_forward_pre_hook(self._ddp_forward)

    def look_for_ddps(self, params: Sequence[Tensor]) -> None:
        """Find the DDP modules that have some of these parameters, unless they are known."""
        if not self._ddps:
            self._rely_on(ddps_around(params))

    def _alive(self) -> list[DistributedDataParallel]:
        return [ddp for ddp in (ref() for ref in self._ddps) if ddp is not None]

    def probe_seed(self, seed: int) -> int:
        """Return the key of the probe's generator on this rank; rank 0 keeps the seed."""
        return mixed(seed, self.rank) if self.rank else seed

    # ---- when to average ---------------------------------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        """Whether ``no_sync()`` of the optimizer or of the DDP module is in effect."""
        return self._silent or not all(ddp.require_backward_grad_sync for ddp in self._alive())

    @property
    def averages_first_order(self) -> bool:
        """Whether an ordinary backward pass will be averaged by DDP, as it goes."""
        return self._ddp_averages and not self.silent

    @property
    def _ddp_averages(self) -> bool:
        return bool(self._ddps) and self._prepared.issuperset(map(id, self._alive()))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients and curvature inside it this rank's own, DDP's hooks included."""
        before, self._silent = self._silent, True
        try:
            with without(self._alive()):
                yield
        finally:
            self._silent = before

    def watch(self, params: Sequence[Tensor]) -> None:
        """Notice ordinary backward passes, which leave gradients that are not averaged unless DDP does it."""
        me = weakref.ref(self)

        def accumulated(p: Tensor) -> None:
            ranks = me()
            if ranks is not None:
                ranks.grads_averaged = ranks._ddp_averages

        # A rank that uses none of these parameters, which DDP has to be told of, still uses others of its module.
        more = [ddp.parameters() for ddp in self._alive() if ddp.find_unused_parameters]
        for p in itertools.chain(params, *more):
            if id(p) not in self._watched and p.requires_grad:
                self._watched.add(id(p))
                p.register_post_accumulate_grad_hook(accumulated)

    def around(self, params: Sequence[Tensor]) -> list[DistributedDataParallel]:
        """Return the DDP modules with these parameters."""
        if not self._looked:  # a model may be wrapped after its optimizer is made
            self._looked = True
            self.look_for_ddps(params)
        return self._alive()

    def concern(self, params: Sequence[Tensor], leaves: Collection[int]) -> bool:
        """Tell whether a rank may use some parameters in a pass whose leaves on this one have these ids.

        All ranks find the same: DDP has every rank use some of its module, and without it any may use them.
        """
        ddps = self.around(params)
        return not ddps or any(id(p) in leaves for p in itertools.chain(params, *(ddp.parameters() for ddp in ddps)))

    def beside(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return what DDP would average beside these parameters, other optimizers' for instance.

        Raises:
            RuntimeError: DDP cannot be passed by, or not now.
        """
        ddps = self.around(params)
        if any(ddp._join_config.enable for ddp in ddps):
            raise RuntimeError(JOINED)
        self._passed_by = True
        seen, others = set(map(id, params)), []
        for ddp in ddps:
            for name, p in ddp.module.named_parameters():
                if p.requires_grad and id(p) not in seen and name not in ddp.parameters_to_ignore:
                    seen.add(id(p))
                    others.append(p)
        return others

    def reset(self) -> None:
        """Note that nothing is averaged any more: gradients are dropped, or their step is done."""
        self.grads_averaged = self.curvature_averaged = self.averaged_late = False

    def stepped(self) -> None:
        """End the step. DDP has to be called once more before its hooks are relied on again."""
        self.reset()
        self._prepared.clear()

    def _ddp_forward(self, ddp: Any, *unused: Any) -> None:
        if torch.is_grad_enabled() and not self.silent:
            self._prepared.add(id(ddp))
            self._passed_by = False
        else:
            self._prepared.discard(id(ddp))
            if self._passed_by:  # its hooks still wait for that pass, and would take the coming one for it
                ddp.reducer._reset_state()

    # ---- what they have to agree on ----------------------------------------------------------------------------------

    def check_alike(self, params: Sequence[Tensor]) -> None:
        """Raise unless all ranks are about to average the same parameters; looked at when they are others here."""
        if (now := tuple(map(id, params))) in self._alike:
            return
        own = zlib.crc32(repr([(tuple(p.shape), p.dtype) for p in params]).encode())
        largest = torch.tensor([own, -own], device=params[0].device if params else None)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        if largest[0] != -largest[1]:
            raise RuntimeError(UNLIKE.format(f"{len(params)}, of {sum(map(Tensor.numel, params))} elements"))
        self._alike.add(now)

    @torch.no_grad()
    def check_same(self, params: Sequence[tuple[str, Tensor]]) -> None:
        """Compare checksums of the parameters, in the first and every hundredth call.

        Args:
            params: names and parameters, the same on every rank.

        Raises:
            RuntimeError: a parameter is not the same on all ranks.
        """
        self._checked += 1
        if self._checked % CHECK_EACH == 1 and (differing := self._differing(params)):
            raise RuntimeError(DIFFERENT.format(differing))

    @torch.no_grad()
    def check_grads(self, grads: Sequence[tuple[str, Tensor]]) -> None:
        """Compare checksums of gradients that have been averaged, and may have been clipped since.

        DDP has averaged those of all parameters, and ranks cannot clip apart.

        Args:
            grads: names and gradients, the same on every rank.

        Raises:
            RuntimeError: a gradient is not the same on all ranks.
        """
        if not self._alive() and self._differing(grads, together=True) and (differing := self._differing(grads)):
            raise RuntimeError(CHANGED_APART.format(differing))

    def _differing(self, tensors: Sequence[tuple[str, Tensor]], *, together: bool = False) -> str:
        """Return the name of the first tensor that is not the same on all ranks, if any; ``together``: of any."""
        if not tensors or _capturing():
            return ""
        largest = _checksums([t for _, t in tensors])
        largest = largest.sum(dim=1, keepdim=True) if together else largest
        largest = self.largest(largest)
        differ = (largest[0] != -largest[1]).tolist()
        return tensors[differ.index(True)][0] if any(differ) else ""

    def largest(self, flag: Tensor) -> Tensor:
        """Return the largest of the ranks' values."""
        flag = flag.clone()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return flag


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _checksums(tensors: Sequence[Tensor]) -> Tensor:
    """Return sums of the tensors' bits, and their negatives, whose largest tell whether all ranks agree."""
    bits = [t.view(_INTEGERS[t.element_size()]) for t in tensors]
    sums = torch.stack([b.sum(dtype=torch.int64).to(tensors[0].device) for b in bits])
    return torch.stack((sums, -sums))
