"""What is given away: one version everywhere, a complete source distribution, an installation without a compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import adahessian_fused
from adahessian_fused import backends

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "adahessian_fused" / "__init__.py").read_text(), re.MULTILINE)[1]
NEEDED = {  # for building, testing and reading
    "": "setup.py pyproject.toml MANIFEST.in CMakeLists.txt Makefile constraints.txt mkdocs.yml .clang-format "
    "README.md LICENSE CHANGELOG.md CITATION.cff",
    "csrc": "**/*.cpp **/*.h **/*.cu **/*.cuh",
    "kernels": "*.py",
    "adahessian_fused": "**/*.py py.typed",
    "bench": "**/*.py results/**/*.json",
    "tests": "*.py cpp/*",
    "docs": "**/*.md **/*.svg **/*.png",
    "examples": "*",
}


def build(folder: Path, *command: str, **environment: str) -> str:
    """Run setup.py, which leaves everything in ``folder``; what it printed."""
    result = subprocess.run(
        [sys.executable, "setup.py", "egg_info", "--egg-base", str(folder), *command, "--dist-dir", str(folder)],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_version_of_the_running_package():
    assert adahessian_fused.__version__ == VERSION
    if backends.unavailable_reason("native") is None:
        from adahessian_fused import _native

        assert _native.build_info()["version"] == VERSION


def test_version_of_an_installation():
    try:
        found = importlib.metadata.version("adahessian_fused")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("adahessian_fused is not installed, but run from its source folder")
    assert found == VERSION


def test_version_is_written_nowhere_else():
    places = [*(ROOT / name for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "CITATION.cff", "mkdocs.yml"))]
    places += [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "adahessian_fused").rglob("*.py")]
    assert [p.name for p in places if VERSION in p.read_text()] == ["__init__.py"]


def test_citation_names_the_paper():
    text = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"family-names: (\w+)", text) == ["Yao", "Gholami", "Shen", "Mustafa", "Keutzer", "Mahoney"]
    assert "2006.00719" in text


def test_source_distribution_is_complete(tmp_path):
    build(tmp_path, "sdist")
    with tarfile.open(tmp_path / f"adahessian_fused-{VERSION}.tar.gz") as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
        metadata = archive.extractfile(f"adahessian_fused-{VERSION}/PKG-INFO").read().decode()
    wanted = {
        str(path.relative_to(ROOT))
        for folder, patterns in NEEDED.items()
        for pattern in patterns.split()
        for path in (ROOT / folder).glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts and "adahessian_fused/kernels" not in str(path)
    }
    assert len(wanted) > 150
    assert not wanted - found
    assert not [name for name in found if name.endswith((".so", ".pyc"))]
    assert "\nLicense: MIT\n" in metadata
    assert f"\nVersion: {VERSION}\n" in metadata


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(tmp_path):
    said = build(
        tmp_path, "build", "--build-base", str(tmp_path / "build"), "bdist_wheel", PATH="/nonexistent", CXX="c++"
    )
    assert "no native library: no C++ compiler found" in said
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name == f"adahessian_fused-{VERSION}-py3-none-any.whl"
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        assert not [name for name in archive.namelist() if "/results/" in name or name.endswith(".so")]
    native = site / "adahessian_fused" / "_native.py"  # beside the other modules, which are those of the source
    spec = importlib.util.spec_from_file_location("adahessian_fused.installed_native", native)
    with pytest.raises(ImportError, match=r"When that was built: no C\+\+ compiler found \(tried c\+\+; install g\+\+"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
