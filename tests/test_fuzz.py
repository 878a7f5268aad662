"""Some of the cases of ``make fuzz``, the same ones each time."""

from __future__ import annotations

import importlib
import subprocess
import sys

import conftest
import pytest

CASES = {"models": 60, "sequences": 60, "layouts": 150, "failures": 120}


@pytest.mark.parametrize("kind", CASES)
def test_cases(kind, set_threads):
    set_threads(1)
    case = importlib.import_module(f"fuzz.{kind}").case
    results = [case(seed) for seed in range(CASES[kind])]
    assert results.count("right") > len(results) / 2


@pytest.mark.parametrize("way", ["backward", "closure_standard", "train_step"])
def test_a_failure_at_each_operator(way, set_threads):
    set_threads(1)
    assert importlib.import_module("fuzz.failures").at_every_operator(way, {}) > 200


def test_killed_runs():
    """From its own program, whose processes begin as copies of one that has imported everything."""
    command = [sys.executable, "-m", "fuzz", "--kinds", "kills", "--cases", "1"]
    done = subprocess.run(command, env=conftest.safe_path(), capture_output=True, text=True)
    assert "'right': 1" in done.stdout, done.stdout + done.stderr
