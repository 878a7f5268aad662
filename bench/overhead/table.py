"""The table of a model's rows."""

from __future__ import annotations

from typing import Any

from ..display import table

FREQUENCIES = (1, 2, 3, 4, 5, 10)
HEADER = ["", "x SGD", "x AdamW", "off-step", *(f"f={f}" for f in FREQUENCIES), "floor", "memory", "error g", "error D"]


def cells(row: dict[str, Any]) -> list[str]:
    """One line; a row that was not timed says why."""
    name = row["way"]
    if "skipped" in row:
        return [name, f"not run: {row['skipped']}"]
    found = [f"{row[key]:.1e}" if row.get(key) is not None else "-" for key in ("error_g", "error_d")]
    if row.get("wrong"):
        return [name, f"WRONG (errors of g {found[0]}, of D {found[1]}), not timed"]
    frequencies = [f"{cost:.2f}" for cost in row.get("by_frequency", {}).values()] or ["-"] * len(FREQUENCIES)
    off = f"{row['off_step']:.2f}" if "off_step" in row else "-"
    memory = f"{row['peak_memory'] / 2**20:.0f} MiB" if row.get("peak_memory") is not None else "-"
    return [
        *(name, f"{row['cost']:.2f}", f"{row['cost_adamw']:.2f}", off),
        *frequencies,
        *(f"{row['floor']:g}", memory, *found),
    ]


def show(model: dict[str, Any]) -> None:
    """Print it."""
    title = f"{model['model']}, batch {model['batch'][0]}: a step over SGD's ({1e3 * model['sgd_seconds']:.0f} ms)"
    table(title, HEADER, [cells(row) for row in model["rows"]])
