"""What users do to parameter groups while they train, against an optimizer that looks at everything anew."""

from __future__ import annotations

import pytest
import torch
from fuzz.sequences import Session
from published import AdaHessian
from torch import nn

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


ADDED = {
    "a model": (lambda head: head, ["weight", "bias"]),
    "parameters": (lambda head: head.parameters(), ["parameter 0 of group 1", "parameter 1 of group 1"]),
    "a parameter": (lambda head: head.weight, ["parameter 0 of group 1"]),
    "named": (lambda head: head.named_parameters(), ["weight", "bias"]),
    "nothing": (lambda head: [], []),
}


@pytest.mark.parametrize(("given", "names"), ADDED.values(), ids=ADDED)
def test_any_group_may_follow_a_model(given, names):
    """PyTorch wants names for the parameters of all groups or none, and a model's have theirs."""
    body, head = nn.Linear(3, 4), nn.Linear(4, 2)
    opt = AdaHessian(body)
    opt.add_param_group({"params": given(head), "lr": 0.01})
    assert [group["param_names"] for group in opt.param_groups] == [["weight", "bias"], names]
    before = [p.detach().clone() for p in head.parameters()]
    opt.step(lambda: head(body(torch.ones(5, 3)).tanh()).square().mean())
    assert [bool((a != b).any()) for a, b in zip(before, head.parameters(), strict=True)] == [
        len(names) > 0,
        len(names) > 1,
    ]
    again = AdaHessian(opt.param_groups)
    assert [group["param_names"] for group in again.param_groups] == [["weight", "bias"], names]


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
