"""examples/train_gpt.py: an ordinary trainer, with AdaHessian in three lines of it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[1] / "examples" / "train_gpt.py"
SHORT = ["--steps", "24", "--every", "4", "--device", "cpu"]


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    import train_gpt

    return train_gpt


def losses(capsys):
    return [float(number) for number in re.findall(r"loss (?:of unseen text )?([\d.]+)", capsys.readouterr().out)]


def test_compiled_it_learns_what_it_learns_as_it_was_written(program, capsys):
    """The model is compiled after it was told, and a compiler that computes what the model does."""
    torch.compiler.reset()
    for backend in ("aot_eager", ""):
        program.main([*SHORT, "--dtype", "float16", "--compile", backend])
    found = losses(capsys)
    first, second = found[: len(found) // 2], found[len(found) // 2 :]
    assert len(first) == 3
    assert first == pytest.approx(second, abs=2e-2)
    assert first[-1] < math.log(len(set(PROGRAM.read_text()))) - 0.3


def test_the_other_optimizer_is_three_lines_away(program, capsys):
    program.main([*SHORT, "--optimizer", "adamw", "--compile", ""])
    assert losses(capsys)
    assert len(re.findall(r"  #$", PROGRAM.read_text(), re.MULTILINE)) == 3
