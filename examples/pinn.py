"""Burgers' equation by a network: a loss that holds second derivatives, with AdamW and AdaHessian in turns.

    python examples/pinn.py                 # minutes, most of them the compiler's
    python examples/pinn.py --no-compile    # without a compiler

u_t + u u_x = nu u_xx on -1 < x < 1, 0 < t < 1, u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0 (Raissi et al. 2019). The
loss has u_xx in it, so its gradient is a third derivative and the product with the Hessian a fourth. All contestants
take turns, a few steps each, so that their times can be compared whatever else the machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adahessian_fused import AdaHessian, TrainStep, recipes

NU = 0.01 / math.pi
FIRST = 22  # steps before the first that is timed: with curvature and, of the cheap setting, without
Step = Callable[[], Tensor]


def make_network(width: int, depth: int) -> nn.Sequential:
    """Return u(x, t): a network with ``depth`` hidden layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += nn.Linear(2 if i == 0 else width, width), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(width, 1))


def residual(u: nn.Module, points: Tensor) -> Tensor:
    """Return u_t + u u_x - nu u_xx at points (x, t)."""
    points = points.detach().requires_grad_()
    value = u(points)
    (first,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), points, create_graph=True)
    return first[:, 1] + value[:, 0] * first[:, 0] - NU * second[:, 0]


def loss_of(u: nn.Module, inside: Tensor, edge: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean square of the residual plus that of the error at the start and on the walls."""
    return residual(u, inside).square().mean() + (u(edge)[:, 0] - wanted).square().mean()


def make_points(inside: int, edge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return points inside, on the edges, and the values there."""
    random = torch.Generator().manual_seed(1)
    draw = lambda n: torch.rand(n, generator=random)  # noqa: E731
    x = 2 * draw(edge) - 1
    start = torch.stack((x, torch.zeros(edge)), 1)
    walls = torch.stack((torch.where(draw(edge) < 0.5, -1.0, 1.0), draw(edge)), 1)
    wanted = torch.cat((-torch.sin(math.pi * x), torch.zeros(edge)))
    return torch.stack((2 * draw(inside) - 1, draw(inside)), 1), torch.cat((start, walls)), wanted


def adamw(u: nn.Module, points: tuple[Tensor, ...], lr: float, *, compiled: bool) -> Step:
    """Return a step of AdamW; its loss compiled by torch.compile, as far as that goes."""
    opt = torch.optim.AdamW(u.parameters(), lr=lr)
    loss_fn = torch.compile(loss_of) if compiled else loss_of

    def step() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(u, *points)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def closure(u: nn.Module, points: tuple[Tensor, ...], lr: float) -> Step:
    """Return a step of AdaHessian with a closure."""
    opt = AdaHessian(u.parameters(), lr=lr)
    return lambda: opt.step(lambda: loss_of(u, *points)).detach()


def train_step(u: nn.Module, points: tuple[Tensor, ...], *, compiled: bool, **options: Any) -> Step:
    """Return a TrainStep of AdaHessian with some options."""
    step = TrainStep(lambda *batch: loss_of(u, *batch), AdaHessian(u.parameters(), **options), compile=compiled)
    return lambda: step(*points)


def main() -> None:
    """Train all of them in turns and print times and losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--points", type=int, default=512, help="inside; a quarter of it on each edge")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10, help="of each in a round")
    parser.add_argument("--lr", type=float, default=0.05, help="AdaHessian's")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()

    points, compiled = make_points(args.points, args.points // 4), not args.no_compile
    make = {
        "AdamW": lambda u: adamw(u, points, 2e-3, compiled=False),
        "AdamW, torch.compile": lambda u: adamw(u, points, 2e-3, compiled=True),
        "AdaHessian, closure": lambda u: closure(u, points, args.lr),
        "TrainStep": lambda u: train_step(u, points, compiled=compiled, lr=args.lr),
        "TrainStep, cheap": lambda u: train_step(u, points, compiled=compiled, lr=args.lr, **recipes.cheap),
    }
    steps: dict[str, Step] = {}
    for name, factory in make.items():
        if name == "AdamW, torch.compile" and not compiled:
            continue
        begin, step = time.perf_counter(), factory(make_network(args.width, args.depth))
        try:
            for _ in range(FIRST):
                step()
        except Exception as error:  # the compiler's
            print(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            continue
        steps[name] = step
        print(f"{name}: first {FIRST} steps {time.perf_counter() - begin:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(args.steps):
                loss = step()
            times[name].append((time.perf_counter() - begin) / args.steps)
            losses[name] = float(loss)
    found = {}
    for name in steps:
        ratio = statistics.median(t / base for t, base in zip(times[name], times["AdamW"], strict=True))
        found[name] = {"ms": 1e3 * statistics.median(times[name]), "of_adamw": ratio, "loss": losses[name]}
        print("{:28} {ms:8.2f} ms a step   {of_adamw:5.2f} x AdamW   loss {loss:.2e}".format(name, **found[name]))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
