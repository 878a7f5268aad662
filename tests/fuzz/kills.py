"""A training loop that is killed while it writes checkpoints goes on from the last whole one, bit for bit."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from published import AdaHessian
from torch import nn

STEPS = 40
OPTIONS = (
    {}, {"state_dtype": torch.bfloat16}, {"update_each": 3, "n_samples": 2}, {"off_step": "stale", "update_each": 2},
    {"probe": "gaussian", "block_size": 3}, {"shrink": 2.0, "dense_steps": 5, "update_each": 4},
)  # fmt: skip


def train(folder: str, options: dict[str, Any]) -> None:
    """Train to the end from the last whole checkpoint in the folder, writing one after each step."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 5))
    opt = AdaHessian(model.parameters(), lr=0.05, **options)
    begin = 0
    for path in sorted(Path(folder).glob("*.pt"), reverse=True):
        try:
            saved = torch.load(path)
        except (RuntimeError, EOFError, OSError):  # not whole
            continue
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"])
        begin = int(path.stem) + 1
        break
    for step in range(begin, STEPS):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        opt.backward(model(x).square().mean() + model(x).sin().mean())
        opt.step()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, Path(folder) / f"{step:03}.pt")


def _final(folder: str) -> dict[str, Any]:
    return torch.load(Path(folder) / f"{STEPS - 1:03}.pt")


def case(seed: int) -> str:
    """Five kills at random moments."""
    r = random.Random(seed)
    options = r.choice(OPTIONS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fuzz.kills"])
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
        process, begin = context.Process(target=train, args=(whole, options)), time.monotonic()
        process.start()
        process.join()
        took = time.monotonic() - begin
        for _ in range(5):
            process = context.Process(target=train, args=(killed, options))
            process.start()
            process.join(r.uniform(0, took / 2))
            process.kill()
            process.join()
        process = context.Process(target=train, args=(killed, options))
        process.start()
        process.join()
        a, b = _final(whole), _final(killed)
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), f"{name} with {options}"
    for i, state in a["opt"]["state"].items():
        for key, value in state.items():
            other = b["opt"]["state"][i][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, f"{key} with {options}"
    return "right"
