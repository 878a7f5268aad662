"""The processes that train one model together."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..curvature import mixed

DDP_WITHOUT_US = (
    "the closure calls a DistributedDataParallel module, whose hooks would average gradients that belong to the probes "
    "of single ranks; expected AdaHessian(..., process_group=<that module>)"
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
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed(number: int, groups: Sequence[dist.ProcessGroup], device: torch.device) -> int:
    """Return the first rank's number, on all ranks of a group; group after group, as along the axes of a mesh."""
    for group in groups:
        tensor = torch.tensor(number, dtype=torch.int64, device=device)
        dist.broadcast(tensor, group=group, group_src=0)
        number = int(tensor)
    return number


class Ranks:
    """A process group as an optimizer sees it, and what of the coming step has been averaged over it.

    Averaging is idempotent: what all ranks agree on stays as it is. So gradients that have been averaged before, by
    DDP for instance, may be averaged once more, with local ones added to them or not; only the traffic is lost.

    Args:
        process_group: the group; or a DistributedDataParallel module, whose group it is, whose ``no_sync()`` counts
            here, and whose own averaging is relied on after ordinary backward passes.

    Attributes:
        grads_averaged: whether ``p.grad`` is the mean over the ranks.
        curvature_averaged: the same of the curvature that has been gathered.
        averaged_late: whether ``scaler.step(opt)`` had to average the gradients.
    """

    def __init__(self, process_group: dist.ProcessGroup | DistributedDataParallel) -> None:
        self.ddp = process_group if isinstance(process_group, DistributedDataParallel) else None
        group = process_group if self.ddp is None else self.ddp.process_group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group is a {type(process_group).__name__}; expected a torch.distributed process group, such "
                "as torch.distributed.group.WORLD, or a DistributedDataParallel module"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in process_group; expected one of the group's ranks")
        self.grads_averaged = self.curvature_averaged = self.averaged_late = False
        self._silent = False
        self._watched: set[int] = set()  # ids of parameters
        self._ddp_reduces = False  # DDP has prepared for a backward pass since the last step
        if self.ddp is not None:
            self.ddp.register_forward_pre_hook(self._ddp_forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self.group)  # copied parameters are not DDP's

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with a process_group cannot be pickled: the group is this process's own; expected "
            "optimizer.state_dict() in its place"
        )

    def probe_seed(self, seed: int) -> int:
        """Return the key of the probe's generator on this rank; rank 0 keeps the seed."""
        return mixed(seed, self.rank) if self.rank else seed

    # ---- when to average ---------------------------------------------------------------------------------------------

    @property
    def silent(self) -> bool:
        """Whether ``no_sync()`` of the optimizer or of the DDP module is in effect."""
        return self._silent or (self.ddp is not None and not self.ddp.require_backward_grad_sync)

    @property
    def averages_first_order(self) -> bool:
        """Whether an ordinary backward pass will be averaged by DDP, as it goes."""
        return self._ddp_reduces and not self.silent

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients and curvature inside it this rank's own, DDP's hooks included."""
        before, self._silent = self._silent, True
        try:
            with contextlib.nullcontext() if self.ddp is None else self.ddp.no_sync():
                yield
        finally:
            self._silent = before

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Keep DDP from averaging while a strategy evaluates a closure: a rank's gradients belong to its own probe."""
        if self.ddp is not None:
            with self.ddp.no_sync():
                yield
            return
        with nn.modules.module.register_module_forward_pre_hook(_refuse_ddp):
            yield

    def watch(self, params: Sequence[Tensor]) -> None:
        """Notice ordinary backward passes, which leave gradients that are not averaged unless DDP does it."""
        me = weakref.ref(self)

        def accumulated(_: Tensor) -> None:
            ranks = me()
            if ranks is not None:
                ranks.grads_averaged = ranks._ddp_reduces

        for p in params:
            if id(p) not in self._watched:
                self._watched.add(id(p))
                p.register_post_accumulate_grad_hook(accumulated)

    def reset(self) -> None:
        """Note that nothing is averaged any more: gradients are dropped, or their step is done."""
        self.grads_averaged = self.curvature_averaged = self.averaged_late = False

    def stepped(self) -> None:
        """End the step. DDP has to be called once more before its hooks are relied on again."""
        self.reset()
        self._ddp_reduces = False

    def _ddp_forward(self, *unused: Any) -> None:
        self._ddp_reduces = torch.is_grad_enabled() and not self.silent

    def largest(self, flag: Tensor) -> Tensor:
        """Return the largest of the ranks' values."""
        flag = flag.clone()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return flag


def _refuse_ddp(module: nn.Module, inputs: Any) -> None:
    if isinstance(module, DistributedDataParallel):
        raise RuntimeError(DDP_WITHOUT_US)
