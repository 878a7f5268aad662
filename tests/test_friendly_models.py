"""curvature_friendly on whole models: Hessian-vector products, running statistics, autocast, and what it costs."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import batch, conv_net
from published import AdaHessian
from tolerances import assert_error, relative_error
from torch import Tensor, nn
from watching import Operators, nodes

from adahessian_fused import available_backends, curvature_friendly
from examples.resnet import ResNet


def resnet20() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(3)


class Transformer(nn.Module):
    """Two encoder layers over 7 tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
        self.bags = nn.EmbeddingBag(20, 16)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.flatten(1)[:, :112].unflatten(1, (7, 16))).mean(1))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Transformer()


def images(n: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, 32, 32, dtype=torch.float64, generator=generator)
    return x.to(device, dtype), (torch.arange(n) % 10).to(device)


def derivatives(model: nn.Module, x: Tensor, y: Tensor, context) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient and Hessian-vector product of the cross entropy, with the forward pass inside a context."""
    params = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(4)
    z = [(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p in params]
    with context:
        loss = F.cross_entropy(model(x), y)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    used = [(g, v) for g, v in zip(grads, z, strict=True) if g is not None]
    products = torch.autograd.grad([g for g, _ in used], params, [v for _, v in used], allow_unused=True)
    return [g.detach() for g, _ in used], [h for h in products if h is not None]


def test_float32_is_as_good_as_plain_float32(device):
    model, (x, y) = resnet20().to(device), images(4, device, torch.float32)
    exact = derivatives(copy.deepcopy(model).double(), x.double(), y, nullcontext())
    plain = derivatives(copy.deepcopy(model), x, y, nullcontext())
    ours = derivatives(model, x, y, curvature_friendly())
    assert all(map(torch.equal, ours[0], plain[0]))
    assert_error(ours[1], exact[1], 3 * relative_error(plain[1], exact[1]))


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.1}], ids=str
)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_batch_norm_module(device, options, mode):
    """Running statistics included; in frozen mode only the weights train."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5))
    plain.to(device, torch.float64)(torch.randn(6, 3, 8, 8).to(device, torch.float64))  # statistics to start from
    if mode == "eval":
        plain.eval()
    elif mode == "frozen":
        plain[1].eval()
    ours = copy.deepcopy(plain)
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64).to(device)
    y = torch.arange(6, device=device) % 5
    for _ in range(2):
        expected, found = derivatives(plain, x, y, nullcontext()), derivatives(ours, x, y, curvature_friendly())
    assert_error(found[0], expected[0], 1e-14)
    assert_error(found[1], expected[1], 1e-12)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_operators_of_a_step(device):
    model, (x, y) = resnet20().to(device), images(2, device, torch.float32)
    opt = AdaHessian(model.parameters(), lr=0.01)
    for _ in range(2):  # the first one lays out the states, and both look whether steps are long
        opt.step(lambda: F.cross_entropy(model(x), y))
    with Operators() as mode:
        opt.step(lambda: F.cross_entropy(model(x), y))
    fused = available_backends(device)["native"] is None
    assert mode.launched <= (500 if fused else 1200), mode.counts
    assert mode.counts.total() <= (1000 if fused else 1800), mode.counts


def test_off_steps_enter_nothing(device):
    """They run PyTorch's own operators, flash attention included."""
    model, seen = transformer().to(device), []
    opt = AdaHessian(model.parameters(), lr=0.01, update_each=2)
    x, y = images(2, device, torch.float32)

    def closure():
        loss = F.cross_entropy(model(x), y)
        seen.extend(nodes(loss))
        return loss

    for ours in (True, False, True):
        seen.clear()
        opt.step(closure)
        assert ("_ForwardBackward" in seen) == ours
        assert any("ScaledDotProduct" in name for name in seen) != ours


@pytest.mark.parametrize("name", ["conv", "resnet", "transformer"])
def test_autocast(device, name):
    """The same precisions as PyTorch's, forward and backward."""
    model = {"conv": conv_net, "resnet": lambda _: resnet20(), "transformer": lambda _: transformer()}[name](
        torch.float32
    )
    model.to(device)
    x, y = (
        images(4, device, torch.float32) if name != "conv" else (batch(0, model)[0], torch.zeros(8).long().to(device))
    )
    results = []
    for context in (nullcontext(), curvature_friendly()):
        twin, dtypes = copy.deepcopy(model), []
        for module in twin.modules():
            module.register_forward_hook(lambda _m, _i, y, dtypes=dtypes: dtypes.append(getattr(y, "dtype", None)))
        with context, torch.autocast(device, torch.bfloat16), torch.nn.attention.sdpa_kernel([MATH]):
            loss = F.cross_entropy(twin(x), y)
        results.append([dtypes, loss, *torch.autograd.grad(loss, tuple(twin.parameters()), allow_unused=True)])
    (dtypes, *plain), (dtypes_ours, *ours) = results
    assert dtypes_ours == dtypes
    for a, b in zip(ours, plain, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


MATH = torch.nn.attention.SDPBackend.MATH


def test_double_backward_under_autocast(device):
    model, (x, y) = resnet20().to(device), images(8, device, torch.float32)
    exact = derivatives(copy.deepcopy(model).double(), x.double(), y, nullcontext())
    with torch.autocast(device, torch.bfloat16):
        plain = derivatives(copy.deepcopy(model), x, y, nullcontext())
        ours = derivatives(model, x, y, curvature_friendly())
    assert_error(ours[1], exact[1], 3 * relative_error(plain[1], exact[1]))


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "no_grad", "forward_ad"])
def test_other_transforms_keep_pytorchs_operators(device, transform):
    x = torch.randn(3, 2, 4, device=device)

    def run():
        f = lambda t: F.group_norm(t, 1).relu().sum()  # noqa: E731
        if transform == "grad":
            return torch.func.grad(f)(x)
        if transform == "vmap":
            return torch.func.vmap(lambda t: f(t[None]))(x)
        if transform == "jvp":
            return torch.func.jvp(f, (x,), (x,))[1]
        if transform == "no_grad":
            return f(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(F.relu(dual).sum()).tangent

    expected = run()
    with curvature_friendly():
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("batched", [False, True])
def test_several_probes_from_one_graph(device, batched):
    model = conv_net(device=device)
    params, (x, _) = list(model.parameters()), batch(0, model)
    torch.manual_seed(0)
    z = [torch.randn(3, *p.shape, dtype=p.dtype).to(device) for p in params]
    plain = torch.autograd.grad(model(x).pow(3).mean(), params, create_graph=True)
    with curvature_friendly():
        loss = model(x).pow(3).mean()
    ours = torch.autograd.grad(loss, params, create_graph=True)
    together = torch.autograd.grad(ours, params, z, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        probe = [v[i] for v in z]
        expected = torch.autograd.grad(plain, params, probe, retain_graph=True)
        found = [h[i] for h in together] if batched else torch.autograd.grad(ours, params, probe, retain_graph=True)
        assert_error(found, expected, 1e-12)
