"""AdaHessian from the paper alone (Algorithm 1, Eq. 5-9): nothing here imports the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# ---- the probe -------------------------------------------------------------------------------------------------------

MASK = 2**32 - 1


def philox(counter: Sequence[int], seed: int, rounds: int = 10) -> list[int]:
    """One call of Philox4x32 (Salmon et al. 2011)."""
    c, key = list(counter), [seed & MASK, seed >> 32 & MASK]
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ key[0], b & MASK, a >> 32 ^ c[3] ^ key[1], a & MASK]
        key = [key[0] + 0x9E3779B9 & MASK, key[1] + 0xBB67AE85 & MASK]
    return c


def probe(shape: Sequence[int], number: int, hessian_step: int, seed: int, sample: int = 0) -> Tensor:
    """Signs of a parameter's elements in logical order: bit by bit of calls (element / 128, number, step, sample)."""
    n, signs = math.prod(shape), []
    for call in range(-(-n // 128)):
        for word in philox((call, number, hessian_step, sample), seed):
            signs += [1 - 2 * (word >> bit & 1) for bit in range(32)]
    return torch.tensor(signs[:n], dtype=torch.float64).reshape(tuple(shape))


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------------


def block_means(d: Tensor, block: int) -> Tensor:
    """Each element's block mean, in logical order."""
    n, block = d.numel(), max(min(block, d.numel()), 1)
    padded = torch.cat([d.reshape(-1), d.new_zeros(-n % block)]).view(-1, block)
    counts = torch.full((len(padded),), block).clamp_max(n - block * torch.arange(len(padded)))
    return (padded.sum(1) / counts).repeat_interleave(block)[:n].view(d.shape)


def averages(m: Tensor, v: Tensor, g: Tensor, d: Tensor | None, betas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The moving averages; v stays where there is no curvature, or none that is finite."""
    m = betas[0] * m + (1 - betas[0]) * g
    if d is not None:
        v = torch.where((d * d).isfinite(), betas[1] * v + (1 - betas[1]) * d * d, v)
    return m, v


def moved(
    p: Tensor, m: Tensor, v: Tensor, t: int, h: int, *, lr: float, betas: Sequence[float], eps: float = 1e-4,
    weight_decay: float = 0.0, hessian_power: float = 1.0, clip: float = math.inf, unmeasured: str = "hold",
    nesterov: bool = False, cautious: bool = False, g: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The parameter after step t, of which h had curvature, by a gradient g."""
    if h == 0:
        return p
    root = (v / (1 - betas[1] ** h)).sqrt()
    x = m / (1 - betas[0] ** t)
    if nesterov:
        x = (betas[0] * m + (1 - betas[0]) * g) / (1 - betas[0] ** (t + 1))
    if cautious:
        x = x * (x * g > 0)
    update = (x / (root**hessian_power + eps)).clamp(-clip, clip)
    stays = (v == 0) & (hessian_power > 0 and unmeasured == "hold")
    return torch.where(stays, p, p * (1 - lr * weight_decay) - lr * update)


# ---- derivatives -----------------------------------------------------------------------------------------------------


def _normalised(x: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    y = _normalised(x, tuple(range(-len(shape), 0)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    y = _normalised(x.reshape(len(x), groups, -1), (2,), eps).reshape(x.shape)
    by_channel = (1, -1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(by_channel)
    return y if bias is None else y + bias.view(by_channel)


def _batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    by_channel = (1, -1, *[1] * (x.dim() - 2))
    if training:
        y = _normalised(x, (0, *range(2, x.dim())), eps)
    else:
        y = (x - mean.view(by_channel)) / (var.view(by_channel) + eps).sqrt()
    y = y if weight is None else y * weight.view(by_channel)
    return y if bias is None else y + bias.view(by_channel)


def _instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    return _group_norm(x, x.shape[1], weight, bias, eps)


def _rms_norm(x, shape, weight=None, eps=None):
    axes = tuple(range(-len(shape), 0))
    y = x / (x.square().mean(axes, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
    return y if weight is None else y * weight


def _embedding_bag(words, weight, *args, mode="mean", **kwargs):
    found = weight[words]
    return {"mean": found.mean, "sum": found.sum, "max": found.amax}[mode](1)


def _weight_norm(v, g, dim=0):
    axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
    return v * g / v.square().sum(axes, keepdim=True).sqrt()  # norm() takes two axes at most


class Plain(TorchFunctionMode):
    """Operators whose derivatives of higher order PyTorch lacks, or has wrong, from their definitions."""

    active = False
    FORMULAS = {  # noqa: RUF012
        F.layer_norm: _layer_norm, F.group_norm: _group_norm, F.batch_norm: _batch_norm, F.rms_norm: _rms_norm,
        F.instance_norm: _instance_norm,
        F.embedding_bag: _embedding_bag, torch._weight_norm: _weight_norm,
    }  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.FORMULAS.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def by_definition() -> Iterator[None]:
    """Inside it losses are computed from operators that autograd differentiates right any number of times.

    Models ask for ``Plain.active`` where they would use code that hides something from autograd.
    """
    Plain.active = True
    try:
        with Plain(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        Plain.active = False


def derivatives(
    loss: Callable[[], Tensor], params: Sequence[Tensor], z: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor]]:
    """G, and Hz for the probe z: None and zeros for parameters that the loss does not depend on."""
    with by_definition():
        value = loss()
        if not value.requires_grad:
            return [None] * len(params), list(map(torch.zeros_like, params))
        grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
        used = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        products = list(map(torch.zeros_like, params))
        hooks = [p._backward_hooks for p in params]
        for p in params:
            p._backward_hooks = None
        if used:
            found = torch.autograd.grad(
                [grads[i] for i in used], params, [z[i].to(params[i]) for i in used], allow_unused=True
            )
            products = [x if h is None else h for x, h in zip(products, found, strict=True)]
        for p, before in zip(params, hooks, strict=True):
            p._backward_hooks = before
    return [None if g is None else g.detach() for g in grads], products
