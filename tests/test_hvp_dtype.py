"""``hvp_dtype``: the second differentiation's products in lower precision, and nothing else."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import strategies
import torch
import torch.nn.functional as F
from models import assert_same, batch, conv_net, loss_of, mlp
from published import AdaHessian
from strategies import CASES, build
from tolerances import UNITS, assert_error, effect, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from ways import EVERY, WAYS

from adahessian_fused import TrainStep
from adahessian_fused.friendly import attention_double_backward
from adahessian_fused.hvp import precision
from adahessian_fused.hvp.precision import LowPrecisionProducts, tf32
from adahessian_fused.train_step import step as step_module

LOW = torch.bfloat16
U = torch.finfo(LOW).eps / 2  # unit roundoff
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def says_it_again():
    precision._said.clear()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- one operator ----------------------------------------------------------------------------------------------------

GEOMETRY = (1,), (1,), (1,), False, (0,), 1
CONVOLUTIONS = {
    "conv1d": ((2, 4, 9), (6, 4, 3), GEOMETRY),
    "strided_conv2d": ((2, 4, 9, 8), (6, 4, 3, 3), ((2, 2), (1, 1), (1, 1), False, (0, 0), 1)),
    "grouped_conv2d": ((2, 4, 9, 8), (6, 2, 3, 3), ((1, 1), (0, 0), (2, 2), False, (0, 0), 2)),
    "transposed_conv2d": ((2, 4, 9, 8), (4, 6, 3, 3), ((2, 2), (1, 1), (1, 1), True, (1, 1), 1)),
    "conv3d": ((2, 4, 5, 5, 5), (6, 4, 3, 3, 3), ((1,) * 3, (1,) * 3, (1,) * 3, False, (0,) * 3, 1)),
}
FACTORS = {
    "mm": (aten.mm.default, [(7, 40), (40, 5)], {}),
    "bmm": (aten.bmm.default, [(3, 7, 40), (3, 40, 5)], {}),
    "addmm": (aten.addmm.default, [(5,), (7, 40), (40, 5)], {}),
    "scaled_addmm": (aten.addmm.default, [(7, 5), (7, 40), (40, 5)], {"beta": 0.5, "alpha": -2}),
    "addmm_without_sum": (aten.addmm.default, [(7, 5), (7, 40), (40, 5)], {"beta": 0}),
    "baddbmm": (aten.baddbmm.default, [(3, 7, 5), (3, 7, 40), (3, 40, 5)], {"beta": 2}),
}


def check(function, tensors: list[Tensor], signs=lambda kwargs: kwargs, **kwargs) -> None:
    """Inside the mode, an operator is off by at most 3.5 U of what it adds up.

    Each factor of a product is rounded, and so is the sum, which is then spread by U / 2. (The terms of second order,
    and the float32 sum of at most 2^10 products, are less than U / 4.)
    """
    with LowPrecisionProducts(LOW):
        found = function(*tensors, **kwargs)
    plain = function(*tensors, **kwargs)
    exact = function(*(t.double() for t in tensors), **kwargs)
    sizes = function(*(t.double().abs() for t in tensors), **{k: abs(v) for k, v in kwargs.items()})
    several = isinstance(found, tuple)
    for f, p, e, s in zip(*((x if several else (x,)) for x in (found, plain, exact, sizes)), strict=True):
        if f is None:
            assert p is None
            continue
        assert (f.dtype, f.stride()) == (torch.float32, p.stride())
        assert not torch.equal(f, p), "nothing has been rounded"
        assert ((f - e).abs() <= 3.75 * U * s).all(), f"off by {((f - e).abs() / (U * s)).max():.2f} units"


@pytest.mark.parametrize(("function", "shapes", "options"), FACTORS.values(), ids=FACTORS)
def test_products(function, shapes, options):
    check(function, [randn(*shape, seed=i) for i, shape in enumerate(shapes)], **options)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("x", "weight", "geometry"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(x, weight, geometry, last):
    if last and len(x) != 4:
        pytest.skip("no such memory format for these dimensions")
    form = torch.channels_last if last else torch.contiguous_format
    x, weight = (randn(*shape, seed=i).to(memory_format=form) for i, shape in enumerate((x, weight)))
    y = aten.convolution.default(x, weight, None, *geometry)
    grad, bias = torch.empty_like(y).copy_(randn(*y.shape, seed=2)), randn(y.shape[1], seed=3)
    check(lambda x, w: aten.convolution.default(x, w, None, *geometry), [x, weight])
    check(lambda x, w, b: aten.convolution.default(x, w, b, *geometry), [x, weight, bias])
    for mask in ([True, True, True], [False, True, False]):
        check(
            lambda g, x, w, mask=mask: aten.convolution_backward.default(g, x, w, [len(bias)], *geometry, mask),
            [grad, x, weight],
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype):
    a, b = randn(7, 40).to(dtype), randn(40, 5, seed=1).to(dtype)
    with warnings.catch_warnings(), LowPrecisionProducts(LOW):
        warnings.simplefilter("ignore")
        found = aten.mm.default(a, b)
        sums = a + a
    assert torch.equal(found, a @ b)
    assert torch.equal(sums, a + a)


def test_sparse_factors_stay_as_they_are():
    """A graph network: the adjacency is sparse, the layers are not."""
    adjacency, x = torch.eye(6).roll(1, 0), randn(6, 3)
    found = []
    for dtype, graph in ((None, adjacency), (LOW, adjacency.to_sparse())):
        model = mlp(torch.float32)
        opt = AdaHessian(model.parameters(), betas=(0.0, 0.0), hvp_dtype=dtype)
        opt.step(lambda g=graph, m=model: torch.sparse.mm(g, m(torch.sparse.mm(g, x))).square().mean())
        found.append([opt.hessian_diag(p) for p in model.parameters()])
    a = adjacency.double()
    assert_rounded(*found[::-1], mlp(), lambda m: (a @ m(a @ x.double())).square().mean())


@pytest.mark.parametrize(("device", "dtype"), [("cuda", LOW), ("cpu", torch.float32)], ids=["cuda", "cpu"])
def test_attention_is_in_low_precision_where_tensor_cores_are(device, dtype):
    """No GPU is needed for its dtypes; test_attention has the kernel's numbers in bfloat16, interpreted."""
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append([t.dtype for t in args[:8]] if func is attention_double_backward.run else None)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [torch.empty(1, 2, 16, 8, device=device) for _ in range(7)]
        with Seen(), LowPrecisionProducts(LOW):
            found = attention_double_backward.run(*tensors, torch.empty(1, 2, 16, device=device), None, 1.0, 0)
    assert [t.dtype for t in found] == [torch.float32] * 4
    assert [types for types in seen if types] == [[*[dtype] * 7, torch.float32]]


@pytest.mark.parametrize("dims", [0, 2], ids=["mm", "conv2d"])
def test_results_do_not_cancel_exactly(dims):
    """Sums of two results, as Hz is made of them, are zero no more often than in float32."""
    a, b = randn(64, 4, *[4] * dims), randn(64, 4, *[4] * dims, seed=1)
    weight, geometry = torch.zeros(4, 4, *[1] * dims), ((1,) * dims, (0,) * dims, (1,) * dims, False, (0,) * dims, 1)

    def product(x, y):
        if dims == 0:
            return aten.mm.default(x.t(), y)
        return aten.convolution_backward.default(x, y, weight, None, *geometry, [False, True, False])[1]

    with LowPrecisionProducts(LOW):
        difference = product(a, b) + product(-a, b)
    assert (difference != 0).all()
    assert (difference.abs() <= U * product(a, b).abs() * (1 + 8 * U)).all()


def assert_rounded(low: list[Tensor], full: list[Tensor], model: nn.Module, loss) -> None:
    """Ds are off by what roundings of U of the weights do to Hz, and by more than nothing.

    Only products are rounded, in one of the two differentiations.
    """
    assert relative_error(low, full) > 0
    hz = strategies.exact(model, loss)[1]
    moved = effect(lambda m: strategies.exact(m, loss)[1], copy.deepcopy(model).double(), hz)
    assert_error(low, full, UNITS * U * float(moved.norm() / torch.stack([h.norm() for h in hz]).norm()))


# ---- Hessian-vector products -----------------------------------------------------------------------------------------


def second_order(name: str, dtype=None, **options) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients, |D| and loss of a step by a closure."""
    model, loss = build(name, dtype=torch.float32)
    opt = AdaHessian(model.parameters(), betas=(0.0, 0.0), block_size=1, hvp_dtype=dtype, **options)
    torch.manual_seed(5)
    value = opt.step(lambda: loss(model))
    params = [p for p in model.parameters() if "exp_avg" in opt.state.get(p, ())]
    return [opt.state[p]["exp_avg"] for p in params], [opt.hessian_diag(p).abs() for p in params], value


@pytest.mark.parametrize("name", CASES)
def test_models(name):
    (g, d, loss), (low_g, low_d, low_loss) = second_order(name), second_order(name, LOW)
    assert_same([*low_g, low_loss], [*g, loss])
    assert_rounded(low_d, d, *build(name))


# ---- ways of stepping ------------------------------------------------------------------------------------------------


# Every other way of stepping does what these do: test_options.py.
SOME = ("function", "backward_split", "micro_batches")
OPTIONS = {
    "plain": {},
    "two_samples": {"n_samples": 2},
    "part_of_the_batch": {"hessian_fraction": 0.5},
    "gaussian_abs": {"probe": "gaussian", "averaging": "abs"},
}
CELLS = [(way, name) for way in SOME for name in OPTIONS if (name == "part_of_the_batch") <= (way == "backward_split")]


@pytest.mark.parametrize(("way", "options"), CELLS)
def test_the_gradient_stays_and_the_curvature_is_rounded(way, options):
    """Bit for bit."""
    found = []
    for dtype in (None, LOW):
        model = conv_net(torch.float32)
        opt = AdaHessian(model.parameters(), betas=(0.0, 0.0), hvp_dtype=dtype, **OPTIONS[options])
        EVERY[way](opt, lambda x, y, m=model: F.mse_loss(m(x), y), *batch(0, model))
        states = [opt.state[p] for p in model.parameters()]
        found.append([[s[key] for s in states] for key in ("exp_avg", "exp_hessian_diag_sq")])
    (g, v), (low_g, low_v) = found
    assert_same(low_g, g)
    assert_rounded([t.sqrt() for t in low_v], [t.sqrt() for t in v], conv_net(), loss_of)


def test_off_steps_are_untouched():
    """From the same weights, which the step with curvature before them has not moved."""
    found = []
    for dtype in (None, LOW):
        model = mlp(torch.float32)
        opt = AdaHessian(model.parameters(), lr=0.0, update_each=2, hvp_dtype=dtype)
        WAYS["backward"](opt, lambda m=model: loss_of(m, 0))
        opt.zero_grad()
        opt.backward(loss_of(model, 1))
        found.append([p.grad for p in model.parameters()])
        assert opt.coming_step.curvature is None
    assert_same(*found)


def test_traced_step_has_the_casts_in_its_graph(monkeypatch):
    graphs = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graphs.append(graph) or graph)
    model, other = (conv_net(torch.float32) for _ in range(2))
    opt, plain = (AdaHessian(m.parameters(), betas=(0.0, 0.0), hvp_dtype=d) for m, d in ((model, LOW), (other, None)))
    TrainStep(model, F.mse_loss, opt)(*batch(0, model))
    TrainStep(other, F.mse_loss, plain, compile=False)(*batch(0, other))
    assert len(graphs) == 1
    products = [n for n in graphs[0].graph.nodes if n.target in (aten.mm.default, aten.convolution.default)]
    assert {n.meta["val"].dtype for n in products} == {torch.float32, LOW}
    assert_same(*([m.state[p]["exp_avg"] for p in m.param_groups[0]["params"]] for m in (opt, plain)))


def test_a_graph_is_made_anew_when_the_option_changes(monkeypatch):
    graphs = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graphs.append(graph) or graph)
    monkeypatch.setattr(step_module, "EAGER_BEFORE", 0)
    model = mlp(torch.float32)
    opt = AdaHessian(model.parameters())
    step = TrainStep(model, F.mse_loss, opt)
    for dtype in (None, LOW, LOW):
        opt.param_groups[0]["hvp_dtype"] = dtype
        step(*batch(0, model))
    assert len(graphs) == 2


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_a_tensor_is_rounded_once_until_it_is_written_to():
    a, b = randn(8, 8), randn(8, 8, seed=1)
    with LowPrecisionProducts(LOW) as mode:
        first = mode.low(a)
        assert (
            mode.low(a).data_ptr()
            == mode.low(a.t()).data_ptr()
            == mode.low(a.view(8, 8)).data_ptr()
            == first.data_ptr()
        )
        assert torch.equal(mode.low(a.t()), a.t().to(LOW))
        assert mode.low(b).data_ptr() != first.data_ptr()
        assert not torch.equal(mode.low(a[:4]), mode.low(a[4:]))
        a.add_(1)
        assert torch.equal(mode.low(a), a.to(LOW))
        assert torch.equal(mode.low(a[:, :4]), a[:, :4].to(LOW))
        a @ b
    assert not mode._rounded


def test_what_is_kept_goes_with_its_tensor():
    with LowPrecisionProducts(LOW) as mode:
        kept = [weakref.ref(mode.low(randn(4, 4, seed=i))) for i in range(200)]
        assert len(mode._rounded) < 40
        assert sum(ref() is not None for ref in kept) < 40
        mode.lowered = 1
    gc.collect()
    assert all(ref() is None for ref in kept)


def _fail_inside(mode):
    with mode:
        mode.low(randn(4, 4))
        raise ZeroDivisionError


def test_exceptions_leave_nothing_behind():
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    mode = LowPrecisionProducts(LOW)
    with pytest.raises(ZeroDivisionError):
        _fail_inside(mode)
    assert not mode._rounded
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == reduced
    assert torch.equal(randn(4, 4) @ randn(4, 4), randn(4, 4) @ randn(4, 4))
    a = randn(4, 40)
    assert (a @ a.t()).dtype == torch.float32


# ---- TF32 ------------------------------------------------------------------------------------------------------------

SWITCHES = torch.backends.cuda.matmul, torch.backends.cudnn.conv


def switch(value: str) -> None:
    for switch in SWITCHES:
        switch.fp32_precision = value


@pytest.fixture
def switches():
    before = [switch.fp32_precision for switch in SWITCHES]
    yield
    for switch, value in zip(SWITCHES, before, strict=True):
        switch.fp32_precision = value


@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_tf32_is_switched_on_inside_and_back_whatever_happens(before, switches):
    switch(before)
    with tf32():
        assert [s.fp32_precision for s in SWITCHES] == ["tf32", "tf32"]
    assert [s.fp32_precision for s in SWITCHES] == [before, before]
    with pytest.raises(ZeroDivisionError), tf32():
        raise ZeroDivisionError
    assert [s.fp32_precision for s in SWITCHES] == [before, before]


def test_tf32_is_on_in_the_second_differentiation_only(monkeypatch, switches):
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return g if len(seen) > 1 else Looks.apply(g)

    switch("ieee")
    monkeypatch.setattr(precision, "_said", {"tf32"})
    model = mlp(torch.float32)
    opt = AdaHessian(model.parameters(), hvp_dtype="tf32")
    opt.backward(Looks.apply(loss_of(model)) ** 2)
    assert seen[0] == "ieee"
    assert set(seen[1:]) == {"tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


# ---- nothing to do, and errors ---------------------------------------------------------------------------------------


def step(model: nn.Module, dtype, scope=None) -> None:
    opt = AdaHessian(model.parameters(), hvp_dtype=dtype)

    def closure():
        with scope or warnings.catch_warnings():
            return loss_of(model).float()

    for _ in range(2):
        opt.step(closure)


IDLE = {
    "autocast": (
        torch.float32,
        LOW,
        torch.autocast("cpu", LOW),
        "hvp_dtype=torch.bfloat16 has nothing to do.*autocast",
    ),
    "16_bit_model": (LOW, LOW, None, "hvp_dtype=torch.bfloat16 has nothing to do.*16-bit model"),
    "tf32_on_a_cpu": (torch.float32, "tf32", None, 'hvp_dtype="tf32" has nothing to do.*CUDA'),
}


@pytest.mark.parametrize(("model_dtype", "dtype", "scope", "message"), IDLE.values(), ids=IDLE)
def test_says_once_that_there_is_nothing_to_do(model_dtype, dtype, scope, message):
    with pytest.warns(UserWarning, match=message) as said:
        step(mlp(model_dtype), dtype, scope)
    assert len([w for w in said if "hvp_dtype" in str(w.message)]) == 1


def test_says_nothing_where_there_is_something_to_do():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*hvp_dtype")
        step(mlp(torch.float32), LOW)


REFUSED = {
    "finite_difference": (
        {"hvp_dtype": LOW, "hvp": "finite_difference"},
        'hvp_dtype=torch.bfloat16 with hvp="finite_difference".*expected hvp="autograd", or hvp_dtype=None',
    ),
    "forward_over_reverse": ({"hvp_dtype": "tf32", "hvp": "forward_over_reverse"}, 'expected hvp="autograd", or'),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaHessian(mlp(torch.float32).parameters(), **options)


def test_float64_parameters_are_refused():
    with pytest.raises(ValueError, match=r"hvp_dtype=torch.bfloat16 with parameters in torch.float64; expected"):
        AdaHessian(mlp().parameters(), hvp_dtype=LOW)


def test_tf32_is_refused_in_a_compiled_graph():
    model = mlp(torch.float32)
    opt = AdaHessian(model.parameters(), hvp_dtype="tf32")
    with pytest.raises(ValueError, match=r"hvp_dtype=torch.bfloat16, or TrainStep\(..., compile=False\)"):
        TrainStep(model, F.mse_loss, opt)
    TrainStep(model, F.mse_loss, opt, compile=False)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_older_checkpoints_and_pickles_are_without():
    model = mlp(torch.float32)
    old = AdaHessian(model.parameters()).state_dict()
    for group in old["param_groups"]:
        del group["hvp_dtype"]
    opt = AdaHessian(model.parameters(), hvp_dtype=LOW)
    opt.load_state_dict(old)
    assert opt.param_groups[0]["hvp_dtype"] is LOW
    pickled = AdaHessian(model.parameters())
    del pickled.defaults["hvp_dtype"], pickled.param_groups[0]["hvp_dtype"]
    model, opt = copy.deepcopy((model, pickled))
    opt.backward(loss_of(model))
    opt.step()
    assert opt.param_groups[0]["hvp_dtype"] is None
