"""examples/log_to_tensorboard.py: what it writes is what TensorBoard finds."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "log_to_tensorboard.py"


def test_every_number_arrives(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    runpy.run_path(str(EXAMPLE))["train"](str(tmp_path), steps=4, log_each=2)
    found = accumulators.EventAccumulator(str(tmp_path)).Reload()
    numbers = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert {tuple(step for step, _ in values) for values in numbers.values()} == {(2, 4)}
    norms = {"param_norm", "grad_norm", "update_norm", "hessian_diag_norm"}
    names = {*norms, "nonfinite", "missed", "clipped", "step", "hessian_step"}
    groups = {f"group{i}/{name}" for i in range(2) for name in (*names, "lr")}
    assert set(numbers) == {"loss", *(f"adahessian/{name}" for name in (*names, *groups))}
    assert [value for _, value in numbers["adahessian/hessian_step"]] == [2, 4]
    assert all(value > 0 for _, value in numbers["adahessian/update_norm"])
    assert len(found.Tags()["histograms"]) == 4
