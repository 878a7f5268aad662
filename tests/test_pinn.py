"""examples/pinn.py: its residual, and one short run of the whole program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_residual_is_that_of_burgers_equation(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pinn

    class Known(torch.nn.Module):
        def forward(self, points):
            x, t = points.unbind(1)
            return (torch.sin(x) * t**2)[:, None]

    points = torch.rand(7, 2, dtype=torch.float64)
    x, t = points.unbind(1)
    u, u_x, u_xx, u_t = torch.sin(x) * t**2, torch.cos(x) * t**2, -torch.sin(x) * t**2, 2 * t * torch.sin(x)
    torch.testing.assert_close(pinn.residual(Known(), points), u_t + u * u_x - pinn.NU * u_xx)


def test_all_contestants_lower_the_loss(tmp_path):
    sizes = ["--width", "8", "--depth", "2", "--points", "32", "--rounds", "8", "--steps", "5"]
    command = [sys.executable, EXAMPLES / "pinn.py", "--no-compile", *sizes, "--json", tmp_path / "found.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, check=True, cwd=EXAMPLES.parent, env=environment, timeout=120)
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == {"AdamW", "AdaHessian, closure", "TrainStep", "TrainStep, cheap"}
    assert found["AdaHessian, closure"]["loss"] == found["TrainStep"]["loss"]  # the same step
    assert all(0 < each["loss"] < 0.5 for each in found.values())  # 0.5 at the start
