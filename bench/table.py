"""Results as rows of text: the same columns on the screen and on the results page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import cases

COLUMNS = ("case", "backend", "time", "20-80 %", "GB/s", "time / floor", "launches", "host", "per byte vs AdamW fused")

Result = dict[str, Any]


def seconds(value: float | None) -> str:
    """Three digits and a unit."""
    if value is None:
        return "-"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:.3g} {unit}"
    raise AssertionError


def over_floor(result: Result, backend: str) -> float | None:
    """Our time over the floor's."""
    timings = result["seconds"]
    return timings[backend]["median"] / timings["floor"]["median"] if "floor" in timings else None


def per_byte(result: Result, backend: str) -> float | None:
    """Our time a byte over AdamW(fused)'s: its states are smaller in 16 bits, and it has no Hz to read."""
    timings = result["seconds"]
    if cases.ADAMW not in timings:
        return None
    return timings[backend]["median"] / result["bytes"] / (timings[cases.ADAMW]["median"] / result["adamw_bytes"])


def against(result: Result, backend: str, peer: str) -> float | None:
    """Return a peer's time over ours."""
    timings = result["seconds"]
    return timings[peer]["median"] / timings[backend]["median"] if peer in timings else None


def columns(results: list[Result]) -> list[str]:
    """Return the header: the fixed columns, and those peers that were timed at all."""
    timed = {name for result in results for name in result["seconds"]}
    return [*COLUMNS, *(peer for peer in cases.EVERYBODY if peer in timed)]


def rows(results: list[Result]) -> list[list[str]]:
    """One row a case and backend; cases that did not run have their reason in place of the time."""
    peers = columns(results)[len(COLUMNS) :]
    found = []
    for result in results:
        if "skipped" in result:
            found.append([result["case"], "-", f"skipped: {result['skipped']}"])
        for backend in () if "skipped" in result else result["backends"]:
            found.append(_row(result, backend, peers))
    return found


def _row(result: Result, backend: str, peers: list[str]) -> list[str]:
    if backend in result.get("missing_peers", {}):
        return [result["case"], backend, f"not run: {result['missing_peers'][backend]}"]
    if backend not in result["seconds"]:
        return [result["case"], backend, f"WRONG: error is {result['error_over_tolerance'][backend]:.3g} x tolerance"]
    timing = result["seconds"][backend]
    return [
        result["case"],
        backend,
        seconds(timing["median"]),
        f"{seconds(timing['p20'])} - {seconds(timing['p80'])}",
        f"{result['bytes'] / timing['median'] / 1e9:.1f}",
        _ratio(over_floor(result, backend)),
        str(timing.get("launches") or "-"),
        seconds(timing.get("host")),
        _ratio(per_byte(result, backend)),
        *(_ratio(against(result, backend, peer), "x") for peer in peers),
    ]


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a Markdown table whose first ``texts`` columns are text; a row may be shorter."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts)]
    lines += [[*row, *[""] * (len(header) - len(row))] for row in body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ratio(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def notes(results: list[Result]) -> list[str]:
    """Why peers are missing, one line a reason."""
    reasons = {(peer, reason) for result in results for peer, reason in result.get("missing_peers", {}).items()}
    return [f"{peer}: {reason}" for peer, reason in sorted(reasons)]
