"""Every message the package raises or warns with, found in its source: Python's by ast, C++'s and CMake's by regex."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HOLE = "…"  # where a message has a value
RAISING = {"warn", "sys.exit", "parser.error"}


class Message(NamedTuple):
    """A message with holes, and where it comes from."""

    text: str
    where: str


def in_python() -> Iterator[Message]:
    """Messages of ``raise``, ``warn`` and ``sys.exit``, and reasons why something cannot run."""
    sources = [*_sources("adahessian_fused", "kernels", suffix=".py"), ROOT / "setup.py"]
    files = [(path, ast.parse(path.read_text())) for path in sources]
    named: dict[str, str] = {}  # constants, and functions that return a string
    for _, tree in files:
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                named[node.targets[0].id] = _text(node.value, {})
            elif isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return) and node.body[-1].value:
                named[node.name] = _text(node.body[-1].value, {})
    for path, tree in files:
        for node in ast.walk(tree):
            for expression, line in _said_by(node):
                text = _text(expression, named)
                if text.strip(HOLE + " "):
                    yield Message(text, f"{path.relative_to(ROOT)}:{line}")


def in_cpp() -> Iterator[Message]:
    """Messages of STD_TORCH_CHECK and of exceptions in csrc."""
    for path in _sources("csrc", suffix=".cpp", also=(".h", ".cu", ".cuh")):
        source = re.sub(r"^\s*(#|//).*$", "", path.read_text(), flags=re.MULTILINE)
        for found in re.finditer(r"\b(STD_TORCH_CHECK|throw [\w:]+)\(", source):
            arguments = _arguments(source[found.end() :])
            message = arguments[1:] if found[1] == "STD_TORCH_CHECK" else arguments
            text = _squeeze("".join(map(_literals, message)))
            if text.strip(HOLE + ": "):
                yield Message(text, f"{path.relative_to(ROOT)}:{source.count(chr(10), 0, found.start()) + 1}")


def in_cmake() -> Iterator[Message]:
    """Reasons why the CUDA kernels are not compiled."""
    for path in _sources("csrc", suffix=".cmake"):
        for found in re.finditer(r'set\(why_not "([^"]+)"', path.read_text()):
            yield Message(re.sub(r"\$\{\w+\}", HOLE, found[1]), path.name)


def _said_by(node: ast.AST) -> Iterator[tuple[ast.expr, int]]:
    call = node.exc if isinstance(node, ast.Raise) else node
    if isinstance(call, ast.Call) and call.args and (call is not node or ast.unparse(call.func) in RAISING):
        yield call.args[0], call.lineno
    if isinstance(node, ast.FunctionDef) and node.returns is not None and ast.unparse(node.returns) == "str | None":
        yield from ((n.value, n.lineno) for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None)


def _sources(*folders: str, suffix: str, also: tuple[str, ...] = ()) -> list[Path]:
    found = {p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (suffix, *also)}
    return sorted(p for p in found if p.parts[-2:-1] != ("kernels",) or p.parent == ROOT / "kernels")


def _text(node: ast.expr, named: dict[str, str]) -> str:
    """A string expression, with holes; ``named`` are strings that it may refer to."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w*\}", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return _squeeze("".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values))
    if isinstance(node, ast.BinOp):
        return _squeeze(_text(node.left, named) + _text(node.right, named))
    if isinstance(node, ast.Call):
        formatted = isinstance(node.func, ast.Attribute) and node.func.attr == "format"
        return _text(node.func.value if formatted else node.func, named)
    if isinstance(node, ast.IfExp):
        return _text(node.body, named)
    return named.get(node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", ""), HOLE)


def _squeeze(text: str) -> str:
    return re.sub(f"{HOLE}+", HOLE, text)


def _literals(argument: str) -> str:
    """The strings in an argument; what precedes them is a hole."""
    strings = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', argument))
    return strings if argument.lstrip().startswith('"') else HOLE + strings


def _arguments(source: str) -> list[str]:
    """The arguments of a call whose opening parenthesis has just been read."""
    arguments, depth, quoted, begin = [], 0, False, 0
    for i, c in enumerate(source):
        if c == '"' and source[i - 1] != "\\":
            quoted = not quoted
        elif not quoted and c in "([{":
            depth += 1
        elif not quoted and depth and c in ")]}":
            depth -= 1
        elif not quoted and not depth and c in ",)":
            arguments.append(source[begin:i])
            begin = i + 1
            if c == ")":
                return arguments
    raise ValueError("a call without its closing parenthesis")
