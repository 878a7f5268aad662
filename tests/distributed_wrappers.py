"""DDP, FSDP2 and checkpoints on several ranks, and the page about them; run by test_distributed.py."""

from __future__ import annotations

import functools
import itertools
import pickle
import re
from collections import Counter
from pathlib import Path

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
    bytes_reduced,
    closure,
    everything,
    function,
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
from tolerances import SHARE
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from ways import WAYS

from adahessian_fused import curvature_friendly

# ---- DistributedDataParallel -----------------------------------------------------------------------------------------


def _parts(x):
    return x[: len(x) // 2], x[len(x) // 2 :]


def ddp_micro_batches(model, opt, x, y):
    (x1, x2), (y1, y2) = _parts(x), _parts(y)
    opt.zero_grad()
    with model.no_sync():
        opt.backward(loss_of(model, x1, y1) / 2)
    opt.backward(loss_of(model, x2, y2) / 2)
    opt.step()


def ddp_unwrapped(model, opt, x, y):
    backward(model.module, opt, x, y)


def ddp_unwrapped_on_off_steps(model, opt, x, y):
    opt.zero_grad()
    if opt.needs_hessian:
        opt.backward(loss_of(model, x, y))
    else:
        loss_of(model.module, x, y).backward()
    opt.step()


def ddp_first_order_as_ever(model, opt, x, y):
    opt.zero_grad()
    if opt.needs_hessian:
        opt.backward(loss_of(model.module, x, y))
    else:
        loss_of(model, x, y).backward()
    opt.step()


def check_ddp_equals_the_joint_batch(ranks):
    expected = alone(STEPS)
    around = (ddp_unwrapped, ddp_unwrapped_on_off_steps)  # without its hooks on off-steps
    ways = (backward, closure, standard_closure, hooked, ddp_micro_batches, ddp_first_order_as_ever, *around)
    for told in ("module", "group", "nothing", "nothing, made before", "group, made before"):
        for way in ways if told in ("module", "group") else ways[:5]:
            model = make_model()
            options = {"probe_per_rank": False, **SETTINGS}
            options |= {"process_group": ranks.group} if "group" in told else {}
            if "before" in told:
                opt = AdaHessian(model.parameters(), **options)
            ddp = DistributedDataParallel(model, process_group=ranks.group)
            if "before" not in told:
                opt = AdaHessian(ddp.parameters(), **options | ({"process_group": ddp} if told == "module" else {}))
            off_steps = 0
            for step in range(STEPS):
                inputs, targets = batch(step)
                x, y = inputs[ranks.share(N)], targets[ranks.share(N)]
                first_order = not opt.needs_hessian
                off_steps += first_order * bytes_reduced(lambda: way(ddp, opt, x, y))  # noqa: B023
            assert_close(model, expected)
            assert same_bits(everything(model, opt), ranks.group)
            # DDP has averaged the gradients of first-order steps, and nobody does it again.
            assert (off_steps == 0) == (way not in around), (way.__name__, told, off_steps)


def check_finite_differences_through_ddp(ranks):
    expected = alone(STEPS, hvp="finite_difference")
    options = {"hvp": "finite_difference", **SETTINGS}
    for told in ("module", "group", "nothing", "group, made before"):
        model = make_model()
        handle = {"process_group": ranks.group} if "group" in told else {}
        if "before" in told:
            opt = AdaHessian(model.parameters(), probe_per_rank=False, **options, **handle)
        ddp = DistributedDataParallel(model, process_group=ranks.group)
        handle = {"process_group": ddp} if told == "module" else handle
        if "before" not in told:
            opt = AdaHessian(ddp.parameters(), probe_per_rank=False, **options, **handle)
        train(ranks, standard_closure, ddp, opt)
        assert_close(model, expected, hvp="finite_difference")
        assert same_bits(everything(model, opt), ranks.group)


def check_several_ddp_modules_of_one_optimizer(ranks):
    """Encoder and head, each wrapped by itself: on off-steps DDP averages what went through both."""
    expected = alone(STEPS)
    model = make_model()
    ddps = [DistributedDataParallel(part, process_group=ranks.group) for part in (model[:3], model[3:])]
    both = nn.Sequential(*ddps)
    opt = AdaHessian(both.parameters(), probe_per_rank=False, **SETTINGS)
    for step in range(STEPS):
        inputs, targets = batch(step)
        x, y = inputs[ranks.share(N)], targets[ranks.share(N)]
        off_step = not opt.needs_hessian
        assert (bytes_reduced(lambda: backward(both, opt, x, y)) == 0) == off_step  # noqa: B023
    assert_close(model, expected)
    assert same_bits(everything(model, opt), ranks.group)


def check_what_another_optimizer_trains_is_averaged(ranks):
    """Steps with curvature go past DDP's hooks, and so average what it would have averaged for others."""

    def trained(model, wrapped, way, share, **options):
        opt, sgd = (
            AdaHessian(model[:3].parameters(), **SETTINGS, **options),
            torch.optim.SGD(model[3:].parameters(), 0.1),
        )
        for step in range(STEPS):
            inputs, targets = batch(step)
            sgd.zero_grad()
            way(wrapped, opt, inputs[share], targets[share])
            sgd.step()
        return model

    model = make_model()
    expected = trained(model, model, backward, slice(N), process_group="alone")
    for told in ({}, {"process_group": ranks.group}):
        for way in (backward, closure, standard_closure, hooked, train_step, ddp_micro_batches):
            model = make_model()
            ddp = DistributedDataParallel(model, process_group=ranks.group)
            trained(model, ddp, way, ranks.share(N), probe_per_rank=False, **told)
            assert_close(model, expected)
            assert same_bits(list(model.parameters()), ranks.group), way.__name__


class Experts(nn.Module):
    """The examples of the first rank go past the second part."""

    def __init__(self):
        super().__init__()
        self.trunk, self.expert = make_model(), nn.Linear(3, 3).double()

    def forward(self, x, first):
        outputs = self.trunk(x)
        return torch.cat((outputs[:first], self.expert(outputs[first:]))) if first < len(x) else outputs


def _micro_batches_and_backward(opt, loss, x, y):
    """Between steps with curvature all is PyTorch's, and DDP averages the last of two passes."""
    opt.zero_grad()
    with opt.hook_backward():
        with opt.no_sync():
            (loss(x, y) / 2).backward()
        (loss(x, y) / 2).backward()
    opt.step()


EXPERTS = {"expert alone": ["expert"], "expert first": ["expert", "trunk"], "last": ["trunk", "expert"]}
PASSES = {name: WAYS[name] for name in ("backward", "closure_standard", "backward_split", "train_step")}
PASSES |= {"micro-batches": _micro_batches_and_backward}


@worlds(2)
def check_what_one_rank_does_not_use(ranks):
    """It takes part in whatever the others do for it."""

    def trained(way, whose, wrap, share, first, **options):
        torch.manual_seed(2)
        model = Experts()
        wrapped = wrap(model)
        options = {**SETTINGS, "probe_per_rank": False, **options}
        opt, *others = (
            AdaHessian(model.get_submodule(name).parameters(), **options | {"update_each": 2 - i})
            for i, name in enumerate(EXPERTS[whose])
        )
        others += [torch.optim.SGD(model.trunk.parameters(), 0.1)] if whose == "expert alone" else []
        for step in range(STEPS):
            x, y = batch(step)
            for other in others:
                other.zero_grad()
            way(opt, lambda x, y: F.cross_entropy(wrapped(x, first), y), x[share], y[share])
            for other in others:
                other.step()
        return model

    n = N // ranks.size
    for whose in EXPERTS:
        expected = trained(WAYS["backward"], whose, lambda model: model, slice(N), n, process_group="alone")
        ddp = functools.partial(DistributedDataParallel, process_group=ranks.group, find_unused_parameters=True)
        for name, way in PASSES.items():
            for told in ({}, {"process_group": ranks.group}) if name == "backward" else ({},):
                found = trained(way, whose, ddp, ranks.share(N), 0 if ranks.rank else n, **told)
                assert_close(found, expected)
                assert same_bits(list(found.parameters()), ranks.group), (whose, name)


def _compress(ddp, group):
    ddp.register_comm_hook(group, default_hooks.fp16_compress_hook)


def _power(ddp, group):
    state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=2, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


@worlds(2)
def check_communication_hooks_of_ddp(ranks):
    """They work on steps without curvature; those with it are averaged in full precision."""
    expected = alone(STEPS)
    for hook in (_compress, _power):
        for way in (backward, closure, hooked, train_step):
            model = make_model()
            ddp = DistributedDataParallel(model, process_group=ranks.group)
            hook(ddp, ranks.group)
            opt = AdaHessian(ddp.parameters(), probe_per_rank=False, **SETTINGS)
            train(ranks, way, ddp, opt)
            for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=2**-11)  # half a unit of float16 below 1
            assert same_bits(everything(model, opt), ranks.group)


def _compiled_around(model, group):
    return torch.compile(DistributedDataParallel(model, process_group=group), backend="aot_eager")


def _compiled_inside(model, group):
    return DistributedDataParallel(torch.compile(model, backend="aot_eager"), process_group=group)


def _compiled_in_place(model, group):
    ddp = DistributedDataParallel(model, process_group=group)
    ddp.compile(backend="aot_eager")
    return ddp


@worlds(2)
def check_ddp_and_compiled_models(ranks):
    """In both orders, told or not: every pair of the three; what cannot be differentiated twice says what to write."""
    expected = alone(STEPS)
    wraps = _compiled_inside, _compiled_around, _compiled_in_place
    ways = backward, closure, hooked, standard_closure, train_step
    for (i, wrap), (j, way), told in itertools.product(enumerate(wraps), enumerate(ways), (True, False)):
        has_to_be_told = wrap is _compiled_inside and way in (backward, hooked)
        if told == (i + j) % 2 and not has_to_be_told:
            continue
        torch._dynamo.reset()
        model = make_model()
        opt = AdaHessian(model.parameters(), probe_per_rank=False, **SETTINGS)
        if told:
            curvature_friendly(model, opt)
        wrapped = wrap(model, ranks.group)
        if has_to_be_told and not told:
            inputs, targets = batch(0)
            with pytest.raises(RuntimeError, match=r"compiled.*curvature_friendly\(model, opt\)"):
                way(wrapped, opt, inputs[ranks.share(N)], targets[ranks.share(N)])
            continue
        train(ranks, way, wrapped, opt)
        assert_close(model, expected)
        assert same_bits(everything(model, opt), ranks.group)


@worlds(2)
def check_ddp_that_cannot_be_passed_by_says_so(ranks):
    x, y = batch(0)
    ddp = DistributedDataParallel(make_model(), process_group=ranks.group, static_graph=True)
    with pytest.raises(RuntimeError, match=r"static_graph=True\) learns .* expected static_graph=False"):
        AdaHessian(ddp.parameters())
    with pytest.raises(RuntimeError, match="expected static_graph=False"):
        backward(ddp, AdaHessian(ddp.parameters(), process_group=ranks.group), x, y)
    ddp = DistributedDataParallel(make_model(), process_group=ranks.group)
    opt = AdaHessian(ddp.parameters())
    with (
        pytest.raises(RuntimeError, match=r"inside join\(\) .* expected opt\.backward\(loss, batch_size=len\(x\)\)"),
        ddp.join(),
    ):
        backward(ddp, opt, x, y)


@worlds(2)
def check_another_group_than_ddps_is_an_error(ranks):
    same, alone = dist.new_group([0, 1]), [dist.new_group([i]) for i in range(2)][ranks.rank]
    ddp = DistributedDataParallel(make_model(), process_group=ranks.group)
    with pytest.raises(ValueError, match=r"process_group is of ranks \[\d\], but .* over ranks \[0, 1\]; exp"):
        AdaHessian(ddp.parameters(), process_group=alone)
    backward(ddp, AdaHessian(ddp.parameters(), process_group=same), *batch(ranks.rank))
    assert same_bits(list(ddp.parameters()), ranks.group)


@worlds(2)
def check_create_graph_through_ddp_says_what_to_write(ranks):
    x, y = batch(0)
    for told in ("module", "group", "nothing", "nothing, made before", "a part"):
        model = make_model()
        early = AdaHessian(model.parameters()) if told == "nothing, made before" else None
        ddp = DistributedDataParallel(model, process_group=ranks.group, gradient_as_bucket_view=told == "group")
        handle = {"module": {"process_group": ddp}, "group": {"process_group": ranks.group}}.get(told, {})
        opt = early or AdaHessian((model[0] if told == "a part" else ddp).parameters(), **handle)
        with pytest.raises(RuntimeError, match=r"through DistributedDataParallel, .* expected opt\.backward\(loss\)"):
            loss_of(ddp, x, y).backward(create_graph=opt.needs_hessian)


def check_ranks_that_were_found_draw_from_one_seed(ranks):
    model = make_model()
    manual_seed(100 + ranks.rank)
    opt = AdaHessian(model.parameters(), seed=None)
    assert opt.defaults["seed"] == 100 + ranks.rank
    ddp = DistributedDataParallel(model, process_group=ranks.group)
    backward(ddp, opt, *batch(0))
    assert {group["seed"] for group in (opt.defaults, *opt.param_groups)} == {100}
    copied = pickle.loads(pickle.dumps(opt))  # whose parameters are not DDP's
    assert copied.param_groups[0]["seed"] == 100


# ---- sharded parameters (FSDP2) --------------------------------------------------------------------------------------


def _sharded(ranks: Ranks, **options) -> tuple[nn.Module, AdaHessian]:
    model, mesh = make_model(), DeviceMesh.from_group(ranks.group, "cpu")
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, AdaHessian(model.parameters(), hvp="finite_difference", **SETTINGS | options)


def check_fsdp_equals_the_joint_batch(ranks):
    """Same probes too: rows of the convolution and of the matrices lie on all ranks, unevenly."""
    more = {"warmup": 4, "lr": 0.5}, {"shrink": 5.0}
    for way, options in ((closure, {}), (standard_closure, {}), (function, {}), *((closure, o) for o in more)):
        expected = alone(STEPS, hvp="finite_difference", **options)
        model, opt = _sharded(ranks, **options)
        train(ranks, way, model, opt)
        assert_close(model, expected, hvp="finite_difference")
        weight = model[3].weight
        assert opt.state[weight]["exp_avg"].placements == weight.placements
        assert opt.hessian_diag(weight).full_tensor().shape == weight.shape


def check_fsdp_has_the_statistics_of_the_whole(ranks):
    whole = make_model()
    plain = AdaHessian(whole.parameters(), process_group="alone", hvp="finite_difference", **SETTINGS)
    model, opt = _sharded(ranks)
    x, y = batch(0)
    for each in (plain, opt):
        each.step(lambda each=each: loss_of(model if each is opt else whole, x, y))
    found, expected = opt.statistics().as_dict(), plain.statistics().as_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6 * SHARE), name


def check_shards_are_probed_with_one_seed(ranks):
    model, _ = _sharded(ranks)
    manual_seed(100 + ranks.rank)
    assert AdaHessian(model.parameters(), hvp="finite_difference", seed=None).param_groups[0]["seed"] == 100


class Collectives(TorchDispatchMode):
    """Counts them inside it."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += func.namespace in ("c10d", "_c10d_functional")
        self.counts += Counter()  # without zeros
        return func(*args, **(kwargs or {}))


def check_fsdp_communicates_once_for_each_pass(ranks):
    """A finite difference is two passes, and the curvature of a shard is nobody else's business."""
    model, opt = _sharded(ranks)
    x, y = batch(0)
    counts = []
    for _ in range(2):
        with Collectives() as mode:
            closure(model, opt, x, y)
        counts.append(mode.counts)
    with_curvature, without = counts
    assert len(without) == 2  # kinds: gathering and scattering
    assert with_curvature == {op: 2 * n for op, n in without.items()}


@worlds(2)
def check_what_sharded_parameters_do_not_allow(ranks):
    x, y = batch(0)
    model, opt = _sharded(ranks, block_size="tensor")
    with pytest.raises(ValueError, match=r"a cut after every . rows, .* goes through averaging blocks of 27"):
        closure(model, opt, x, y)
    model, opt = _sharded(ranks, block_size="row")  # the row of a vector is all of it
    with pytest.raises(ValueError, match=r'goes through .* expected block_size="auto" or 1 for it, in a group'):
        closure(model, opt, x, y)
    for hvp in ("autograd", "forward_over_reverse"):
        exact = AdaHessian(model.parameters(), hvp=hvp)
        with pytest.raises(RuntimeError, match=rf'hvp="{hvp}" with sharded parameters .* expected hvp="finite_diff'):
            closure(model, exact, x, y)
    for options, message in (
        ({"process_group": ranks.group}, "process_group is given for sharded parameters"),
        ({"probe": "gaussian"}, 'probe="gaussian" with sharded'),
        ({"off_step": "stale", "update_each": 2}, 'off_step="stale" with sharded'),
    ):
        with pytest.raises(ValueError, match=message):
            AdaHessian(model.parameters(), **options)


@worlds(2, 3, 1)
def check_checkpoint_of_two_ranks_resumes_on_one_and_three(ranks):
    """Saved in the world of 2, which runs first; the world of 1 is an ordinary model."""
    if ranks.size == 1:
        model = make_model()
        opt = AdaHessian(model.parameters(), hvp="finite_difference", shrink=5.0, **SETTINGS)
    else:
        model, opt = _sharded(ranks, shrink=5.0)

    def state():
        return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, opt)}

    if ranks.size == 2:
        train(ranks, closure, model, opt, range(3))
        checkpoint.save(state(), checkpoint_id=ranks.folder / "saved", process_group=ranks.group)
    else:
        loaded = state()
        assert opt.param_groups[0]["step"] == 0
        checkpoint.load(loaded, checkpoint_id=ranks.folder / "saved", process_group=ranks.group)
        model.load_state_dict(loaded["model"])
        set_optimizer_state_dict(model, opt, loaded["optimizer"])
        assert opt.param_groups[0]["step"] == 3
        assert opt.state[model[0].weight]["hessian_step"] == 2
    train(ranks, closure, model, opt, range(3, 6))  # an off-step first
    assert_close(model, alone(6, hvp="finite_difference", shrink=5.0), 6, hvp="finite_difference")


# ---- documentation ---------------------------------------------------------------------------------------------------


@worlds(2)
def check_the_recipes_of_the_documentation_run(ranks):
    """The blocks of docs/distributed.md in their order; the ranks agree after each."""
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    parts = [batch(i, dtype=torch.float32) for i in range(3)]
    names = {"torch": torch, "dist": dist, "loss_fn": F.cross_entropy, "folder": ranks.folder / str(ranks.size)}
    names |= {
        "make_model": lambda: make_model(torch.float32, hidden=6),
        "mesh": DeviceMesh.from_group(ranks.group, "cpu"),
    }
    names |= {"batches": [(x[ranks.share(N)], y[ranks.share(N)]) for x, y in parts]}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(block, names)
        assert names["opt"].state
        if not any(isinstance(p, DTensor) for p in names["model"].parameters()):
            assert same_bits(everything(names["model"], names["opt"]), ranks.group)
    assert names["opt"].param_groups[0]["step"] == 3  # loaded
