"""The package is built in layers, and its parts use each other by what they show: docs/design.md lists them."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "adahessian_fused"


def layers() -> dict[str, int]:
    """The number of each module's layer, or of its package's, from the top."""
    section = (ROOT / "docs" / "design.md").read_text().partition("\n## Who imports whom\n")[2]
    lines = re.search(r"```text\n(.*?)```", section, re.DOTALL)[1].splitlines()
    return {module: number for number, line in enumerate(lines) for module in line.split()}


@functools.cache
def nodes_of(path: Path) -> list[ast.AST]:
    """Everything in a file, also inside functions."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[list[str]]:
    """Names of the modules of the package that a file imports, inside functions too, but not for types alone."""
    waiting = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        for_types = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        waiting += [] if for_types else ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = [*path.parts, ""][: -node.level - 1]
            names = [*folder[len(PACKAGE.parts) :], *(node.module or "").split(".")]
            for alias in node.names:
                yield [*filter(None, names), alias.name]


def test_imports_go_down():
    layer_of, wrong = layers(), []

    def layer(parts: tuple[str, ...]) -> int | None:
        names = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        return next((layer_of[name] for name in names if name in layer_of), None)

    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    files = [path for path in files if path.parts[0] not in ("kernels", "__init__.py", "__main__.py")]
    for path in files:
        name = path.with_suffix("").parts
        assert layer(name) is not None, f"{path} is in none of the layers in docs/design.md"
        for imported in map(tuple, imports(PACKAGE / path)):
            below = layer(imported)
            if below is not None and below <= layer(name) and imported[0] != name[0]:
                wrong.append(f"{path} imports {'.'.join(imported)}")
    assert len(files) > 50
    assert not wrong


@pytest.mark.parametrize("part", ["optimizer", "hessian_step", "layout", "schedule", "curvature", "bucket", "record"])
def test_parts_are_used_by_what_they_show(part):
    """Private attributes of the optimizer and its parts are their own, and of subclasses."""
    private, wrong = set(), []
    for path in [PACKAGE / f"{part}.py", *PACKAGE.rglob("*.py")]:  # the part itself comes first
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                if of_self and path.stem == part:
                    private.add(node.attr)
                elif not of_self and node.attr in private and path.stem != part:
                    wrong.append(f"{path.name}:{node.lineno} {node.attr}")
    assert private
    assert not wrong


@pytest.mark.parametrize("equation", [6, 7, 8, 9])
@pytest.mark.parametrize(
    "file", ["adahessian_fused/reference.py", "csrc/adahessian_math.h", "kernels/adahessian_math.py"]
)
def test_equations_carry_their_numbers(file, equation):
    numbers = [
        set(re.findall(r"\d", found)) for found in re.findall(r"Eq\. (\d(?:(?: and |-)\d)*)", (ROOT / file).read_text())
    ]
    assert any(str(equation) in found for found in numbers)
