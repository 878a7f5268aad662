"""What users do to parameter groups while they train, against an optimizer that looks at everything anew.

The losses are sums over elements, so the Hessian is diagonal and D = z * Hz = z^2 * H is the diagonal, whatever z is.
"""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adahessian_fused import AdaHessian
from adahessian_fused.reference import block_mean

SHAPES = ((3, 4), (5,), (2, 3), (0,), (1,))
HYPER = (
    {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "update_each": 1, "block_size": 1},
    {"lr": 0.05, "betas": (0.5, 0.9), "weight_decay": 0.0, "update_each": 2, "block_size": 4, "averaging": "abs"},
    {"lr": 0.0, "betas": (0.8, 0.95), "update_each": 1, "block_size": "row", "hessian_power": 0.5},
    {"lr": 0.03, "betas": (0.0, 0.9), "update_each": 3, "block_size": 2, "maximize": True},
    {"lr": 0.01, "block_size": 4},
)
DEFAULTS = {
    "betas": (0.9, 0.999),
    "update_each": 1,
    "averaging": "signed",
    "weight_decay": 0.0,
    "hessian_power": 1.0,
    "maximize": False,
}


class Plain:
    """Algorithm 1 for groups of parameters, each described by one of HYPER; all are looked at in every step."""

    def __init__(self, values, groups):
        self.values = [x.clone() for x in values]
        self.groups = [{"params": params, "count": 0, **DEFAULTS, **HYPER[number]} for params, number in groups]
        self.state = defaultdict(lambda: {"m": 0.0, "v": 0.0, "t": 0, "h": 0})

    def step(self, grads, diags, trained):
        for group in self.groups:
            due = group["count"] % group["update_each"] == 0 and any(trained[i] for i in group["params"])
            found = [i for i in group["params"] if grads[i] is not None]
            for i in found:
                self.update(i, grads[i], diags[i], due, group)
            group["count"] += bool(found)

    def update(self, i, g, d, due, group):
        p, s, (b1, b2) = self.values[i], self.state[i], group["betas"]
        s["t"] += 1
        s["m"] = b1 * s["m"] + (1 - b1) * (-g if group["maximize"] else g)
        if due:
            s["h"] += 1
            ds = self.average(d.abs() if group["averaging"] == "abs" else d, group["block_size"])
            s["v"] = b2 * s["v"] + (1 - b2) * ds**2
        if s["h"]:
            denominator = (s["v"] / (1 - b2 ** s["h"])).sqrt() ** group["hessian_power"] + 1e-4
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(group["lr"] / (1 - b1 ** s["t"]) * s["m"] / denominator)

    @staticmethod
    def average(d, block):
        block = d.shape[-1] if block == "row" else block
        return block_mean(d.reshape(-1), max(block, 1)).repeat_interleave(max(block, 1))[: d.numel()].reshape(d.shape)


class Session:
    """An optimizer, and beside it the plain one, to which the same things happen."""

    def __init__(self, engine, places=(((0, 1), 0), ((2, 3), 1), ((4,), 3))):
        values = [torch.linspace(0.6, 1.4, torch.Size(s).numel(), dtype=torch.float64).reshape(s) for s in SHAPES]
        self.params = [nn.Parameter(x.clone()) for x in values]
        self.plain = Plain(values, [(list(params), number) for params, number in places])
        groups = [{"params": [self.params[i] for i in params], **HYPER[number]} for params, number in places]
        self.opt, self.steps = AdaHessian(groups, backend=engine), 0

    # ---- what users do -----------------------------------------------------------------------------------------------

    def step(self, a, b, meanwhile=lambda: None):
        """A step with gradients for some of the parameters."""
        loss, grads, diags, trained = self.loss(a)
        if not loss.requires_grad:
            return
        self.opt.zero_grad(set_to_none=True)
        for p in self.params:  # those that are in no group
            p.grad = None
        if b % 3 == 0:
            loss.backward(create_graph=True)
        elif b % 3 == 1:
            self.opt.backward(loss)
        else:
            self.opt.backward(loss / 4, retain_graph=True)
            self.opt.backward(loss * 0.75)
        meanwhile()
        self.opt.step()
        self.plain.step(grads, diags, trained)
        self.steps += 1
        self.check()

    def move(self, a, b):
        """A parameter from the end or the middle of a group into another, by editing the lists."""
        groups = [n for n, group in enumerate(self.plain.groups) if group["params"]]
        if not groups:
            return
        source, target = groups[a % len(groups)], b % len(self.plain.groups)
        i = self.plain.groups[source]["params"].pop(a % len(self.plain.groups[source]["params"]))
        self.plain.groups[target]["params"].append(i)
        kept = self.opt.param_groups[source]["params"]
        self.opt.param_groups[source]["params"] = [p for p in kept if p is not self.params[i]]
        self.opt.param_groups[target]["params"].append(self.params[i])

    def remove(self, a, b):
        if len(self.plain.groups) > 1:
            del self.plain.groups[a % len(self.plain.groups)], self.opt.param_groups[a % len(self.opt.param_groups)]

    def add(self, a, b):
        """A new group of some of the parameters that are in none."""
        placed = {i for group in self.plain.groups for i in group["params"]}
        free = [i for i in range(len(SHAPES)) if i not in placed and (a >> i) % 2]
        if free:
            number = b % len(HYPER)
            self.plain.groups.append({"params": free, "count": 0, **DEFAULTS, **HYPER[number]})
            self.opt.add_param_group({"params": [self.params[i] for i in free], **HYPER[number]})

    def change(self, a, b):
        number = a % len(self.plain.groups)
        new = {"lr": (0.01, 0.04)[b % 2], "betas": ((0.7, 0.9), (0.9, 0.99))[b % 2], "weight_decay": 0.05 * (b % 3)}
        self.plain.groups[number].update(new)
        self.opt.param_groups[number].update(new)

    def freeze(self, a, b):
        self.params[a % len(SHAPES)].requires_grad_(bool(b % 2))

    def rebind(self, a, b):
        p = self.params[a % len(SHAPES)]
        p.data = p.data.clone() if b % 2 or p.ndim < 2 else p.data.mT.contiguous().mT

    def deepcopy(self, a, b):
        self.opt, self.params = copy.deepcopy((self.opt, self.params))

    def pickle(self, a, b):
        self.opt, self.params = pickle.loads(pickle.dumps((self.opt, self.params)))

    def resume(self, a, b):
        """A checkpoint, and an optimizer that is made with the groups as they are."""
        saved = self.opt.state_dict()
        defaults = {"backend": self.opt.backend}
        groups = [{"params": list(group["params"])} for group in self.opt.param_groups]
        self.opt = AdaHessian(groups, **defaults)
        self.opt.load_state_dict(saved)
        placed = {i for group in self.plain.groups for i in group["params"]}
        for i in set(self.plain.state) - placed:
            del self.plain.state[i]

    # ---- how it is judged --------------------------------------------------------------------------------------------

    def loss(self, a):
        """A loss of those parameters that the bits of ``a`` name, its gradients and the diagonals of its Hessian."""
        c, used = 0.5 + 0.25 * (self.steps % 3), [i for i in range(len(SHAPES)) if (a >> i) % 2]
        trained = [p.requires_grad for p in self.params]
        loss = sum(c * (self.params[i] ** 4).sum() for i in used) + torch.zeros((), dtype=torch.float64)
        x = {i: self.params[i].detach() for i in used if trained[i]}
        grads = [4 * c * x[i] ** 3 if i in x else None for i in range(len(SHAPES))]
        diags = [12 * c * x[i] ** 2 if i in x else None for i in range(len(SHAPES))]
        return loss, grads, diags, trained

    def check(self):
        for i, (p, expected) in enumerate(zip(self.params, self.plain.values, strict=True)):
            assert torch.allclose(p.detach(), expected, rtol=1e-11, atol=0), f"parameter {i} after {self.steps} steps"


ACTIONS = ("move", "remove", "add", "change", "freeze", "rebind", "deepcopy", "pickle", "resume")
NUMBERS = st.integers(0, 31)
ONE = st.tuples(st.sampled_from(ACTIONS), NUMBERS, NUMBERS)


@pytest.mark.filterwarnings("ignore:Using backward")
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(events=st.lists(st.tuples(st.lists(ONE, max_size=3), NUMBERS, NUMBERS), min_size=3, max_size=8))
def test_sequences_of_use(events):
    for engine in ("reference", "native"):
        session = Session(engine)
        for before, a, b in events:
            for name, *numbers in before:
                getattr(session, name)(*numbers)
            session.step(a | 1 << b % 5, b)


MEANWHILE = {
    "moved": lambda session: session.move(1, 0),
    "moved_to_another_block_size": lambda session: session.move(0, 2),
    "removed": lambda session: session.remove(0, 0),
    "added": lambda session: session.add(16, 0),
    "signed_beside_abs": lambda session: session.add(16, 1),
    "other_memory": lambda session: session.rebind(0, 0),
}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("way", [0, 1, 2], ids=["create_graph", "backward", "micro_batches"])
@pytest.mark.parametrize("change", MEANWHILE.values(), ids=MEANWHILE)
def test_groups_that_change_between_backward_and_step(engine, change, way):
    session = Session(engine, [((0, 1), 4), ((3, 2), 4), ((), 0)])
    session.step(15, way)
    if way == 2 and change is MEANWHILE["moved_to_another_block_size"]:
        with pytest.raises(RuntimeError, match=r"block_size or averaging of parameter .* has changed since"):
            session.step(15, way, lambda: change(session))
        return
    session.step(15, way, lambda: change(session))
    session.step(15, way)


def test_the_probe_is_the_one_that_was_drawn_when_a_parameter_gets_another_number(engine):
    """The Hessian is not diagonal here: z decides. All parameters are renumbered between backward() and step()."""
    found = []
    for meanwhile in (True, False):
        p, q = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(3))
        opt = AdaHessian([{"params": [q]}, {"params": [p]}], seed=3, backend=engine)
        opt.backward(p.sum() ** 2 + (q**3).sum())
        if meanwhile:
            del opt.param_groups[0]
        opt.step()
        found.append(opt.hessian_diag(p))
    assert torch.equal(*found)


TWICE = {
    "two_groups": lambda opt: opt.param_groups[1]["params"].append(opt.param_groups[0]["params"][0]),
    "one_group": lambda opt: opt.add_param_group({"params": [nn.Parameter(torch.ones(2))] * 2}),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("edit", TWICE.values(), ids=TWICE)
def test_a_parameter_in_two_places(edit):
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = AdaHessian([{"params": [p]}, {"params": [q]}])
    p.grad = q.grad = torch.ones(2)

    def use():
        edit(opt)
        opt.step(hessian=[torch.ones(2)] * 3)

    with pytest.raises(ValueError, match="expected it in one place"):
        use()
    assert torch.equal(p, torch.ones(2))


def test_group_dicts_that_another_optimizer_has_counted_in():
    p = nn.Parameter(torch.ones(2))
    groups = [{"params": [p]}]
    opt = AdaHessian(groups, update_each=10)
    for _ in range(3):
        opt.step(lambda: (p**2).sum())
    assert not opt.needs_hessian
    assert AdaHessian(groups).needs_hessian


def test_update_norm_is_not_told_of_groups_that_have_changed():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = AdaHessian([{"params": [p], "lr": 0.1}, {"params": [q], "lr": 0.2}])
    opt.backward((p**2).sum() + (q**2).sum())
    opt.step()
    del opt.param_groups[0]
    assert opt.statistics().update_norm is None
