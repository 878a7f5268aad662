"""Errors at any operator of a step, whichever way it is taken: parameters and states are before it or after it."""

from __future__ import annotations

import contextlib
import itertools
import random
import warnings
from typing import Any

import torch
import ways
from published import AdaHessian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adahessian_fused.compat import pytorch_optimizer

LAID_OUT = ("master_param", "hessian_diag_sq_mean")  # states that are not zero before the first update
ERRORS = (MemoryError, KeyboardInterrupt, torch.OutOfMemoryError, ArithmeticError)


class FailsAt(TorchDispatchMode):
    """Raises at the n-th operator; 0: never."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error, self.failed = n, error, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            self.failed = True
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


class Run:
    """A model with parameters of three dtypes, hence three buckets, and an optimizer."""

    def __init__(self, way: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(2, 2).bfloat16()])
        make = pytorch_optimizer.AdaHessian if "weight_decouple" in options else AdaHessian
        self.opt = make(self.model.parameters(), lr=0.1, **options)
        self.way = way

    def loss(self, x: Tensor) -> Tensor:
        a, b, c = self.model
        return c(b(a(x).tanh().double()).bfloat16().tanh()).float().square().mean()

    def step(self, number: int) -> None:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        self.opt.zero_grad()
        WAYS[self.way](self.opt, self.loss, x)

    def now(self) -> list[Any]:
        """Parameters, states and counts."""
        states = [{k: v.clone() for k, v in self.opt.state.get(p, {}).items()} for p in self.model.parameters()]
        counts = [group["step"] for group in self.opt.param_groups]
        return [[p.detach().clone() for p in self.model.parameters()], states, counts]


EVALUATE = ("function", "closure_returns_loss", "closure_standard")  # which the strategies work with that evaluate
USUAL = ("backward", "needs_hessian", *EVALUATE, "backward_split", "hook_backward", "train_step")
WAYS = {name: ways.EVERY[name] for name in (*USUAL, "micro_batches", "diagonal", "scaled")}
OPTIONS = (
    {}, {"update_each": 2}, {"block_size": 2, "averaging": "abs"}, {"update_each": 2, "off_step": "stale"},
    {"shrink": 2.0, "clip": 0.5}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}, {"hvp": "finite_difference"},
    {"hvp": "forward_over_reverse"}, {"n_samples": 2}, {"capturable": True}, {"master_weights": True},
    {"weight_decouple": False, "weight_decay": 0.1, "faithful": True},  # decays beside the kernels
)  # fmt: skip
GIVEN = ({}, {"update_each": 2}, {"weight_decay": 0.1, "betas": (0.5, 0.9)}, {"shrink": 2.0, "clip": 0.5})


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def is_whole(run: Run, before: list[Any], after: list[Any], what: str) -> bool:
    """Assert that a failed step has changed nothing, or everything; tell which: True for everything."""
    found = run.now()
    if same(found, after):
        return True
    nothing = same(found[::2], before[::2]) and all(
        same(a, b) or not any(bool(t.any()) for name, t in a.items() if name not in LAID_OUT)
        for a, b in zip(found[1], before[1], strict=True)
    )
    assert nothing, f"{what} it is neither before nor after it"
    return False


def at_every_operator(way: str, options: dict[str, Any]) -> int:
    """The second of two steps fails at each of its operators in turn, with one error and the next; their number."""
    expected: list[list[Any]] = []
    for n in itertools.count():
        run, error = Run(way, options), ERRORS[n % len(ERRORS)]
        run.step(0)
        before = run.now()
        with FailsAt(n, error) as at, contextlib.suppress(error):
            run.step(1)
        if n == 0:
            expected = [before, run.now()]
        elif not at.failed:
            return n - 1
        else:
            is_whole(run, *expected, f"{way}, {options}: after {error.__name__} at operator {n}")
    raise AssertionError


def case(seed: int) -> str:
    """Three steps, of which one fails at an operator and is taken again."""
    r = random.Random(seed)
    way = r.choice(list(WAYS))
    options = r.choice(GIVEN if way == "diagonal" else OPTIONS)
    if "hvp" in options and way not in EVALUATE:
        options = {}
    failing, before_end, error = r.randrange(3), int(2 ** r.uniform(0, 8)), r.choice(ERRORS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [(run := Run(way, options)).now()]
        for number in range(3):
            with FailsAt(0, error) as at:
                run.step(number)
            expected.append(run.now())
            if number == failing:
                n = max(-at.left - before_end, 1)  # most of them in the update, which comes last
        run, failed = Run(way, options), False
        for number in range(3):
            with FailsAt(n if number == failing else 0, error) as at, contextlib.suppress(error):
                run.step(number)
            failed |= at.failed
            if at.failed:
                what = f"{way}, {options}: after {error.__name__} at operator {n} of step {number}"
                if not is_whole(run, *expected[number : number + 2], what):
                    run.step(number)
            assert same(run.now(), expected[number + 1]), f"{way}, {options}: operator {n} of step {failing}: other"
    return "right" if failed else "not reached"
