"""Draws data_flow.svg, what a training step computes from what: ``python docs/figures/data_flow.py``."""

from __future__ import annotations

from pathlib import Path

WIDTH, HEIGHT = 860, 330
# Name: left, top, width, height, kind, lines of text.
BOXES = {
    "loss": (20, 60, 130, 50, "torch", ["loss"]),
    "g": (210, 60, 120, 50, "data", ["gradient g"]),
    "seed": (20, 160, 130, 60, "data", ["seed", "Hessian step"]),
    "rademacher": (210, 160, 120, 60, "op", ["rademacher", "z = ±1"]),
    "hz": (400, 100, 120, 60, "data", ["Hz", "(paper Eq. 5)"]),
    "diag": (400, 230, 150, 72, "op", ["hessian_diag", "block means of z·Hz,", "d/b numbers"]),
    "step": (610, 60, 230, 150, "op", [
        "adahessian_step", "draws z again; z·Hz (Eq. 6),", "block mean (Eq. 7),", "moving averages (Eq. 8, 9),",
        "bias correction, decay, update:", "one pass over p, g, Hz, m, v",
    ]),
}  # fmt: skip
# Points of a line, and whether it is dashed.
ARROWS = [
    ([(150, 85), (210, 85)], False),
    ([(330, 75), (610, 75)], False),
    ([(330, 98), (365, 98), (365, 118), (400, 118)], False),
    ([(150, 190), (210, 190)], False),
    ([(330, 190), (365, 190), (365, 142), (400, 142)], False),
    ([(520, 130), (610, 130)], False),
    ([(460, 160), (460, 230)], True),
    ([(550, 266), (725, 266), (725, 210)], True),
]
NOTES = [
    (152, 52, "autograd"),
    (400, 92, "autograd, once more"),
    (468, 185, "several probes"),
    (468, 203, "or micro-batches"),
    (20, 32, "On steps without curvature only the upper path is there: loss, g, update from m and the v of before."),
    (610, 300, "blue: autograd; green: fused kernels"),
]
COLOURS = {"torch": "#cfe2ff", "op": "#c9efd8", "data": "#f3f3f3"}


def svg() -> str:
    """The figure."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#111111">'
    )
    arrowhead = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#555555"/></marker></defs>'
    )
    parts = [head, "<title>Data flow of a training step</title>", arrowhead]
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>')
    for points, dashed in ARROWS:
        path = " ".join(f"{a},{b}" for a, b in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="#555555"{dash} marker-end="url(#head)"/>')
    for box in BOXES.values():
        parts += _box(*box)
    parts += [_text(x, y, note, colour="#1a4fa0" if note.startswith("autograd") else "#444444") for x, y, note in NOTES]
    return "\n".join([*parts, "</svg>", ""])


def _box(left: int, top: int, width: int, height: int, kind: str, lines: list[str]) -> list[str]:
    parts = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="6" fill="{COLOURS[kind]}" stroke="#777777"/>'
    ]
    first = top + height / 2 - 9 * (len(lines) - 1) + 4.5
    for i, line in enumerate(lines):
        bold = ' font-weight="bold"' if i == 0 else ""
        parts.append(_text(left + width / 2, first + 18 * i, line, extra=f' text-anchor="middle"{bold}'))
    return parts


def _text(x: float, y: float, text: str, *, colour: str = "#111111", extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}"{extra}>{text}</text>'


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg())
