"""State dicts of other AdaHessians, of other dtypes and with other options."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from models import assert_same, conv_net, fresh, loss_of, mlp, train, weights
from originals import DROP_INS
from pages import ROOT, blocks
from published import AdaHessian
from tolerances import assert_within
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import adahessian_fused
from adahessian_fused import compat

# ---- what the other packages save ------------------------------------------------------------------------------------

SAME = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.01, "hessian_power": 1.0}


def torch_optimizer(model, steps):
    opt = pytest.importorskip("torch_optimizer").Adahessian(model.parameters(), **SAME, seed=1)
    train(opt, model, steps, "create_graph")
    return opt.state_dict()


def pytorch_optimizer(model, steps, **options):
    opt = pytest.importorskip("pytorch_optimizer").AdaHessian(model.parameters(), **SAME, **options)
    train(opt, model, steps, "create_graph")
    return opt.state_dict()


def by_hand(model, steps, keys, group):
    """A state dict in the format of an implementation that is no package: what its state and groups hold."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.01 * torch.randn_like(p))
    state = {
        i: {"exp_avg": torch.randn_like(p), "exp_hessian_diag_sq": torch.rand_like(p), **keys}
        for i, p in enumerate(model.parameters())
    }
    return {"state": state, "param_groups": [{**SAME, **group, "params": list(range(len(state)))}]}


FORMATS = {
    "torch_optimizer": torch_optimizer,
    "pytorch_optimizer": pytorch_optimizer,
    "official": lambda model, n: by_hand(model, n, {"step": n}, {}),
    "davda54": lambda model, n: by_hand(model, n, {"step": n, "hessian step": n}, {}),
    "timm": lambda model, n: by_hand(model, n, {"step": n, "hessian step": n}, {"initial_lr": 0.05, "lr_scale": 1.0}),
    "step_is_a_tensor": lambda model, n: by_hand(model, n, {"step": torch.tensor(float(n))}, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", FORMATS.values(), ids=FORMATS)
def test_goes_on_from_the_state_of(device, saved):
    """The step after loading is Algorithm 1 with the loaded moments and counts."""
    model = mlp(device=device)
    state = saved(model, 3)
    before = copy.deepcopy(state["state"])
    opt = AdaHessian(model.parameters(), lr=7.0)
    opt.load_state_dict(state)
    p0 = weights(model)
    g, d = ([torch.cos(x * k) for x in p0] for k in (2, 3))
    for p, gradient in zip(model.parameters(), g, strict=True):
        p.grad = gradient.clone()
    opt.step(hessian=d)
    for i, p in enumerate(model.parameters()):
        m = 0.9 * before[i]["exp_avg"] + (1 - 0.9) * g[i]
        v = 0.99 * before[i]["exp_hessian_diag_sq"] + (1 - 0.99) * d[i] ** 2
        denominator = v.sqrt() / math.sqrt(1 - 0.99**4) + 1e-4
        update = 0.05 / (1 - 0.9**4) * m / denominator
        sizes = p0[i].abs() + 0.05 / (1 - 0.9**4) * (before[i]["exp_avg"].abs() + g[i].abs()) / denominator
        assert_within(p, p0[i] * (1 - 0.05 * 0.01) - update, 32 * torch.finfo(p.dtype).eps * sizes, f"weight {i}")
        assert (int(opt.state[p]["step"]), int(opt.state[p]["hessian_step"])) == (4, 4)


@pytest.mark.filterwarnings("ignore")
def test_pytorch_optimizers_period_tells_the_number_of_hessian_updates(device):
    model = mlp(device=device)
    opt = AdaHessian(model.parameters(), update_each=3)
    opt.load_state_dict(pytorch_optimizer(model, 5, update_period=3))
    assert {(s["step"], s["hessian_step"]) for s in opt.state.values()} == {(5, 2)}
    assert not opt.needs_hessian
    train(opt, model, 1)
    assert opt.needs_hessian


def test_options_that_the_state_dict_lacks_stay_as_they_are(device):
    model = mlp(device=device)
    groups = [
        {"params": model.parameters(), "block_size": "row", "averaging": "abs", "update_each": 4, "off_step": "stale"}
    ]
    opt = AdaHessian(groups, probe="gaussian", maximize=True, seed=5)
    expected = {k: v for k, v in opt.param_groups[0].items() if k not in {"params", "step", *SAME}}
    opt.load_state_dict(FORMATS["official"](model, 3))
    assert {k: opt.param_groups[0][k] for k in expected} == expected
    assert {k: opt.param_groups[0][k] for k in SAME} == SAME


class Diagonal(nn.Module):
    """Its Hessian is diagonal, so that the probe does not matter: two runs are the same if their rules are."""

    def __init__(self, shape):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, math.prod(shape), dtype=torch.float64).view(shape))

    def forward(self, t):
        return (self.w.pow(3) / 6 + 0.1 * (self.w - t).square()).sum()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (5, 6)], ids=["kernel", "matrix"])
@pytest.mark.parametrize(
    ("package", "name"), [("torch_optimizer", "Adahessian"), ("pytorch_optimizer", "AdaHessian")], ids=str
)
def test_a_run_goes_on_by_the_rules_of_its_code(device, package, name, shape):
    """Both go on in turn: what was loaded is not theirs any more, either."""
    model, other = Diagonal(shape).to(device), Diagonal(shape).to(device)
    theirs = getattr(pytest.importorskip(package), name)(model.parameters(), lr=0.01)

    def step(opt, model, t):
        opt.zero_grad()
        model(0.1 * t).backward(create_graph=True)
        opt.step()

    for t in range(4):
        step(theirs, model, t)
    other.load_state_dict(model.state_dict())
    ours = adahessian_fused.AdaHessian(other.parameters())
    with pytest.warns(UserWarning, match=r"states and options of .*s AdaHessian and goes on with .*'update_each': 1"):
        ours.load_state_dict(theirs.state_dict())
    for t in range(4, 20):
        step(theirs, model, t)
        step(ours, other, t)
    assert torch.allclose(other.w, model.w, rtol=1e-12)


# ---- state dicts of other optimizers ---------------------------------------------------------------------------------

KEPT = {"Adam": {}, "AdamW": {"amsgrad": True}, "Adamax": {"maximize": True}, "NAdam": {}, "RAdam": {}}
OTHERS = {
    "SGD": {"momentum": 0.9},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {},
    "Rprop": {},
    "ASGD": {},
    "Adafactor": {},
}
MAKERS = {"ours": AdaHessian, **DROP_INS}


def first_order(name, options, device, steps=3):
    p = nn.Parameter(torch.linspace(0.5, 2.0, 6, device=device))
    opt = getattr(torch.optim, name)([p], **options)
    for _ in range(steps):
        opt.zero_grad()
        (p**4).sum().backward()
        opt.step()
    return p, opt


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("name", "options"), KEPT.items(), ids=KEPT)
def test_the_gradients_average_of_adams_family_is_kept(device, name, options, make):
    """V is measured anew at once, so the first step is of the length that it has in a new optimizer."""
    p, theirs = first_order(name, options, device)
    opt, x = make([p], lr=0.01, betas=(0.9, 0.99), eps=0.0, hessian_power=1.0), p.detach().clone()
    expected = {name: value for name, value in opt.param_groups[0].items() if name != "params"}
    sign = -1 if options.get("maximize") else 1
    m = 0.9 * sign * theirs.state[p]["exp_avg"] + 0.1 * 4 * x**3
    with pytest.warns(UserWarning, match="took exp_avg and step of a state dict of Adam's family"):
        opt.load_state_dict(theirs.state_dict())
    assert {name: opt.param_groups[0][name] for name in expected} == expected
    assert opt.needs_hessian
    opt.zero_grad()
    opt.backward((p**4).sum())
    opt.step()
    assert torch.allclose(p, x - 0.01 / (1 - 0.9**4) * m / (12 * x**2), rtol=1e-5)
    assert (int(theirs.state[p]["step"]), torch.is_tensor(theirs.state[p]["exp_avg"])) == (3, True)


def test_counting_as_pytorch_optimizer_does_cannot_go_on_from_adam(device):
    p, theirs = first_order("Adam", {}, device)
    opt = compat.pytorch_optimizer.AdaHessian([p], faithful=True)
    with pytest.raises(ValueError, match="faithful=True with a state dict of Adam's family; expected faithful=False"):
        opt.load_state_dict(theirs.state_dict())


STRANGERS = {
    **{name: lambda device, n=name, o=options: first_order(n, o, device)[1] for name, options in OTHERS.items()},
    "AdamW_not_stepped": lambda device: first_order("AdamW", {}, device, 0)[1],
    "SGD_without_states": lambda device: first_order("SGD", {}, device)[1],
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_other_optimizers_are_refused(device, stranger, make):
    opt = make([nn.Parameter(torch.linspace(0.5, 2.0, 6, device=device))])
    opt.step(lambda: (opt.param_groups[0]["params"][0] ** 4).sum())
    before = str(opt.state_dict())
    with pytest.raises(
        ValueError, match=r"the state dict has states with .* expected those of an AdaHessian, or of Adam"
    ):
        opt.load_state_dict(stranger(device).state_dict())
    assert str(opt.state_dict()) == before


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_adahessian_that_has_not_stepped(device, make, recwarn):
    p = nn.Parameter(torch.ones(3, device=device))
    opt = AdaHessian([p])
    opt.load_state_dict(make([p], lr=0.5).state_dict())
    assert opt.param_groups[0]["lr"] == 0.5
    assert not recwarn


def test_stale_steps_before_any_diagonal_is_known_hold(device):
    model = mlp(device=device)
    opt = AdaHessian(model.parameters(), update_each=3, off_step="stale")
    opt.load_state_dict(FORMATS["davda54"](model, 4))
    v = [opt.state[p]["exp_hessian_diag_sq"].clone() for p in model.parameters()]
    train(opt, model, 2)  # steps 5 and 6 of a period of 3; the next one computes curvature
    assert_same([opt.state[p]["exp_hessian_diag_sq"] for p in model.parameters()], v)
    assert opt.needs_hessian


def test_other_groups_are_refused(device):
    model, opt = fresh(mlp(device=device))
    train(opt, model, 1)
    before, state = weights(model), opt.state_dict()
    two = AdaHessian([{"params": model[0].parameters()}, {"params": model[2:].parameters()}])
    with pytest.raises(ValueError, match="parameter groups"):
        two.load_state_dict(state)
    with pytest.raises(ValueError, match="doesn't match the size"):
        AdaHessian(model[0].parameters()).load_state_dict(state)
    assert_same(weights(model), before)


def test_the_state_of_another_model_is_refused(device):
    opt = AdaHessian([nn.Parameter(torch.ones(3, device=device))])
    p = opt.param_groups[0]["params"][0]
    p.grad = torch.ones_like(p)
    opt.step(hessian=[torch.ones_like(p)])
    q = nn.Parameter(torch.ones(4, device=device))
    other = AdaHessian([q])
    other.load_state_dict(opt.state_dict())
    q.grad = torch.ones_like(q)
    with pytest.raises(ValueError, match=r"state .* of parameter 0 of group 0 has shape \(3,\); expected \(4,\)"):
        other.step(hessian=[torch.ones_like(q)])


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_keep_their_precision(device, dtype):
    model, opt = fresh(mlp(dtype, device), lr=1e-3)
    train(opt, model, 2)
    state = opt.state_dict()
    again = AdaHessian(model.parameters())
    again.load_state_dict(state)
    for found, saved in zip(again.state_dict()["state"].values(), state["state"].values(), strict=True):
        assert_same([found["exp_avg"], found["exp_hessian_diag_sq"]], [saved["exp_avg"], saved["exp_hessian_diag_sq"]])
        assert found["exp_avg"].dtype == torch.float32


def test_moments_of_a_float32_model_in_a_bfloat16_one(device):
    model, opt = fresh(conv_net(torch.float32, device))
    train(opt, model, 2)
    half = copy.deepcopy(model).bfloat16()
    again = AdaHessian(half.parameters(), lr=1e-3)
    again.load_state_dict(opt.state_dict())
    for p in half.parameters():
        p.grad = torch.zeros_like(p)
    again.step(hessian=[torch.zeros_like(p) for p in half.parameters()])
    expected = [opt.state[p]["exp_avg"] * torch.tensor(0.9, device=device) for p in model.parameters()]
    assert_same([again.state[p]["exp_avg"] for p in half.parameters()], expected)


def test_bfloat16_moments_of_others_become_float32(device):
    model = mlp(torch.bfloat16, device)
    opt = AdaHessian(model.parameters())
    opt.load_state_dict(FORMATS["official"](model, 3))
    train(opt, model, 1)
    assert {s["exp_avg"].dtype for s in opt.state.values()} == {torch.float32}


@pytest.mark.parametrize(
    "kind",
    [int, float, torch.tensor, lambda n: torch.tensor(float(n))],
    ids=["int", "float", "int_tensor", "float_tensor"],
)
def test_step_as_number_or_tensor(device, kind):
    found = []
    for convert in (kind, lambda n: n):
        model, opt = fresh(mlp(device=device), update_each=2)
        train(opt, model, 3)
        state = opt.state_dict()
        for s in state["state"].values():
            s["step"], s["hessian_step"] = convert(int(s["step"])), convert(int(s["hessian_step"]))
        opt.load_state_dict(state)
        found.append(train(opt, model, [3, 4]))
    assert_same(*found)


def test_what_was_saved_before_there_was_an_option_goes_on_without_it():
    p = torch.nn.Parameter(torch.ones(2))
    saved = adahessian_fused.AdaHessian([p], **adahessian_fused.recipes.published).state_dict()
    for name in ("warmup", "clip", "nesterov", "cautious"):
        del saved["param_groups"][0][name]
    opt = adahessian_fused.AdaHessian([p])
    opt.load_state_dict(saved)
    names = adahessian_fused.recipes.published
    assert {name: opt.param_groups[0][name] for name in names} == adahessian_fused.recipes.published


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_distributed_checkpoint_from_before_there_was_an_option_goes_on_without_it(flat, tmp_path):
    """By what the documentation says, word for word."""
    form = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = mlp()
    opt = adahessian_fused.AdaHessian(model.parameters(), seed=0, nesterov=False, cautious=False)
    train(opt, model, 2)
    values, states = get_state_dict(model, opt, options=form)
    for part in [states] if flat else states["param_groups"]:
        for key in [key for key in part if key.split(".")[-1] in ("nesterov", "cautious")]:
            del part[key]
    checkpoint.save({"model": values, "optimizer": states}, checkpoint_id=tmp_path)

    other = mlp()
    opt_of_other = adahessian_fused.AdaHessian(other.parameters())
    values, states = get_state_dict(other, opt_of_other, options=form)
    with pytest.raises(checkpoint.CheckpointException, match="Missing key in checkpoint state_dict"):
        checkpoint.load({"model": values, "optimizer": states}, checkpoint_id=tmp_path)
    page = ROOT / "docs" / "troubleshooting.md"
    [block] = [b for b in blocks(page, "python") if "checkpoint.load" in b.code and ("endswith" in b.code) == flat]
    exec(block.code, {"states": states, "weights": values, "checkpoint": checkpoint, "folder": tmp_path})
    set_state_dict(other, opt_of_other, model_state_dict=values, optim_state_dict=states, options=form)
    assert_same(train(opt, model, [2, 3]), train(opt_of_other, other, [2, 3]))


@pytest.mark.parametrize(("origin", "off_step"), [("official", "hold"), ("timm", "stale")])
@pytest.mark.parametrize("chosen", [{}, {"block_size": "conv2d"}, {"clip": 0.5}], ids=str)
def test_rules_of_the_code_that_saved_it_come_along_unless_others_were_chosen(origin, off_step, chosen):
    model = mlp()
    opt = adahessian_fused.AdaHessian(model.parameters(), **chosen)
    with pytest.warns(UserWarning, match="goes on with"):
        opt.load_state_dict(FORMATS[origin](model, 3))
    expected = {"warmup": 0, "clip": None, "nesterov": False, "cautious": False, "off_step": off_step, **chosen}
    assert {name: opt.param_groups[0][name] for name in expected} == expected


def test_what_was_pickled_before_there_was_an_option_goes_on_without_it():
    model = mlp()
    opt = adahessian_fused.AdaHessian(model.parameters(), nesterov=False, cautious=False)
    train(opt, model, 2)
    again, old = copy.deepcopy((model, opt))
    for options in (old.defaults, *old.param_groups):
        del options["nesterov"], options["cautious"]
    again, old = pickle.loads(pickle.dumps((again, old)))
    assert_same(train(old, again, [2, 3]), train(opt, model, [2, 3]))
    old.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert not any(old.param_groups[1][name] for name in ("nesterov", "cautious"))


@pytest.mark.parametrize("capturable", [False, True])
def test_counts_are_where_they_belong_after_loading(device, capturable):
    """PyTorch 103256: a loaded step count landed on the wrong device."""
    model, opt = fresh(mlp(torch.bfloat16, device), lr=1e-3, capturable=capturable)
    train(opt, model, 1)
    again = AdaHessian(model.parameters(), capturable=capturable)
    again.load_state_dict(opt.state_dict())
    train(again, model, [1])
    expected = device if capturable else "cpu"
    counts = [s[key] for s in again.state.values() for key in ("step", "hessian_step")]
    assert {(x.device.type, x.dtype, int(x)) for x in counts} == {(expected, torch.int64, 2)}


# ---- between the backward passes and the step ------------------------------------------------------------------------

KINDS_OF_CURVATURE = {
    "products": {},
    "gaussian": {"probe": "gaussian"},
    "folded": {"n_samples": 2, "block_size": 2},
    "signed": {"n_samples": 2, "block_size": 2, "averaging": "signed"},
}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("options", KINDS_OF_CURVATURE.values(), ids=KINDS_OF_CURVATURE)
@pytest.mark.parametrize("way", ["ours", "graph", "beside"])
def test_loading_leaves_gathered_curvature(way, options):
    def stepped(*, loads):
        model, opt = fresh(mlp(), **options)
        train(opt, model, 2)
        other = AdaHessian([nn.Parameter(torch.ones(2, dtype=torch.float64))], **options)
        opt.zero_grad()
        saved, loss = copy.deepcopy(opt.state_dict()), loss_of(model)
        if way == "graph":
            loss.backward(create_graph=True)
        else:
            (opt if way == "ours" else other).backward(loss)
        if loads:
            opt.load_state_dict(saved)
        opt.step()
        return weights(model)

    assert_same(stepped(loads=True), stepped(loads=False))


def test_loading_other_blocks_lets_averaged_curvature_go():
    model, opt = fresh(mlp(), n_samples=2, block_size=2, averaging="signed")
    saved = AdaHessian(model.parameters(), n_samples=2, block_size=3, averaging="signed").state_dict()
    opt.backward(loss_of(model))
    before = weights(model)
    opt.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="this step needs curvature"):
        opt.step()
    assert_same(weights(model), before)
