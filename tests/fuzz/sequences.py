"""Sequences of what users do, with an optimizer and beside it with Algorithm 1.

The losses are sums over elements, so the Hessian is diagonal and D = z * Hz = z^2 * H is the diagonal, whatever z is.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import warnings
from collections import defaultdict

import pytest
import torch
import ways
from published import AdaHessian
from tolerances import assert_trajectory
from torch import nn

from . import oracle

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

    def due(self, trained):
        return [g["count"] % g["update_each"] == 0 and any(trained[i] for i in g["params"]) for g in self.groups]

    def step(self, grads, diags, trained, given=False):
        for group, due in zip(self.groups, self.due(trained), strict=True):
            due = due or given
            found = [i for i in group["params"] if grads[i] is not None]
            for i in found:
                self.update(i, grads[i], diags[i], due, group)
            group["count"] += bool(found)

    def update(self, i, g, d, due, group):
        s, options = self.state[i], {name: group[name] for name in ("lr", "betas", "weight_decay", "hessian_power")}
        s["t"], s["h"] = s["t"] + 1, s["h"] + due
        d = self.average(d.abs() if group["averaging"] == "abs" else d, group["block_size"]) if due else None
        s["m"], s["v"] = oracle.averages(s["m"], s["v"], -g if group["maximize"] else g, d, group["betas"])
        self.values[i].copy_(oracle.moved(self.values[i], s["m"], s["v"], s["t"], s["h"], **options))

    @staticmethod
    def average(d, block):
        return oracle.block_means(d, d.shape[-1] if block == "row" else block)


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
        self.drop_gradients()
        given = WAYS[b % len(WAYS)](self, a, loss, diags, meanwhile)
        if given is not None:
            self.plain.step(grads, diags, trained, given=given == "diagonal")
            self.steps += 1
        self.check()

    def drop_gradients(self):
        self.opt.zero_grad(set_to_none=True)
        for p in self.params:  # those that are in no group
            p.grad = None

    def due(self):
        """Whether the coming step uses curvature, in any group."""
        return any(self.plain.due([p.requires_grad for p in self.params]))

    def abandon(self, a, b):
        """A batch whose gradients are thrown away in one of the ways there are; what was gathered goes with them."""
        loss, *_ = self.loss(a)
        if not loss.requires_grad:
            return
        self.drop_gradients()
        (self.opt.backward if b % 2 else torch.autograd.backward)(loss)
        if b % 3 == 0:
            self.opt.zero_grad()
        elif b % 3 == 1:
            self.opt.zero_grad(set_to_none=False)
        else:
            for p in self.params:
                p.grad = None

    def fail(self, a, b):
        """A closure that raises after it has differentiated, or before."""
        loss, *_ = self.loss(a)

        def closure():
            self.opt.zero_grad()
            if b % 2 and loss.requires_grad:
                loss.backward()
            raise ArithmeticError

        with contextlib.suppress(ArithmeticError):
            self.opt.step(closure)
        self.check()

    def overflow(self, a, b):
        """A step that GradScaler skips: nothing changes, nothing is counted."""
        loss, *_ = self.loss(a)
        if not loss.requires_grad:
            return
        self.drop_gradients()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.opt.backward(scaler.scale(loss * (float("inf") if b % 2 else 1)))
        seen = [self.params[i] for group in self.plain.groups for i in group["params"]]
        grads = [p.grad for p in seen if p.grad is not None and p.numel()]
        if not grads:
            return
        for g in grads:
            g.fill_(float("nan"))
        scaler.step(self.opt)
        scaler.update()
        self.check()

    def mixed(self, a, b):
        """A plain backward pass on top of ours: refused where it would lack curvature."""
        loss, grads, diags, trained = self.loss(a)
        placed = {i for group in self.plain.groups for i in group["params"]}
        if not any(grads[i] is not None for i in placed):
            return
        self.drop_gradients()
        self.opt.backward(loss / 4, retain_graph=True)
        (loss * 0.75).backward()
        if self.due():
            with pytest.raises(RuntimeError, match="without their curvature"):
                self.opt.step()
        else:
            self.opt.step()
            self.plain.step(grads, diags, trained)
            self.steps += 1
        self.check()

    def unscaled(self, a, b):
        """A batch for which nothing has a gradient."""
        self.drop_gradients()
        self.opt.step()
        self.check()

    def write(self, a, b):
        """A parameter is written to from outside."""
        i = a % len(SHAPES)
        with torch.no_grad():
            self.params[i].mul_(0.9)
        self.plain.values[i].mul_(0.9)

    def strange(self, a, b):
        """Another optimizer trains something else meanwhile, and a loss of these parameters is differentiated."""
        other = AdaHessian([nn.Parameter(torch.ones(2))])
        other.step(lambda: (other.param_groups[0]["params"][0] ** 2).sum())
        if self.params[0].requires_grad:
            torch.autograd.grad((self.params[0] ** 3).sum(), self.params[0], create_graph=True)

    def reload(self, a, b):
        """The optimizer's own state dict, into itself."""
        self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
        placed = {i for group in self.plain.groups for i in group["params"]}
        for i in set(self.plain.state) - placed:
            del self.plain.state[i]

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
        """No parameter minds another, and one moves by at most lr: a step multiplies an error by 1 + 3 lr, or less."""
        assert_trajectory(self.params, self.plain.values, max(self.steps, 1), grows=1.2**self.steps)


# ---- ways of stepping: each returns None if there was no step --------------------------------------------------------


def _trains_here(session, a):
    placed = {i for group in session.plain.groups for i in group["params"]}
    return any((a >> i) % 2 and session.params[i].requires_grad for i in placed)


def _usual(name):
    """A way of tests/ways.py; those with a closure or a scaler only where there is something to train."""

    def way(session, a, loss, diags, meanwhile):
        if name.startswith(("closure", "scaled")) and not _trains_here(session, a):
            return None
        ways.EVERY[name](session.opt, lambda: session.loss(a)[0], then=meanwhile)
        return "step"

    way.__name__ = name
    return way


def _diagonal(session, a, loss, diags, meanwhile):
    loss.backward()
    order = [i for group in session.plain.groups for i in group["params"]]
    if not any(session.params[i].grad is not None for i in order):
        return None
    session.opt.step(hessian=[diags[i] for i in order])
    return "diagonal"


USUAL = (
    *("create_graph", "backward", "micro_batches", "function", "closure_returns_loss", "closure_standard"),
    *("hook_backward", "scaled", "closure_zeroes_in_place"),
)
WAYS = (*map(_usual, USUAL), _diagonal)
ACTIONS = (
    "move", "remove", "add", "change", "freeze", "rebind", "deepcopy", "pickle", "resume", "abandon", "fail",
    "overflow", "mixed", "unscaled", "write", "strange", "reload",
)  # fmt: skip


def run(engine, events):
    """What goes wrong in a sequence of things done; None if nothing does."""
    session = Session(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name, a, b in events:
                getattr(session, name)(a, b)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def shrunk(engine, events):
    """As few of the events as go wrong."""
    for i in reversed(range(len(events))):
        fewer = events[:i] + events[i + 1 :]
        if run(engine, fewer) is not None:
            events = fewer
    return events


def case(seed: int) -> str:
    """Up to ten steps with up to three things done before each."""
    r, events = random.Random(seed), []
    engine = r.choice(["reference", "native"])
    for _ in range(r.randint(3, 10)):
        for name in (*r.choices(ACTIONS, k=r.randint(0, 3)), "step"):
            a, b = r.getrandbits(5), r.getrandbits(16)
            events.append((name, a | (name == "step") << b % 5, b))
    if run(engine, events) is not None:
        events = shrunk(engine, events)
        steps = [(name, a, WAYS[b % len(WAYS)].__name__ if name == "step" else b) for name, a, b in events]
        raise AssertionError(f"{run(engine, events)} on {engine} after {steps}")
    return "right"
