"""Every option with every way of stepping: it does what it does elsewhere, or raises. docs/options.md is this table."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import ways
from models import assert_same, batch, fresh, mlp, weights
from tolerances import assert_trajectory, growth, nudge

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
STEPS = 4

# ---- the ways --------------------------------------------------------------------------------------------------------


def squares(model, x, y):
    return (model(x) - y).square().mean()


WAYS = {
    "create_graph": ways.WAYS["needs_hessian"],
    "backward_loss": ways.WAYS["backward"],
    "backward_function": ways.WAYS["function"],
    "backward_split": ways.WAYS["backward_split"],
    "closure": ways.WAYS["closure_returns_loss"],
    "closure_with_backward": ways.WAYS["closure_standard"],
    "hook_backward": ways.WAYS["hook_backward"],
    "given_diagonal": ways.by_hand,
    "train_step": ways.WAYS["train_step"],
}
NAMES = (
    *("`loss.backward(create_graph=True)`", "`opt.backward(loss)`", "`opt.backward(function)`", "`opt.backward_split`"),
    *("closure", "closure with `backward()`", "`opt.hook_backward()`", "`opt.step(hessian=)`", "`TrainStep`"),
)

# ---- the options -----------------------------------------------------------------------------------------------------

YES = ""
FUNCTION = "computes the loss itself|evaluates the loss itself"  # write opt.backward(function) or a closure
SPLIT = "write opt.backward_split"
GIVEN = "has no effect on a diagonal of your own"
DOUBLE_BACKWARD = 'TrainStep is hvp="autograd"'

ANSWERS = {YES: "yes", FUNCTION: "raises", SPLIT: "raises", GIVEN: "raises", DOUBLE_BACKWARD: "raises"}
OF_A_LOSS = ("create_graph", "backward_loss", "hook_backward")
EVALUATED = {**dict.fromkeys(OF_A_LOSS, FUNCTION), "given_diagonal": GIVEN, "train_step": DOUBLE_BACKWARD}


@dataclass(frozen=True)
class Option:
    """An option and where it raises.

    Attributes:
        name: on the page.
        options: what is given to the optimizer.
        raises: what the message says, by way; the other ways take it.
        canon: the way whose steps are the right ones, tested against float64 elsewhere.
        same: it changes no number, by definition.
        dtype: of the parameters.
        note: on the page.
    """

    name: str
    options: dict[str, Any]
    raises: dict[str, str] = field(default_factory=dict)
    canon: str = "backward_function"
    same: bool = False
    dtype: torch.dtype = torch.float64
    note: str = ""


OPTIONS = (
    Option('hvp="forward_over_reverse"', {"hvp": "forward_over_reverse"}, EVALUATED, same=True),
    Option('hvp="finite_difference"', {"hvp": "finite_difference"}, EVALUATED),
    Option(
        "fd_epsilon", {"hvp": "finite_difference", "fd_epsilon": 2.0**-10}, EVALUATED, note="finite differences only"
    ),
    Option("hvp_dtype", {"hvp_dtype": torch.bfloat16}, {"given_diagonal": GIVEN}, dtype=torch.float32),
    Option(
        "hessian_fraction",
        {"hessian_fraction": 0.5},
        {**{w: SPLIT for w in WAYS if w not in ("backward_split", "train_step")}, "given_diagonal": GIVEN},
        canon="backward_split",
    ),
    Option("n_samples", {"n_samples": 2}, {"given_diagonal": GIVEN}),
    Option('probe="gaussian"', {"probe": "gaussian"}, {"given_diagonal": GIVEN}),
    Option("seed", {"seed": 7}),
    Option("update_each", {"update_each": 2}, note="a diagonal of your own is used whenever it is given"),
    Option("update_each, a function", {"update_each": lambda h: 2 + h, "dense_steps": 0}, note="likewise"),
    Option("dense_steps", {"update_each": 3, "dense_steps": 2}, note="likewise"),
    Option("warmup", {"warmup": 5}),
    Option(
        'off_step="stale"', {"update_each": 2, "off_step": "stale"}, note="with update_each=1 there is no step between"
    ),
    Option("block_size", {"block_size": "row"}),
    Option(
        'averaging="abs"',
        {"averaging": "abs", "block_size": "row"},
        note="the same as signed for blocks of one: D enters squared",
    ),
    Option("hessian_power", {"hessian_power": 0.5}),
    Option("betas, eps, weight_decay, lr", {"betas": (0.5, 0.9), "weight_decay": 0.1}),
    Option("nesterov", {"nesterov": True}),
    Option("cautious", {"cautious": True}),
    Option("clip", {"clip": 0.05}),
    Option("shrink", {"shrink": 5.0}, note="not with capturable"),
    Option('unmeasured="move"', {"unmeasured": "move"}, same=True, note="where v = 0, which is rare"),
    Option('nonfinite="raise"', {"nonfinite": "raise"}, same=True, note="where curvature is not finite"),
    Option("maximize", {"maximize": True}),
    Option("capturable", {"capturable": True}, same=True),
)


def run(way, options, dtype=torch.float64, start=lambda model: model):
    model, opt = fresh(start(mlp(dtype)), lr=0.05, **options)
    for i in range(STEPS):
        WAYS[way](opt, functools.partial(squares, model), *batch(i, model))
    return weights(model)


CASES = [(option, way) for option in OPTIONS for way in WAYS]


@functools.cache
def plain(dtype):
    """Where steps without any option lead."""
    return run("backward_function", {}, dtype)


@functools.cache
def canon(number):
    """Where steps with an option should lead."""
    option = OPTIONS[number]
    return run(option.canon, option.options, option.dtype)


@pytest.mark.filterwarnings(
    "ignore:Using backward\\(\\) with create_graph=True", "ignore:This instance was constructed"
)
@pytest.mark.parametrize(("option", "way"), CASES, ids=[f"{o.name}-{w}" for o, w in CASES])
def test_every_option_in_every_way(option, way):
    if way in option.raises:
        with pytest.raises((RuntimeError, ValueError), match=option.raises[way]):
            run(way, option.options, option.dtype)
        return
    found, expected = run(way, option.options, option.dtype), canon(OPTIONS.index(option))
    if option.canon == way or "hessian_fraction" not in option.options:
        assert_same(found, expected)
    else:  # the two parts of a batch are added up in another order
        assert_trajectory(found, expected, STEPS, growth(run(way, option.options, start=nudge), expected))


@pytest.mark.parametrize("option", [o for o in OPTIONS if not o.same], ids=lambda option: option.name)
def test_every_option_has_an_effect(option):
    assert any((a != b).any() for a, b in zip(canon(OPTIONS.index(option)), plain(option.dtype), strict=True))


@pytest.mark.parametrize("way", ["closure", "closure_with_backward", "backward_function"])
@pytest.mark.parametrize("hvp", ["forward_over_reverse", "finite_difference"])
def test_strategies_that_evaluate_need_the_batch_to_take_a_part_of_it(way, hvp):
    with pytest.raises(RuntimeError, match=SPLIT):
        run(way, {"hvp": hvp, "hessian_fraction": 0.5})


def table() -> str:
    """The page's table."""
    lines = ["| | " + " | ".join(NAMES) + " | |", "|---" * (len(NAMES) + 2) + "|"]
    for option in OPTIONS:
        cells = [ANSWERS[option.raises.get(way, YES)] for way in WAYS]
        lines.append(f"| `{option.name}` | " + " | ".join(cells) + f" | {option.note} |")
    return "\n".join(lines)


def test_the_page_has_this_table():
    assert table() in PAGE.read_text()
