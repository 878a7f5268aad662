"""The fused double backward of norms against the formulas in float64, for every backend that has it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tolerances import assert_within
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from adahessian_fused import backends, norm_operators
from adahessian_fused.friendly import double_backward, formulas

BATCH, ROW = "batch_norm_double_backward", "row_norm_double_backward"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# op, shape of x, option: batch norm's `fixed`, a row norm's number of groups
CASES = {
    "images": (BATCH, (6, 5, 7, 10), False),
    "short_planes": (BATCH, (300, 33, 2, 2), False),
    "many_short_planes": (BATCH, (2, 600, 3, 3), False),
    "channels_last": (BATCH, (6, 5, 7, 9), False),
    "channels_last_3d": (BATCH, (3, 17, 2, 3, 4), False),
    "features": (BATCH, (40, 33), False),
    "long": (BATCH, (2, 3, 5001), False),
    "many_rows": (BATCH, (9000, 4), False),
    "one_channel": (BATCH, (4, 1, 6, 6), False),
    "fixed": (BATCH, (6, 5, 7, 9), True),
    "fixed_channels_last": (BATCH, (6, 5, 7, 9), True),
    "layer": (ROW, (50, 65, 1), 1),
    "long_layer": (ROW, (3, 5001, 1), 1),
    "rms": (ROW, (50, 64, 1), 1),
    "group": (ROW, (12, 3, 35), 4),
    "rms_group": (ROW, (12, 3, 35), 4),
}


# What interpreted Triton, which takes a second for a few programs, has to do.
INTERPRETED = {
    "small_images": (BATCH, (2, 3, 5, 2), False),
    "small_channels_last": (BATCH, (2, 3, 5, 2), False),
    "whole_vectors": (BATCH, (2, 3, 4, 4), False),
    "whole_vectors_channels_last": (BATCH, (2, 24, 3, 2), False),
    "small_fixed": (BATCH, (2, 3, 2, 2), True),
    "small_layer": (ROW, (3, 9, 1), 1),
    "rms_small": (ROW, (2, 5, 1), 1),
    "small_group": (ROW, (4, 3, 5), 2),
    "whole_vectors_layer": (ROW, (3, 16, 1), 1),
    "rms_of_three_blocks": (ROW, (2, 592, 1), 1),
    "layer_of_two_warps": (ROW, (2, 1025, 1), 1),
    "group_of_several_blocks": (ROW, (2, 4, 96), 2),
    "layer_that_is_read_twice": (ROW, (2, 4112, 1), 1),
    "whole_vectors_group": (ROW, (4, 3, 8), 2),
}


@pytest.fixture
def kernels(device):
    """The kernels that the device under test uses."""
    name = {"cpu": "native", "cuda": "triton"}[device]
    reason = backends.unavailable_reason(name, device)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return double_backward._kernels(device)


def arguments(case: str, dtype: torch.dtype, device: str, without: str = "") -> list:
    """Everything by position; ``without`` names arguments that are None."""
    op, shape, option = (CASES | INTERPRETED)[case]
    torch.manual_seed(0)
    formats = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
    layout = next((f for name, f in formats.items() if case.endswith(name)), torch.contiguous_format)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights, statistics = (shape[1], shape[1]) if op == BATCH else (option * shape[1], shape[0])

    def of_x(offset: float = 0.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) + offset).to(device, dtype).contiguous(memory_format=layout)

    v, grad, x = of_x(0.2), of_x(-0.1), of_x(0.5)
    over = [i for i in range(x.dim()) if i != 1] if op == BATCH else [1, 2]
    mean = x.double().mean(over)
    invstd = (((x.double() - mean.view(-1 if op == ROW else 1, *((-1,) if op == BATCH else (1,)), *[1] * (x.dim() - 2)))
               .square().mean(over)) + 0.1).rsqrt()  # fmt: skip
    v_weight, v_bias, weight = (torch.randn(weights, dtype=torch.float64) for _ in range(3))
    assert mean.numel() == statistics
    given = {"v_weight": v_weight, "v_bias": v_bias, "weight": weight, "mean": mean, "invstd": invstd}
    given = {name: None if name in without.split() else t.to(device, wide) for name, t in given.items()}
    if case.startswith("rms"):
        given["mean"] = None
    g = given
    return [v, g["v_weight"], g["v_bias"], grad, x, g["weight"], g["mean"], g["invstd"], option]


def in_float64(arguments: list) -> list:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


def check(kernels, given: list, op: str) -> None:
    """An op's results against those of the formulas in float64."""
    dtype = given[4].dtype
    found = getattr(kernels, op)(*given)
    expected = getattr(formulas, op)(*in_float64(given))
    eps = torch.finfo(dtype).eps
    for name, a, b in zip(("grad", "x", "weight"), found, expected, strict=True):
        # The terms of a result are up to a few times larger than it; a sum over n is off by about eps sqrt(n) of one.
        n = given[4].numel() / b.numel()
        wide = torch.finfo(a.dtype).eps
        scale = b.abs().max() + n**0.5
        bound = 8 * wide * scale * (1 if name != "weight" else n**0.5) + (
            eps * b.abs().max() if a.dtype == dtype else 0
        )
        assert a.isfinite().all()
        assert_within(a, b.view_as(a), bound, name)


@pytest.mark.parametrize("without", ["", "v_weight v_bias", "weight"], ids=["all", "no_cotangents", "no_weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_against_the_formulas(kernels, device, case, dtype, without):
    check(kernels, arguments(case, dtype, device, without), CASES[case][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_triton(device, case, dtype):
    reason = backends.unavailable_reason("triton", device)
    if reason is not None or device == "cuda":
        pytest.skip(reason or "not interpreted")
    without = "v_weight v_bias weight" if dtype == torch.bfloat16 else ""
    check(backends.get("triton"), arguments(case, dtype, device, without), INTERPRETED[case][0])


# ---- CUDA tensors, without a GPU -------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["native", "no_native"])
def on_cuda(request, monkeypatch):
    """The operators as they are where there is a GPU, with the native library and without."""
    if backends.unavailable_reason("triton", "cpu") is not None:
        pytest.skip("Triton is not interpreted")
    native = request.param and backends.unavailable_reason("native") is None
    monkeypatch.setattr(
        backends, "unavailable_reason", lambda name, _="cpu": None if native or name != "native" else "-"
    )
    if not native:
        monkeypatch.setattr(norm_operators, "NAMESPACE", "adahessian_fused_without_native")
    double_backward._kernels.cache_clear()
    yield double_backward._kernels("cuda")
    double_backward._kernels.cache_clear()


@pytest.mark.parametrize("case", ["small_images", "small_group"])
def test_cuda_takes_triton(on_cuda, case):
    """The operator's CUDA part, called with tensors that the interpreter can read."""
    op = getattr(on_cuda, INTERPRETED[case][0])
    given = arguments(case, torch.float32, "cpu")
    check(SimpleNamespace(**{op._opname: partial(op._op_dk, torch._C.DispatchKey.CUDA)}), given, op._opname)


@pytest.mark.parametrize("case", ["images", "channels_last", "fixed", "layer", "rms", "group"])
def test_traced_on_cuda(on_cuda, case):
    """As TrainStep traces it: with tensors that have no data, which no kernel can be launched with."""
    op, shape, option = CASES[case]
    v, v_weight, v_bias, grad, x, weight, mean, invstd, _ = arguments(case, torch.bfloat16, "cpu")

    def double_backward_of(v, v_weight, v_bias, grad, x, weight, mean, invstd):
        if op == BATCH:
            return double_backward.batch_norm(v, v_weight, v_bias, grad, x, weight, mean, invstd, fixed=option)
        return double_backward.row_norm(v, v_weight, v_bias, grad, x, weight, mean, invstd, shape=shape, groups=option)

    with FakeTensorMode() as mode, torch.no_grad():
        tensors = (v, v_weight, v_bias, grad, x, weight, mean, invstd)
        fake = [t if t is None else torch.empty_like(mode.from_tensor(t), device="cuda") for t in tensors]
        graph = make_fx(double_backward_of)(*fake)
        results = graph(*fake)
    assert getattr(on_cuda, op) in {node.target for node in graph.graph.nodes}
    for result, tensor in zip(results, (grad, x, weight), strict=True):
        assert (result.shape, result.dtype, result.device.type) == (tensor.shape, tensor.dtype, "cuda")


@pytest.mark.parametrize(
    ("op", "shape", "layout"),
    [
        (BATCH, (64, 64, 512, 512), torch.channels_last),
        (BATCH, (64, 64, 512, 512), torch.contiguous_format),
        (BATCH, (8192, 8, 128, 128), torch.channels_last),
        (ROW, (1 << 24, 24, 1), torch.contiguous_format),
    ],
)
def test_grids_that_cuda_takes(monkeypatch, op, shape, layout):
    """Up to 65,535 in the second dimension, with as many programs as a GPU needs, and no element left out."""
    module = pytest.importorskip(f"adahessian_fused.kernels.{op}", reason="Triton is not installed")
    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launches.append((grid, arguments, constants))

    for name in (
        ("batch_norm_sums", "batch_norm_gradients") if op == BATCH else ("row_norm_gradients", "row_norm_weight")
    ):
        monkeypatch.setattr(module, f"{name}_kernel", Kernel())
    monkeypatch.setattr(module, "on", lambda *_: nullcontext())
    for name, value in {"TILE": 1024, "PROGRAMS": 1024, "INTERPRETED": False}.items():
        monkeypatch.setattr(sys.modules[f"{module.__package__}.norm"], name, value)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=layout)
    of_channel = torch.empty(shape[1], device="meta")
    getattr(module, op)(x, None, None, x, x, None, of_channel, of_channel, op == ROW)
    for grid, arguments, constants in launches:
        assert grid[1:] <= (65535,)
        if "BLOCK_I" in constants:
            count, _, _, length = [n for n in arguments if isinstance(n, int)][:4]
            assert grid[1] * length >= count > (grid[1] - 1) * length
            assert grid[0] * grid[1] >= 512


@pytest.mark.parametrize("numel", [2**31 - 2**20, 2**31 - 2**20 + 1, 2**31 - 1])
@pytest.mark.parametrize(
    ("op", "options"), [("batch_norm", {"fixed": False}), ("row_norm", {"shape": (1, 1, None), "groups": 1})]
)
def test_sizes_whose_numbers_have_more_than_32_bits_take_the_formulas(monkeypatch, op, options, numel):
    """The kernels' loops count on to the end of a block."""
    taken = []
    monkeypatch.setattr(double_backward, "_kernels", lambda _: taken.append(True) or formulas)
    x, of_one = torch.empty(1, 1, numel, device="meta"), torch.empty(1, device="meta")
    if "shape" in options:
        options = {**options, "shape": x.shape}
    with torch.no_grad():
        getattr(double_backward, op)(x, None, None, x, x, None, of_one, of_one, **options)
    assert taken == [True] * (numel <= 2**31 - 2**20)


@pytest.mark.parametrize("length", [1, 31, 256, 257, 768, 1024, 1025, 1600, 2049, 3072, 4096, 4097, 50000])
def test_rows_in_registers_are_whole_blocks_but_for_the_last(length):
    module = pytest.importorskip("adahessian_fused.kernels.row_norm_double_backward", reason="Triton is not installed")
    held, block, warps = module.row_blocks(length, held=True).values()
    assert (0 < length - (held - 1) * block <= block and held <= 4) if length <= 4096 else held == 0
    assert block <= warps * 32 * 8
    assert module.row_blocks(length, held=False)["HELD"] == 0


def test_the_library_and_python_define_the_same_operators():
    if (reason := backends.unavailable_reason("native")) is not None:
        pytest.skip(reason)
    for name, schema in norm_operators.SCHEMAS.items():
        assert str(getattr(torch.ops.adahessian_fused, name).default._schema) == f"adahessian_fused::{name}{schema}"


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_does_not_matter(kernels, device, set_threads, case):
    if not isinstance(getattr(kernels, ROW), torch._ops.OpOverload):
        pytest.skip("there are no threads to count")
    op, results = getattr(kernels, CASES[case][0]), []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(op(*arguments(case, torch.float32, device)))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("case", ["images", "channels_last", "rms", "group"])
def test_registration(kernels, device, case):
    """Schema, fake tensors and torch.compile's functionalisation."""
    op = getattr(kernels, CASES[case][0])
    if not isinstance(op, torch._ops.OpOverload):
        pytest.skip("not an operator")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    assert set(torch.library.opcheck(op, arguments(case, torch.float32, device), test_utils=tests).values()) == {
        "SUCCESS"
    }


NAMES = ("v", "v_weight", "v_bias", "grad", "x", "weight", "mean", "invstd", "groups")
BAD = [
    *(
        ("images", name, "dtype", lambda t: t.double())
        for name in ("v", "grad", "v_weight", "v_bias", "weight", "mean")
    ),
    *(("images", name, "shape", lambda t: t[..., :-1].clone()) for name in ("v", "grad", "v_weight", "mean", "invstd")),
    ("images", "v", "strides", lambda t: t.contiguous(memory_format=torch.channels_last)),
    ("images", "x", "strides", lambda t: t.transpose(2, 3)),
    ("images", "x", "dtype", lambda t: t.long()),
    ("images", "x", "one dimension", lambda t: t.reshape(-1)),
    ("images", "weight", "strides", lambda t: t.repeat(2)[::2]),
    ("group", "groups", "divisor", lambda groups: 5),
    ("group", "groups", "zero", lambda groups: 0),
    ("group", "weight", "shape", lambda t: t[:-1].clone()),
    ("group", "x", "dimensions", lambda t: t[..., None]),
    ("group", "x", "strides", lambda t: t.transpose(1, 2)),
]


@pytest.mark.parametrize(("case", "name", "label", "change"), BAD, ids=[f"{c}-{n}-{b}" for c, n, b, _ in BAD])
def test_refused(kernels, device, case, name, label, change):
    op, given = CASES[case][0], arguments(case, torch.float32, device)
    given[NAMES.index(name)] = change(given[NAMES.index(name)])
    if not isinstance(getattr(kernels, op), torch._ops.OpOverload):
        pytest.skip("called by double_backward only, which prepares the arguments")
    with pytest.raises(RuntimeError, match=rf"{op}: ({name}|v|grad)"):
        getattr(kernels, op)(*given)
