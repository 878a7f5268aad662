"""The table of costs: every row is checked before it is timed, and a wrong one is not timed."""

import json
import sys
from dataclasses import replace

import pytest

from bench.overhead import __main__ as overhead
from bench.overhead.check import MOST
from bench.overhead.problems import problem
from bench.overhead.table import cells
from bench.overhead.ways import WAYS

EAGER = [way for way in WAYS if not way.compiled and not way.captured]


@pytest.fixture(scope="module")
def small():
    return problem("MLP", batch=8)


@pytest.mark.parametrize("way", EAGER, ids=lambda way: way.name)
def test_rows_are_right(way, small):
    if way.missing:
        pytest.skip(way.missing)
    row, step = overhead.start(small, way, "cpu")
    assert step is not None, row
    assert (row["error_d"] is None) == (not way.second_order)


def test_a_wrong_gradient_is_not_timed(small):
    def make(problem, model):
        step, opt = EAGER[0].make(problem, model)
        return lambda: (step(), model[0].weight.grad.mul_(1.01)), opt

    row, step = overhead.start(small, replace(EAGER[0], make=make), "cpu")
    assert step is None
    assert row["wrong"]
    assert "WRONG" in cells(row)[1]


def test_wrong_curvature_is_not_timed(small):
    ours = next(way for way in WAYS if way.name == "ours, closure")

    def make(problem, model):
        step, opt = ours.make(problem, model)
        opt.param_groups[0]["seed"] = 1  # another probe than the one it is compared with
        return step, opt

    row, step = overhead.start(small, replace(ours, make=make), "cpu")
    assert step is None
    assert row["wrong"]
    assert row["error_g"] < MOST[None][0]


def test_whatever_raises_is_in_the_table(small):
    def make(problem, model):
        raise NotImplementedError("no such thing")

    row, step = overhead.start(small, replace(EAGER[0], make=make), "cpu")
    assert step is None
    assert "no such thing" in cells(row)[1]


def test_frequencies_average_measured_steps(tmp_path, monkeypatch):
    arguments = ["--quick", "--models", "MLP", "--batch", "4", "--rounds", "1", "--no-memory", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["overhead", *arguments])
    assert overhead.main() == 0
    data = json.loads(next(tmp_path.glob("*.json")).read_text())
    rows = {row["way"]: row for row in data["models"][0]["rows"]}
    ours = rows["ours, closure"]
    assert ours["by_frequency"]["5"] == pytest.approx((ours["cost"] + 4 * ours["off_step"]) / 5)
    assert rows["SGD"]["cost"] == 1
    assert next(tmp_path.glob("*.svg")).stat().st_size > 1000


def test_peak_memory_is_measured_in_a_process_of_its_own():
    assert overhead.peak_memory("MLP", "SGD", "cpu", 4) > 2 * 2**20  # gradients and momentum
