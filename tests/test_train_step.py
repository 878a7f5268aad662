"""TrainStep: eager, traced and compiled, it does what the optimizer does with a closure."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import operator
import pickle
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import assert_same, batch, conv_net, fresh, mlp, weights
from published import AdaHessian
from tolerances import assert_trajectory
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adahessian_fused import TrainStep, curvature_friendly
from adahessian_fused.train_step import compiled as compiled_module
from adahessian_fused.train_step import step as step_module


def with_dropout(device: str) -> nn.Module:
    model = mlp(device=device)
    model.insert(2, nn.Dropout(0.3))
    return model


class AttentionWithDropout(nn.Module):
    """Takes a batch for a sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(3, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.first(x).view(1, -1, 6, 4).transpose(1, 2).chunk(3, 1)
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=0.3 if self.training else 0.0)
        return self.last(y.transpose(1, 2).flatten(2)[0])


def with_unused(device: str) -> nn.Module:
    model = mlp(device=device)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64, device=device)))
    model[0].bias.requires_grad_(False)
    return model


MODELS = {
    "mlp": lambda device: mlp(device=device),
    "batch_norm": lambda device: conv_net(device=device),
    "channels_last": lambda device: conv_net(device=device).to(memory_format=torch.channels_last),
    "dropout": with_dropout,
    "attention_with_dropout": lambda device: AttentionWithDropout().to(device, torch.float64),
    "unused_and_frozen": with_unused,
}
OPTIONS = {
    "plain": {},
    "every_third": {"update_each": 3},
    "two_samples": {"n_samples": 2},
    "gaussian": {"probe": "gaussian"},
}
SMALL = {"lr": 0.01, "eps": 1e-2}


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced but not compiled, which would take long."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)
    # Nothing of a compiler's is to be freed, and to look for it takes longer the more objects a process has.
    monkeypatch.setattr(compiled_module, "_give_back", lambda: None)


def train(step: TrainStep | AdaHessian, model: nn.Module, steps: int = 10) -> list[Tensor]:
    """Train on batches 0, 1, ... by TrainStep or by closures; losses, weights and buffers."""
    torch.manual_seed(5)
    losses = []
    for i in range(steps):
        x, y = batch(i, model)
        if isinstance(step, TrainStep):
            losses.append(step(x, y))
        else:
            losses.append(step.step(lambda x=x, y=y: F.mse_loss(model(x), y)))
    return [*losses, *weights(model), *(b.clone().double() for b in model.buffers())]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(a.isfinite().all() for a in found)
    assert_trajectory(found, expected, 10)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_eager_is_the_closure_bit_for_bit(device, name, options):
    (a, opt_a), (b, opt_b) = (fresh(MODELS[name](device), **SMALL, **options) for _ in range(2))
    assert_same(train(TrainStep(a, F.mse_loss, opt_a, compile=False, cuda_graph=False), a), train(opt_b, b))


PAIRS = [*((name, "plain") for name in MODELS), *(("mlp", options) for options in OPTIONS if options != "plain")]


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_traced_follows_the_closure(device, traced, name, options):
    options = OPTIONS[options]
    (a, opt_a), (b, opt_b) = (fresh(MODELS[name](device), **SMALL, **options) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a, cuda_graph=False)
    assert_close(train(step, a), train(opt_b, b))
    assert len(step._graphs) == len({i % options.get("update_each", 1) == 0 for i in range(10)})
    assert None not in step._graphs.values()


def test_compiled_follows_the_closure(device):
    """The real compiler, once: training, off-steps, a scheduler, a shorter batch, and resuming."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).to(device, torch.float64)
    (a, opt_a), (b, opt_b) = (fresh(model, **SMALL, update_each=2) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in (opt_a, opt_b)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "TrainStep")
        for i in range(10):
            x, y = batch(i, model, size=3 if i == 4 else 8)
            assert_close([step(x, y)], [opt_b.step(lambda x=x, y=y: F.mse_loss(b(x), y))])
            for scheduler in schedulers:
                scheduler.step()
    assert_close(weights(a), weights(b))
    assert_close([*a.buffers()], [*b.buffers()])
    assert len(step._graphs) == 2


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that are to be compiled, and the compiler's settings for them."""
    found = []
    watched = "reorder_for_locality", "cpp_wrapper"

    def compiler(graph, inputs):
        found.append((graph, *(getattr(torch._inductor.config, name) for name in watched)))
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compiler)
    return found


@pytest.mark.parametrize(("threads", "in_one_file"), [(1, True), (2, True), (16, False)])
def test_how_a_graph_is_compiled(graphs, threads, in_one_file):
    """Operators put off until they are used took 422 MiB in a transformer of 2,048 tokens instead of 345.

    A file for each kernel took 58 s of the compiler's time instead of 27, which many cores share.
    """
    model = mlp(device="cpu")
    with torch._inductor.config.patch(compile_threads=threads):
        TrainStep(model, F.mse_loss, AdaHessian(model.parameters()))(*batch(0, model))
    assert [how for _, *how in graphs] == [[False, in_one_file]]
    assert torch._inductor.config.reorder_for_locality  # for others
    assert not torch._inductor.config.cpp_wrapper


def test_one_file_or_several(monkeypatch):
    """What the compiler cannot call from C++ is compiled file by file."""

    def compiler(graph, inputs):
        if torch._inductor.config.cpp_wrapper:
            raise NotImplementedError
        return graph

    monkeypatch.setattr(torch._inductor, "compile", compiler)
    model = mlp(device="cpu")
    step = TrainStep(model, F.mse_loss, AdaHessian(model.parameters()))
    with torch._inductor.config.patch(compile_threads=1):
        step(*batch(0, model))
    assert None not in step._graphs.values()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("trained", [True, False])
def test_recurrent_layers_on_off_steps(graphs, kind, trained):
    """The LSTM of oneDNN is nothing for TorchInductor; and a layer is one operator for all its time steps."""
    layer, head = kind(3, 4, batch_first=True).requires_grad_(trained), nn.Linear(4, 1)
    params = [*layer.parameters(), *head.parameters()]
    opt = AdaHessian(params, update_each=2, dense_steps=1)
    step = TrainStep(lambda x: head(layer(x)[0]).square().mean(), opt)
    step(torch.ones(2, 30, 3)), step(torch.ones(2, 30, 3))
    targets = [str(node.target) for node in graphs[1][0].graph.nodes]
    assert not [target for target in targets if "mkldnn" in target]
    assert not trained or len(targets) < 100


@pytest.mark.parametrize("how", ["eager", "traced"])
@pytest.mark.parametrize("options", [{}, {"update_each": 2}, {"hessian_fraction": 0.5}], ids=str)
def test_other_leaves_get_what_backward_gives(device, traced, how, options):
    """Another optimizer's parameters and an input, with hooks, added to what is there; their states are nobody's."""
    model = mlp(device=device)
    ours, others = model[:2], model[2:]
    step = TrainStep(model, F.mse_loss, AdaHessian(ours.parameters(), lr=0.0, **options), compile=how == "traced")
    after = []
    for p in others.parameters():
        p.grad = torch.ones_like(p)
        p.register_hook(lambda g: 2 * g)
        p.register_post_accumulate_grad_hook(after.append)
    expected = [torch.ones_like(p) for p in others.parameters()]
    for i in range(3):
        x, y = batch(i, model)
        x.requires_grad_()
        grads = torch.autograd.grad(F.mse_loss(model(x), y), [*others.parameters(), x])
        step(x, y)
        for total, g in zip(expected, grads, strict=False):
            total += g  # which the hook has doubled
        assert_close([*(p.grad for p in others.parameters()), x.grad], [*expected, grads[-1]])
    assert len(after) == 3 * len(expected)


def test_tensors_computed_before_the_step_pass_gradients_on(device):
    encoder, head = mlp(device=device), nn.Linear(2, 2).to(device, torch.float64)
    x, y = batch(0, encoder)
    step = TrainStep(head, F.mse_loss, AdaHessian(head.parameters(), lr=0.0), compile=False)
    expected = torch.autograd.grad(F.mse_loss(head(encoder(x)), y), list(encoder.parameters()))
    step(encoder(x), y)
    assert_close([p.grad for p in encoder.parameters()], list(expected))


@pytest.mark.parametrize("how", ["eager", "traced"])
@pytest.mark.parametrize("name", ["mlp", "dropout"])
def test_fraction(device, traced, how, name):
    """Curvature of the first part, gradient of the whole batch; one forward pass for each part."""
    (a, opt_a), (b, opt_b) = (fresh(MODELS[name](device), lr=0.1, **o) for o in ({"hessian_fraction": 0.25}, {}))
    step = TrainStep(a, F.mse_loss, opt_a, compile=how == "traced", cuda_graph=False)
    for i in range(3):
        x, y = batch(i, b)
        torch.manual_seed(i)
        loss = step(x, y)
        torch.manual_seed(i)
        opt_b.zero_grad()
        first = F.mse_loss(b(x[:2]), y[:2])
        opt_b.backward(first)
        rest = F.mse_loss(b(x[2:]), y[2:])
        grads = torch.autograd.grad(rest, list(b.parameters()))
        for p, g in zip(b.parameters(), grads, strict=True):
            p.grad = 0.25 * p.grad + 0.75 * g
        opt_b.step()
        assert_close([loss], [(0.25 * first + 0.75 * rest).detach()])
        assert_close(weights(a), weights(b))


def test_graphs_are_made_once_for_each_kind_of_step(device, traced, monkeypatch):
    made = []
    graph = step_module.Graph
    monkeypatch.setattr(
        step_module, "Graph", lambda loss, spec, *args, **k: made.append(spec) or graph(loss, spec, *args, **k)
    )
    model, opt = fresh(with_dropout(device), lr=0.01, update_each=2)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    for i in range(4):
        opt.param_groups[0]["lr"] = 0.01 / (i + 1)
        step(*batch(i, model))
    assert len(made) == 2
    model.eval()
    for i in range(4):
        step(*batch(i, model))
    assert len(made) == 2  # not yet
    for i in range(2 * step_module.EAGER_BEFORE):
        step(*batch(i, model))
    assert len(made) == 4


def test_their_number_is_bounded(device, traced, monkeypatch):
    model, opt = fresh(mlp(device=device), lr=0.01)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    monkeypatch.setattr(step_module, "EAGER_BEFORE", 0)
    for size in range(2, 2 + step_module.MAX_GRAPHS):
        step(*batch(0, model, size))
    with pytest.warns(UserWarning, match="has made 8 graphs"):
        step(*batch(0, model, 20))
    assert len(step._graphs) == step_module.MAX_GRAPHS


class Undecided(nn.Module):
    """Its Python code looks at numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if x.sum() > 0 else 2 * x)


def test_says_aloud_what_it_cannot_compile(device):
    (a, opt_a), (b, opt_b) = (fresh(Undecided(mlp(device=device)), lr=0.01) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a)
    with pytest.warns(UserWarning, match="eagerly, because it cannot be"):
        step(*batch(0, a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        step(*batch(1, a))
    assert_same(weights(a), train(opt_b, b, 2)[2:])


@pytest.mark.parametrize("how", ["eager", "traced"])
def test_grad_scaler(device, traced, how):
    """The scale drops out; an overflow skips the step and lowers it."""
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), lr=0.01) for _ in range(2))
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    step = TrainStep(a, F.mse_loss, opt_a, compile=how == "traced", cuda_graph=False, grad_scaler=scaler)
    assert_close(train(step, a, 3), train(opt_b, b, 3))
    assert scaler.get_scale() == 2.0**11
    before = weights(a)
    x, y = batch(0, a)
    step(x, y * 1e306)
    assert_same(weights(a), before)
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("how", ["eager", "traced"])
def test_autocast(device, traced, how):
    (a, opt_a), (b, opt_b) = (fresh(conv_net(torch.float32, device), lr=0.01) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a, compile=how == "traced", cuda_graph=False)
    x, y = batch(0, a)

    def closure():
        with torch.autocast(device, torch.bfloat16):
            return F.mse_loss(b(x), y)

    with torch.autocast(device, torch.bfloat16):
        found = step(x, y)
    assert_same([found], [opt_b.step(closure)])
    torch.testing.assert_close(weights(a), weights(b))
    exact = F.mse_loss(conv_net(torch.float32, device)(x), y)
    assert found != exact


def test_groups_and_checkpoint(device, traced):
    """Groups with schedules of their own; a resumed run goes on as the uninterrupted one."""
    model = mlp(device=device)

    def start(model):
        model = copy.deepcopy(model)
        groups = [{"params": model[:2].parameters(), "lr": 0.02}, {"params": model[2:].parameters(), "update_each": 2}]
        opt = AdaHessian(groups, lr=0.01)
        return model, opt, TrainStep(model, F.mse_loss, opt, cuda_graph=False)

    (a, _, step_a), (b, opt_b, step_b), (c, opt_c, _) = start(model), start(model), start(model)
    train(step_a, a, 5)
    train(step_b, b, 3)
    assert_close(weights(b), train(opt_c, c, 3)[3:])
    d, opt_d, step_d = start(b)
    opt_d.load_state_dict(opt_b.state_dict())
    for i in (3, 4):
        step_d(*batch(i, d))
    assert_close(weights(d), weights(a))
    assert all(p in opt_d.state for p in d.parameters())


class TwoInputs(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return self.inner(x) * factor


@pytest.mark.parametrize("how", ["eager", "traced"])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_several_inputs(device, traced, how, form):
    (a, opt_a), (b, opt_b) = (fresh(TwoInputs(mlp(device=device)), lr=0.01) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a, compile=how == "traced", cuda_graph=False)
    x, y = batch(0, a)
    factor = torch.full_like(y, 2.0)
    for _ in range(2):
        found = step((x, factor) if form == "tuple" else {"x": x, "factor": factor}, y)
        assert_close([found], [opt_b.step(lambda: F.mse_loss(b(x, factor), y))])
    assert_close(weights(a), weights(b))


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (F.mse_loss(outputs, targets) * self.log_scale.exp() - self.log_scale).mean()


def test_parameters_of_the_loss(device, traced):
    model, loss_fn = mlp(device=device), Weighted().to(device)
    opt = AdaHessian([*model.parameters(), *loss_fn.parameters()], lr=0.1)
    step = TrainStep(model, loss_fn, opt, cuda_graph=False)
    step(*batch(0, model))
    assert step._graphs
    assert loss_fn.log_scale != 0


def test_gradients_and_hooks_are_the_optimizers(device):
    model, opt = fresh(mlp(device=device), lr=0.01)
    called = []
    opt.register_step_post_hook(lambda *_: called.append(True))
    step = TrainStep(model, F.mse_loss, opt, compile=False, cuda_graph=False)
    x, y = batch(0, model)
    for _ in range(2):  # not accumulated
        with curvature_friendly():
            expected = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
        step(x, y)
        assert_same([p.grad for p in model.parameters()], expected)
    assert called == [True, True]


def test_a_loss_of_none_of_the_parameters_is_an_error():
    """Nothing would be trained."""
    mine, another = nn.Linear(3, 1), nn.Linear(3, 1)
    step = TrainStep(mine, nn.functional.mse_loss, AdaHessian(another.parameters()), compile=False)
    with pytest.raises(RuntimeError, match=r"shape \(1, 3\), \(1,\) are the optimizer's, but not in model or loss_fn"):
        step(torch.ones(8, 3), torch.ones(8, 1))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"optimizer": "sgd"}, TypeError, "expected adahessian_fused.AdaHessian"),
        ({"hessian_fraction": 0.25}, ValueError, r"0.25, but the optimizer's is 1.0; expected AdaHessian"),
        ({"cuda_graph": "never"}, ValueError, "cuda_graph='never'"),
        ({"compile": "max"}, ValueError, "compile='max'; expected True or False"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn is 'mse'; expected a function"),
        ({"loss_fn": nn.MSELoss}, TypeError, "loss_fn is <class .*MSELoss'>; expected a function or a module, such as"),
        (
            {"loss_fn": nn.Linear(1, 1)},
            TypeError,
            r"Linear, which cannot .* TrainStep\(model, loss_fn, optimizer\)",
        ),
        ({"loss_fn": lambda batch: batch}, TypeError, "function, which cannot be called with outputs and targets"),
    ],
    ids=str,
)
def test_refused(device, change, error, match):
    model, opt = fresh(mlp(device=device))
    opt = torch.optim.SGD(model.parameters(), lr=0.1) if change.pop("optimizer", None) else opt
    with pytest.raises(error, match=match):
        TrainStep(model, change.pop("loss_fn", F.mse_loss), opt, **change)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("batch", [(), (torch.ones(8, 3),), (torch.ones(8, 3),) * 3], ids=len)
def test_batches_that_do_not_fit(device, batch, compiled):
    model, opt = fresh(mlp(device=device))
    message = rf"called with a batch of {len(batch)}; expected inputs and targets, or TrainStep\(loss_of, opt\)"
    with pytest.raises(TypeError, match=message):
        TrainStep(model, F.mse_loss, opt, compile=compiled)(*batch)


def test_a_loss_of_several_numbers_is_refused(device):
    model, opt = fresh(mlp(device=device))
    step = TrainStep(model, lambda y, t: (y - t).square(), opt, compile=False, cuda_graph=False)
    with pytest.raises(RuntimeError, match=r"the loss has shape \(8, 2\)"):
        step(*batch(0, model))


# ---- what a graph depends on ----------------------------------------------------------------------------------------


class Surroundings:
    """A loss, and what Python code changes between steps."""

    def __init__(self, device: str) -> None:
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Dropout(0.0), nn.Linear(3, 2))
        self.model = self.model.to(device, torch.float64)
        self.model.register_buffer("offset", torch.ones(2, dtype=torch.float64, device=device))
        self.model.activation = torch.sin
        self.weight, self.held = 1.0, torch.ones(2, dtype=torch.float64, device=device)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        outputs = self.model.activation(self.model(x)) * self.held + self.model.offset
        return self.weight * F.mse_loss(outputs, y) + factor * torch.ones(2).mean()


factor = 1.0


def the_other_layer(s):
    s.model[0].requires_grad_(not s.model[0].weight.requires_grad)
    s.model[2].requires_grad_(not s.model[2].weight.requires_grad)


def shared(s):
    s.model[2].weight = s.model[0].weight


def hooked(s):
    s.model[0].register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = {
    "trained_layer": the_other_layer,
    "frozen": lambda s: s.model[2].requires_grad_(False),
    "shared": shared,
    "module": lambda s: s.model.__setitem__(1, nn.Sigmoid()),
    "order_of_modules": lambda s: (s.model.__setitem__(0, s.model[2]), s.model.__setitem__(2, s.model[0])),
    "hook": hooked,
    "dropout_rate": lambda s: setattr(s.model[3], "p", 1.0),
    "function": lambda s: setattr(s.model, "activation", torch.cos),
    "number_of_the_loss": lambda s: setattr(s, "weight", 3.0),
    "tensor_of_the_loss": lambda s: setattr(s, "held", 3 * s.held),
    "written_tensor_of_the_loss": lambda s: s.held.mul_(3),
    "written_buffer": lambda s: s.model.offset.mul_(3),
    "global": lambda s: globals().update(factor=5.0),
    "eval": lambda s: s.model[3].eval(),
    "default_dtype": lambda s: torch.set_default_dtype(torch.float64),
    "gradient_hook": lambda s: s.model[0].weight.register_hook(lambda g: 2 * g),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_is_not_used_for_another_step(device, traced, change, monkeypatch):
    """Loss and gradients after the change are those of a new model that begins with it, then, and change by change."""
    monkeypatch.setitem(globals(), "factor", 1.0)
    dtype = torch.get_default_dtype()
    monkeypatch.setattr(step_module, "EAGER_BEFORE", 0)
    torch.manual_seed(1)
    s = Surroundings(device)
    params = list(s.model.parameters())
    if change == "trained_layer":
        s.model[0].requires_grad_(False)
    opt = AdaHessian(params, lr=0.01)
    step = TrainStep(s, opt, cuda_graph=False)
    try:
        for i in range(3):
            if i == 1:
                CHANGES[change](s)
            x, y = batch(i, s.model)
            trained = [p for p in params if p.requires_grad and any(p is q for q in s.model.parameters())]
            loss = s(x, y)
            expected = torch.autograd.grad(loss, trained)
            assert_close([step(x, y)], [loss.detach()])
            assert_close([p.grad for p in trained], list(expected))
            assert all(p.grad is None for p in params if not p.requires_grad)
    finally:
        torch.set_default_dtype(dtype)
    assert None not in step._graphs.values()


class Attribute:
    """Has its number in the class, in an object, in a slot, and behind methods."""

    __slots__ = ("slot",)
    number = 1.0

    def __init__(self) -> None:
        self.slot = 1.0

    def value(self) -> float:
        return self.slot

    @property
    def asked(self) -> float:
        return self.slot


def through(y: Tensor) -> Tensor:
    return inner_function(y)


def inner_function(y: Tensor) -> Tensor:
    return factor * y


def times(y: Tensor, k: float) -> Tensor:
    return y * k


class Asked:
    """Answers with a number that it has elsewhere."""

    def __init__(self) -> None:
        self.numbers = {"a": 1.0}

    def __getattr__(self, name: str) -> float:
        return self.__dict__["numbers"][name]

    def __getitem__(self, i: int) -> float:
        return self.numbers["a"]


class Descriptor:
    def __get__(self, owner, kind=None) -> float:
        return owner.hidden[0]


class Described:
    a = Descriptor()

    def __init__(self) -> None:
        self.hidden = [1.0]


@dataclasses.dataclass
class Config:
    a: float = 1.0


python_module = types.ModuleType("python_module")
LOOKS = {  # what Python code has, how it looks at it, and how it changes
    "list": (lambda: [1.0], lambda s, y: y * s[0], lambda s: s.__setitem__(0, 3.0)),
    "longer_list": (lambda: [1.0], lambda s, y: y * len(s), lambda s: s.append(3.0)),
    "dict": (lambda: {"a": 1.0}, lambda s, y: y * s["a"], lambda s: s.update(a=3.0)),
    "tuple": (lambda: types.SimpleNamespace(a=(1.0,)), lambda s, y: y * s.a[0], lambda s: setattr(s, "a", (3.0,))),
    "set": (lambda: {"a"}, lambda s, y: y * (1 if "a" in s else 3), lambda s: s.clear()),
    "nested": (lambda: {"a": [{"b": 1.0}]}, lambda s, y: y * s["a"][0]["b"], lambda s: s["a"][0].update(b=3.0)),
    "object": (lambda: types.SimpleNamespace(a=1.0), lambda s, y: y * s.a, lambda s: setattr(s, "a", 3.0)),
    "slot": (Attribute, lambda s, y: y * s.slot, lambda s: setattr(s, "slot", 3.0)),
    "method": (Attribute, lambda s, y: y * s.value(), lambda s: setattr(s, "slot", 3.0)),
    "property": (Attribute, lambda s, y: y * s.asked, lambda s: setattr(s, "slot", 3.0)),
    "by_name": (
        lambda: types.SimpleNamespace(a=1.0),
        lambda s, y: y * getattr(s, chr(97)),
        lambda s: setattr(s, "a", 3.0),
    ),
    "of_class": (
        lambda: type("Made", (Attribute,), {"number": 1.0})(),
        lambda s, y: y * s.number,
        lambda s: setattr(type(s), "number", 3.0),
    ),
    "over_class": (
        lambda: type("Made", (), {"number": 1.0})(),
        lambda s, y: y * s.number,
        lambda s: setattr(s, "number", 3.0),
    ),
    "array": (lambda: np.ones(1), lambda s, y: y * float(s[0]), lambda s: s.__setitem__(0, 3.0)),
    "scalar_of_numpy": (
        lambda: [np.float64(1)],
        lambda s, y: y * float(s[0]),
        lambda s: s.__setitem__(0, np.float64(3)),
    ),
    "tensor_in_a_list": (
        lambda: [torch.ones(())],
        lambda s, y: y * s[0],
        lambda s: s.__setitem__(0, torch.tensor(3.0)),
    ),
    "function_in_a_list": (lambda: [torch.sin], lambda s, y: s[0](y), lambda s: s.__setitem__(0, torch.cos)),
    "partial": (
        lambda: [functools.partial(times, k=1.0)],
        lambda s, y: s[0](y),
        lambda s: s.__setitem__(0, functools.partial(times, k=3.0)),
    ),
    "module_in_a_list": (lambda: [nn.Dropout(0.0)], lambda s, y: s[0](y), lambda s: setattr(s[0], "p", 1.0)),
    "module_made_anew": (
        lambda: types.SimpleNamespace(net=nn.Sequential(nn.Identity())),
        lambda s, y: s.net(y),
        lambda s: s.net.__setitem__(0, nn.Tanh()),
    ),
    "getattr": (Asked, lambda s, y: y * s.a, lambda s: s.__dict__["numbers"].update(a=3.0)),
    "getitem": (Asked, lambda s, y: y * s[0], lambda s: s.__dict__["numbers"].update(a=3.0)),
    "descriptor": (Described, lambda s, y: y * s.a, lambda s: s.hidden.__setitem__(0, 3.0)),
    "asdict": (Config, lambda s, y: y * dataclasses.asdict(s)["a"], lambda s: setattr(s, "a", 3.0)),
    "attrgetter": (Config, lambda s, y: y * operator.attrgetter("a")(s), lambda s: setattr(s, "a", 3.0)),
    "user_list": (lambda: collections.UserList([1.0]), lambda s, y: y * s[0], lambda s: s.__setitem__(0, 3.0)),
    "not_there": (
        types.SimpleNamespace,
        lambda s, y: y * getattr(s, "absent", 1.0),
        lambda s: setattr(s, "absent", 3.0),
    ),
    "item": (lambda: [torch.ones(())], lambda s, y: y * s[0].item(), lambda s: s[0].fill_(3.0)),
    "tolist": (lambda: [torch.ones(2)], lambda s, y: y * s[0].tolist()[0], lambda s: s[0].fill_(3.0)),
    "python_module": (lambda: None, lambda s, y: y * python_module.a, lambda s: setattr(python_module, "a", 3.0)),
    "behind_functions": (lambda: None, lambda s, y: through(y), lambda s: globals().update(factor=3.0)),
    "behind_a_function": (lambda: None, lambda s, y: through(y), lambda s: globals().update(inner_function=torch.sin)),
    "attribute_of_class": (
        lambda: None,
        lambda s, y: y * Attribute.number,
        lambda s: setattr(Attribute, "number", 3.0),
    ),
}


class Looks(nn.Module):
    def __init__(self, inner: nn.Module, held, look) -> None:
        super().__init__()
        self.inner, self.held, self.look = inner, held, look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(self.held, self.inner(x))


@pytest.mark.parametrize("where", ["module", "closure"])
@pytest.mark.parametrize("name", LOOKS)
def test_a_graph_is_not_used_once_python_sees_something_else(device, traced, name, where, monkeypatch):
    """A step after the change is that of no graph; and one graph serves as long as nothing changes."""
    monkeypatch.setattr(step_module, "EAGER_BEFORE", 0)
    monkeypatch.setattr(python_module, "a", 1.0, raising=False)
    monkeypatch.setattr(Attribute, "number", 1.0)
    for of_globals in ("factor", "inner_function"):
        monkeypatch.setitem(globals(), of_globals, globals()[of_globals])
    make, look, change = LOOKS[name]
    held, inner = make(), mlp(device=device)
    loss = lambda x, y: F.mse_loss(look(held, inner(x)), y)  # noqa: E731
    model, opt = Looks(inner, held, look), AdaHessian(inner.parameters(), lr=0.0)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False) if where == "module" else TrainStep(loss, opt)
    for i in range(4):
        if i == 2:
            change(held)
        x, y = batch(i, inner)
        torch.manual_seed(i)
        found = step(x, y)
        torch.manual_seed(i)
        assert_close([found], [loss(x, y).detach()])
    assert len(step._graphs) == 2
    assert None not in step._graphs.values()


def test_what_changes_all_the_time_is_said(device, traced):
    (model, opt), held = fresh(mlp(device=device), lr=0.0), types.SimpleNamespace(weight=0.0)
    step = TrainStep(lambda x: held.weight * model(x).mean(), opt, cuda_graph=False)
    x, _ = batch(0, model)
    with warnings.catch_warnings(record=True) as seen:
        for i in range(step_module.MAX_GRAPHS + 2):
            held.weight = float(i)
            assert_close([step(x)], [(held.weight * model(x).mean()).detach()])
    (said,) = (str(each.message) for each in seen if "SimpleNamespace.weight has changed" in str(each.message))
    assert "step(x, y, number)" in said
    assert len(step._graphs) == 1


def test_leaves_that_a_loss_has_in_lists_get_their_gradients(device, traced):
    """Learned weights of several losses, say, which another optimizer trains."""
    model, opt = fresh(mlp(device=device), lr=0.0)
    held = {
        "weights": [torch.ones((), dtype=torch.float64, device=device, requires_grad=True)],
        "net": [mlp(device=device)],
    }
    step = TrainStep(lambda x: (model(x) * held["weights"][0] + held["net"][0](x)).square().mean(), opt)
    leaves = [held["weights"][0], *held["net"][0].parameters()]
    for i in range(2):
        x, _ = batch(i, model)
        expected = torch.autograd.grad(step.loss_fn(x), leaves)
        for leaf in leaves:
            leaf.grad = None
        step(x)
        assert_close([leaf.grad for leaf in leaves], list(expected))
    assert len(step._graphs) == 1


@pytest.mark.parametrize("way", [1, -1])
def test_another_optimizer_has_its_own_order(device, traced, way):
    """Two AdaHessians share one product, whichever order each has its parameters in."""
    models = [nn.Sequential(*(nn.Linear(3, 3, dtype=torch.float64, device=device) for _ in range(4))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    two = {"lr": 0.1, "n_samples": 2}
    pairs = [[AdaHessian(m[:2].parameters(), **two), AdaHessian([*m[2:].parameters()][::way], **two)] for m in models]
    step = TrainStep(models[0], F.mse_loss, pairs[0][0], cuda_graph=False)
    for i in range(3):
        x = batch(i, models[0])[0]
        for opt in (pairs[0][1], *pairs[1]):
            opt.zero_grad()
        step(x, x)
        pairs[1][0].backward(F.mse_loss(models[1](x), x))
        for opt in (pairs[0][1], *pairs[1]):
            opt.step()
    assert_close(weights(models[0]), weights(models[1]))


def test_numbers_that_change_cost_no_graph(device, traced):
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), lr=0.01) for _ in range(2))
    losses = [lambda x, y, t, n, how, m=m: getattr((m(x) * t / n - y).square(), how)() for m in (a, b)]
    step = TrainStep(losses[0], opt_a, cuda_graph=False)
    for i in range(12):
        x, y = batch(i, a)
        rest = (1.0 / (i + 1), i + 1, "mean")
        assert_close([step(x, y, *rest)], [opt_b.step(lambda x=x, y=y, rest=rest: losses[1](x, y, *rest))])
    assert_close(weights(a), weights(b))
    assert len(step._graphs) == 2  # the int is a constant until it changes
    x, y = batch(0, a)
    assert_close([step(x, y, 1.0, 1, "sum")], [losses[1](x, y, 1.0, 1, "sum").detach()])


def test_numbers_that_python_code_looks_at(device, traced, monkeypatch):
    monkeypatch.setattr(step_module, "EAGER_BEFORE", 0)
    model, opt = fresh(mlp(device=device), lr=0.0)
    step = TrainStep(lambda x, t: model(x).square().mean() if t > 0.5 else model(x).sum(), opt, cuda_graph=False)
    x, _ = batch(0, model)
    for t in (1.0, 0.2, 1.0):
        assert_close([step(x, t)], [(model(x).square().mean() if t > 0.5 else model(x).sum()).detach()])
    assert len(step._graphs) == 2


class Counts(nn.Module):
    """Replaces a buffer in the forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        return self.inner(x)


def test_it_says_what_is_waited_for(device, traced, caplog):
    model, opt = fresh(mlp(device=device), update_each=2)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    with caplog.at_level("INFO", "adahessian_fused"):
        step(*batch(0, model))
        step(*batch(1, model))
    first = [f"TrainStep makes a graph for steps {order} curvature; " for order in ("with", "without")]
    assert [m for m in caplog.messages if "makes" in m] == [f + "the compiler may take minutes" for f in first]
    # What comes in mid-training is heard where nobody has asked for it.
    assert [r.levelname for r in caplog.records if "makes" in r.getMessage()] == ["INFO", "WARNING"]
    assert repr(step).endswith("graphs: 1 with curvature, 1 without curvature)")


def counting(s, y):
    s.count += 1
    return y * s.count


def annealing(s, y):
    s.count += 1
    return y if s.count < 3 else 2 * y


def summing(s, y):
    s.items.append(1.0)
    return y * len(s.items)


def recurring(s, y):
    s.last = torch.tanh(y + s.last).detach()
    return y * s.last


def begun(s, y):
    before, s.none = (0.0 if s.none is None else s.none), y.detach()
    return y + before


def caching(s, y):
    if "factor" not in s.cache:
        s.cache["factor"] = 2 * torch.ones_like(y[0])
    if not hasattr(s, "made"):
        s.made = torch.ones_like(y[0])
    return y * s.cache["factor"] * s.made * s.cached


def leaving(s, y):
    s.last = y.square()
    return y


def filling(s, y):
    s.cache["y"], s.items[0] = y.square(), y.detach()
    return y


def recurring_in_a_tuple(s, y):
    s.pair = torch.tanh(y + s.pair[0]).detach(), s.pair[1]
    return y * s.pair[0]


def leaving_several(s, y):
    s.last = [y.square(), {"y": y}]
    return y


WRITES = {  # what a forward writes: whether graphs can be made
    "counting": (counting, False),
    "annealing": (annealing, False),
    "summing": (summing, False),
    "recurring": (recurring, False),
    "begun": (begun, False),
    "caching": (caching, True),
    "leaving": (leaving, True),
    "filling": (filling, True),
    "recurring_in_a_tuple": (recurring_in_a_tuple, False),
    "leaving_several": (leaving_several, True),
}


class Writes(nn.Module):
    def __init__(self, inner: nn.Module, write) -> None:
        super().__init__()
        self.inner, self.write, self.count, self.none, self.items, self.cache = inner, write, 0, None, [1.0], {}
        self.last = torch.zeros(2, dtype=torch.float64, device=inner[0].weight.device)
        self.pair = self.last.clone(), 1
        self.register_buffer("seen", torch.zeros(()))

    @functools.cached_property
    def cached(self):
        return 3.0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.write(self, self.inner(x))


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.filterwarnings("ignore:TrainStep runs this kind")
def test_modules_that_write_to_themselves(device, traced, name):
    """What the next step reads of it runs eagerly, aloud; caches and outputs that are kept do not matter."""
    write, can = WRITES[name]
    (a, opt_a), (b, opt_b) = (fresh(Writes(mlp(device=device), write), lr=0.01) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a, cuda_graph=False)
    assert_close(train(step, a, 5), train(opt_b, b, 5))
    assert (a.count, len(a.items), a.seen) == (b.count, len(b.items), 5)
    left = [[torch.as_tensor(x).detach() for x in tree_leaves((m.last, m.pair, m.cache, m.items[0]))] for m in (a, b)]
    assert_close(*left)
    assert [graph is not None for graph in step._graphs.values()] == [can]


def test_what_a_step_writes_is_said(device, traced):
    model, opt = fresh(Writes(mlp(device=device), counting), lr=0.01)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    with pytest.warns(UserWarning, match=r"eagerly.*writes to Writes\.count.*self\.count\.add_\(1\)"):
        step(*batch(0, model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(*batch(1, model))


def test_a_buffer_that_is_replaced(device, traced):
    model, opt = fresh(Counts(mlp(device=device)), lr=0.01)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    with pytest.warns(UserWarning, match=r"eagerly.*Counts replaces its buffer seen.*self\.seen\.copy_"):
        step(*batch(0, model))
    step(*batch(0, model))
    assert model.seen == 2


@pytest.mark.parametrize("form", ["object", "derived"])
def test_batches_that_cannot_be_in_a_graph(device, traced, form):
    model, opt = fresh(mlp(device=device), lr=0.0)
    step = TrainStep(lambda x, other: (model(x) * torch.as_tensor(other)).mean(), opt, cuda_graph=False)
    x, _ = batch(0, model)
    for factor in (1.0, 2.0):
        w = model[0].weight.sum()
        other = torch.full((2,), factor).numpy() if form == "object" else w * factor
        grads = torch.autograd.grad((model(x) * torch.as_tensor(other)).mean(), list(model.parameters()))
        w = model[0].weight.sum()
        with warnings.catch_warnings(record=True) as seen:
            step(x, torch.full((2,), factor).numpy() if form == "object" else w * factor)
        assert len(seen) == (factor == 1.0)
        assert_close([p.grad for p in model.parameters()], list(grads))
    assert not step._graphs


# ---- any loss --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Example:
    x: Tensor
    y: Tensor
    name: str = "example"


Pair = collections.namedtuple("Pair", ["x", "y"])
FORMS = {
    "dataclass": (Example, lambda b: (b.x, b.y)),
    "named_tuple": (Pair, lambda b: (b.x, b.y)),
    "mapping": (lambda x, y: collections.UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "nested": (lambda x, y: {"more": [Example(x, y), None]}, lambda b: (b["more"][0].x, b["more"][0].y)),
}


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_batches(device, traced, form, fraction):
    make, values = FORMS[form]
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), lr=0.01, hessian_fraction=fraction) for _ in range(2))

    def loss_of(model, data):
        x, y = values(data)
        return F.mse_loss(model(x), y)

    step = TrainStep(lambda data: loss_of(a, data), opt_a, cuda_graph=False)
    for i in range(3):
        data = make(*batch(i, a))
        opt_b.zero_grad()
        loss = opt_b.backward_split(lambda data: loss_of(b, data), data)
        opt_b.step()
        assert_close([step(data)], [loss])
    assert_close(weights(a), weights(b))
    assert len(step._graphs) == 1


def test_axes_count_only_where_a_part_is_asked_for(device, traced):
    model, opt = fresh(mlp(device=device), lr=0.01)
    step = TrainStep(lambda pair, extra: model(pair[0]).mean() * pair[1].mean(), opt, cuda_graph=False)
    pair = torch.ones(16, 3, dtype=torch.float64, device=device), torch.ones(5, device=device)
    expected = model(pair[0]).mean().detach()
    assert_close([step(pair, None)], [torch.ones((), dtype=torch.float64, device=device) * expected])
    opt.param_groups[0]["hessian_fraction"] = 0.5
    with pytest.raises(ValueError, match="first axes"):
        step(pair, None)


RESULTS = {
    "tuple": (lambda loss, out: (loss, out, "text"), lambda r: (r[0], r[1])),
    "mapping": (lambda loss, out: {"outputs": out, "loss": loss}, lambda r: (r["loss"], r["outputs"])),
}


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("how", ["eager", "traced"])
@pytest.mark.parametrize("form", RESULTS)
def test_more_than_the_loss_comes_back(device, traced, form, how, fraction):
    make, values = RESULTS[form]
    model, opt = fresh(mlp(device=device), lr=0.0, hessian_fraction=fraction)
    step = TrainStep(
        lambda x, y: make(F.mse_loss(model(x), y), model(x)), opt, compile=how == "traced", cuda_graph=False
    )
    x, y = batch(0, model)
    for _ in range(2):
        loss, outputs = values(step(x, y))
        assert not loss.requires_grad
        assert not outputs.requires_grad
        assert_close([loss, outputs], [F.mse_loss(model(x), y).detach(), model(x).detach()])


def with_tensor(device):
    w = torch.ones(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    return [w], lambda x, y: (torch.tanh(x @ w) - y).square().mean()


def with_hidden_module(device):
    """A loss that does not show what it uses."""
    held = [conv_net(device=device)]
    return list(held[0].parameters()), lambda x, y: F.mse_loss(held[0](x), y)


def with_derivative(device):
    model = mlp(device=device)

    def loss(x, y):
        x = x.requires_grad_()
        outputs = model(x)
        (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return slope.square().mean() + (outputs - y).square().mean()

    return list(model.parameters()), loss


def with_compiled_model(device):
    model = mlp(device=device)
    compiled = torch.compile(model, backend="eager")
    return list(model.parameters()), lambda x, y: F.mse_loss(compiled(x), y)


@pytest.mark.parametrize("make", [with_tensor, with_hidden_module, with_derivative, with_compiled_model])
def test_losses_of_all_kinds(device, traced, make):
    (params_a, loss_a), (params_b, loss_b) = make(device), make(device)
    opt_a, opt_b = (AdaHessian(params, lr=0.01, update_each=2) for params in (params_a, params_b))
    step = TrainStep(loss_a, opt_a, cuda_graph=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "TrainStep")
        for i in range(4):
            x, y = batch(i, mlp(device=device))
            opt_b.zero_grad()
            loss = loss_b(x.clone(), y)
            opt_b.backward(loss)
            opt_b.step()
            assert_close([step(x.clone(), y)], [loss.detach()])
    assert_close([p.detach() for p in params_a], [p.detach() for p in params_b])
    assert len(step._graphs) == 2


def test_what_it_tells_of_itself(device, traced):
    model, opt = fresh(mlp(device=device), lr=0.01, update_each=2)
    step = TrainStep(model, F.mse_loss, opt, cuda_graph=False)
    for i in range(3):
        step(*batch(i, model))
    assert repr(step) == "TrainStep(Sequential, mse_loss, AdaHessian; graphs: 1 with curvature, 1 without curvature)"
    again = pickle.loads(pickle.dumps(step))
    assert_close([again(*batch(3, model))], [step(*batch(3, model))])
    assert_close(weights(again.model), weights(model))


@pytest.mark.parametrize("value", [None, [], {"total": 1}, "text"], ids=str)
def test_a_loss_function_without_a_loss(device, value):
    _, opt = fresh(mlp(device=device))
    with pytest.raises(TypeError, match="the loss function returned"):
        TrainStep(lambda: value, opt, compile=False, cuda_graph=False)()


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


def test_cuda_graph_needs_cuda(device):
    if device == "cuda":
        pytest.skip("it is there")
    model, opt = fresh(mlp(device=device))
    with pytest.raises(RuntimeError, match="cannot make a CUDA graph"):
        TrainStep(model, F.mse_loss, opt, compile=False, cuda_graph=True)(*batch(0, model))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["mlp", "batch_norm"])
def test_cuda_graph_follows_the_closure(device, name, compiled):
    if device != "cuda":
        pytest.skip("needs --device cuda")
    options = {"update_each": 2, "capturable": True}
    (a, opt_a), (b, opt_b) = (fresh(MODELS[name](device), **SMALL, **options) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a, compile=compiled, cuda_graph=True)
    assert_close(train(step, a), train(opt_b, b))
    assert len(step._graphs) == 2


def test_cuda_graph_notices_moved_parameters(device):
    if device != "cuda":
        pytest.skip("needs --device cuda")
    (a, opt_a), (b, opt_b) = (fresh(mlp(device=device), **SMALL) for _ in range(2))
    step = TrainStep(a, F.mse_loss, opt_a, compile=False, cuda_graph=True)
    train(step, a, 2), train(opt_b, b, 2)
    for p in a.parameters():
        p.data = p.data.clone()
    assert_close(train(step, a, 2), train(opt_b, b, 2))


def test_cuda_graph_says_aloud_what_it_cannot_capture(device):
    if device != "cuda":
        pytest.skip("needs --device cuda")
    model, opt = fresh(Undecided(mlp(device=device)), **SMALL)
    with pytest.warns(UserWarning, match="captured as a CUDA graph"):
        TrainStep(model, F.mse_loss, opt, compile=False)(*batch(0, model))
