"""make test-versions: which versions, and what is done with each. The environments are made before releases."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import versions


def test_the_oldest_version_is_what_the_package_asks_for():
    oldest = re.search(r'"torch>=([\d.]+)"', (versions.ROOT / "pyproject.toml").read_text())[1]
    assert versions.VERSIONS[oldest][0] == f"torch=={oldest}.*"


def test_only_the_pinned_version_is_held_by_the_constraints():
    """Nor setuptools, which torch 2.11 wants below 82."""
    pinned, other = (versions.constraints(name) for name in ("pinned", "newest"))
    assert [line.split("==")[0] for line in pinned if line not in other] == ["torch", "triton", "numpy", "setuptools"]
    assert "torch-optimizer" in {line.split("==")[0] for line in other}


@pytest.mark.parametrize(("fails", "code"), [(None, 0), ("install", 1), ("bin/pytest", 1)])
def test_every_version_is_tried_and_told(monkeypatch, tmp_path, capsys, fails, code):
    """With what would be run in place of it."""
    called = []

    def run(command, **options):
        words = " ".join(map(str, command))
        called.append(words)
        bad = fails is not None and fails in words and "2.10" in words
        return SimpleNamespace(returncode=int(bad), stdout="7 passed in 3.21s" if "pytest -q" in words else "")

    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(versions.subprocess, "run", run)
    assert versions.main(["2.10", "pinned", "-k", "rounding"]) == code
    shown = capsys.readouterr().out.splitlines()[-2:]
    assert ["RED" in line for line in shown] == [code == 1, False]
    assert "7 passed" in shown[1]
    assert sum(words.endswith("-k rounding") for words in called) == 2 - (fails == "install")
    assert "torch==" in (tmp_path / "pinned.txt").read_text()
    assert "torch==" not in (tmp_path / "2.10.txt").read_text()


def test_an_unknown_version_is_named():
    with pytest.raises(SystemExit):
        versions.main(["1.0"])
