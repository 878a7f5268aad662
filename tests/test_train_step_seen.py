"""What the graphs of TrainStep depend on: what changes between steps, what Python code looks at, and what it writes."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import functools
import operator
import os
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import batch, fresh, mlp, weights
from published import AdaHessian
from test_train_step import assert_close, train
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from adahessian_fused import TrainStep
from adahessian_fused.train_step import step as step_module


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
context = contextvars.ContextVar("context", default=1.0)
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
    "data": (lambda: [torch.ones(())], lambda s, y: y * s[0], lambda s: setattr(s[0], "data", torch.tensor(3.0))),
    "data_of_another_shape": (
        lambda: [torch.ones(())],
        lambda s, y: y * s[0],
        lambda s: setattr(s[0], "data", torch.full((2,), 3.0)),
    ),
    "long_list": (lambda: [1.0] * 5_000, lambda s, y: y * s[-1], lambda s: s.__setitem__(-1, 3.0)),
    "long_dict": (lambda: dict.fromkeys(range(5_000), 1.0), lambda s, y: y * s[7], lambda s: s.update({7: 3.0})),
    "context": (lambda: None, lambda s, y: y * context.get(), lambda s: context.set(3.0)),
    "environ": (lambda: None, lambda s, y: y * float(os.environ["FACTOR"]), lambda s: os.environ.update(FACTOR="3.0")),
    "getenv": (lambda: None, lambda s, y: y * float(os.getenv("FACTOR")), lambda s: os.environ.update(FACTOR="3.0")),
    "globals": (lambda: None, lambda s, y: y * globals()["factor"], lambda s: globals().update(factor=3.0)),
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
    monkeypatch.setenv("FACTOR", "1.0")
    context.set(1.0)
    for of_globals in ("factor", "inner_function"):
        monkeypatch.setitem(globals(), of_globals, globals()[of_globals])
    make, look, change = LOOKS[name]
    held, inner = make(), nn.Linear(3, 2, dtype=torch.float64, device=device)
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
    assert len(step._graphs) == 2 - name.startswith("data")  # which is the graph's input
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
