"""Constructors of the drop-ins: the originals' signatures and defaults, seeds, refusals, timm's registry."""

from __future__ import annotations

import inspect
import re
import sys

import pytest
import torch
from models import mlp
from originals import STATE_KEYS, Origin
from seeds import manual_seed
from torch import nn

from adahessian_fused import compat


@pytest.mark.parametrize("module", STATE_KEYS)
def test_signature_and_defaults_of_the_original(module):
    """Ours has keyword-only arguments besides."""
    found = inspect.signature(Origin(module).drop_in).parameters.values()
    extra = {"backend", "faithful"}
    found = [(p.name, p.default, p.kind) for p in found if p.name not in extra]
    expected = inspect.signature(Origin(module).original).parameters.values()
    assert found == [(p.name, p.default, p.kind) for p in expected]


def test_seeds():
    """From PyTorch's generator, which is left alone; davda54's and timm's originals have one of their own."""
    seed_of = lambda cls, **options: cls([nn.Parameter(torch.ones(1))], **options).param_groups[0]["seed"]  # noqa: E731
    make = compat.torch_optimizer.Adahessian
    manual_seed(11)
    before = torch.get_rng_state()
    assert (seed_of(make), seed_of(make, seed=5), seed_of(compat.timm.Adahessian)) == (11, 5, 2147483647)
    assert torch.equal(torch.get_rng_state(), before)
    seed_of(make, seed=5, faithful=True)
    assert torch.initial_seed() == 5
    manual_seed(2**64 - 1)
    assert seed_of(make) == 2**63 - 1


REFUSED = {
    "single_gpu": ("official", {"single_gpu": False}, ValueError, "single_gpu=False; expected True"),
    "adam_debias": ("pytorch_optimizer", {"adam_debias": True}, ValueError, "adam_debias=True; expected False"),
    "unknown": ("pytorch_optimizer", {"block_size": 3}, TypeError, "block_size=3; expected those of pytorch_opt"),
    "distribution": (
        "pytorch_optimizer",
        {"hessian_distribution": "uniform"},
        ValueError,
        "hessian_distribution='uniform'; expected \"rademacher\" or",
    ),
    "period": ("pytorch_optimizer", {"update_period": 0}, ValueError, "update_period=0; expected an int >= 1"),
    "samples": ("pytorch_optimizer", {"num_samples": 0}, ValueError, "num_samples=0; expected an int >= 1"),
    "update_each": ("timm", {"update_each": 0}, ValueError, "update_each=0; expected an int >= 1"),
    "seed": ("official", {"seed": 1}, TypeError, "seed"),
    "lr": ("davda54", {"lr": -1.0}, ValueError, "lr=-1.0; expected 0.0 <= lr"),
}


@pytest.mark.parametrize(("module", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_options_that_cannot_be_had(module, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Origin(module).drop_in(mlp().parameters(), **options)


def test_a_group_with_an_option_that_cannot_be_had_is_refused():
    opt = compat.pytorch_optimizer.AdaHessian(mlp().parameters())
    with pytest.raises(ValueError, match="adam_debias=True; expected False"):
        opt.add_param_group({"params": mlp().parameters(), "adam_debias": True})
    assert len(opt.param_groups) == 1


def test_without_timm_registering_says_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="name='fused_adahessian'; expected no underscore"):
        compat.timm.register("fused_adahessian")
    for name in ("timm", "timm.optim"):  # another test may have imported it
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape("expected timm >= 1.0.12")):
        compat.timm.register()
