"""The bounds that are measured and not counted hold for other data too, and what does not keep them is seen."""

from __future__ import annotations

import pytest
import strategies
import tolerances
import torch
from models import conv_net, fresh, mlp, train
from tolerances import GROWS, NUDGE, assert_error, assert_share, assert_trajectory, assert_within, growth, nudge

OPTIONS = {"default": {}, "every_third": {"update_each": 3}, "two_samples": {"n_samples": 2}, "large_lr": {"lr": 0.15}}
SEEDS = range(6)


def with_seed(make, seed: int):
    """The model with the same distribution of weights, drawn from another seed."""
    model = make()
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model.double()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("make", [mlp, conv_net], ids=["mlp", "conv_net"])
def test_errors_grow_by_less_than_assumed(make, options):
    for seed in SEEDS:
        (a, opt_a), (b, opt_b) = (fresh(with_seed(make, seed), **{"lr": 0.01, "eps": 1e-2} | options) for _ in range(2))
        found = growth(train(opt_a, nudge(a), 10), train(opt_b, b, 10))
        assert_share(found / GROWS, f"growth of {found:.0f} with seed {seed}")


@pytest.mark.parametrize("name", ["mlp", "batch_norm", "lstm", "group_norm_silu_mish", "tied_attention"])
def test_errors_of_hz_grow_by_less_than_assumed(name):
    """A product's roundings are those of its operators, and a nudge of the weights is one rounding of each operand."""
    for seed in SEEDS:
        make, loss = strategies.CASES[name]
        torch.manual_seed(seed)
        model = make().double()
        expected = strategies.exact(model, loss)
        for found, wanted in zip(strategies.exact(nudge(model), loss), expected, strict=True):
            assert_error(found, wanted, strategies.BOUND["autograd"] / strategies.U * NUDGE / tolerances.UNITS)


@pytest.fixture
def unseen(monkeypatch):
    """What is wrong on purpose is not in the summary."""
    monkeypatch.setattr(tolerances, "largest", [])


def test_a_share_of_the_bound_is_asked_for(monkeypatch, unseen):
    a = torch.ones(3)
    monkeypatch.setattr(tolerances, "SHARE", 1.0)
    assert_within(a, a + 0.75, 1.0, "ones")
    monkeypatch.setattr(tolerances, "SHARE", 0.5)
    with pytest.raises(
        AssertionError, match=r"ones\[0\] of 3: found 1, expected 1.75 \(0.75 times the bound; 3 elements"
    ):
        assert_within(a, a + 0.75, 1.0, "ones")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1.0])
def test_wrong_numbers_are_seen(wrong, unseen):
    a = torch.ones(3, dtype=torch.float64)
    b = a.clone()
    b[1] += 1e-4 * wrong
    with pytest.raises(AssertionError, match=r"tensor 0\[1\] of 3"):
        assert_trajectory([b], [a], 10)
    with pytest.raises(AssertionError, match="is off by"):
        assert_error([b], [a], 1e-8)
