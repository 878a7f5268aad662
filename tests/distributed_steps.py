"""What every step does on 2 and on 3 ranks; run by test_distributed.py, one process group for each check."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from distributed_problem import (
    SETTINGS,
    STEPS,
    N,
    alone,
    assert_close,
    backward,
    batch,
    closure,
    create_graph,
    everything,
    hooked,
    loss_of,
    make_model,
    same_bits,
    standard_closure,
    train,
    train_step,
)
from published import AdaHessian
from ranks import Ranks, worlds
from seeds import manual_seed
from tolerances import ROUNDINGS, assert_within, unit
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adahessian_fused.curvature import draw_probe
from adahessian_fused.distributed import flat_mean


def together(ranks: Ranks, step, **options):
    """A model trained on all ranks with a step of the check's, which gets model, optimizer and this rank's part."""
    model = make_model()
    opt = AdaHessian(model.parameters(), process_group=ranks.group, **SETTINGS | options)
    train(ranks, step, model, opt)
    assert same_bits(everything(model, opt), ranks.group)
    return model


def two_micro_batches(model, opt, x, y):
    opt.zero_grad()
    half = len(x) // 2
    with opt.no_sync():
        opt.backward(loss_of(model, x[:half], y[:half]) / 2)
    opt.backward(loss_of(model, x[half:], y[half:]) / 2)
    opt.step()


def backward_and_more(model, opt, x, y):
    """On off-steps, a second gradient that the optimizer does not see."""
    opt.zero_grad()
    opt.backward(loss_of(model, x, y) / 2)
    if opt.needs_hessian:
        opt.backward(loss_of(model, x, y) / 2)
    else:
        (loss_of(model, x, y) / 2).backward()
    opt.step()


def never_in_sync(model, opt, x, y):
    opt.zero_grad()
    with opt.no_sync():
        opt.backward(loss_of(model, x, y))
        opt.step()


WAYS = (
    *(backward, closure, standard_closure, create_graph, hooked),
    *(two_micro_batches, backward_and_more, never_in_sync, train_step),
)


def check_every_style_equals_the_joint_batch(ranks):
    expected = alone(STEPS)
    for way in WAYS:
        assert_close(together(ranks, way, probe_per_rank=False), expected)


def check_every_option_equals_the_joint_batch(ranks):
    for options in (
        {"averaging": "abs"},
        {"n_samples": 2},
        {"block_size": 7},
        {"block_size": "tensor", "off_step": "stale"},
        {"probe": "gaussian"},
        {"maximize": True, "update_each": 1},
        {"backend": "reference"},
        {"hvp": "forward_over_reverse"},
        {"hvp": "finite_difference"},
    ):
        found, hvp = together(ranks, closure, probe_per_rank=False, **options), options.get("hvp", "autograd")
        assert_close(found, alone(STEPS, **options), hvp=hvp)


def check_ranks_stay_bit_identical_for_100_steps(ranks):
    model = make_model(torch.float32)
    opt = AdaHessian(model.parameters(), process_group=ranks.group, lr=0.1, update_each=3)
    for step in range(100):
        x, y = batch(step, dtype=torch.float32)
        backward(model, opt, x[ranks.share(N)], y[ranks.share(N)])
    assert same_bits(everything(model, opt), ranks.group)
    assert opt.state[model[0].weight]["hessian_step"] == 34


def check_per_rank_probes_are_samples_of_their_own(ranks):
    """The mean over ranks of z_r * H z_r for different z_r, with one Hessian: the same batch everywhere."""
    for hvp, told in itertools.product(("autograd", "finite_difference"), ("module", "group, made before")):
        model, (x, y) = make_model(), batch(0)
        options = {"block_size": 1, "hvp": hvp}
        early = AdaHessian(model.parameters(), process_group=ranks.group, **options)
        ddp = DistributedDataParallel(model, process_group=ranks.group)
        opt = AdaHessian(model.parameters(), process_group=ddp, **options) if told == "module" else early
        opt.backward(lambda: loss_of(ddp, x, y))  # noqa: B023 - called at once
        _check_mean_diagonal(ranks, model, opt, x, y, ROUNDINGS * (1 if hvp == "autograd" else 2.0**23))


def _check_mean_diagonal(ranks, model, opt, x, y, roundings):
    entries = list(opt.layout.entries.values())
    own = draw_probe(entries, opt.layout.backends, probe="rademacher", seed=opt.coming_step.probe_seed, sample=0)
    probes = [None] * ranks.size
    dist.all_gather_object(probes, [own[entry].clone() for entry in entries], group=ranks.group)
    assert not all(torch.equal(a, b) for a, b in zip(probes[0], probes[1], strict=True))
    params = list(model.parameters())
    grads = torch.autograd.grad(loss_of(model, x, y), params, create_graph=True)
    products = [torch.autograd.grad(grads, params, z, retain_graph=True) for z in probes]
    opt.step()
    for i, entry in enumerate(entries):
        mean = sum(z[i] * h[i] for z, h in zip(probes, products, strict=True)) / ranks.size
        size = torch.stack([h[i].abs().max() for h in products]).max()
        assert_within(opt.hessian_diag(entry.param), mean.abs(), roundings * unit(size.dtype) * size, "diagonal")


def _uneven(ranks: Ranks, n: int) -> slice:
    """This rank's part of n examples: two on the first, the rest on the second, none on the third."""
    sizes = [2, n - 2, 0][: ranks.size]
    begin = sum(sizes[: ranks.rank])
    return slice(begin, begin + sizes[ranks.rank])


def check_uneven_batches_are_weighted(ranks):
    model, expected = make_model(), alone(STEPS, lambda step: 7)
    opt = AdaHessian(model.parameters(), process_group=ranks.group, probe_per_rank=False, **SETTINGS)
    for step in range(STEPS):
        inputs, targets = batch(step, 7)
        mine = _uneven(ranks, 7)
        x, y = inputs[mine], targets[mine]
        opt.zero_grad()
        loss = loss_of(model, x, y) if len(x) else None
        if step == 2 and len(x):
            opt.backward(lambda: loss_of(model, x, y), batch_size=len(x))  # noqa: B023
        else:
            opt.backward(loss, batch_size=len(x))
        opt.step()
    assert_close(model, expected)


def check_weights_inside_closures(ranks):
    model, expected = make_model(), alone(1, lambda step: 7)
    opt = AdaHessian(model.parameters(), process_group=ranks.group, probe_per_rank=False, **SETTINGS)
    inputs, targets = batch(0, 7)
    mine = ranks.share(7)
    opt.step(lambda: loss_of(model, inputs[mine], targets[mine]) * opt.batch_weight(len(inputs[mine])))
    assert_close(model, expected)


class Branches(nn.Module):
    """Every example goes through the first branch or the second; the third is for nobody."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.branches = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))
        self.double()

    def forward(self, x, which):
        return torch.tanh(self.branches[which](x))


def check_parameters_that_only_some_ranks_use(ranks):
    random = torch.Generator().manual_seed(5)
    for way in ("backward", "create_graph", "finite_difference"):
        x = torch.randn(STEPS, ranks.size, 5, 4, generator=random, dtype=torch.float64)
        models = [Branches(), Branches()]
        options = SETTINGS | {"probe_per_rank": False} | ({"hvp": way} if way == "finite_difference" else {})
        opts = [
            AdaHessian(models[0].parameters(), process_group=ranks.group, **options),
            AdaHessian(models[1].parameters(), process_group="alone", **options),
        ]
        for step in range(STEPS):
            # In the last step rank 0 alone uses the first branch, before that the last rank alone the second.
            branch = [int(r == ranks.size - 1) if step < STEPS - 1 else int(r > 0) for r in range(ranks.size)]
            models[1].zero_grad()
            opts[1].zero_grad()
            losses = lambda model, of: [model(x[step, r], branch[r]).square().mean() for r in of]  # noqa: B023, E731
            opts[1].backward(lambda: sum(losses(models[1], range(ranks.size))) / ranks.size)  # noqa: B023
            opts[1].step()
            opts[0].zero_grad()
            if way == "create_graph":
                (loss,) = losses(models[0], [ranks.rank])
                loss.backward(create_graph=opts[0].needs_hessian)
            else:
                opts[0].backward(lambda: losses(models[0], [ranks.rank])[0])  # noqa: B023
            opts[0].step()
            assert all(p.grad is None for p in models[0].branches[2].parameters())
        assert_close(models[0], models[1], hvp=way)
        assert same_bits(everything(models[0], opts[0]), ranks.group)


# ---- the default device ----------------------------------------------------------------------------------------------


@worlds(2)
def check_the_default_device_changes_nothing(ranks):
    def inside(step):
        def run(*args):
            with torch.device("meta"):
                step(*args)

        return run

    for step in (backward, closure, hooked, two_micro_batches):
        models = together(ranks, inside(step)), together(ranks, step)
        assert all(map(torch.equal, *(model.parameters() for model in models))), step
    x = torch.full((2,), ranks.rank + 1.0)
    with torch.device("meta"):
        means = flat_mean.FlatMean([x, x], [[x, None if ranks.rank else x]], ranks.group).wait()
    assert [float(mean[0]) for mean in means] == pytest.approx([(ranks.size + 1) / 2, 1 / ranks.size])


def check_means_of_more_than_a_buffer_holds(ranks):
    """Tensors stay whole, and one that is larger has a buffer of its own."""
    sizes = ((3, torch.float32), (2, torch.float64), (100, torch.float32), (1, torch.float32), (4, torch.float32))
    tensors = [torch.full((n,), n * (ranks.rank + 1.0), dtype=dtype) for n, dtype in (*sizes, (2, torch.float32))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_mean, "FLAT_BYTES", 20)
        assert list(flat_mean.partition(tensors)) == [[0], [2], [3, 4], [5], [1]]
        means = flat_mean.FlatMean(tensors, [tensors], ranks.group).wait()
    for x, mean in zip(tensors, means, strict=True):
        torch.testing.assert_close(mean, torch.full_like(x, len(x) * (ranks.size + 1) / 2))


# ---- seeds -----------------------------------------------------------------------------------------------------------


def check_ranks_take_the_seed_of_the_first(ranks):
    manual_seed(100 + ranks.rank)
    opt = AdaHessian(nn.Linear(2, 2).parameters(), process_group=ranks.group, seed=None)
    assert {group["seed"] for group in (opt.defaults, *opt.param_groups)} == {100}
    assert AdaHessian(nn.Linear(2, 2).parameters(), process_group=ranks.group, seed=ranks.rank).defaults["seed"] == 0
    assert (
        AdaHessian(nn.Linear(2, 2).parameters(), process_group="alone", seed=None).defaults["seed"] == 100 + ranks.rank
    )


def check_states_in_bfloat16_round_alike_on_all_ranks(ranks):
    """Probes differ from rank to rank; what rounds the states does not, or replicas would drift apart."""
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    opt = AdaHessian(model.parameters(), lr=1e-2, process_group=ranks.group, state_dtype=torch.bfloat16)
    for i in range(4):
        opt.zero_grad()
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(10 * i + ranks.rank))
        opt.backward(model(x).square().mean())
        opt.step()
    for p in model.parameters():
        copies = [torch.empty_like(p) for _ in range(ranks.size)]
        torch.distributed.all_gather(copies, p.detach(), group=ranks.group)
        assert all(torch.equal(p, copy) for copy in copies)
