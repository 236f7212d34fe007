"""The picture of `jspec project`: where speculation pays, by drafted tokens and acceptance. Written
as SVG by hand, for it needs no more than rectangles and text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from xml.sax.saxutils import escape

from jspec.scale.project_report import FLOOR, Projected

CELL, ROW, LINE = 44, 30, 18
LEFT, FEWEST, GAP, RIGHT = 104, 8, 64, 48
"""Of a panel, whose labels are left of it; columns that it has room for at least; what is between
two, and beside the last."""
GREY = "#57606a"
SLOW, EVEN, FAST = (214, 139, 84), (250, 250, 248), (49, 104, 160)
"""Colors of half as fast, as fast, and `FASTEST` times as fast."""
FASTEST = 4.0


def picture(projected: Projected) -> str:
    """Two panels, rollout and step: times faster than without a draft, in every cell."""
    panel = CELL * max(FEWEST, len(projected.ks))
    lefts = (LEFT, LEFT + panel + GAP)
    width, late = lefts[1] + panel + RIGHT, bool(projected.projection.lag)
    title = f"{projected.policy} on {projected.on}"
    basis = (f"Projected, with measured {projected.measured}." if projected.measured
             else f"Projected: nothing here was measured. Seconds are a floor, {FLOOR}.")
    about = textwrap.wrap(basis, width // 7)
    top = 78 + LINE * len(about)
    height = top + ROW * len(projected.rows) + 92 + LINE * late
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\" font-size=\"13\" "
        'fill="#1f2328">',
        f"  <title>Where speculation pays: {escape(title)}, projected</title>",
        f'  <rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(24, 28, f"{title}: times faster than without a draft", 16, "bold"),
        *(_text(24, 50 + LINE * i, line, 12, color=GREY) for i, line in enumerate(about))]
    for left, what in zip(lefts, ("rollout", "step"), strict=True):
        lines += _panel(projected, left, top, what)
    lines += _legend(projected, width, height)
    return "\n".join([*lines, "</svg>", ""])


def _panel(projected: Projected, left: int, top: int, what: str) -> Iterator[str]:
    rows = list(zip(projected.levels, projected.rows, strict=True))[::-1]  # the highest on top
    bottom = top + ROW * len(rows)
    yield _text(left, top - 12, what, 14, "bold")
    for i, (level, row) in enumerate(rows):
        y = top + ROW * i
        yield _text(left - 8, y + 20, f"{level:.3g}", anchor="end")
        best = max((getattr(cell, what) for cell in row if cell), default=None)
        for j, cell in enumerate(row):
            if cell is not None:
                yield from _cell(left + CELL * j, y, getattr(cell, what), best)
    for j, k in enumerate(projected.ks):
        yield _text(left + CELL * (j + 0.5), bottom + 18, str(k), anchor="middle")
    middle = left + CELL * len(projected.ks) / 2
    yield _text(middle, bottom + 36, "tokens drafted a cycle, k", 12, "normal", GREY, "middle")
    x, y = left - 52, (top + bottom) / 2
    yield (f'  <text x="{x}" y="{y:g}" font-size="12" fill="{GREY}" text-anchor="middle" '
           f'transform="rotate(-90 {x} {y:g})">{_axis(projected)}</text>')
    yield _border(projected, left, bottom - 1, what)


def _axis(projected: Projected) -> str:
    return "acceptance of a draft" if projected.level == "acceptance" else projected.level


def _cell(x: float, y: float, speed: float, best: float | None) -> Iterator[str]:
    red, green, blue = color(speed)
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 140
    yield (f'  <rect x="{x:g}" y="{y:g}" width="{CELL - 2}" height="{ROW - 2}" rx="3" '
           f'fill="#{red:02x}{green:02x}{blue:02x}"/>')
    shown = f"{speed:.2f}" if speed < 9.995 else f"{speed:.1f}"
    yield _text(x + (CELL - 2) / 2, y + 19, shown, 12, "bold" if speed == best else "normal",
                "#ffffff" if dark else "#1f2328", "middle")


def color(speed: float) -> tuple[int, ...]:
    """Of a cell: from `SLOW` over `EVEN` to `FAST`, by the logarithm."""
    end, most = (FAST, FASTEST) if speed >= 1 else (SLOW, 2.0)
    share = min(1.0, abs(math.log(speed)) / math.log(most))
    return tuple(round(a + share * (b - a)) for a, b in zip(EVEN, end, strict=True))


def _border(projected: Projected, left: int, bottom: int, what: str) -> str:
    """The line between the cells that are faster and those that are not."""
    points: list[str] = []
    for j, column in enumerate(zip(*projected.rows, strict=True)):  # the lowest level first
        slower = sum(cell is not None and getattr(cell, what) < 1 for cell in column)
        points += [f"{left - 1 + CELL * (j + side)} {bottom - ROW * slower}" for side in (0, 1)]
    return f'  <path d="M{" L".join(points)}" fill="none" stroke="#1f2328" stroke-width="2"/>'


def _legend(projected: Projected, width: int, height: int) -> Iterator[str]:
    found = projected.projection
    y = height - 22 - LINE * bool(found.lag)
    yield f'  <path d="M24 {y - 4} H48" stroke="#1f2328" stroke-width="2"/>'
    yield _text(56, y, "speculation pays above this line; the best k of each row is bold", 12)
    late = f"; generation and the rest at the same time, lag {found.lag}" if found.lag else ""
    said = f"without a draft generation takes {found.share:.0%} of a step{late}"
    yield _text(width - 24, height - 22, said, 12, "normal", GREY, "end")


def _text(x: float, y: float, text: str, size: int = 13, weight: str = "normal", color: str = "",
          anchor: str = "start") -> str:
    more = (f' font-weight="{weight}"' * (weight != "normal") + f' fill="{color}"' * bool(color)
            + f' text-anchor="{anchor}"' * (anchor != "start"))
    return f'  <text x="{x:g}" y="{y:g}" font-size="{size}"{more}>{escape(text)}</text>'


