"""Charts as SVG that stands in a page of HTML: lines over steps, with a band or stacked. Colors are
the page's (CSS variables --c0, --c1, ...), so that they follow its light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 230, 66, 14, 10, 30
COLORS = 11
"""Of the page, --c0 to --c9: as many as a step has phases."""
MOST = 400
"""Points of a line at most: of more, those next to each other are one, their mean."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span low .. high, about `count` of them."""
    if not high > low:
        low, high = (low, low + 1) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * n for n in (1, 2, 5, 10) if size * n >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as an axis or a tile shows it."""
    if value and (abs(value) >= 1e7 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def thinned(points: Points) -> list[tuple[float, float]]:
    """The points, or means of neighbours where there are more than MOST."""
    each = math.ceil(len(points) / MOST)
    groups = [points[i:i + each] for i in range(0, len(points), each or 1)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
            for group in groups]


class Axes:
    """Where steps and values lie in a chart."""

    def __init__(self, steps: Sequence[float], values: Sequence[float], log: bool = False) -> None:
        self.log = log
        values = [self._scaled(value) for value in values]
        self.y_ticks = (self._decades(min(values), max(values)) if log
                        else ticks(min(values), max(values)))
        self.x_low, self.x_high = min(steps), max(max(steps), min(steps) + 1)
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]

    @staticmethod
    def _decades(low: float, high: float) -> list[float]:
        first, last = math.floor(low), math.ceil(high)
        last = max(last, first + 1)
        each = math.ceil((last - first) / 5)
        return [float(i) for i in range(first, last + each, each)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, step: float) -> float:
        share = (step - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (self._scaled(value) - self.y_low) / (self.y_high - self.y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def drawn(self) -> str:
        """Grid, ticks and their labels."""
        parts = []
        for tick in self.y_ticks:
            y = self.y(10.0**tick if self.log else tick)
            label = number(10.0**tick if self.log else tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                         f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                         f'text-anchor="end">{label}</text>')
        for tick in ticks(self.x_low, self.x_high, 6):
            if self.x_low <= tick <= self.x_high and tick == int(tick):
                parts.append(f'<text x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" '
                             f'text-anchor="middle">{int(tick)}</text>')
        return "".join(parts)


def path(axes: Axes, points: Points) -> str:
    return " ".join(f"{'M' if i == 0 else 'L'}{axes.x(x):.1f} {axes.y(y):.1f}"
                    for i, (x, y) in enumerate(points))


def svg(label: str, inside: str) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
            f"{inside}</svg>")


def legend(names: Sequence[str], always: bool = False) -> str:
    """The names with their colors; nothing for one alone, unless it is always to be there."""
    if len(names) < 2 and not always:
        return ""
    return '<p class="legend">' + " ".join(
        f'<span><i style="background:var(--c{i % COLORS})"></i>{escape(name)}</span>'
        for i, name in enumerate(names)) + "</p>"


def lines(title: str, series: Mapping[str, Points], band: Sequence[tuple[float, float, float]] = (),
          log: bool = False, named: bool = False) -> str:
    """A chart of lines over steps. band: (step, low, high) around the first. log: by decades, of
    which only values above 0 are shown. named: one line alone has a legend too. Nothing where
    there is no point."""
    shown = {name: thinned([(x, y) for x, y in points if not log or y > 0])
             for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    low, high = thinned([(x, y) for x, y, _ in band]), thinned([(x, y) for x, _, y in band])
    everything = [point for points in (*shown.values(), low, high) for point in points]
    axes = Axes([x for x, _ in everything], [y for _, y in everything], log)
    area = (f'<path class="band" d="{path(axes, [*low, *reversed(high)])} Z"/>' if band else "")
    drawn = "".join(
        f'<path class="line" style="stroke:var(--c{i % COLORS})" d="{path(axes, points)}"/>'
        if len(points) > 1 else f'<circle style="fill:var(--c{i % COLORS})" r="3" '
        f'cx="{axes.x(points[0][0]):.1f}" cy="{axes.y(points[0][1]):.1f}"/>'
        for i, points in enumerate(shown.values()))
    return figure(title, legend(list(shown), named), axes.drawn() + area + drawn)


def stacked(title: str, series: Mapping[str, Points]) -> str:
    """A chart of areas, one above the other; all have the same steps."""
    shown = {name: thinned(points) for name, points in series.items()
             if any(y > 0 for _, y in points)}
    if not shown:
        return ""
    steps = [x for x, _ in next(iter(shown.values()))]
    below, areas = [0.0] * len(steps), []
    for points in shown.values():
        above = [low + y for low, (_, y) in zip(below, points, strict=True)]
        areas.append((below, above))
        below = above
    axes = Axes(steps, [0.0, *below])
    drawn = "".join(
        f'<path style="fill:var(--c{i % COLORS})" d="'
        f'{path(axes, edge(steps, above) + edge(steps, low)[::-1])} Z"/>'
        for i, (low, above) in enumerate(areas))
    return figure(title, legend(list(shown)), axes.drawn() + drawn)


def edge(steps: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
    """The upper or lower edge of an area; of one step alone a level line."""
    points = list(zip(steps, values, strict=True))
    return points if len(points) > 1 else [points[0], (points[0][0] + 1, points[0][1])]


def figure(title: str, above: str, inside: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{above}{svg(title, inside)}</figure>"
