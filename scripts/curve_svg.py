"""Line charts as SVG text, readable on light and on dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 44, 46

# Colours that tell apart for colour-blind readers too, darker on light pages and lighter on dark.
STYLE = """
  .page { fill: #ffffff }
  text { font: 12px system-ui, sans-serif; fill: #24292f }
  .title { font-weight: 600; font-size: 13px }
  .axis { stroke: #57606a; stroke-width: 1 }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .line { fill: none; stroke-width: 2.5 }
  .s0 { stroke: #0969da } .t0 { fill: #0969da } .s1 { stroke: #bc4c00 } .t1 { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 }
    text { fill: #e6edf3 }
    .axis { stroke: #8b949e } .grid { stroke: #30363d }
    .s0 { stroke: #58a6ff } .t0 { fill: #58a6ff } .s1 { stroke: #f0883e } .t1 { fill: #f0883e }
  }
"""


@dataclass(frozen=True)
class Line:
    """A labelled curve; x and y are positive."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves over one logarithmic x axis, y from zero."""

    title: str
    x_label: str
    lines: Sequence[Line]


def svg(charts: Sequence[Chart], description: str) -> str:
    """The charts beside each other."""
    width = WIDTH * len(charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        f'width="{width}" height="{HEIGHT}" role="img">',
        f"<title>{escape(description)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{width}" height="{HEIGHT}"/>',
    ]
    for index, chart in enumerate(charts):
        parts += [f'<g transform="translate({WIDTH * index} 0)">', *drawn(chart), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def drawn(chart: Chart) -> list[str]:
    points = [point for line in chart.lines for point in line.points]
    least, most = (pick(math.log2(x) for x, _ in points) for pick in (min, max))
    step = round_step(max(y for _, y in points))
    top = step * math.ceil(max(y for _, y in points) / step)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - least) / (most - least)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<text class="title" x="{LEFT}" y="20">{escape(chart.title)}</text>']
    for tick in range(round(top / step) + 1):
        _, y = at(2**least, tick * step)
        kind = "grid" if tick else "axis"
        parts.append(f'<path class="{kind}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        label = f"{tick * step:g}"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for exponent in range(math.ceil(least), math.floor(most) + 1):
        x, y = at(2**exponent, 0)
        label = f"{2 ** (exponent - 10)}k" if exponent >= 10 else str(2**exponent)
        parts.append(f'<path class="axis" d="M{x:.1f} {y:.1f}v5"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 19:.1f}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>"
    )
    for index, line in enumerate(chart.lines):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in line.points))
        parts.append(f'<polyline class="line s{index}" points="{path}"/>')
        # The legend: under the title, in the curve's colour and with a piece of it.
        x, y = LEFT + index * 170, 35
        parts.append(f'<path class="line s{index}" d="M{x} {y - 4}h18"/>')
        parts.append(f'<text class="t{index}" x="{x + 24}" y="{y}">{escape(line.label)}</text>')
    return parts


def round_step(most: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that makes four to nine of them."""
    power = 10 ** math.floor(math.log10(most))
    return next(power * part for part in (0.1, 0.2, 0.5, 1) if most / (power * part) <= 8)
