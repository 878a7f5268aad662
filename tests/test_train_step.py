"""TrainStep: eager, traced and compiled, it does what the optimizer does with a closure."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, batch, conv_net, fresh, mlp, weights
from published import AdaHessian
from tolerances import assert_trajectory
from torch import Tensor, nn

from adahessian_fused import TrainStep, curvature_friendly
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
    steps = 12 if trained else 3
    step(torch.ones(2, steps, 3)), step(torch.ones(2, steps, 3))
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
        ({"model": torch.sin}, TypeError, r"model is of type builtin.*; expected a torch\.nn\.Module, or TrainStep"),
        ({"loss_fn": "mse"}, TypeError, "loss_fn is 'mse'; expected a function"),
        ({"loss_fn": nn.MSELoss}, TypeError, "loss_fn is <class .*MSELoss'>; expected a function or a module, such as"),
        (
            {"loss_fn": nn.Linear(1, 1)},
            TypeError,
            r"Linear, which cannot .* TrainStep\(model, loss_fn, optimizer\)",
        ),
        ({"loss_fn": lambda batch: batch}, TypeError, "function, which cannot be called with outputs and targets"),
    ],
)
def test_refused(device, change, error, match):
    model, opt = fresh(mlp(device=device))
    opt = torch.optim.SGD(model.parameters(), lr=0.1) if change.pop("optimizer", None) else opt
    with pytest.raises(error, match=match):
        TrainStep(change.pop("model", model), change.pop("loss_fn", F.mse_loss), opt, **change)


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
