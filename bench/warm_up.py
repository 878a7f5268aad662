"""Time to the first steps of TrainStep, beside that of torch.compile for the same model's forward and backward pass.

``python -m bench.warm_up``: each start is a process of its own; the second one finds what the first has left in
Inductor's caches. What counts is the processors' time, the compilers' included, so the machine may be busy. Minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .machine import machine

OUT = Path(__file__).parent / "results" / "programs" / "warm_up.json"
WAYS = ("torch.compile", "TrainStep")


def seconds(way: str, layers: int) -> list[float]:
    """Compile a small transformer here and now: TrainStep's first steps with and without curvature, or one pass."""
    import torch
    import torch._inductor.compile_fx  # which both need
    from torch import nn

    from adahessian_fused import AdaHessian, TrainStep

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = {"dim_feedforward": 256, "dropout": 0.0, "activation": "gelu", "batch_first": True}
            self.embedding, self.head = nn.Embedding(100, 64), nn.Linear(64, 100)
            self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, **layer) for _ in range(layers)))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers(self.embedding(tokens)))

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, x, y = Model(), torch.randint(0, 100, (8, 32)), torch.randint(0, 100, (8, 32))
    loss_fn = lambda outputs, targets: nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())  # noqa: E731
    if way == "torch.compile":
        compiled = torch.compile(model)
        calls = [lambda: loss_fn(compiled(x), y).backward()]
    else:
        step = TrainStep(model, loss_fn, AdaHessian(model.parameters(), update_each=2, dense_steps=1))
        calls = [lambda: step(x, y)] * 2
    times = []
    for call in calls:
        begin = os.times()
        call()
        times.append(sum(os.times()[:4]) - sum(begin[:4]))  # of this process, and of the compilers that have ended
    return times


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the ratios."""
    parser = argparse.ArgumentParser(prog="python -m bench.warm_up", description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="one start of one of them, in this process")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    if args.way:
        print(json.dumps(seconds(args.way, args.layers)))
        return 0
    found: dict[str, list[float]] = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as caches:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "bench.warm_up",
                "--layers",
                str(args.layers),
                "--way",
                way,
            ]
            for start in ("first", "second"):
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches}
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                found[f"{way}, {start} start"] = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{way}, {start} start: {' + '.join(f'{t:.1f}' for t in found[f'{way}, {start} start'])} s",
                    flush=True,
                )
    base = found["torch.compile, first start"][0]
    ratios = {name: [t / base for t in times] for name, times in found.items()}
    args.out.parent.mkdir(exist_ok=True, parents=True)
    data = {"machine": machine("cpu"), "layers": args.layers, "of_torch_compile": ratios}
    args.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
