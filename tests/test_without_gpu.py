"""What only happens on GPUs, on any machine: with tensors that have no data, or with CUDA's calls replaced."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from types import SimpleNamespace

import conftest
import pytest
import torch
from conftest import OPS
from models import assert_same, batch, fresh, mlp, train, weights
from published import AdaHessian
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adahessian_fused import TrainStep, backends, capture
from adahessian_fused.friendly.embedding_bag import MAX, EmbeddingBag
from adahessian_fused.friendly.row_norm import RmsNorm
from adahessian_fused.segments import Segment, segment_table
from adahessian_fused.train_step import cuda_graph, derivatives, graph
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


# ---- tests on a GPU --------------------------------------------------------------------------------------------------


COMPUTED_ALIKE = """
import conftest, os, torch
conftest.compute_alike()
x = torch.ones(2, 2)
assert torch.equal(x @ x, 2 * x) and torch.are_deterministic_algorithms_enabled()
assert torch.is_deterministic_algorithms_warn_only_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
assert not torch.utils.deterministic.fill_uninitialized_memory and torch.backends.cudnn.deterministic
assert {torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision} == {"ieee"}
"""


def test_tests_on_a_gpu_are_deterministic():
    """In a process of its own, whose settings end with it."""
    subprocess.run([sys.executable, "-c", COMPUTED_ALIKE], env=conftest.safe_path(), check=True)


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


def unchecked():
    """What looks at options that have changed."""


def test_hyperparameters_stay_where_graphs_read_them():
    table = HyperTable()
    first = table.on(GPU, groups(), unchecked)
    with Called() as called:
        assert table.on(GPU, groups(weight_decay=0.5), unchecked) is first
    assert aten.copy_ in called.packets
    assert table.on(GPU, groups(n=2), unchecked) is not first
    assert table._captured == [first]


def test_an_lr_on_the_cpu_is_copied_when_it_changes_only():
    table, lr = HyperTable(), torch.tensor(0.125)
    table.on(GPU, groups(lr), unchecked)
    for value, copies in ((0.125, 0), (0.25, 1)):
        lr.fill_(value)
        with Called() as called:
            table.on(GPU, groups(lr), unchecked)
        assert called.packets.count(aten.copy_) == copies


def test_hyperparameters_cannot_change_under_capture(monkeypatch):
    table, device = HyperTable(), torch.device("cpu")
    first = table.on(device, groups(), unchecked).clone()
    monkeypatch.setattr("adahessian_fused.update.capturing", lambda device: True)
    assert torch.equal(table.on(device, groups(), unchecked), first)
    with pytest.raises(RuntimeError, match="a hyperparameter changed while a CUDA graph is captured"):
        table.on(device, groups(weight_decay=0.5), unchecked)


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


OPTIONS = {
    "samples": {"n_samples": 2},
    "magnitudes": {"averaging": "abs", "block_size": 2, "n_samples": 2},
    "shrink": {"shrink": 1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_step_has_the_tables_of_the_one_before(monkeypatch, options):
    """Triton's plan of a table is uploaded once, and kept as long as the table itself."""
    native, seen = backends.get("reference"), []

    def noting(op):
        def call(*arguments, **named):
            tensors = [x for x in (*arguments, *named.values()) if isinstance(x, Tensor)]
            kept.extend(tensors)  # or another would have its id
            seen[-1].update(id(x) for x in tensors if x.shape[-1:] == (len(Segment),) and x.dtype == torch.int64)
            return getattr(native, op)(*arguments, **named)

        return call

    kept = []
    monkeypatch.setattr(backends, "get", lambda name: SimpleNamespace(**{op: noting(op) for op in OPS}))
    model, opt = fresh(mlp(), backend="reference", **options)
    for i in range(4):
        seen.append(set())
        train(opt, model, [i])
    assert seen[1] == seen[2] == seen[3] != set()


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
    fake = SimpleNamespace(current=0, captured_on=None, graphs=[], pools=[])

    @contextlib.contextmanager
    def device(which):
        before, fake.current = fake.current, torch.device(which).index
        yield
        fake.current = before

    @contextlib.contextmanager
    def capturing(graph, *, pool=None, capture_error_mode="global"):
        fake.graphs.append((graph, fake.current, capture_error_mode))
        fake.pools.append(pool or f"pool {len(fake.pools)}")
        fake.captured_on = fake.current
        yield
        fake.captured_on = None

    stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)
    replaced = {
        "device": device,
        "graph": capturing,
        "current_device": lambda: fake.current,
        "is_current_stream_capturing": lambda: fake.captured_on == fake.current,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None, pool=lambda: fake.pools[-1]),
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
    run(OnGpu.of(x + 1))
    assert torch.equal(run._inputs[1].as_subclass(Tensor), x + 1)


def test_what_is_in_the_graphs_buffers_is_not_copied(gpus, monkeypatch):
    z, x = OnGpu.of(torch.ones(3)), OnGpu.of(torch.ones(2))
    run = cuda_graph.Captured(lambda weight, z, x: [weight], [OnGpu.of(torch.ones(3)), z, x], 1, 1)
    copied = []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of, **options: copied.append(len(to)))
    run(z, x + 1)
    run(z.clone(), x + 1)
    run(z, run._inputs[2])
    assert copied == [1, 2]
    assert cuda_graph.Captured(lambda weight: [weight], [x], 1, pool=run.pool).pool == run.pool == "pool 0"


def test_graphs_of_a_train_step_draw_into_their_own_memory_and_share_a_pool(gpus, monkeypatch):
    """Captured here is what runs on a CPU: inputs as the graph has them, and their addresses."""
    seen = []

    class Captured(cuda_graph.Captured):
        def __init__(self, function, tensors, n_fixed, n_owned, pool):
            self.function, self.inputs, self.n_fixed, self.n_owned = function, tensors, n_fixed, n_owned
            self.pool = pool or object()
            function(*tensors)

        def __call__(self, *tensors):
            seen.append((self.pool, [t.data_ptr() for t in tensors[: self.n_owned]]))
            assert seen[-1][1] == [t.data_ptr() for t in self.inputs[self.n_fixed :][: self.n_owned]]
            return self.function(*self.inputs[: self.n_fixed], *tensors)

    monkeypatch.setattr(graph, "Captured", Captured)
    (a, opt_a), (b, opt_b) = (fresh(mlp(), update_each=2, n_samples=2) for _ in range(2))
    step = TrainStep(a, nn.functional.mse_loss, opt_a, compile=False, cuda_graph=True)
    for i in range(4):
        step(*batch(i, a))
    walks, places = [], derivatives.LossModule.places
    monkeypatch.setattr(derivatives.LossModule, "places", lambda module: walks.append(1) or places(module))
    for i in (4, 5):
        step(*batch(i, a))
    assert_same(weights(a), train(opt_b, b, 6))
    assert len(walks) == 2  # modules are gone through once a step
    assert {len(z) for _, z in seen} == {0, 2 * len(list(a.parameters()))}
    assert len({pool for pool, _ in seen}) == 1


def test_capturing_asks_the_device_it_is_asked_about(gpus):
    with torch.cuda.device("cuda:1"), torch.cuda.graph(None):
        assert capture.capturing(torch.device("cuda:1"))
        assert capture.capturing(torch.device("cuda"))
        assert not capture.capturing(torch.device("cuda:0"))
        gpus.current = 0
        assert capture.capturing(torch.device("cuda:1"))
        assert not capture.capturing(torch.device("cuda"))
        assert not capture.capturing(torch.device("cpu"))


@pytest.mark.parametrize(("update_each", "reads"), [(1, 0), (3, 1)])
def test_grad_scalers_flag_is_read_where_a_schedule_depends_on_it(gpus, update_each, reads):
    opt = AdaHessian([nn.Parameter(torch.ones(2))], lr=0.1, update_each=update_each, dense_steps=0)
    schedule = opt.coming_step.schedule
    schedule.count([0], OnGpu.of(torch.ones(())))
    with Called() as called:
        schedule.settle_on_host()
        assert aten._local_scalar_dense not in called.packets
        schedule.check()
        schedule._settle()
    assert called.packets.count(aten._local_scalar_dense) == reads
    assert opt.param_groups[0]["step"] == 1 - reads


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
