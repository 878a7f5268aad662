"""Cost over Hutchinson frequency, a panel for each model, as the paper's figure has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plots import COLOURS, panels


def draw(data: dict[str, Any], path: Path) -> None:
    """One file; rows without off-steps are horizontal marks at f = 1."""
    models = data["models"]
    names = list(dict.fromkeys(row["way"] for model in models for row in model["rows"] if "cost" in row))
    with panels(path, len(models), 4, 4.5) as axes:
        for panel, model in zip(axes, models, strict=True):
            for row in (row for row in model["rows"] if "cost" in row):
                costs, i = row.get("by_frequency") or {1: row["cost"]}, names.index(row["way"])
                style = {"color": COLOURS[i % len(COLOURS)], "marker": "osD^v"[i // len(COLOURS)], "markersize": 4}
                panel.plot([int(f) for f in costs], list(costs.values()), label=row["way"], **style)
            panel.set(title=f"{model['model']}, batch {model['batch'][0]}", xlabel="Hutchinson frequency")
            panel.axhline(1, color="#999999", linewidth=0.8)
        axes[0].set_ylabel("time of a step / SGD's")
