"""Tensor and sequence parallelism: parameters that are DTensors and in the graph; run by test_distributed.py."""

from __future__ import annotations

import pytest
import torch
from distributed_problem import (
    SETTINGS,
    STEPS,
    backward,
    batch,
    closure,
    create_graph,
    hooked,
    standard_closure,
    values,
)
from published import AdaHessian
from ranks import Ranks, worlds
from tolerances import assert_trajectory, growth, nudge
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)


def make_model() -> nn.Module:
    """36 inputs, six hidden units on two or three ranks, a norm between."""
    torch.manual_seed(1)
    layers = (
        nn.Linear(36, 6),
        nn.Tanh(),
        nn.Linear(6, 12),
        nn.LayerNorm(12),
        nn.Linear(12, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )
    return nn.Sequential(nn.Flatten(), *layers).double()


TENSOR = {"1": ColwiseParallel(), "3": RowwiseParallel(), "5": ColwiseParallel(), "7": RowwiseParallel()}
SEQUENCE = {
    "1": ColwiseParallel(),
    "3": RowwiseParallel(output_layouts=Shard(0)),
    "4": SequenceParallel(sequence_dim=0),
    "5": ColwiseParallel(input_layouts=Shard(0)),
    "7": RowwiseParallel(),
}
PLANS = {"tensor": TENSOR, "sequence": SEQUENCE}


def parallel(ranks: Ranks, plan: str, **options) -> tuple[nn.Module, AdaHessian]:
    model = parallelize_module(make_model(), DeviceMesh.from_group(ranks.group, "cpu"), PLANS[plan])
    return model, AdaHessian(model.parameters(), **SETTINGS | options)


def trained(model: nn.Module, opt: AdaHessian, way) -> nn.Module:
    for step in range(STEPS):
        way(model, opt, *batch(step))
    return model


def alone(model: nn.Module, **options) -> nn.Module:
    return trained(model, AdaHessian(model.parameters(), process_group="alone", **SETTINGS | options), closure)


def check_tensor_parallelism_equals_one_process(ranks):
    """The same probes too, wherever a parameter is cut."""
    cases = [("tensor", way, {}) for way in (backward, closure, standard_closure, hooked, create_graph)]
    cases += [("sequence", backward, {}), ("tensor", backward, {"n_samples": 2, "block_size": 1})]
    cases += [("tensor", closure, {"hvp": "finite_difference"}), ("tensor", backward, {"warmup": 4, "lr": 0.5})]
    for plan, way, options in cases:
        expected = alone(make_model(), **options)
        grows = growth(list(alone(nudge(make_model()), **options).parameters()), list(expected.parameters()))
        model, opt = parallel(ranks, plan, **options)
        assert any(isinstance(p, DTensor) for p in model.parameters())
        trained(model, opt, way)
        roundings = {"roundings": 2.0**23} if options.get("hvp") == "finite_difference" else {}
        found, wanted = (values(list(m.parameters())) for m in (model, expected))
        assert_trajectory(found, wanted, STEPS, grows, **roundings)


@worlds(2)
def check_what_tensor_parallelism_does_not_allow(ranks):
    x, y = batch(0)
    model, opt = parallel(ranks, "tensor", hvp="forward_over_reverse")
    with pytest.raises(RuntimeError, match=r'or with tensor parallelism hvp="autograd"'):
        closure(model, opt, x, y)
    opt = AdaHessian(model[3].parameters(), block_size="row")
    with pytest.raises(ValueError, match=r"a cut after every . of axis 1, .* goes through averaging blocks of"):
        backward(model, opt, x, y)
