"""Progress and tables on a terminal; rich where it is installed, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from .table import Result, columns, notes, rows

HAS_RICH = find_spec("rich") is not None


def progress(items: Sequence[Any], title: str = "") -> Iterator[Any]:
    """Yield what is to be done, one by one, and say it aloud: some of it takes minutes."""
    for number, item in enumerate(items, 1):
        print(f"[{title}{number}/{len(items)}] {item.name}", file=sys.stderr, flush=True)
        yield item


def show(results: list[Result]) -> None:
    """Print the table, and below it what is missing and what is wrong."""
    header, body = columns(results), rows(results)
    table("One optimizer step; peers: their time over ours, same run", header, body, texts=2)
    for note in notes(results):
        print(f"not measured: {note}")
    wrong = [row for row in body if len(row) > 2 and row[2].startswith("WRONG")]
    if wrong:
        print("\n" + "!" * 100)
        for row in wrong:
            print(f"!!! {row[0]}, {row[1]}: {row[2]}. Not timed.")
        print("!" * 100)


def table(title: str, header: list[str], body: list[list[str]], texts: int = 1) -> None:
    """Print a table whose first ``texts`` columns are text; a row may be shorter, its last cell saying why."""
    if not HAS_RICH:
        _plain_table(title, header, body)
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title)
    for i, column in enumerate(header):
        grid.add_column(column, justify="left" if i < texts else "right", overflow="fold")
    for row in body:
        grid.add_row(*row, style="bold red" if any(cell.startswith("WRONG") for cell in row) else None)
    Console(width=None if sys.stdout.isatty() else 200).print(grid)


def _plain_table(title: str, header: list[str], body: list[list[str]]) -> None:
    whole = [row for row in body if len(row) == len(header)]
    widths = [max(map(len, column)) for column in zip(header, *whole, strict=True)]
    print(title)
    for row in (header, *body):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)))
