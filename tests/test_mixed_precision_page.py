"""docs/mixed_precision.md: its code runs, one block after the other, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import batch, mlp, weights
from torch import nn

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mixed_precision.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.filterwarnings("error", "ignore:Using backward\\(\\) with create_graph=True")
def test_every_block_runs_and_trains(device):
    model = mlp(torch.float32, device)
    names = {"model": model, "loss_fn": nn.functional.mse_loss, "device": device}
    names["batches"] = [batch(i, model) for i in range(8)]  # the first ones may overflow with the first loss scale
    setup, *loops = BLOCKS
    exec(compile(setup, str(PAGE), "exec"), names)
    assert len(loops) == 8
    for code in loops:
        before = weights(model)
        exec(compile(code, str(PAGE), "exec"), names)
        after = weights(model)
        assert all((a != b).any() and a.isfinite().all() for a, b in zip(after, before, strict=True)), code
