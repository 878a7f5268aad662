"""What only happens on GPUs, on any machine: with tensors that have no data, or with CUDA's calls replaced."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from published import AdaHessian
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adahessian_fused import backends, capture
from adahessian_fused.friendly.embedding_bag import MAX, EmbeddingBag
from adahessian_fused.friendly.row_norm import RmsNorm
from adahessian_fused.segments import segment_table
from adahessian_fused.train_step import cuda_graph
from adahessian_fused.update import HyperTable

aten = torch.ops.aten


class Called(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.packets = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.packets.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


# ---- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_last_offset", [False, True])
def test_bags_of_maxima_have_a_double_backward(include_last_offset):
    """On CUDA, whose shapes those without data are, there is one bag's size more than there are bags."""
    weight = torch.empty(5, 3, device="meta")
    indices, offsets = (torch.empty(n, dtype=torch.long, device="meta") for n in (6, 4))
    bags = EmbeddingBag(MAX, indices, offsets, include_last_offset, -1)
    y, tensors = bags.forward(weight, None)
    d_grad, *_ = bags.double_backward((weight, None), y, *tensors, mask=(True, True, False))
    assert d_grad.shape == y.shape


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_rms_norm_takes_the_operators_that_torch_takes(dtypes):
    with FakeTensorMode(), torch.no_grad():
        x, weight = (torch.empty(n, dtype=t, device="cuda") for n, t in zip(((4, 8), 8), dtypes, strict=True))
        norm = RmsNorm((8,), 1e-5)
        with Called() as ours:
            y, tensors = norm.forward(x, weight)
            grads = norm.backward(y, *tensors, mask=(True, True))
    assert (aten._fused_rms_norm_backward in ours.packets) == (dtypes[0] == dtypes[1])
    assert [g.dtype for g in grads] == list(dtypes)


# ---- what CUDA graphs read -------------------------------------------------------------------------------------------

GPU = torch.device("meta")  # neither has numbers here


def groups(lr=0.1, n=1, **changed):
    opt = AdaHessian([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(n)], lr=lr)
    for group in opt.param_groups:
        group.update(changed)
    return opt.param_groups


def test_hyperparameters_stay_where_graphs_read_them():
    table = HyperTable()
    first = table.on(GPU, groups())
    with Called() as called:
        assert table.on(GPU, groups(weight_decay=0.5)) is first
    assert aten.copy_ in called.packets
    assert table.on(GPU, groups(n=2)) is not first
    assert table._captured == [first]


def test_an_lr_on_the_cpu_is_copied_when_it_changes_only():
    table, lr = HyperTable(), torch.tensor(0.125)
    table.on(GPU, groups(lr))
    for value, copies in ((0.125, 0), (0.25, 1)):
        lr.fill_(value)
        with Called() as called:
            table.on(GPU, groups(lr))
        assert called.packets.count(aten.copy_) == copies


def test_hyperparameters_cannot_change_under_capture(monkeypatch):
    table, device = HyperTable(), torch.device("cpu")
    first = table.on(device, groups()).clone()
    monkeypatch.setattr("adahessian_fused.update.capturing", lambda device: True)
    assert torch.equal(table.on(device, groups()), first)
    with pytest.raises(RuntimeError, match="a hyperparameter changed while a CUDA graph is captured"):
        table.on(device, groups(weight_decay=0.5))


def test_groups_with_different_update_each_share_the_tables(device):
    """Steps of one or two of three groups alternate, and each has its tables once."""
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3))).to(device)
    every = [{"params": layer.parameters(), "update_each": f} for layer, f in zip(model, (1, 2, 3), strict=True)]
    opt = AdaHessian(every, lr=0.1, dense_steps=0)
    made = []
    for _ in range(12):
        opt.zero_grad()
        opt.backward(model(torch.ones(2, 3, device=device)).square().sum())
        opt.step()
        made.append(next(iter(opt.layout.entries.values())).bucket._subsets.values())
    assert len({id(subset.segments) for subset in made[5]}) == len(made[5]) == len(made[-1])
    assert {id(subset.segments) for subset in made[5]} == {id(subset.segments) for subset in made[-1]}


# ---- several GPUs ----------------------------------------------------------------------------------------------------


class OnGpu(Tensor):
    """A tensor that says it is on the second of two GPUs."""

    @staticmethod
    def of(tensor):
        return torch.Tensor._make_subclass(OnGpu, tensor)

    device = property(lambda self: torch.device("cuda", 1))
    is_cuda = property(lambda self: True)


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs as far as torch.cuda's calls go: which is current, what is captured where, in what mode."""
    fake = SimpleNamespace(current=0, captured_on=None, graphs=[])

    @contextlib.contextmanager
    def device(which):
        before, fake.current = fake.current, torch.device(which).index
        yield
        fake.current = before

    @contextlib.contextmanager
    def graph(graph, *, capture_error_mode="global", **options):
        fake.graphs.append((graph, fake.current, capture_error_mode))
        fake.captured_on = fake.current
        yield
        fake.captured_on = None

    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    replaced = {
        "device": device,
        "graph": graph,
        "current_device": lambda: fake.current,
        "is_current_stream_capturing": lambda: fake.captured_on == fake.current,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "Stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: stream,
        "get_rng_state": lambda device: torch.device(device).index,
        "set_rng_state": lambda state, device: fake.__setattr__("random", (state, torch.device(device).index)),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def test_graphs_are_captured_on_the_device_of_their_tensors(gpus):
    weight, x = torch.ones(3), torch.arange(3.0)

    def function(weight, x):
        weight.add_(1)
        return [weight * x]

    run = cuda_graph.Captured(function, [OnGpu.of(weight), OnGpu.of(x)], 1)
    # A loader may pin memory in another thread meanwhile, which the mode "global" forbids.
    assert [graph[1:] for graph in gpus.graphs] == [(1, "thread_local")]
    assert gpus.random == (1, 1)
    assert torch.equal(weight, torch.full((3,), 2.0))  # one call, where CUDA would have recorded it: no warm-up is felt
    run(OnGpu.of(weight), OnGpu.of(x + 1))
    assert torch.equal(run._inputs[1].as_subclass(Tensor), x + 1)


def test_capturing_asks_the_device_it_is_asked_about(gpus):
    with torch.cuda.device("cuda:1"), torch.cuda.graph(None):
        assert capture.capturing(torch.device("cuda:1"))
        assert capture.capturing(torch.device("cuda"))
        assert not capture.capturing(torch.device("cuda:0"))
        gpus.current = 0
        assert capture.capturing(torch.device("cuda:1"))
        assert not capture.capturing(torch.device("cuda"))
        assert not capture.capturing(torch.device("cpu"))


PARAM, FLAT = torch.ones(16), torch.zeros(16)
TABLES = {"segments": segment_table([(0, 16, 1, 1, 1, 0, 0, 0, 0, 0)]), "steps": torch.zeros(1, 2, dtype=torch.int64)}
KEY = {"seed": 0, "sample": 0}
LAUNCHES = {
    "rademacher": ((FLAT,), KEY),
    "perturb": (([PARAM], FLAT), {**KEY, "scale": 0.5, "save": True}),
    "hessian_diag": (([PARAM], FLAT), {**KEY, "is_hvp": True, "scale": 1.0, "accumulate": False}),
}


@pytest.mark.parametrize("op", LAUNCHES)
def test_triton_plans_on_the_device_it_launches_on(op, monkeypatch):
    """Tables go through the stream of the device that is current then, and so is asked for a capture."""
    if (reason := backends.unavailable_reason("triton", "cpu")) is not None:
        pytest.skip(reason)
    module = importlib.import_module(f"adahessian_fused.kernels.{op}")
    current = []

    @contextlib.contextmanager
    def on(op, device):
        current.append(device)
        yield
        current.pop()

    def plan_of(*arguments, original=module.plan_of):
        assert current == [torch.device("cpu")]
        return original(*arguments)

    monkeypatch.setattr(module, "on", on)
    monkeypatch.setattr(module, "plan_of", plan_of)
    arguments, options = LAUNCHES[op]
    getattr(module, op)(*arguments, **TABLES, **options)
