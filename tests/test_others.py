"""examples/others: twelve scripts of usual kinds, with their own optimizer and with AdaHessian in its place."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "others"


@pytest.fixture
def program(monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("others_program", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_run(program):
    assert {path.stem for path in FOLDER.glob("*.py")} == {*program.TASKS, "__main__", "script", "sources"}


def test_program_trains_writes_and_goes_on_where_it_stopped(program, tmp_path, monkeypatch):
    arguments = ["--steps", "3", "--seeds", "1", "--option", "update_each=1", "--out", str(tmp_path / "others.json")]
    records = program.main(arguments)
    assert set(records) == {f"{task}, {column}, seed 0" for task in program.TASKS for column in program.COLUMNS}
    for task in program.TASKS:
        first, *others = (records[f"{task}, {column}, seed 0"]["first"] for column in program.COLUMNS)
        # The same weights, the same batch; attention draws its dropout in a way of its own.
        assert others == pytest.approx([first] * 2, rel=1e-2 if task == "transformer" else 1e-4)
    monkeypatch.setattr(program, "run", None)  # there is nothing left to be run
    assert program.main(arguments) == records


def test_a_loss_that_is_not_finite_ends_the_run(program, monkeypatch):
    diverging = SimpleNamespace(train=lambda script: iter([2.0, math.nan, 1.0]))
    monkeypatch.setattr(program.importlib, "import_module", lambda name: diverging)
    record = program.run("cnn", program.Script(), seed=0, steps=5)
    assert record["first"] == 2
    assert record["last"] is None
