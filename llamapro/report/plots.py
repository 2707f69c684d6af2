"""Line plots as SVG that take their colours from the page around them, so that dark mode and print work.

matplotlib draws with the page's light colours; each use of one is followed by the CSS variable that overrides it
(`--ink`, `--grid`, `--line-1` …). Text stays text: it can be selected, searched and scaled.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID = "#1f2430", "#d5d9e0"
LINES = ("#2563c9", "#d0640a", "#0a7d45", "#9333a8", "#b3261e", "#5b6472")
_VARIABLES = {INK: "--ink", GRID: "--grid", **{color: f"--line-{number}" for number, color in enumerate(LINES, 1)}}
_MAX_POINTS = 2000
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One plot of a report: `series` maps a legend name to (step, value) points; units stand in the axis label."""

    key: str
    title: str
    unit: str
    series: Mapping[str, Series]
    markers: bool = False


def draw(plot: Plot) -> str:
    """The plot as an `<svg>` element without outside references, its ids made unique by the plot's key."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": plot.key}):
        figure = Figure(figsize=(6.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for color, (name, points) in zip(_cycle(len(plot.series)), plot.series.items(), strict=True):
            _draw_series(axes, name, thin(points), color, markers=plot.markers)
        axes.set_xlabel("step")
        axes.set_ylabel(plot.unit)
        if len(plot.series) > 1:
            axes.legend(ncols=2)
        return themed(to_svg(figure), plot.key, plot.title)


def thin(points: Series, limit: int = _MAX_POINTS) -> Series:
    """At most about `limit` points of a long series, the first and the last among them."""
    stride = max(1, -(-len(points) // limit))
    kept = list(points[::stride])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def to_svg(figure: Figure, *, transparent: bool = True) -> str:
    """The figure as one `<svg>` element: no XML header, no metadata, the same bytes every time."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=transparent, metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def themed(svg: str, key: str, title: str) -> str:
    """Let CSS variables override the colours, make ids unique to `key`, name the picture for screen readers."""
    for color, variable in _VARIABLES.items():
        svg = re.sub(rf"(fill|stroke): {color}", rf"\g<0>; \g<1>: var({variable})", svg)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    svg = re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _cycle(count: int) -> list[str]:
    return [LINES[index % len(LINES)] for index in range(count)]


def _draw_series(axes: Axes, name: str, points: Series, color: str, *, markers: bool) -> None:
    steps, values = [point[0] for point in points], [point[1] for point in points]
    marker = "o" if markers or len(points) == 1 else ""
    axes.plot(steps, values, label=name, color=color, linewidth=1.4, marker=marker, markersize=3.5)
