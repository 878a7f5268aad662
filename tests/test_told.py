"""``curvature_friendly(model, opt)``: a model that enters the mode by itself, and is otherwise what it was."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, weights
from published import AdaHessian
from torch import nn
from zoo import Encoder

from adahessian_fused import TrainStep, curvature_friendly
from adahessian_fused.friendly import mode


class Watched(nn.Module):
    """Takes down whether each of its calls ran in the mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.inside = Encoder(), []

    def forward(self, x):
        self.inside.append(mode.on())
        if x is None:
            raise KeyboardInterrupt
        return self.encoder(x)


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))


def step(opt, model, x=X):
    opt.zero_grad()
    opt.backward(model(x).square().mean())
    opt.step()


def told(**options):
    model = Watched()
    opt = AdaHessian(model.parameters(), lr=0.01, **options)
    return model, opt, curvature_friendly(model, opt)


@pytest.fixture(autouse=True)
def nothing_stays():
    before = torch.backends.cuda.flash_sdp_enabled()
    yield
    assert not mode.on()
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_due_steps_only():
    model, opt, _ = told(update_each=3)
    for _ in range(4):
        step(opt, model)
    assert model.inside == [True, False, False, True]


@pytest.mark.parametrize("how", ["no_grad", "eval", "finite_differences", "curvature=0", "after remove", "after with"])
def test_left_alone(how):
    model, opt, handle = told(hvp="finite_difference" if how == "finite_differences" else "autograd")
    if how == "no_grad":
        with torch.no_grad():
            model(X)
    elif how == "eval":
        model.eval()(X)
    elif how == "finite_differences":
        opt.step(lambda: model(X).square().mean())
    elif how == "curvature=0":
        opt.backward(lambda: model(X).square().mean(), curvature=0)
    elif how == "after remove":
        handle.remove()
        model(X)
    else:
        with handle:
            pass
        model(X)
    assert not any(model.inside)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_it_is_what_it_was():
    model, opt, handle = told()
    plain = Watched()
    assert len(pickle.dumps(model)) == len(pickle.dumps(plain))
    assert opt.needs_hessian
    assert [*model.state_dict()] == [*plain.state_dict()]
    for module, other in zip(model.modules(), plain.modules(), strict=True):
        assert (module._forward_hooks, module._forward_pre_hooks) == (other._forward_hooks, other._forward_pre_hooks)
        assert module.forward.__func__ is other.forward.__func__
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), copy.copy(model), torch.load(file, weights_only=False)):
        twin.inside = []
        twin(X)
        assert twin.inside == [False]
    assert_same([model.eval()(X)], [plain.eval()(X)])
    for trace in (
        torch.fx.symbolic_trace,
        lambda m: torch.jit.trace(m, X),
        lambda m: torch.export.export(m, (X,)).module(),
    ):
        assert_same([trace(model.encoder.head)(X)], [plain.encoder.head(X)])
    handle.remove()
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in plain.modules()]


@pytest.mark.parametrize("part", ["child", "grandchild", "wrapper"])
def test_however_it_is_called(part):
    """A trainer's module is told, and its parts are called; or a part is told, and what wraps it is called."""
    model, opt, handle = told()
    if part == "wrapper":
        outer = nn.Sequential(model, nn.Tanh())
        loss = outer(X).square().mean()
    else:
        handle.remove()
        outer = nn.ModuleDict({"a": nn.ModuleList([model])})
        curvature_friendly(outer if part == "grandchild" else outer["a"], opt)
        loss = outer["a"][0](X).square().mean()
    assert model.inside == [True]
    opt.backward(loss)


def test_exceptions():
    model, opt, _ = told()
    with pytest.raises(KeyboardInterrupt):
        model(None)
    assert model.inside == [True]
    with pytest.raises(ValueError, match="hook"), nn.modules.module.register_module_forward_pre_hook(refuse):
        model(X)
    assert not mode.on()
    step(opt, model)


def refuse(module, args):
    raise ValueError("hook")


class Recursive(nn.Module):
    """Calls itself, and another model that was told, before and after."""

    def __init__(self, other):
        super().__init__()
        self.weight, self.other, self.inside = nn.Parameter(torch.ones(3)), [other], []

    def forward(self, x, depth=2):
        self.other[0](x)
        x = self(x, depth - 1) if depth else x * self.weight
        self.inside.append(mode.on())
        return x


def test_modules_that_call_themselves_and_each_other():
    other = Watched()
    other.forward = lambda x: other.inside.append(mode.on())
    model = Recursive(other)
    opt, opt_of_other = AdaHessian(model.parameters(), update_each=2), AdaHessian(other.parameters())
    curvature_friendly(model, opt)
    curvature_friendly(other, opt_of_other)
    for due in (True, False):
        model.inside.clear(), other.inside.clear()
        opt.zero_grad()
        opt.backward(model(torch.ones(3)).square().sum())
        opt.step()
        assert model.inside == [due] * 3
        assert other.inside == [True] * 3


def test_several_optimizers_of_one_model():
    model = Watched()
    parts = (model.encoder.encoder, 2), (model.encoder.head, 3)
    opts = [AdaHessian(part.parameters(), update_each=n) for part, n in parts]
    handles = [curvature_friendly(model, opt) for opt in opts]
    with opts[0].hook_backward(), opts[1].hook_backward():
        for _ in range(4):
            for opt in opts:
                opt.zero_grad()
            model(X).square().mean().backward()
            for opt in opts:
                opt.step()
    assert model.inside == [True, False, True, True]
    handles[0].remove()
    model(X)
    assert model.inside[-1] == opts[1].needs_hessian
    del opts[:], opt
    model(X)
    assert not model.inside[-1]


def test_generator_and_critic():
    """Each has its optimizer; the generator's loss goes through the critic."""
    torch.manual_seed(0)
    generator, critic = nn.Sequential(nn.Linear(2, 32), nn.Unflatten(1, (4, 8))), Watched()
    opts = [AdaHessian(m.parameters(), lr=0.01, update_each=n) for m, n in ((generator, 1), (critic, 2))]
    curvature_friendly(generator, opts[0])
    curvature_friendly(critic, *opts)
    for _ in range(3):
        for opt, loss in zip(
            opts,
            (lambda z: -critic(generator(z)).mean(), lambda z: critic(generator(z).detach()).square().mean()),
            strict=True,
        ):
            opt.zero_grad()
            opt.backward(loss(torch.randn(4, 2)))
            opt.step()
    assert critic.inside == [True] * 6


def test_replicas():
    """nn.DataParallel copies what a module has in its dictionary."""
    model, opt, _ = told()
    assert opt.needs_hessian
    replica = model._replicate_for_data_parallel()
    replica.inside, replica.encoder = [], nn.Flatten()
    results = [replica(X)]
    thread = threading.Thread(target=lambda: results.append(replica(X)))
    thread.start()
    thread.join()
    assert [r.shape for r in results] == [(3, 32)] * 2
    assert (replica.inside, model.inside) == ([True, True], [])


def test_threads():
    """The stance of compiled code is the process's: it is back when the last of them has left."""
    barrier, failures = threading.Barrier(4), []

    def work():
        try:
            model, opt, _ = told(update_each=2)
            for _ in range(4):
                barrier.wait()
                step(opt, model)
            assert model.inside == [True, False] * 2
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures


@pytest.mark.parametrize(
    "how", ["told after", "told before", "in place", "in place, told before", "around it, told before", "closure"]
)
def test_compiled_models(how):
    """They run as they were written on steps with curvature, and compiled, without a break, on the others."""
    torch.compiler.reset()
    from torch._dynamo.testing import CompileCounter

    model, reference = Watched().encoder, Watched().encoder
    opt, opt_of_reference = (AdaHessian(m.parameters(), lr=0.01, update_each=2) for m in (model, reference))
    counter, run = CompileCounter(), model
    if "told before" in how:
        curvature_friendly(model, opt)
    if "in place" in how:
        model.compile(backend=counter, fullgraph=True)
    else:
        whole = nn.Sequential(model) if "around" in how else model
        run = torch.compile(whole, backend=counter, fullgraph=True)
    if how in ("told after", "in place"):
        curvature_friendly(run, opt)
    for i in range(4):
        if how == "closure":
            opt.step(lambda: run(X).square().mean())
        else:
            step(opt, run)
        assert counter.frame_count == (i > 0)
        opt_of_reference.step(lambda: reference(X).square().mean())
    assert_same(weights(model), weights(reference))


@pytest.mark.parametrize("arguments", [("model",), (nn.Linear(1, 1),), (nn.Linear(1, 1), "opt")], ids=str)
def test_arguments(arguments):
    with pytest.raises(TypeError, match="expected"):
        curvature_friendly(*arguments)


def test_the_error_names_it_first():
    model, opt, handle = told()
    handle.remove()
    with pytest.raises(RuntimeError, match=r"Ways out: curvature_friendly\(model, opt\), once"):
        step(opt, model)


@pytest.mark.filterwarnings("error:TrainStep runs this kind of step eagerly")
@pytest.mark.parametrize("how", ["eager", "traced"])
def test_train_step(how, monkeypatch):
    """It takes told models, and their off-steps, as it takes any other."""
    monkeypatch.setattr(Watched, "forward", lambda self, x: self.encoder(x))  # no list is written to
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)
    (model, opt, _), (twin, opt_of_twin, handle) = (told(update_each=2) for _ in range(2))
    handle.remove()
    steps = [TrainStep(m, F.mse_loss, o, compile=how == "traced") for m, o in ((model, opt), (twin, opt_of_twin))]
    for _ in range(4):
        losses = [step(X, torch.ones(3, 5)) for step in steps]
        assert_same(losses[:1], losses[1:])
    assert_same(weights(model), weights(twin))
