"""Errors name the argument or parameter, what was found and what was expected, and leave the optimizer as it was."""

from __future__ import annotations

import copy
import re
from functools import partial

import numpy as np
import pytest
import torch
from models import assert_same, fresh, loss_of, mlp, train, weights
from published import AdaHessian
from torch import nn

from adahessian_fused import compat, hutchinson_diagonal

OUT_OF_RANGE = {
    "lr": (-0.1, float("nan"), "fast", None, torch.ones(2)),
    "betas": ((0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9, None, ("a", 0.9)),
    "eps": (-1e-8, float("nan"), None),
    "weight_decay": (-1.0, "no"),
    "hessian_power": (-0.5, 1.5, None),
    "block_size": (0, -3, 1.5, "column", None, True),
    "averaging": ("mean", None),
    "update_each": (0, 1.5, None, True),
    "off_step": ("skip", None),
    "n_samples": (0, 2.0, None),
    "probe": ("uniform", None),
    "seed": (0.5, 2**64, "x"),
    "hvp": ("forward", None),
    "hvp_dtype": (torch.float16, "bf16", 16),
    "hessian_fraction": (0.0, -0.5, 1.5, float("nan"), None),
    "fd_epsilon": (0.0, -1e-3, float("nan"), float("inf"), "small"),
    "backend": ("cuda", ""),
    "maximize": ("yes", 2, None),
    "capturable": ("yes", None),
    "master_weights": ("yes", None),
    "state_dtype": (torch.float32, torch.float16, "bfloat16", 16),
    "clip": (0.0, "1", float("nan")),
    "shrink": (-1.0, float("inf")),
    "nesterov": ("yes", None),
    "cautious": (2, None),
    "warmup": (-1, 0.5),
    "dense_steps": (-1, 0.5),
    "unmeasured": ("stay", 1),
    "nonfinite": ("ignore", None),
}
CASES = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{n}={v!r}"[:30] for n, v in CASES])
def test_arguments_out_of_range(name, value):
    expected = rf"{name}.*{re.escape(str(tuple(value.shape)) if isinstance(value, torch.Tensor) else '')}.*expected"
    with pytest.raises((ValueError, TypeError), match=expected) as raised:
        AdaHessian([nn.Parameter(torch.ones(2))], **{name: value})
    if not isinstance(value, (tuple, torch.Tensor)):
        assert str(value) in str(raised.value)


@pytest.mark.parametrize(("name", "value"), [c for c in CASES if c[0] not in ("backend", "state_dtype")], ids=str)
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(name, value):
    opt = AdaHessian([nn.Parameter(torch.ones(2))])
    before, state = copy.deepcopy(opt.param_groups), opt.state_dict()
    with pytest.raises((ValueError, TypeError)):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], name: value})
    assert str(opt.param_groups) == str(before)
    assert str(opt.state_dict()) == str(state)


@pytest.mark.parametrize("several", [torch.ones(2), np.ones(2)], ids=["tensor", "array"])
@pytest.mark.parametrize("name", [*sorted(set(OUT_OF_RANGE) - {"backend", "betas"}), "probe_per_rank"])
def test_several_numbers_in_the_place_of_one(name, several):
    with pytest.raises(ValueError, match=rf"{name}.*expected"):
        AdaHessian([nn.Parameter(torch.ones(2))], **{name: several})


def test_ranks_in_the_place_of_their_group():
    with pytest.raises(TypeError, match=r"process_group is a list; expected a torch\.distributed process group"):
        AdaHessian([nn.Parameter(torch.ones(2))], process_group=[0, 1])


CHANGED = [c for c in CASES if c[0] not in ("backend", "state_dtype") and type(c[1]) not in (torch.Tensor, bool)]


@pytest.mark.parametrize(("name", "value"), CHANGED, ids=str)
def test_an_option_that_is_changed_is_checked_at_the_step(name, value):
    model, opt = fresh(mlp(), update_each=2)
    with pytest.raises((ValueError, TypeError)) as at_first:
        AdaHessian(model.parameters(), **{name: value})
    opt.step(lambda: loss_of(model))
    opt.zero_grad()
    loss_of(model).backward()
    before, right = weights(model), opt.param_groups[0][name]
    opt.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(at_first.type, match=re.escape(str(at_first.value))):
            opt.step()
    assert_same(weights(model), before)
    opt.param_groups[0][name] = right
    opt.step()


@pytest.mark.parametrize(("name", "value"), [c for c in CHANGED if c[0] in ("update_each", "hvp", "hessian_fraction")])
@pytest.mark.parametrize(
    "step", [lambda opt, m: (opt.backward(loss_of(m)), opt.step()), lambda opt, m: opt.step(lambda: loss_of(m))]
)
def test_an_option_that_is_changed_is_checked_where_curvature_depends_on_it(name, value, step):
    model, opt = fresh(mlp())
    opt.step(lambda: loss_of(model))
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}={value!r}; expected"):
        step(opt, model)


WIDE = {
    "n_samples": 2,
    "probe": "gaussian",
    "seed": 1,
    "hvp": "finite_difference",
    "hvp_dtype": "tf32",
    "fd_epsilon": 0.1,
    "hessian_fraction": 0.5,
    "capturable": True,
    "master_weights": True,
}


@pytest.mark.parametrize(("name", "value"), WIDE.items())
def test_options_of_the_whole_optimizer_cannot_differ_between_groups(name, value):
    hvp = "finite_difference" if name == "fd_epsilon" else "autograd"
    opt = AdaHessian([nn.Parameter(torch.ones(2))], hvp=hvp)
    with pytest.raises(ValueError, match=f"{name}=.*expected.*the same for all groups"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], name: value})
    assert len(opt.param_groups) == 1


REFUSED = {
    "sparse": (torch.eye(3).to_sparse(), r"parameter 1 of group 0 has layout torch.sparse_coo; expected a dense"),
    "complex": (
        torch.ones(3, dtype=torch.complex64),
        r"parameter 1 of group 0 is torch.complex64; expected float32.*view_as_complex",
    ),
    "float8": (torch.ones(3).to(torch.float8_e5m2), r"parameter 1 of group 0 is torch.float8_e5m2; expected float32"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
def test_parameters_that_no_backend_can_update(value, message):
    with pytest.raises(TypeError, match=message):
        AdaHessian([nn.Parameter(torch.ones(2)), nn.Parameter(value)])


@pytest.mark.parametrize("block_size", [1, "auto"])
@pytest.mark.parametrize(
    "shared",
    [lambda x: x.view(-1)[:1].expand(3), lambda x: x.expand(2, 2, 2), lambda x: x.as_strided((3, 2), (1, 1))],
    ids=["expanded", "batch", "overlapping"],
)
def test_parameters_whose_elements_share_memory(shared, block_size):
    p = shared(torch.ones(2, 2)).requires_grad_()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, of shape .* share memory; expected .*clone"):
        AdaHessian([p], block_size=block_size)
    p = nn.Parameter(torch.ones(2, 2))
    opt = AdaHessian([p], block_size=block_size)
    opt.backward((p**2).sum())
    opt.step()
    p.data, p.grad = shared(torch.ones(2, 2)), None
    with pytest.raises(ValueError, match="share memory"):
        opt.step(lambda: (p**2).sum())
    assert p.eq(1).all()


MEMORY = torch.ones(6, 4)
IN_COMMON = {
    "the_same": (MEMORY, MEMORY.view(4, 6)),
    "rows": (MEMORY[:3], MEMORY[2:]),
    "columns": (MEMORY[:, :3], MEMORY[:, 2:]),
    "another_dtype": (MEMORY[:, 1:], MEMORY.view(torch.bfloat16)[:, 2:4]),
}
APART = {
    "rows": (MEMORY[:3], MEMORY[3:]),
    "columns": (MEMORY[:, ::2], MEMORY[:, 1::2]),
    "another_dtype": (MEMORY[:, 1:], MEMORY.view(torch.bfloat16)[:, :2]),
    "empty": (MEMORY, MEMORY[:0]),
}


@pytest.mark.parametrize("pair", IN_COMMON.values(), ids=IN_COMMON)
def test_parameters_that_share_memory(pair, device):
    a, b = (nn.Parameter(t) for t in pair)
    message = r"parameter . of group . shares memory with parameter 0 of group 0; expected each element in one"
    for params in ([a, b], [{"params": [a]}, {"params": [b]}]):
        with pytest.raises(ValueError, match=message):
            AdaHessian(params)
    opt = AdaHessian([a])
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [b]})
    assert len(opt.param_groups) == 1
    opt.step(lambda: (a**2).sum() * 0)


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("pair", IN_COMMON.values(), ids=IN_COMMON)
def test_parameters_that_come_to_share_memory(pair, stepped, device):
    a, b = (nn.Parameter(t.clone()) for t in pair)
    opt = AdaHessian([a, b])
    if stepped:
        opt.step(lambda: (a**2).sum() + (b**2).sum().float())
    a.grad = b.grad = None
    a.data, b.data = pair
    before = MEMORY.clone()
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 shares memory with parameter 0 of group 0"):
        opt.step(lambda: (a**2).sum() + (b**2).sum().float())
    assert torch.equal(MEMORY, before)


@pytest.mark.parametrize("pair", APART.values(), ids=APART)
def test_parameters_of_one_storage(pair):
    a, b = (nn.Parameter(t) for t in pair)
    opt = AdaHessian([a, b], lr=0.0)
    opt.step(lambda: (a**2).sum() + (b**2).sum().float())
    assert torch.equal(opt.hessian_diag(a), torch.full_like(a, 2))


def test_strides_that_only_look_as_if_elements_shared_memory():
    p = torch.ones(8).as_strided((2, 3), (3, 2)).requires_grad_()
    opt = AdaHessian([p], lr=1.0, eps=0.0, block_size=1)
    opt.backward((p**2).sum())
    opt.step()
    assert torch.equal(p, torch.zeros(2, 3))


FROZEN = {
    "int8": torch.ones(3, dtype=torch.int8),
    "bool": torch.ones(3, dtype=torch.bool),
    "float8": torch.ones(3).to(torch.float8_e5m2),
    "complex": torch.ones(3, dtype=torch.complex64),
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.ones(3, device="meta"),
    "expanded": torch.ones(1).expand(3),
}


@pytest.mark.parametrize("value", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_may_be_of_any_kind(value):
    frozen, p = nn.Parameter(value, requires_grad=False), nn.Parameter(torch.ones(3))
    opt = AdaHessian([frozen, p], lr=1.0, eps=0.0)
    opt.backward((p**2).sum())
    opt.step()
    assert torch.equal(p, torch.zeros(3))
    assert opt.statistics().update_norm is not None
    other = AdaHessian([frozen, p])
    other.load_state_dict(opt.state_dict())
    assert int(other.state[p]["step"]) == 1
    if value.is_complex():
        frozen.requires_grad_()
        frozen.grad, p.grad = torch.ones_like(frozen), torch.ones_like(p)
        with pytest.raises(TypeError, match=r"parameter 0 of group 0 is torch\.complex64"):
            opt.step(hessian=[torch.ones(3)] * 2)
        assert int(opt.state[p]["step"]) == 1


@pytest.mark.parametrize("update_each", [1, 2])
def test_sparse_gradients(update_each):
    p, table = nn.Parameter(torch.ones(2)), nn.Embedding(5, 2, sparse=True)
    opt = AdaHessian([p, *table.parameters()], update_each=update_each)
    if update_each == 2:
        p.grad = torch.ones(2)
        opt.step(hessian=[torch.ones(2), None])
    p.grad = torch.ones(2)
    table(torch.tensor([1, 3])).square().sum().backward()
    with pytest.raises(
        TypeError,
        match=r"gradient of parameter 1 of group 0 has layout torch.sparse_coo; expected a dense.*sparse=False",
    ):
        opt.step(**({} if update_each == 2 else {"hessian": [torch.ones(2), torch.ones(5, 2)]}))


def test_no_curvature_says_what_to_write():
    model, opt = fresh(mlp())
    loss_of(model).backward()
    with pytest.raises(
        RuntimeError, match=r"opt\.backward\(loss\).*create_graph=opt\.needs_hessian.*opt\.step\(closure\)"
    ):
        opt.step()


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference", "create_graph"])
@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_gradients_that_are_cleared_before_the_step_are_told(hvp):
    model, opt = fresh(mlp(), hvp="autograd" if hvp == "create_graph" else hvp)
    for _ in range(2):
        if hvp == "create_graph":
            loss_of(model).backward(create_graph=True)
        else:
            opt.backward(lambda: loss_of(model))
        opt.zero_grad(set_to_none=False)
        with pytest.raises(RuntimeError, match=r"\(set_to_none=False\) has cleared.*before opt\.backward\(loss\) or"):
            opt.step()
        opt.zero_grad()
        opt.step(lambda: loss_of(model))


@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_gradients_of_the_last_step_are_told(hvp):
    model, opt = fresh(mlp(), hvp=hvp)
    opt.backward(lambda: loss_of(model))
    opt.step()
    with pytest.raises(RuntimeError, match=r"still those of the last step.*opt\.backward\(loss\) anew"):
        opt.step()
    opt.backward(lambda: loss_of(model))
    opt.step()


NO_GRADIENTS = {
    "no backward pass": lambda opt, model: opt.step(),
    "cleared before the step": lambda opt, model: (opt.backward(loss_of(model)), opt.zero_grad(), opt.step()),
    "a copy": lambda opt, model: (loss_of(copy.deepcopy(model)).backward(), opt.step()),
    "a copy's closure": lambda opt, model: opt.step(partial(loss_of, copy.deepcopy(model))),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("step", NO_GRADIENTS.values(), ids=NO_GRADIENTS)
def test_gradients_that_never_come_are_told_once(step):
    model, opt = fresh(mlp())
    for _ in range(2):
        step(opt, model)
    with pytest.warns(UserWarning, match=r"no parameter has had a gradient.*Call opt\.backward\(loss\) before") as told:
        step(opt, model)
    assert [warning.filename for warning in told] == [__file__]
    for _ in range(5):
        step(opt, model)


@pytest.mark.filterwarnings("error")
def test_steps_without_gradients_after_one_with_some_are_nothing_to_tell():
    model, opt = fresh(mlp(), warmup=1)
    opt.step()
    opt.step(lambda: loss_of(model))
    opt.zero_grad()
    for _ in range(5):
        opt.step()


LOSSES = {
    "number": (lambda p: 3.0, TypeError, "loss is a float; expected a tensor"),
    "vector": (lambda p: p * 2, RuntimeError, r"loss has shape \(2,\); expected one number"),
    "detached": (lambda p: p.sum().detach(), RuntimeError, "loss does not require grad; expected"),
}


@pytest.mark.parametrize(("loss", "error", "message"), LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("update_each", [1, 2])
def test_what_is_no_loss(loss, error, message, update_each):
    p = nn.Parameter(torch.ones(2))
    opt = AdaHessian([p], update_each=update_each)
    p.grad = torch.ones(2)
    opt.step(hessian=[torch.ones(2)])
    with pytest.raises(error, match=message):
        opt.backward(loss(p))


@pytest.mark.parametrize("value", [-2, float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_weights_of_curvature(value, hvp):
    model, opt = fresh(mlp(), hvp=hvp, update_each=2)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"curvature={value!r}; expected 0.0 <= curvature < inf"):
            opt.backward(lambda: loss_of(model), curvature=value)
        assert all(p.grad is None for p in model.parameters())
        opt.step(lambda: loss_of(model))
        opt.zero_grad()


def test_a_closure_that_is_a_loss():
    model, opt = fresh(mlp())
    with pytest.raises(TypeError, match=r"closure is of type Tensor; expected a function.*opt\.backward\(loss\), then"):
        opt.step(loss_of(model))


@pytest.mark.parametrize("inner", ["closure", "no closure"])
@pytest.mark.parametrize("update_each", [1, 2])
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference", "forward_over_reverse"])
def test_a_step_in_its_own_closure(hvp, update_each, inner):
    model, calls = mlp(), []
    opt = AdaHessian(model.parameters(), hvp=hvp, update_each=update_each)
    opt.step(lambda: loss_of(model, 0))
    before, state = weights(model), str(opt.state_dict())

    def closure():
        calls.append(1)
        opt.zero_grad()
        loss = loss_of(model, 1)
        loss.backward()
        opt.step(*[closure] * (inner == "closure"))
        return loss

    with pytest.raises(
        RuntimeError, match=r"was called by the closure of opt.step\(closure\); expected a closure that"
    ):
        opt.step(closure)
    assert len(calls) == 1
    assert_same(weights(model), before)
    assert str(opt.state_dict()) == state
    opt.step(lambda: loss_of(model, 0))


def test_a_loss_in_the_place_of_its_function():
    model, opt = fresh(mlp(), hessian_fraction=0.5)
    with pytest.raises(TypeError, match=r"loss_fn is of type Tensor; expected a function of the batch, as in .*lambda"):
        opt.backward_split(loss_of(model), torch.ones(4, 3))
    assert all(p.grad is None for p in model.parameters())


HESSIANS = {
    "too_few": ([], "hessian has 0 entries; expected 2"),
    "too_many": ([torch.ones(2)] * 3, "hessian has 3 entries; expected 2"),
    "wrong_shape": (
        [torch.ones(2), torch.ones(4)],
        r"hessian of parameter 1 of group 0 is of shape \(4,\); expected shape \(3,\)",
    ),
    "none": ([torch.ones(2), None], r"hessian of parameter 1 of group 0 is None; expected shape \(3,\)"),
    "number": ([torch.ones(2), 1.0], r"hessian of parameter 1 of group 0 is 1.0; expected shape \(3,\)"),
}


@pytest.mark.parametrize(("hessian", "message"), HESSIANS.values(), ids=HESSIANS)
def test_external_curvature_that_does_not_fit(hessian, message):
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    opt = AdaHessian(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=message):
        opt.step(hessian=hessian)


def test_external_curvature_in_a_dict_is_refused():
    """Whose keys could be taken for it: they have its shapes."""
    p = nn.Parameter(torch.ones(2))
    opt = AdaHessian([p])
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="hessian is of type dict; expected a list of tensors, one for each parameter"):
        opt.step(hessian={p: torch.ones(2)})
    assert_same([p], [torch.ones(2)])


@pytest.mark.parametrize("make", [AdaHessian, compat.timm.Adahessian, compat.pytorch_optimizer.AdaHessian])
@pytest.mark.parametrize(
    ("given", "found"), [("a.pt", "is a str"), (None, "is a NoneType"), ({"opt": {}}, r"has \['opt'\]")]
)
def test_what_is_no_state_dict(make, given, found):
    opt = make([nn.Parameter(torch.ones(2))])
    with pytest.raises(
        ValueError, match=rf"the state dict {found}; expected what opt\.state_dict\(\) returns: state and"
    ):
        opt.load_state_dict(given)


def test_a_parameter_that_has_changed_its_shape():
    model, opt = fresh(mlp())
    train(opt, model, 1)
    model[4].bias.data, model[4].weight.data = torch.ones(6).double(), torch.ones(6, 4).double()
    for _ in range(2):  # the second time as well
        with pytest.raises(
            ValueError, match=r"state exp_avg of parameter 4 of group 0 has shape \(2, 4\); expected \(6, 4\)"
        ):
            opt.step(lambda: model(torch.ones(2, 3).double()).square().sum())


def test_curvature_before_the_first_step():
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="has not seen any curvature yet"):
        AdaHessian([p]).hessian_diag(p)


def test_curvature_of_a_name():
    with pytest.raises(TypeError, match="param is of type str; expected one of the optimizer's parameters"):
        AdaHessian([nn.Parameter(torch.ones(2))]).hessian_diag("weight")


def test_curvature_of_a_stranger():
    with pytest.raises(ValueError, match="not a parameter of this optimizer"):
        AdaHessian([nn.Parameter(torch.ones(2))]).hessian_diag(torch.ones(2))


def test_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        RuntimeError, match=r'backend="triton" cannot run on cpu tensors here: .*Available: .*reference'
    ):
        AdaHessian([nn.Parameter(torch.ones(2))], backend="triton")


ESTIMATES = {"n_samples": 0, "block_size": 0, "averaging": "mean", "probe": "uniform", "backend": "cuda"}


@pytest.mark.parametrize(("name", "value"), ESTIMATES.items())
def test_arguments_of_the_estimate(name, value):
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=f"{name}.*{value}.*expected"):
        hutchinson_diagonal((p**3).sum(), [p], **{name: value})


PASSES = {
    "ours": lambda opt, loss: opt.backward(loss),
    "graph": lambda opt, loss: loss.backward(create_graph=True),
    "plain": lambda opt, loss: loss.backward(),
    "engine": lambda opt, loss: torch.autograd.backward([loss]),
}
TOGETHER = {
    ("ours", "graph"): r"has gathered curvature.*Use one of the two, with opt\.zero_grad",
    **{
        (a, b): r"has added to gradients of this step without their curvature"
        for second in ("ours", "graph")
        for first in ("plain", "engine")
        for a, b in ((first, second), (second, first))
    },
}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("pair", TOGETHER, ids="-".join)
def test_one_step_has_one_way_to_get_curvature(pair):
    (model, opt), (other, expected) = fresh(mlp()), fresh(mlp())
    before = weights(model)

    def stepped():
        for i, name in enumerate(pair):
            PASSES[name](opt, loss_of(model, i))
        opt.step()

    with pytest.raises(RuntimeError, match=TOGETHER[pair]):
        stepped()
    assert_same(weights(model), before)
    for opt_, of in ((opt, model), (expected, other)):  # as if nothing had happened
        of.zero_grad()
        for i in range(2):
            PASSES["graph" if "graph" in pair else "ours"](opt_, loss_of(of, i))
        opt_.step()
    assert_same(weights(model), weights(other))


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_a_graph_that_is_used_up_is_told():
    (model, opt), (other, expected) = fresh(mlp()), fresh(mlp())
    before = weights(model)
    loss_of(model).backward(create_graph=True)
    torch.autograd.grad([p.grad.sum() for p in model.parameters()], list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"has been used up, by a step\(\) that failed.*then compute"):
        opt.step()
    assert_same(weights(model), before)
    opt.zero_grad()
    assert_same(train(opt, model, 1), train(expected, other, 1))


WARNINGS = {
    "step": (lambda opt, p: opt.step(lambda: p.norm()), "is infinite or NaN"),
    "hooked": (lambda opt, p: hooked_step(opt, p.norm()), "is infinite or NaN"),
    "low": (lambda opt, p: opt.backward(p.sum() ** 2), "hvp_dtype=torch.bfloat16 has nothing to do"),
    "load": (lambda opt, p: opt.load_state_dict(adam_of(p).state_dict()), "a state dict of Adam's family"),
}


def hooked_step(opt, loss):
    with opt.hook_backward():
        loss.backward()
    opt.step()


def adam_of(p):
    adam = torch.optim.Adam([nn.Parameter(p.detach().clone())])
    adam.param_groups[0]["params"][0].grad = torch.ones(2)
    adam.step()
    return adam


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_are_of_the_line_that_calls(name, monkeypatch):
    monkeypatch.setattr("adahessian_fused.hvp.precision._first_time", lambda what: True)
    p = nn.Parameter(torch.zeros(2))
    call, message = WARNINGS[name]
    with pytest.warns(UserWarning, match=message) as told:
        call(AdaHessian([p], hvp_dtype=torch.bfloat16 if name == "low" else None), p)
    assert [warning.filename for warning in told if re.search(message, str(warning.message))] == [__file__]
