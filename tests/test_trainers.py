"""Trainers that people use: each of them trains as a plain loop does, and its example and documentation run."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from pathlib import Path
from unittest import mock

import originals
import pytest
import ranks
import torch
import trainers
from models import assert_same, loss_of, weights
from published import AdaHessian
from timm_without_torchvision import timm  # noqa: F401
from tolerances import assert_trajectory, assert_within, unit
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from trainers import BATCH, STEPS, Net, Recipe, examples, plain

from adahessian_fused import compat, curvature_friendly

ROOT = Path(__file__).resolve().parents[1]
TRAINERS = {name: getattr(trainers, name) for name in ("lightning", "accelerate", "transformers")}
every_trainer = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)

EVERY_SECOND = {"lr": 0.05, "update_each": 2}
RECIPES = {
    "plain": Recipe(),
    "micro_batches, clipped, bfloat16": Recipe(accumulate=2, clip=0.05, bf16=True, epochs=2, options=EVERY_SECOND),
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch, tmp_path):
    """Trainers leave files in the working folder, settings in the environment, and Accelerate its state in a class."""
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def hessian_steps(opt: AdaHessian) -> set[int]:
    return {int(opt.state[p]["hessian_step"]) for group in opt.param_groups for p in group["params"]}


def assert_same_run(found: trainers.Run, expected: trainers.Run) -> None:
    assert_same(found.weights, expected.weights)
    assert found.lr == expected.lr
    assert hessian_steps(found.opt) == hessian_steps(expected.opt)


def test_recipes_matter():
    """What the trainers are compared with: it learns, takes curvature, and every recipe makes a difference."""
    runs = {name: plain(recipe) for name, recipe in RECIPES.items()}
    for name in set(runs) - {"plain"}:
        assert all((a != b).any() for a, b in zip(runs[name].weights, runs["plain"].weights, strict=True)), name
    assert all(hessian_steps(run.opt) == {STEPS} for run in runs.values())
    model, [everything] = Net(), DataLoader(examples(Recipe()), STEPS * BATCH)
    before = model(**everything)["loss"].item()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(runs["plain"].weights), model.parameters())
    assert model(**everything)["loss"].item() < before


@every_trainer
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_same_run_as_a_plain_loop(train, recipe):
    assert_same_run(train(recipe), plain(recipe))


@every_trainer
def test_resumed_from_a_checkpoint(train, tmp_path):
    """After an epoch, in the middle of a period of two steps."""
    recipe = Recipe(epochs=2, options=EVERY_SECOND)
    assert_same_run(train(recipe, tmp_path), plain(recipe))


# ---- Lightning -------------------------------------------------------------------------------------------------------


def test_lightning_needs_no_hook_without_micro_batches():
    recipe = Recipe(clip=0.05, options=EVERY_SECOND)
    assert_same_run(trainers.lightning(recipe, hook=False), plain(recipe))


def test_lightning_with_micro_batches_asks_for_the_hook():
    with pytest.raises(RuntimeError, match=r"call opt\.hook_backward\(\) once before training"):
        trainers.lightning(Recipe(accumulate=2), hook=False)


def test_lightning_with_finite_differences():
    recipe = Recipe(options={"lr": 0.05, "hvp": "finite_difference"})
    assert_same_run(trainers.lightning(recipe, hook=False), plain(recipe))


def test_lightning_with_manual_optimization():
    assert_same_run(trainers.lightning(Recipe(), manual=True), plain(Recipe()))


# ---- timm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(timm, monkeypatch):  # noqa: F811
    """Its registry of optimizers, as it is afterwards."""
    from timm.optim._optim_factory import default_registry

    monkeypatch.setattr(default_registry, "_optimizers", dict(default_registry._optimizers))
    return timm.optim


def test_timms_factory_makes_ours_once_registered(registry):
    compat.timm.register()
    options = {"lr": 0.3, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "update_each": 2}
    model = Net()
    opt = registry.create_optimizer_v2(model, opt="fusedadahessian", **options)
    assert type(opt) is compat.timm.Adahessian
    assert "fusedadahessian" in registry.list_optimizers()
    assert registry.get_optimizer_info("fusedadahessian").second_order
    found = {group["weight_decay"]: [p.dim() for p in group["params"]] for group in opt.param_groups}
    assert found == {0.0: [1, 1], 0.1: [2, 2]}  # timm does not decay biases
    for group in opt.param_groups:
        assert {name: group[name] for name in options if name != "weight_decay"} == {
            name: value for name, value in options.items() if name != "weight_decay"
        }


def test_timms_own_can_be_replaced(registry):
    compat.timm.register("adahessian")
    assert type(registry.create_optimizer_v2(Net(), opt="adahessian", lr=0.1)) is compat.timm.Adahessian


def test_the_rule_that_the_drop_in_is_tested_against_is_timms(registry):
    """Same arguments, same steps; timm draws its probes from a generator of its own."""
    theirs, stand_in = registry.Adahessian, originals.Timm
    assert str(inspect.signature(theirs.__init__)) == str(inspect.signature(stand_in.__init__))
    options = {"update_each": 2, "n_samples": 2, "avg_conv_kernel": True, "eps": 1e-3, "weight_decay": 0.1}
    a, b = (originals.conv_net().float() for _ in range(2))
    opt_a, opt_b = theirs(a.parameters(), **options), stand_in(b.parameters(), **options)
    generator = torch.Generator()
    generator.set_state(opt_a.generator.get_state())
    opt_b.z = lambda p, sample: torch.randint(0, 2, p.shape, generator=generator) * 2.0 - 1.0
    for i in range(4):
        for opt, model in ((opt_a, a), (opt_b, b)):
            opt.zero_grad()
            loss_of(model, i).backward(create_graph=True)
            opt.step()
    assert {key for state in opt_a.state.values() for key in state} == originals.STATE_KEYS["timm"]
    assert_trajectory(weights(a), weights(b), steps=4)


# ---- averages of the weights -----------------------------------------------------------------------------------------


def test_averages_of_the_weights():
    """They are averages of what the optimizer leaves, and leave the optimizer alone."""
    model = Net()
    opt = AdaHessian(model.parameters(), **EVERY_SECOND)
    schedule = trainers.schedule(opt)
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    seen = []
    for batch in DataLoader(examples(Recipe()), BATCH):
        opt.zero_grad()
        opt.backward(model(**batch)["loss"])
        opt.step()
        schedule.step()
        for average in (swa, ema):
            average.update_parameters(model)
        seen.append(weights(model))
    a, b, c = (nn.utils.parameters_to_vector(step) for step in seen)
    bound = 8 * unit(a.dtype) * torch.stack([a, b, c]).abs().amax(0)  # quotients and sums of three
    assert_within(nn.utils.parameters_to_vector(swa.parameters()), (a + b + c) / 3, bound, "mean")
    assert_within(nn.utils.parameters_to_vector(ema.parameters()), a / 4 + b / 4 + c / 2, bound, "mean")
    assert_same(weights(model), plain(Recipe(options=EVERY_SECOND)).weights)


# ---- examples and documentation --------------------------------------------------------------------------------------

NEEDS = {"averaging": (), "with_lightning": ("lightning",), "with_accelerate": ("accelerate",)}
NEEDS |= {"with_transformers": ("accelerate", "transformers"), "with_timm": ("timm",)}


def need(packages, request):
    for package in packages:
        if package == "timm":
            request.getfixturevalue("registry")
        else:
            pytest.importorskip(package, reason=f"needs {package}")


def test_every_example_is_run_here():
    folder = ROOT / "examples" / "trainers"
    assert {path.stem for path in folder.glob("*.py")} == {*NEEDS, "digits"}


@pytest.mark.parametrize("name", NEEDS)
def test_example_learns(name, request, monkeypatch):
    need(("sklearn", *NEEDS[name]), request)
    monkeypatch.syspath_prepend(ROOT / "examples" / "trainers")
    opt, *accuracies = importlib.import_module(name).main()
    assert min(accuracies) > 0.6
    steps = {int(opt.state[p]["step"]) for group in opt.param_groups for p in group["params"]}
    assert len(steps) == 1
    every = opt.param_groups[0]["update_each"]
    stale = opt.param_groups[0]["off_step"] == "stale"
    dense = opt.param_groups[0]["warmup"]
    assert hessian_steps(opt) == {n if stale else sum(i < dense or i % every == 0 for i in range(n)) for n in steps}


PAGE = (ROOT / "docs" / "trainers.md").read_text()
SECTIONS = {section.split("\n", 1)[0]: section for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)}
BLOCKS = {
    "# In a trainer": (),
    "Lightning": ("lightning",),
    "Accelerate": ("accelerate",),
    "Hugging Face Trainer": ("accelerate", "transformers"),
    "timm": ("timm",),
    "torch.optim: schedules, SWA, EMA": (),
}


@pytest.mark.parametrize("title", SECTIONS)
def test_documentation(title, request):
    found = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], re.DOTALL | re.MULTILINE)
    assert len(found) == (title in BLOCKS)
    for code in found:
        need(BLOCKS[title], request)
        rows = examples(Recipe())
        classifier = Net()
        names = {"torch": torch, "AdaHessian": AdaHessian, "curvature_friendly": curvature_friendly, "rows": rows}
        names |= {"classifier": classifier, "model": classifier.layers, "loss_fn": nn.functional.cross_entropy}
        pairs = [(row["pixels"], row["labels"]) for row in rows]
        names["loader"] = DataLoader(pairs, BATCH // 2)
        before = weights(classifier)
        exec(compile(code, "<a block of docs/trainers.md>", "exec"), names)
        moved = [(a != b).any() for a, b in zip(weights(classifier), before, strict=True)]
        assert all(moved) == any(moved) == ("loss.backward" in code or "loss_fn" in code or "train()" in code)


def test_lightnings_wrapper_differentiates_for_its_optimizer():
    """It has AdaHessian's methods, on attributes of its own."""
    wrapped = pytest.importorskip("lightning.pytorch.core.optimizer").LightningOptimizer
    model = torch.nn.Linear(3, 2)
    opt = AdaHessian(model.parameters())
    wrapper = wrapped(opt)
    wrapper.backward(model(torch.ones(4, 3)).square().mean())
    opt.step()
    assert int(opt.state[model.weight]["hessian_step"]) == 1
    with wrapper.hook_backward():
        model(torch.ones(4, 3)).square().mean().backward()
    opt.step()
    assert int(opt.state[model.weight]["hessian_step"]) == 2


# ---- two ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_two_ranks():
    for package in ("accelerate", "lightning"):
        pytest.importorskip(package, reason=f"needs {package}")
    return ranks.run([Path(__file__).with_name("distributed_trainers.py")], [2])


@pytest.mark.parametrize("trainer", ["accelerate", "lightning"])
def test_two_ranks_learn_what_one_process_does(on_two_ranks, trainer):
    assert not any(on_two_ranks["2"][f"check_{trainer}"])
