"""What is drawn: code of somebody's own, layers, small models of them, and losses."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from functions import kinds
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from . import oracle

EXAMPLES = 4

# ---- code of somebody's own ------------------------------------------------------------------------------------------

SINES = kinds(torch.sin, torch.cos)


class Sine(nn.Module):
    """A Function that says, or hides, that it is curved."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def extra_repr(self) -> str:
        return self.kind

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if oracle.Plain.active else SINES[self.kind].apply(x)


class Checkpoint(nn.Module):
    """Layers that are computed again in the backward pass."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if oracle.Plain.active:
            return self.inner(x)
        # PyTorch drops all gradients in a reentrant one whose input has none.
        return checkpoint(self.inner, x, use_reentrant=self.reentrant and x.requires_grad)

    def extra_repr(self) -> str:
        return "reentrant" if self.reentrant else ""


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """The same weights two times."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(x)))


class Of(nn.Module):
    """A function of the input, and of a parameter if it takes one."""

    def __init__(self, f: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.f = f
        self.weight = nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) if self.weight is None else self.f(x, self.weight)


class Attention(nn.Module):
    def __init__(self, n: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.heads, self.causal = nn.Linear(n, 3 * n), heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(-2, -3).flatten(-2)


class Last(nn.Module):
    """The sequence that a recurrent network returns."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


# ---- layers: each is drawn for a shape of its input, without examples ------------------------------------------------


def _activation(r: random.Random, shape):
    kinds = [
        nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Hardswish, nn.Mish,
        nn.Softsign, nn.PReLU, nn.Identity, nn.ReLU6, nn.CELU, nn.LogSigmoid, nn.Hardtanh,
    ]  # fmt: skip
    return r.choice(kinds)()


def _in_place(r, shape):
    return nn.Sequential(Of(lambda x: x * 1.5), r.choice([nn.ReLU, nn.SiLU, nn.LeakyReLU, nn.ELU])(inplace=True))


def _sine(r, shape):
    return Sine(r.choice(list(SINES)) if r.random() < 0.5 else "complete")


def _linear(r, shape):
    layer = nn.Linear(shape[-1], r.choice([1, 2, 3, 4, 4, 6]), bias=r.random() < 0.7)
    if r.random() < 0.1:
        layer = parametrizations.weight_norm(layer)
    elif r.random() < 0.07:
        layer = parametrizations.spectral_norm(layer)
    return layer


def _elementwise(r, shape):
    fs = [
        lambda x: x.square(), lambda x: x / (1 + x.abs()), lambda x: x.clamp(-1, 1), lambda x: x.cumsum(-1),
        lambda x: x.softmax(-1), lambda x: x.log_softmax(-1), lambda x: x * torch.sigmoid(x.detach()),
        lambda x: x.flip(-1) + x.roll(1, -1), lambda x: F.normalize(x, dim=-1), lambda x: x.exp().log1p(),
        lambda x: torch.where(x > 0, x, 0.1 * x**2), lambda x: x.sort(-1)[0], lambda x: (x**2 + 0.1).sqrt(),
        lambda x: x + 0.1 * torch.logcumsumexp(x, -1), lambda x: torch.atan2(x, 1 + x * x), lambda x: x.erf(),
    ]  # fmt: skip
    return Of(r.choice(fs))


def _weighted(r, shape):
    n = shape[-1]
    fs = [
        (lambda x, w: x * w, n), (lambda x, w: x + w, *shape), (lambda x, w: x * w, 1), (lambda x, w: x * w.sum(), 2),
        (lambda x, w: x @ (w @ w.T), n, n), (lambda x, w: torch.einsum("...i,ij->...j", x, w).tanh(), n, n),
        (lambda x, w: x - w.exp().mean(), n), (lambda x, w: F.linear(x, w, w[0]), n, n),
        (lambda x, w: x * F.softplus(w[: x.shape[-1]]), n + 2), (lambda x, w: torch.addcmul(x, x, w.expand_as(x)), n),
    ]  # fmt: skip
    f, *own = r.choice(fs)
    return Of(f, *own)


def _norm(r, shape):
    n = shape[-1]
    kinds = [
        lambda: nn.LayerNorm(n), lambda: nn.RMSNorm(n), lambda: nn.LayerNorm(shape),
        lambda: nn.LayerNorm(n, bias=False), lambda: nn.LayerNorm(n, elementwise_affine=False),
    ]  # fmt: skip
    return r.choice(kinds)()


def _norm_of_channels(r, shape):
    n = shape[0]
    batch, instance = {
        1: (nn.BatchNorm1d, nn.Identity),
        2: (nn.BatchNorm1d, nn.InstanceNorm1d),
        3: (nn.BatchNorm2d, nn.InstanceNorm2d),
    }[len(shape)]
    kinds = [
        lambda: batch(n), lambda: batch(n, affine=False), lambda: batch(n, track_running_stats=False),
        lambda: batch(n).eval(), lambda: nn.GroupNorm(1, n), lambda: nn.GroupNorm(n, n) if len(shape) > 1 else batch(n),
        lambda: instance(n), lambda: instance(n, affine=True, track_running_stats=True),
    ]  # fmt: skip
    return r.choice(kinds)()


def _dropout(r, shape):
    # Masks are drawn in the order of memory, which differs between kernels of attention.
    return nn.Sequential(Of(lambda x: x.contiguous()), nn.Dropout(r.choice([0.2, 0.5])))


def _conv(r, shape):
    c, out = shape[0], r.choice([1, 2, 4])
    groups = 2 if c % 2 == 0 and out % 2 == 0 and r.random() < 0.3 else 1
    kind = {2: nn.Conv1d, 3: nn.Conv2d}[len(shape)]
    options = {"padding": 1, "stride": r.choice([1, 1, 2]), "bias": r.random() < 0.6, "groups": groups}
    if r.random() < 0.2:
        options |= {"padding_mode": r.choice(["reflect", "circular"])}
    layer = kind(c, out, 3, **options)
    return parametrizations.weight_norm(layer) if r.random() < 0.08 else layer


def _transposed(r, shape):
    kind = {2: nn.ConvTranspose1d, 3: nn.ConvTranspose2d}[len(shape)]
    return kind(shape[0], r.choice([1, 2]), r.choice([2, 3]), padding=1, stride=r.choice([1, 2]))


def _pool(r, shape):
    kinds = [
        lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2), lambda: nn.AdaptiveAvgPool2d(2), lambda: nn.LPPool2d(2, 2),
        lambda: nn.AdaptiveMaxPool2d(2), lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
        lambda: nn.Upsample(scale_factor=2), lambda: nn.ReflectionPad2d(1),
    ]  # fmt: skip
    return r.choice(kinds)() if min(shape[1:]) > 2 else nn.ReflectionPad2d(1)


def _attention(r, shape):
    n = shape[-1]
    heads = 2 if n % 2 == 0 else 1
    kinds = [
        lambda: Attention(n, heads, r.random() < 0.4),
        lambda: nn.TransformerEncoderLayer(n, heads, 6, 0.0, r.choice(["relu", "gelu"]), batch_first=True,
                                           norm_first=r.random() < 0.5),
    ]  # fmt: skip
    return r.choice(kinds)()


def _recurrent(r, shape):
    return Last(r.choice([nn.GRU, nn.LSTM, nn.RNN])(shape[-1], 3, batch_first=True))


def _wrapped(r, shape):
    inner = nn.Sequential(*(layer for _ in range(r.choice([1, 2])) for layer in [_any(r, shape, nested=True)]))
    kind = r.choice([Residual, Twice, Checkpoint])
    keeps_shape = _shape_after(inner, shape) == tuple(shape)
    if any(isinstance(m, parametrizations._SpectralNorm) for m in inner.modules()):
        return inner  # a checkpoint would iterate once more
    if kind is Checkpoint or not keeps_shape:
        return Checkpoint(inner, r.random() < 0.15)
    return kind(inner)


BY_AXES = {
    1: [_linear, _linear, _activation, _activation, _norm, _norm_of_channels, _elementwise, _weighted, _sine, _in_place,
        _dropout],
    2: [_linear, _attention, _attention, _activation, _norm, _norm_of_channels, _elementwise, _weighted, _recurrent,
        _conv, _dropout],
    3: [_conv, _conv, _conv, _transposed, _pool, _activation, _norm_of_channels, _norm, _in_place, _sine, _weighted],
}  # fmt: skip


def _any(r, shape, nested=False):
    if not nested and r.random() < 0.2:
        return _wrapped(r, shape)
    return r.choice(BY_AXES[len(shape)])(r, shape)


def _shape_after(layer: nn.Module, shape) -> tuple[int, ...] | None:
    """The shape of its results, or None if it does not fit."""
    twin = copy.deepcopy(layer)
    try:
        with torch.no_grad():  # as PyTorch does it: the definitions take norms of what it refuses
            return tuple(twin(torch.randn(EXAMPLES, *shape)).shape[1:])
    except (RuntimeError, ValueError, AssertionError):
        return None


# ---- models and losses -----------------------------------------------------------------------------------------------


def _layers(r: random.Random, shape: tuple[int, ...], depth: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    layers = []
    while len(layers) < depth:
        layer = _any(r, shape)
        after = _shape_after(layer, shape)
        if after and 0 < torch.Size(after).numel() <= 128 and len(after) == len(shape):
            layers.append(layer)
            shape = after
    return layers, shape


class Model(nn.Module):
    """A stem, layers, and a head that gives ``outputs`` numbers an example."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        kind = r.choice(["vectors", "vectors", "words", "bags", "images", "sequences"])
        n, length = r.choice([2, 3, 4]), r.choice([2, 3])
        self.takes, stem = {
            "vectors": ((n,), nn.Identity()), "words": ("words", nn.Embedding(5, n)),
            "bags": ("words", nn.EmbeddingBag(5, n, mode=r.choice(["mean", "sum", "max"]))),
            "images": ((r.choice([1, 2]), 4, r.choice([3, 4])), nn.Identity()),
            "sequences": ((length, n), nn.Identity()),
        }[kind]  # fmt: skip
        shape = {"words": (3, n), "bags": (n,)}.get(kind, self.takes)
        layers, shape = _layers(r, shape, r.randint(1, 4))
        self.body = nn.Sequential(stem, *layers)
        self.flatten = r.choice(["flatten", "mean"]) if len(shape) > 1 else "flatten"
        width = shape[-1] if self.flatten == "mean" else torch.Size(shape).numel()
        self.head = nn.Linear(width, 3) if r.random() < 0.8 else nn.Identity()
        if r.random() < 0.15 and isinstance(stem, nn.Embedding) and isinstance(self.head, nn.Linear) and width == n:
            self.head = nn.Linear(n, 5, bias=False)
            self.head.weight = stem.weight  # tied
        if r.random() < 0.1:
            self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y.flatten(1) if self.flatten == "flatten" else y.flatten(1, -2).mean(1) if y.dim() > 2 else y)

    def inputs(self, r: random.Random) -> Tensor:
        generator = torch.Generator().manual_seed(r.getrandbits(32))
        if self.takes == "words":
            return torch.randint(0, 5, (EXAMPLES, 3), generator=generator)
        return torch.randn(EXAMPLES, *self.takes, generator=generator, dtype=torch.float64)


def _classes(y: Tensor) -> Tensor:
    return torch.arange(len(y)) % y.shape[1]


def _slope_norm(model: nn.Module, loss: Tensor) -> Tensor:
    params = [p for p in model.parameters() if p.requires_grad]
    if not loss.requires_grad:
        return loss * 0
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    return sum((g.square().sum() for g in grads if g is not None), loss * 0)


def _penalised_input(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if not x.is_floating_point():
        return y.square().mean()
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).tanh().sum(), x, create_graph=True)
    length = (slope.flatten(1).square().sum(1) + 1e-12).sqrt()  # a norm of nothing has no derivative
    return F.softplus(-y).mean() + (length - 1).square().mean()


def _meta(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not y.requires_grad:
        return y.square().mean()
    grads = torch.autograd.grad(y.square().mean(), list(params.values()), create_graph=True, allow_unused=True)
    fast = {n: p if g is None else p - 0.1 * g for (n, p), g in zip(params.items(), grads, strict=True)}
    return functional_call(model, fast, (x.flip(0),)).square().mean()


LOSSES = {
    "mean_square": lambda model, x, y: y.square().mean(),
    "cross_entropy": lambda model, x, y: F.cross_entropy(y, _classes(y)),
    "smoothed": lambda model, x, y: F.cross_entropy(y, _classes(y), label_smoothing=0.1),
    "l1": lambda model, x, y: F.l1_loss(y, torch.ones_like(y)),
    "huber": lambda model, x, y: F.huber_loss(y, torch.ones_like(y), delta=0.3),
    "bce": lambda model, x, y: F.binary_cross_entropy_with_logits(y, torch.full_like(y, 0.3)),
    "sum": lambda model, x, y: y.sum(),
    "norm": lambda model, x, y: (y + 0.1).norm(),
    "log": lambda model, x, y: (1 + y.square()).log().mean(),
    "cosine": lambda model, x, y: (1 - F.cosine_similarity(y + 0.1, torch.ones_like(y))).mean(),
    "kl": lambda model, x, y: F.kl_div(y.log_softmax(1), torch.ones_like(y).softmax(1), reduction="batchmean"),
    "max": lambda model, x, y: y.amax(1).square().mean(),
    "decay": lambda model, x, y: y.square().mean() + sum(p.square().sum() for p in model.parameters()) * 0.01,
    "slope": lambda model, x, y: y.square().mean() + 0.1 * _slope_norm(model, y.square().mean()),
    "penalty": _penalised_input,
    "meta": _meta,
    "hidden": lambda model, x, y: Sine("no_grad")(y).sum(),
    "hidden_square": lambda model, x, y: Sine("inner_backward")(y).square().sum(),
}


HOLD_GRADIENTS = ("slope", "penalty", "meta")
