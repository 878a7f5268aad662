"""A small problem that several ranks solve together, and one process alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from published import AdaHessian
from ranks import Ranks
from tolerances import GROWS, ROUNDINGS, assert_trajectory, growth, nudge
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from ways import WAYS

STEPS = 4
N = 12  # examples of a joint batch; 2 and 3 divide it
SETTINGS = {"lr": 0.05, "weight_decay": 0.01, "update_each": 2, "seed": 0}


def make_model(dtype: torch.dtype = torch.float64, hidden: int = 5) -> nn.Module:
    """A smooth network with a convolution, whose kernels are averaged over blocks of 9."""
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, hidden), nn.Tanh(), nn.Linear(hidden, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The joint batch of a step, the same on every rank."""
    random = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(n, 1, 6, 6, generator=random, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, 3, (n,), generator=random)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), targets)


def alone(steps: int, n: Callable[[int], int] = lambda step: N, **options) -> nn.Module:
    """The model after training in one process on the joint batches.

    Its attribute ``grows`` says by how much that multiplies the errors of sums over the batch in another order.
    """

    def trained(model: nn.Module) -> nn.Module:
        opt = AdaHessian(model.parameters(), process_group="alone", **SETTINGS | options)
        for step in range(steps):
            inputs, targets = batch(step, n(step))
            opt.step(lambda: loss_of(model, inputs, targets))  # noqa: B023 - called at once
        return model

    model = trained(make_model())
    model.grows = growth(list(trained(nudge(make_model())).parameters()), list(model.parameters()))
    return model


def values(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Plain tensors; the whole of what is sharded."""
    return [t.detach().full_tensor() if isinstance(t, DTensor) else t.detach() for t in tensors]


def assert_close(model: nn.Module, expected: nn.Module, steps: int = STEPS, hvp: str = "autograd") -> None:
    """The parameters of both are right."""
    found, wanted = (values(list(m.parameters())) for m in (model, expected))
    # The roundings of a gradient, relative to it, come out of a difference divided by the distance of 2^-23.
    roundings = 2.0**23 if hvp == "finite_difference" else ROUNDINGS
    assert_trajectory(found, wanted, steps, getattr(expected, "grows", GROWS), roundings)


def same_bits(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> bool:
    """Whether all ranks hold the same bytes."""
    mine = [t.detach().contiguous().clone() for t in tensors]
    theirs = [None] * dist.get_world_size(group)
    dist.all_gather_object(theirs, mine, group=group)
    return all(torch.equal(a, b) for other in theirs for a, b in zip(mine, other, strict=True))


def everything(model: nn.Module, opt: AdaHessian) -> list[Tensor]:
    """Parameters and states."""
    return [*model.parameters(), *(v for s in opt.state.values() for v in s.values() if isinstance(v, Tensor))]


def snapshot(model: nn.Module, opt: AdaHessian) -> tuple:
    """What a failed step must not change."""
    return copy.deepcopy([t.detach() for t in everything(model, opt)]), [g["step"] for g in opt.param_groups]


# ---- ways to take a step ---------------------------------------------------------------------------------------------


def taking(name: str) -> Callable:
    """A way to take a step with a model and a rank's part of the batch."""

    def way(model, opt, x, y):
        WAYS[name](opt, lambda x, y: loss_of(model, x, y), x, y)

    way.__name__ = name
    return way


backward, closure, standard_closure = map(taking, ("backward", "closure_returns_loss", "closure_standard"))
function = taking("function")
hooked, create_graph, train_step = map(taking, ("hook_backward", "needs_hessian", "train_step"))


def train(ranks: Ranks, way: Callable, model: nn.Module, opt: AdaHessian, steps: Sequence[int] = range(STEPS)) -> None:
    """Train with this rank's part of the joint batches."""
    for step in steps:
        inputs, targets = batch(step)
        way(model, opt, inputs[ranks.share(N)], targets[ranks.share(N)])


# ---- traffic ---------------------------------------------------------------------------------------------------------


def bytes_reduced(run) -> int:
    """Bytes of the all-reduces of this package while something runs; DDP's own do not come through here."""
    total, original = 0, dist.all_reduce

    def counted(tensor, *args, **kwargs):
        nonlocal total
        total += tensor.nbytes
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        run()
    finally:
        dist.all_reduce = original
    return total
