"""Writes the report: Markdown with plots beside it."""

from __future__ import annotations

from pathlib import Path

from ..plan import Extent
from . import paper_page, pays_page
from .outcome import load
from .plots import draw, draw_sensitivity, draw_time


def write(results: Path, pages: Path, extent: Extent) -> list[Path]:
    """The pages from all results of a folder; returns what was written.

    Args:
        results: folder of the JSON files.
        pages: folder of ``paper.md``, ``when_does_it_pay.md`` and the plots, in ``paper/``.
        extent: what the runs were to be.
    """
    outcomes = {stem: o for stem, o in load(results, extent).items() if o.tables}
    if not outcomes:
        return []
    plots = pages / "paper"
    for stem, o in outcomes.items():
        draw(o, plots / f"{stem}.png")
        if "lr_scaling" in o.tables:
            draw_sensitivity(o, plots / f"{stem}-sensitivity.png")
    timed = [o for o in outcomes.values() if "cheap" in o.tables and o.results.step_times]
    if timed:
        draw_time(timed, plots / "time.png")
    written = []
    for name, text in (("paper", paper_page.page(outcomes)), ("when_does_it_pay", pays_page.page(timed))):
        path = pages / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(path)
    return written
