"""Plots of a results file: GB/s over size, and time against the peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend
from matplotlib.axes import Axes
from PIL import Image

from .cases import EVERYBODY
from .table import Result, against

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#999999")
STYLE = {"svg.hashsalt": "adahessian_fused", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}


@contextmanager
def panels(path: Path, n: int, width: float, height: float, title: str = "") -> Iterator[Sequence[Axes]]:
    """Axes side by side, with one legend below all of them; saved when they have been drawn on."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, n, figsize=(width * n, height), layout="constrained", squeeze=False)
        yield axes[0]
        handles = {label: h for panel in axes[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles, loc="outside lower center", frameon=False, ncols=4, fontsize=8)
        figure.suptitle(title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=100)
        plt.close(figure)
    if path.suffix == ".png":
        Image.open(path).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def draw(data: dict[str, Any], stem: Path, suffixes: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Draw what the results allow into ``<stem>-roofline`` and ``<stem>-peers``; returns the files."""
    where, written = data["machine"].get("gpu") or data["machine"]["cpu"], []
    for name, plot in (("roofline", _roofline), ("peers", _peers)):
        for path in (stem.parent / f"{stem.name}-{name}.{suffix}" for suffix in suffixes):
            with panels(path, 1, 8, 4) as (axes,):
                drawn = plot(axes, data["results"])
                axes.set_title(f"{axes.get_title()}\n{where}", fontsize=9)
            if drawn:
                written.append(path)
            else:
                path.unlink()
    return written


def _rate(result: Result, name: str) -> float:
    return result["bytes"] / result["seconds"][name]["median"] / 1e9


def _backends(results: list[Result]) -> list[str]:
    """Ours, in the order they were asked for."""
    return list(dict.fromkeys(name for r in results for name in r["backends"] if name in r["seconds"]))


def _roofline(axes: Axes, results: list[Result]) -> bool:
    """GB/s of a Hessian step with b = 1 on a single tensor, over its size."""
    lines = 0
    for dtype, dash in (("float32", "-"), ("bfloat16", "--")):
        chosen = [r for r in results if (r["tensors"], r["block"], r["dtype"], r["curvature"]) == (1, 1, dtype, True)]
        chosen = [r for r in chosen if r.get("state_dtype", "default") == "default"]
        chosen.sort(key=lambda r: r["numel"])
        for number, name in enumerate((*_backends(results), "floor")):
            points = [(r["numel"], _rate(r, name)) for r in chosen if name in r["seconds"]]
            if points:
                axes.plot(*zip(*points, strict=True), dash, marker="o", color=COLOURS[number], label=f"{name}, {dtype}")
                lines += 1
    axes.set(xscale="log", xlabel="parameters", ylabel="GB/s", title="Hessian step with b = 1, one tensor")
    axes.set_ylim(bottom=0)
    return lines > 0


def _peers(axes: Axes, results: list[Result]) -> bool:
    """Time of every peer over ours, for the cases that have several."""
    chosen = [r for r in results if sum(peer in r["seconds"] for peer in EVERYBODY) > 1]
    backend = next(iter(_backends(chosen)), None)
    chosen = [r for r in chosen if backend in r["seconds"]]
    if not chosen:
        return False
    place, ticks = 0, []
    for result in chosen:
        present = [peer for peer in EVERYBODY if peer in result["seconds"]]
        ticks.append(place + (len(present) - 1) / 2)
        for peer in present:
            known = peer in axes.get_legend_handles_labels()[1]
            label = None if known else peer
            axes.bar(place, against(result, backend, peer), label=label, color=COLOURS[EVERYBODY.index(peer)])
            place += 1
        place += 1
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(ticks, [result["case"] for result in chosen], rotation=20)
    axes.set(yscale="log", ylabel=f"time / time of {backend}", title="Time of a step: peers over ours")
    return True
