"""Models, losses and the exact answer for the tests of the ways to compute Hessian-vector products."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from fuzz import oracle
from models import conv_net, mlp, probe
from published import AdaHessian
from tolerances import assert_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[nn.Module], Tensor]

U = torch.finfo(torch.float64).eps / 2
# An exact product is off by roundings alone. In a difference of gradients they are divided by eps = 2^-23, and the
# truncation error eps^2 is smaller still; both in units of sizes that differ from |Hz|, hence the factors.
BOUND = {"autograd": 512 * U, "forward_over_reverse": 512 * U, "finite_difference": 512 * U / 2.0**-23}


class Tied(nn.Module):
    """A language model whose embedding is its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=True)[0])  # with weights: no flash kernel
        return x @ self.embedding.weight.t()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


class Partial(nn.Module):
    """One parameter is unused, one is linear in the loss, one has no gradient wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.linear = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        self.unused, self.frozen = nn.Linear(3, 2), nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x)).square() + self.frozen


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[:, None])[0]


def normalised() -> nn.Module:
    """Operators whose first-order backward has no forward-mode derivative.

    Groups of six: of two numbers a norm leaves their signs, and what is left of Hz is all cancellation.
    """
    return nn.Sequential(nn.Linear(3, 12), nn.GroupNorm(2, 12), nn.SiLU(), nn.Linear(12, 4), nn.Mish(), nn.Linear(4, 2))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4), nn.Dropout(0.2), nn.Tanh())


def spectral() -> nn.Module:
    """Power iterations: buffers that the forward pass uses and changes, as functions of the weight."""
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def numbers(model: nn.Module, n: int = 8, seed: int = 3) -> Tensor:
    p = next(model.parameters())
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(p)


def square(model: nn.Module) -> Tensor:
    return model(numbers(model)).square().mean()


def plus_linear(model: nn.Module) -> Tensor:
    return square(model) + model.linear.sum()


def next_token(model: nn.Module) -> Tensor:
    tokens = torch.arange(24).reshape(4, 6).remainder(7).to(next(model.parameters()).device)
    return F.cross_entropy(model(tokens).transpose(1, 2), tokens.roll(-1, 1))


CASES: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "mlp": (mlp, square),
    "batch_norm": (conv_net, square),
    "dropout": (dropout, square),
    "tied_attention": (Tied, next_token),
    "checkpoint": (Checkpointed, square),
    "partial": (Partial, plus_linear),
    "lstm": (Recurrent, square),
    "group_norm_silu_mish": (normalised, square),
}
BUFFERS = {**CASES, "spectral_norm": (spectral, square)}


def build(name: str, device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Loss]:
    """A model and a function of it that returns the loss."""
    torch.manual_seed(1)
    make, loss = BUFFERS[name]
    return make().to(device, dtype), loss


def exact(
    model: nn.Module, loss: Loss, *, sample: int = 0, due: Callable[[int], bool] = lambda i: True
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient and Hz by double backward in float64, on a copy; z is 0 for parameters that are not ``due``."""
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    wanted = [i for i, p in enumerate(params) if p.requires_grad]
    torch.manual_seed(5)
    z = [probe(params[i], i, 0, sample=sample) * due(i) for i in wanted]
    found = oracle.derivatives(lambda: loss(model), [params[i] for i in wanted], z)
    grads, hz = (list(map(torch.zeros_like, params)) for _ in range(2))
    for i, g, h in zip(wanted, *found, strict=True):
        grads[i], hz[i] = grads[i] if g is None else g, h
    return grads, hz


def optimizer(model: nn.Module, hvp: str, **options) -> AdaHessian:
    """One whose first step leaves g in ``exp_avg`` and |D| in ``hessian_diag``."""
    return AdaHessian(model.parameters(), **({"betas": (0.0, 0.0), "hvp": hvp, "block_size": 1} | options))


def found(opt: AdaHessian, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient and |D| of the step that was taken; zeros for parameters without."""
    params = list(model.parameters())
    seen = [p in opt.state and "exp_avg" in opt.state[p] for p in params]
    return (
        [opt.state[p]["exp_avg"] if s else torch.zeros_like(p) for p, s in zip(params, seen, strict=True)],
        [opt.hessian_diag(p) if s else torch.zeros_like(p) for p, s in zip(params, seen, strict=True)],
    )


def step(opt: AdaHessian, model: nn.Module, loss, seed: int = 5):
    """One step on the loss as a function, from a known state of the random numbers."""
    torch.manual_seed(seed)
    value = opt.backward(lambda: loss(model))
    opt.step()
    return value


def compare(opt, model, g, hz, hvp) -> None:
    """Gradient and |D| of the first step."""
    for name, ours, theirs in zip(("gradient", "Hz"), found(opt, model), (g, [h.abs() for h in hz]), strict=True):
        assert_error(ours, theirs, BOUND[hvp], name)
