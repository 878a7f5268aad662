"""check_hvp says of every strategy how right it is, what it costs and what fails, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from models import assert_same, batch, conv_net, mlp, weights
from test_first_order_only import Attention, Bag
from torch import nn

from adahessian_fused import check_along_z, check_hvp, curvature_friendly
from adahessian_fused.hvp.kinks import kinks

EXACT = ("autograd", "forward_over_reverse")


def loss_on(model, x, y):
    return (model(x) - y).square().mean()


def check(model, data=None, **options):
    data = batch(0, model, 16) if data is None else data
    return check_hvp(model, loss_on, data, show=False, repeats=1, **options)


def relu_net(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)


@pytest.mark.parametrize("extra", [nn.Identity(), nn.Dropout(0.3)], ids=str)
def test_smooth_models_can_use_all(device, extra):
    result = check(nn.Sequential(mlp(torch.float32, device), extra))
    assert result.reference == "double backward in float64"
    assert all(check.trusted and check.failure is None and check.time > 0 for check in result.strategies)
    assert all(result[hvp].product_error < 1e-5 for hvp in EXACT)
    assert 1e-5 < result["finite_difference"].product_error < 1e-2


def test_lower_precision_has_a_row_where_there_is_float32(device):
    low = "autograd, bfloat16"
    result = check(relu_net(device))
    assert 1e-4 < result[low].product_error < 0.02
    assert result[low].gradient_error == result["autograd"].gradient_error
    assert result[low].pays == (result[low].time < result["autograd"].time)
    assert result[low].verdict == "can be trusted" + ("" if result[low].pays else ", no gain")
    for dtype in (torch.float64, torch.bfloat16):
        assert low not in [c.strategy for c in check(mlp(dtype, device)).strategies]


def test_finite_differences_of_relu_networks_are_not_trusted(device):
    result = check(relu_net(device), fd_epsilon=2.0**-9)
    assert all(result[hvp].trusted for hvp in EXACT)
    assert not result["finite_difference"].trusted
    assert result["finite_difference"].verdict == "WRONG for this model"


class Leaky(torch.autograd.Function):
    """Of somebody's own, with a kink that no name tells."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


KINKED = {
    "relu": (nn.ReLU(), ("Relu",)),
    "leaky_relu": (nn.LeakyReLU(), ("LeakyRelu",)),
    "hardswish": (nn.Hardswish(), ("Hardswish",)),
    "selu": (nn.SELU(), ("Elu",)),
    "elu": (nn.ELU(), ()),
    "gelu": (nn.GELU(), ()),
    "max_pool": (nn.Sequential(nn.Unflatten(1, (1, 16)), nn.MaxPool1d(1), nn.Flatten()), ("MaxPool2DWithIndices",)),
    "softmax": (nn.Softmax(-1), ()),
    "abs": (torch.abs, ("Abs",)),
    "sort": (lambda x: x.sort(-1).values, ("Sort",)),
    "where": (lambda x: torch.where(x > 0, x, 0), ("Where",)),
    "function": (Leaky.apply, ("Leaky",)),
}


class Acting(nn.Module):
    def __init__(self, act) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(3, 16), act, nn.Linear(16, 2)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize("friendly", [False, True])
@pytest.mark.parametrize("case", KINKED)
def test_kinks_are_known_by_the_operators(device, case, friendly):
    act, names = KINKED[case]
    model = Acting(act).to(device)
    with curvature_friendly() if friendly else contextlib.nullcontext():
        loss = loss_on(model, *batch(0, model))
    assert [name.lower() for name in kinks(loss)] == [name.lower() for name in names]


def test_a_batch_that_crosses_no_kink_is_no_reason_to_trust(device):
    model, verdicts = Acting(nn.ReLU()).to(device), set()
    for i in range(3):
        found = check_hvp(model, loss_on, batch(i, model), show=False, repeats=1)["finite_difference"]
        assert not found.trusted
        verdicts.add(found.verdict)
    assert "cannot tell: Relu" in verdicts
    assert verdicts <= {"cannot tell: Relu", "WRONG for this model"}


def test_kinks_that_no_operator_tells(device):
    """Such as a product with x > 0; a wider distance crosses what a narrow one does not."""
    model = Acting(lambda x: 100 * x * (x > 0)).to(device)
    found = [check_hvp(model, loss_on, batch(i, model, 64), show=False, repeats=1) for i in range(2)]
    assert not any(each["finite_difference"].trusted for each in found)


def test_what_fails_is_named():
    torch.manual_seed(0)
    data = torch.randn(5, 4), torch.randn(1, 2, 5, 2)
    result = check(Attention(), data)
    assert result.reference == "double backward in float64"  # attention in plain operators
    assert result["finite_difference"].trusted
    for hvp in EXACT:
        assert not result[hvp].trusted
        assert result[hvp].product_error is result[hvp].time is None
        assert "_scaled_dot_product_flash_attention" in result[hvp].operator
        assert result[hvp].operator in result[hvp].verdict


def test_without_any_double_backward_the_reference_is_a_difference():
    torch.manual_seed(0)
    result = check(Bag(), (torch.zeros(1), torch.randn(4, 3)))
    assert result.reference.startswith("central differences in float64")
    assert result["finite_difference"].trusted
    assert result["autograd"].operator == "_embedding_bag_backward"


class Sworn(torch.autograd.Function):
    """Hides numbers and denies it, so that nothing but numbers tells."""

    twice_differentiable = True

    @staticmethod
    def forward(ctx, x):
        ctx.slope = x.detach().cos()
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


CONSTANT = {
    "function": Sworn.apply,
    "detach": lambda x: x * x.detach().sigmoid(),
    "data": lambda x: x * x.data.cos(),
    "straight_through": lambda x: x + (torch.round(4 * x) / 4 - x).detach(),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_differences_of_gradients_see_what_is_constant_for_autograd_alone(device, case):
    result = check(Acting(CONSTANT[case]).to(device))
    assert result.along_z > 0.02
    assert not any(each.trusted for each in result.strategies)
    verdicts = [each.verdict for each in result.strategies if each.failure is None]  # a Function without jvp
    assert len(verdicts) > 1
    assert all(f"off by {result.along_z:.1%} from the change of g along z" in verdict for verdict in verdicts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "act",
    [nn.Tanh(), nn.ReLU(), nn.Softplus(beta=100), torch.abs, nn.BatchNorm1d(16)],
    ids=["tanh", "relu", "softplus", "abs", "batch_norm"],
)
def test_differences_of_gradients_agree(device, act, dtype):
    """A kink is crossed at the larger distances at most."""
    assert check(Acting(act).to(device, dtype)).along_z < 1e-4


def test_differences_of_gradients_in_the_precision_of_the_model():
    assert check(Unequal()).along_z < 0.01


def test_differences_alone(device):
    """For use in training: nothing is left behind, and the number is that of the whole check."""
    for act in (nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.3)), Sworn.apply):
        model = Acting(act).to(device)
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        found = check_along_z(model, loss_on, batch(0, model, 16))
        assert torch.equal(torch.get_rng_state(), state)
        assert_same(list(model.state_dict().values()), list(before.values()))
        assert all(p.grad is None for p in model.parameters())
        assert found == check(model).along_z


def test_differences_of_gradients_at_a_kink_tell_nothing(device, capsys):
    model = Acting(nn.ReLU()).to(device)
    nn.init.zeros_(model.first.bias)
    data = torch.zeros(16, 3, device=device), torch.ones(16, 2, device=device)
    result = check_hvp(model, loss_on, data, repeats=1)
    assert result.along_z is None
    assert result["autograd"].trusted
    assert "g along z: cannot tell" in " ".join(capsys.readouterr().out.split())


class Unequal(nn.Module):
    """Random numbers that depend on the precision, as dropout's on a GPU do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return torch.tanh(self.layer(x)) * (3 if x.dtype == torch.float64 else 1)


def test_other_random_numbers_in_float64_keep_the_precision():
    result = check(Unequal())
    assert result.reference == "double backward in the precision of the model"
    assert result["autograd"].product_error == 0


def test_nothing_is_changed(device):
    model = nn.Sequential(conv_net(torch.float32, device), nn.Dropout(0.5))
    loss_on(model, *batch(0, model)).backward()
    before = copy.deepcopy(model.state_dict())
    grads, versions = [p.grad for p in model.parameters()], [p.grad._version for p in model.parameters()]
    state, held = torch.get_rng_state(), weights(model)
    check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(weights(model), held)
    assert_same(list(model.state_dict().values()), list(before.values()))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert [g._version for g in grads] == versions


def test_the_table(device, capsys):
    check_hvp(mlp(torch.float32, device), loss_on, batch(0, mlp(torch.float32, device)), repeats=1)
    printed = capsys.readouterr().out
    for text in (*EXACT, "finite_difference", "can be trusted", "double backward in float64"):
        assert text in printed


LONG = "an operator of somebody's own cannot do what is asked of it, for a reason that takes many words to tell"


class Refusing(torch.autograd.Function):
    """Without a second derivative, and with a word on it that nobody knows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(LONG)
        return grad.clone()


FAILING = {
    "an operator": (
        nn.Identity(),
        F.mse_loss,
        "forward_over_reverse",
        r"such as mse_loss\) has no forward-mode derivative",
    ),
    "an error": (Refusing.apply, F.l1_loss, "autograd", LONG),
}


@pytest.mark.parametrize("case", FAILING)
def test_below_the_table_is_the_whole_reason_of_a_failure(case, capsys):
    act, loss, way, reason = FAILING[case]
    result = check_hvp(Acting(act), lambda model, x, y: loss(model(x), y), batch(0, Acting(act)), repeats=1)
    table, below = capsys.readouterr().out.split("Errors of Hz")
    assert re.search(rf"^{way} fails: .*{reason}\.$", below, re.M)
    assert re.search(rf"^{way} .* fails$", table, re.M)
    assert max(map(len, table.splitlines())) <= 80
    assert re.fullmatch(f"fails: .*{reason}", result[way].verdict)


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        check(mlp().requires_grad_(False))

    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        check_along_z(mlp().requires_grad_(False), loss_on, batch(0, mlp(), 16))


WRONG = {
    "a function for the model": ({"model": lambda x: x}, TypeError, "model is of type function; expected a torch.nn"),
    "a tensor for the batch": ({"batch": torch.ones(4, 3)}, TypeError, r"batch is of type Tensor; expected a tuple"),
    "a dict for the batch": ({"batch": {"x": 1}}, TypeError, r"batch is of type dict; expected a tuple"),
    "a loss of outputs": (
        {"loss_fn": nn.CrossEntropyLoss()},
        TypeError,
        r"loss_fn\(model, .*as lambda model, x, y",
    ),
    "a function of outputs": (
        {"loss_fn": F.cross_entropy},
        TypeError,
        r"must be Tensor, not .*; expected a function",
    ),
    "no loss": ({"loss_fn": lambda *_: None}, TypeError, "returned a value of type NoneType; expected the loss"),
    "outputs": ({"loss_fn": lambda m, x, _: m(x)}, ValueError, r"returned shape \(16, .*\); expected one number"),
    "another model's loss": ({"model": nn.Linear(1, 1)}, ValueError, "depends on no parameter of the model; expected"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("of", [check_hvp, check_along_z])
def test_wrong_arguments_are_refused_by_name(of, name):
    change, error, message = WRONG[name]
    model = mlp()
    use = {"model": model, "loss_fn": lambda m, *data: loss_on(m if "model" not in change else model, *data)}
    with pytest.raises(error, match=message):
        of(**{**use, "batch": batch(0, model, 16), **change})


def test_a_number_of_repeats():
    with pytest.raises(ValueError, match="repeats=0; expected an int >= 1"):
        check_hvp(mlp(), loss_on, batch(0, mlp(), 16), repeats=0)


def test_errors_of_the_loss_are_not_results():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        check(mlp(), (torch.ones(4, 7).double(), torch.ones(4, 2).double()))
