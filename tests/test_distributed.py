"""Several ranks on one machine: gloo, CPU. The checks are in the files below; all of them share one launch a world."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks

NAMES = ("distributed_steps.py", "distributed_wrappers.py", "distributed_tensors.py", "distributed_failures.py")
FILES = [Path(__file__).with_name(name) for name in NAMES]
LINES = [line for file in FILES for line in file.read_text().splitlines()]
CHECKS = [line.split("(")[0].removeprefix("def ") for line in LINES if line.startswith("def check_")]


@pytest.fixture(scope="module")
def results():
    return ranks.run(FILES, [2, 3, 1])


@pytest.mark.parametrize("name", CHECKS)
def test_on_all_ranks(results, name):
    """Sums, means and parts are of three ranks; what is refused or said is so by two."""
    worlds = {world: checks[name] for world, checks in results.items() if name in checks}
    failures = [f"rank {i} of {n}: {error}" for n, errors in worlds.items() for i, error in enumerate(errors) if error]
    assert worlds
    assert not failures, "\n".join(failures)
