"""Some of the cases of ``make fuzz``, the same ones each time."""

from __future__ import annotations

import importlib

import pytest

CASES = {"models": 60, "sequences": 60, "layouts": 150, "failures": 120}


@pytest.mark.parametrize("kind", CASES)
def test_cases(kind, set_threads):
    set_threads(1)
    case = importlib.import_module(f"fuzz.{kind}").case
    results = [case(seed) for seed in range(CASES[kind])]
    assert results.count("right") > len(results) / 2
