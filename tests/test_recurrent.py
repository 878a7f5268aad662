"""Recurrent layers in the mode: kernels, all their variants against PyTorch's own, and what a step runs."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from published import AdaHessian
from tolerances import assert_error, relative_error, unit
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from watching import Operators

from adahessian_fused import TrainStep, backends, curvature_friendly
from adahessian_fused.friendly import recurrence as op
from adahessian_fused.friendly.recurrent import Recurrence

GATES, STATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}, {"lstm": 2}
LENGTHS = torch.tensor([5, 3, 2])


@pytest.fixture(autouse=True)
def kernel(device):
    """The operators have the device's kernel, whichever test comes first."""
    op.prepare(device)


# ---- the operators ---------------------------------------------------------------------------------------------------

# size, sizes of the steps
SHAPES = {
    "small": (3, None),
    "more_sequences_than_a_task_has": (5, [19] * 4),
    "wider_than_vectors": (37, [4, 4, 4]),
    "large": (150, [9, 9]),
    "packed": (5, [11, 11, 9, 3, 1]),
}


def arguments(kind: str, name: str, reverse: bool, dtype: torch.dtype, device: str) -> dict[str, list]:
    """Of the three operators, by position; the later ones get what the formulas find in float64."""
    torch.manual_seed(0)
    size, sizes = SHAPES[name]
    batch, rows, hidden = (sizes or [2])[0], sum(sizes or [2] * 3), GATES[kind] * size
    gates, states = {"gru": 4}.get(kind, GATES[kind]) * size, STATES.get(kind, 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype).double()

    a, w, b = draw(rows, hidden), draw(hidden, size).div_(4), draw(size) if kind == "gru" else None
    state, grad, final = draw(states, batch, size), draw(rows, size), draw(states, batch, size)
    order = (torch.tensor(sizes) if name == "packed" else None), reverse
    _, _, *saved = op.recurrence(kind, a, w, b, state, *order)
    _, d_each, _ = op.backward(kind, w, grad, final, *saved, *order)
    p, v_state, on_h = draw(rows, gates), draw(states, batch, size), draw(rows, size)
    given = {
        "recurrence": [kind, a, w, b, state, *order],
        "backward": [kind, w, grad, final, *saved, *order],
        "double_backward": [kind, p, w, v_state, *saved, d_each, on_h, *order],
    }
    to = lambda t: t.to(device, dtype) if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    return {operator: [to(t) for t in given] for operator, given in given.items()}


OPERATORS = {"recurrence": op.run, "backward": op.run_backward, "double_backward": op.run_double_backward}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", GATES)
def test_kernels_against_the_formulas(device, kind, name, reverse, dtype):
    """To 4 times the formulas' own error, which is known in float32 and in proportion to the roundoff.

    In float64 what the kernels are compared with is off by it once more.
    """

    def computed(operator, given, dtype):
        given = [t.to("cpu", dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
        return given, getattr(op, operator)(*given)

    single, units = torch.float32, torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    for operator, given in arguments(kind, name, reverse, dtype, device).items():
        found, (_, exact) = OPERATORS[operator](*given), computed(operator, given, torch.float64)
        rounded, plain = computed(operator, given, single)
        for a, b, c, d in zip(found, exact, plain, computed(operator, rounded, torch.float64)[1], strict=True):
            assert a.dtype == dtype
            own = units * relative_error([c], [d])
            assert_error([a.cpu()], [b], (4 + (dtype == torch.float64)) * own + 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", GATES)
def test_what_is_not_finite_stays_so(device, kind):
    given = arguments(kind, "small", False, torch.float32, device)["recurrence"]
    given[1][0], given[1][1] = float("nan"), float("inf")
    expected, found = op.recurrence(*given), op.run(*given)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert found[0].isnan().any()
    assert not found[0].isnan().all()


@pytest.fixture
def native():
    if (reason := backends.unavailable_reason("native")) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("kind", GATES)
def test_the_number_of_threads_does_not_matter(native, set_threads, kind):
    for operator, given in arguments(kind, "more_sequences_than_a_task_has", True, torch.float32, "cpu").items():
        results = []
        for threads in (1, 2):
            set_threads(threads)
            results.append(OPERATORS[operator](*given))
        assert all(map(torch.equal, *results))


BAD = {
    "kind": (0, lambda kind: "rnn", "expected lstm, gru, tanh or relu"),
    "dtype": (2, lambda w: w.bfloat16(), "expected float32 or float64"),
    "weight": (2, lambda w: w[:-1], "expected contiguous float64 with 36 elements"),
    "strides": (1, lambda a: a.mT.contiguous().mT, "a is float64"),
    "rows": (1, lambda a: a[:-1], "5 rows; expected a multiple of the batch"),
    "sizes": (5, lambda _: torch.tensor([2, 2]), "6 rows; expected the sum of sizes"),
    "more": (5, lambda _: torch.tensor([3, 2, 1]), "sizes has 3; expected 0 to 2"),
    "int": (5, lambda _: torch.tensor([2, 2, 2]).int(), "expected contiguous int64"),
    "dimensions": (4, lambda state: state[0], "expected a matrix of weights, rows and states"),
}


@pytest.mark.parametrize("what", BAD)
def test_refused(native, what):
    index, change, message = BAD[what]
    given = arguments("lstm", "small", False, torch.float64, "cpu")["recurrence"]
    given[index] = change(given[index])
    with pytest.raises(RuntimeError, match=message):
        op.run(*given)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "relu"])
def test_registration(device, kind, operator):
    given = arguments(kind, "packed", False, torch.float64, device)[operator]
    torch.library.opcheck(OPERATORS[operator], given)


# ---- the layers ------------------------------------------------------------------------------------------------------

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": lambda *a, **o: nn.RNN(*a, nonlinearity="relu", **o)}
VARIANTS = {
    "plain": {},
    "layers": {"num_layers": 2},
    "both_ways": {"num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "bidirectional": True},
    "batch_first": {"batch_first": True, "num_layers": 2},
    "dropout": {"num_layers": 3, "dropout": 0.5},
}
LAYERS = [(kind, name) for kind in KINDS for name in VARIANTS] + [
    ("lstm", "projected"),
    ("lstm", "projected_both_ways"),
]
VARIANTS |= {
    "projected": {"proj_size": 2, "num_layers": 2},
    "projected_both_ways": {"proj_size": 2, "bidirectional": True, "bias": False},
}


def layer(kind: str, name: str, device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return KINDS[kind](3, 4, **VARIANTS[name]).to(device, dtype)


def inputs(model: nn.Module, given_states: bool, frozen: bool = False) -> list[Tensor]:
    """Input, and the states to begin with if they are given."""
    torch.manual_seed(2)
    p = next(model.parameters())
    directions = model.num_layers * (2 if model.bidirectional else 1)
    shapes = [(3, 5, 3) if model.batch_first else (5, 3, 3)]
    if given_states:
        shapes += [(directions, 3, model.proj_size or 4), (directions, 3, 4)][: 2 if model.mode == "LSTM" else 1]
    return [torch.randn(s, dtype=torch.float64).to(p).requires_grad_(not frozen) for s in shapes]


def flat(result) -> list[Tensor]:
    """All tensors of what a layer returns."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def run(model: nn.Module, tensors: list[Tensor], packed: bool, context) -> list[Tensor]:
    x, *states = tensors
    if packed:
        x = pack_padded_sequence(x, LENGTHS, batch_first=model.batch_first)
    torch.manual_seed(3)
    with context:
        return flat(model(x, *([states[0] if len(states) == 1 else tuple(states)] if states else [])))


def derivatives(model: nn.Module, tensors: list[Tensor], packed: bool, context) -> tuple[list[Tensor], ...]:
    """Outputs, gradients and products of the Hessian by all that requires grad."""
    variables = [t for t in (*tensors, *model.parameters()) if t.requires_grad]
    outputs = run(model, tensors, packed, context)
    torch.manual_seed(4)
    loss = sum((y * torch.randn(y.shape, dtype=torch.float64).to(y)).sin().sum() for y in outputs)
    grads = torch.autograd.grad(loss, variables, create_graph=True)
    z = [torch.randn(v.shape, dtype=torch.float64).to(v) for v in variables]
    return outputs, grads, torch.autograd.grad(grads, variables, z)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize(("kind", "name"), LAYERS)
def test_layers(device, kind, name, packed):
    model = layer(kind, name, device)
    for given_states in (False, True):
        tensors = inputs(model, given_states)
        found = derivatives(model, tensors, packed, curvature_friendly())
        expected = derivatives(model, tensors, packed, nullcontext())
        for a, b in zip(found, expected, strict=True):
            assert_error(list(a), list(b), 1e-13)
        assert [t.stride() for t in found[0]] == [t.stride() for t in expected[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_our_operators_run(device, kind):
    """And off-steps, eval mode without gradients and cells have PyTorch's."""
    model, x = layer(kind, "plain", device), torch.randn(5, 3, 3, device=device, dtype=torch.float64)
    with curvature_friendly():
        assert isinstance(ours := model(x)[0].grad_fn.next_functions[0][0].operator, Recurrence), ours
        with torch.no_grad():
            assert torch.equal(model(x)[0], layer(kind, "plain", device)(x)[0])
    assert "Recurrence" not in str(model(x)[0].grad_fn)


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "input", "all but one"])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen(device, kind, frozen):
    model = layer(kind, "plain", device)
    for name, p in model.named_parameters():
        p.requires_grad_(name != frozen if frozen != "all but one" else name == "bias_ih_l0")
    tensors = inputs(model, True, frozen in ("input", "all but one"))
    found = derivatives(model, tensors, True, curvature_friendly())
    for a, b in zip(found, derivatives(model, tensors, True, nullcontext()), strict=True):
        assert_error(list(a), list(b), 1e-13)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_one_output(device, output):
    """The others have no gradient."""
    model = layer("lstm", "plain", device)
    x, variables = inputs(model, False), list(model.parameters())
    found = []
    for context in (curvature_friendly(), nullcontext()):
        grads = torch.autograd.grad(run(model, x, False, context)[output].sin().sum(), variables, create_graph=True)
        found.append([*grads, *torch.autograd.grad(sum(g.sin().sum() for g in grads), variables)])
    assert_error(*found, 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_order(device, kind):
    torch.manual_seed(0)
    model = KINDS[kind](1, 2).to(device, torch.float64)
    names = [name for name, _ in model.named_parameters()]
    tensors = [torch.randn(2, 2, 1, dtype=torch.float64).to(device).requires_grad_(), *model.parameters()]

    def outputs(x, *weights):
        with curvature_friendly():
            y, final = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), x)
        return torch.cat([y.flatten(), flat(final)[-1].flatten()])

    def second(*tensors):
        grads = torch.autograd.grad(outputs(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(outputs, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(second, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(second, tensors, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_good_as_plain_float32(device, kind):
    torch.manual_seed(0)
    model, x = KINDS[kind](8, 33, 2).to(device), torch.randn(12, 6, 8).to(device)
    twin = copy.deepcopy(model).double()
    exact = derivatives(twin, [x.double()], False, nullcontext())
    plain, ours = (derivatives(model, [x], False, context) for context in (nullcontext(), curvature_friendly()))
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert_error(list(a), list(c), 3 * relative_error(list(b), list(c)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(device, kind, dtype):
    """The dtypes are PyTorch's, and numbers as good."""
    torch.manual_seed(0)
    model, x = KINDS[kind](8, 16).to(device), torch.randn(7, 4, 8).to(device, dtype)
    exact = derivatives(copy.deepcopy(model).double(), [x.double()], False, nullcontext())
    with torch.autocast(device, torch.bfloat16):
        try:
            plain = run(model, [x], False, nullcontext())
        except RuntimeError as error:
            if "could not create a primitive descriptor" in str(error):
                pytest.skip("oneDNN has no LSTM in bfloat16 with these instructions")
            raise
        ours = run(model, [x], False, curvature_friendly())
        found = derivatives(model, [x], False, curvature_friendly())
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    # Weights and inputs are rounded alike; then each rounds the gates' products, their sums and h in its own way.
    theirs = relative_error([t.double() for t in plain], exact[0])
    assert_error([t.double() for t in ours], exact[0], theirs + 2 * 3 * unit(torch.bfloat16))
    assert_error(list(found[2]), list(exact[2]), 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_several_probes_from_one_graph(device, kind):
    model = layer(kind, "plain", device)
    params, (x,) = list(model.parameters()), inputs(model, False)
    with curvature_friendly():
        grads = torch.autograd.grad(model(x)[0].sin().sum(), params, create_graph=True)
    z = [torch.randn(3, *p.shape, dtype=torch.float64).to(device) for p in params]
    together = torch.autograd.grad(grads, params, z, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        apart = torch.autograd.grad(grads, params, [v[i] for v in z], retain_graph=True)
        assert_error([h[i] for h in together], list(apart), 1e-13)


@pytest.mark.parametrize("train_step", [False, True], ids=["closure", "train_step"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_as_many_products_for_any_length(device, kind, train_step):
    counts = []
    for length in (3, 40):
        torch.manual_seed(0)
        model, x = KINDS[kind](4, 5, 2).to(device), torch.randn(length, 2, 4, device=device)
        opt = AdaHessian(model.parameters(), lr=0.01)
        loss = lambda x: model(x)[0].square().mean()  # noqa: B023, E731
        step = TrainStep(loss, opt, compile=False) if train_step else lambda x: opt.step(lambda: loss(x))  # noqa: B023
        step(x)
        with Operators() as mode:
            step(x)
        counts.append(mode.counts["mm"] + mode.counts["addmm"])
    assert counts[0] == counts[1], counts
    assert 0 < counts[0] <= 2 * 14, counts
