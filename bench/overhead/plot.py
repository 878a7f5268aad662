"""Cost over Hutchinson frequency, a panel for each model, as the paper's figure has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend

from ..plots import COLOURS, STYLE


def draw(data: dict[str, Any], path: Path) -> None:
    """One file; rows without off-steps are horizontal marks at f = 1."""
    models = data["models"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 4.5), layout="constrained", squeeze=False)
        names = list(dict.fromkeys(row["way"] for model in models for row in model["rows"] if "cost" in row))
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
        marks = {name: "osD^v"[i // len(COLOURS)] for i, name in enumerate(names)}
        for panel, model in zip(axes[0], models, strict=True):
            for row in model["rows"]:
                if "cost" not in row:
                    continue
                costs = row.get("by_frequency") or {1: row["cost"]}
                style = {"color": colours[row["way"]], "marker": marks[row["way"]], "markersize": 4}
                panel.plot([int(f) for f in costs], list(costs.values()), label=row["way"], **style)
            panel.set(title=f"{model['model']}, batch {model['batch'][0]}", xlabel="Hutchinson frequency")
            panel.axhline(1, color="#999999", linewidth=0.8)
        axes[0][0].set_ylabel("time of a step / SGD's")
        handles = {label: h for ax in axes[0] for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", frameon=False, ncols=4, fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
