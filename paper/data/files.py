"""Files that a user brings."""

from __future__ import annotations

from pathlib import Path

from examples.data import DataError

__all__ = ["DataError", "find", "lines_of"]


def find(root: Path | None, *names: str) -> Path:
    """Return the first of the names that is a file in ``root``.

    Raises:
        DataError: there is none; the message has all of them.
    """
    if root is None:
        raise DataError(f"pass the folder with {' or '.join(names)} as --root")
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(f"{root} has no {' or '.join(names)}; pass the folder that has it as --root")


def lines_of(path: Path) -> list[str]:
    """Lines without their ends; other line separators of Unicode are part of the text."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
