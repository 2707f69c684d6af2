"""Line plots as SVG that take their colours from the page around them, so that dark mode and print work.

matplotlib draws with the page's light colours; each use of one is followed by the CSS variable that overrides it
(`--ink`, `--grid`, `--line-1` …). Text stays text: it can be selected, searched and scaled.
"""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, SOFT, GRID = "#1f2430", "#5c6470", "#dfe2e7"
LINES = ("#2459b8", "#c25a06", "#0b7a48", "#8a2f9e", "#b3261e", "#546070")
_VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    GRID: "--grid",
    **{color: f"--line-{number}" for number, color in enumerate(LINES, 1)},
}
_DASHES = ("-", "--", ":")
_MAX_POINTS = 1000
_SMOOTHED_FROM = 60  # points
_SMOOTHING = 50  # the window is this part of a series
_COMMON: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}
# Of pictures that stand alone, outside a page.
ON_WHITE: dict[Any, Any] = {**_COMMON, "font.size": 10.0}
_STYLE: dict[Any, Any] = {
    **_COMMON,
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.spines.left": False,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.major.size": 0,
}

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One plot of a report: `series` maps a legend name to points; units stand in the axis labels.

    Attributes:
        markers: each point is drawn, because there are few.
        noisy: a long series is drawn thin, its running mean bold.
        across: what the horizontal axis is.
        marks: places on it that deserve a vertical line, each with whether it is grave.
    """

    key: str
    title: str
    unit: str
    series: Mapping[str, Series]
    markers: bool = False
    noisy: bool = False
    across: str = "step"
    marks: tuple[tuple[float, bool], ...] = ()


def draw(plot: Plot) -> str:
    """The plot as an `<svg>` element without outside references, its ids made unique by the plot's key."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": plot.key}):
        figure = Figure(figsize=(6.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for place, grave in plot.marks:
            axes.axvline(place, color=LINES[4] if grave else SOFT, linewidth=0.8, linestyle=":")
        for (color, dash), (name, points) in zip(_looks(), plot.series.items(), strict=False):
            _draw_series(axes, plot, name, points, color, dash)
        axes.set_xlabel(plot.across)
        axes.set_ylabel(plot.unit)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
        if len(plot.series) > 1:
            axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, handlelength=1.4)
        return themed(to_svg(figure), plot.key, plot.title)


def compact(value: float) -> str:
    """A tick's number in few characters: 12,000; 0.25; 5e−4."""
    if value and abs(value) < 1e-2:
        mantissa, exponent = f"{value:.4e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    elif abs(value) >= 1e6:
        text = f"{value / 1e6:,.10g}M"
    else:
        text = f"{value:,.10g}"
    return text.replace("-", "−")


def thin(points: Series, limit: int = _MAX_POINTS) -> Series:
    """At most about `limit` points of a long series: the lowest and the highest of each stretch, and both ends."""
    if len(points) <= limit:
        return points
    stretch = -(-2 * len(points) // limit)
    kept: list[tuple[float, float]] = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return [*kept, points[-1]]


def running_mean(points: Series) -> Series:
    """Each value replaced by the mean around it, over a fiftieth of the series; fewer values at its ends."""
    values = np.array([value for _, value in points])
    half = max(2, len(points) // (2 * _SMOOTHING))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(points))
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(points))
    means = (sums[end] - sums[first]) / (end - first)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def is_smoothed(plot: Plot) -> bool:
    """Whether a running mean is drawn of any of its series."""
    return plot.noisy and any(len(points) >= _SMOOTHED_FROM for points in plot.series.values())


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
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def _looks() -> Iterator[tuple[str, str]]:
    """Colours; once they are used up, the same ones dashed, then dotted, then all of it again."""
    while True:
        yield from ((color, dash) for dash in _DASHES for color in LINES)


def _draw_series(axes: Axes, plot: Plot, name: str, points: Series, color: str, dash: str) -> None:
    marker = "o" if plot.markers or len(points) == 1 else ""
    bold: dict[str, Any] = {
        "label": name,
        "color": color,
        "linestyle": dash,
        "linewidth": 1.5,
        "marker": marker,
        "markersize": 3.5,
    }
    if plot.noisy and len(points) >= _SMOOTHED_FROM:
        axes.plot(*_coordinates(thin(points)), color=color, linewidth=0.6, alpha=0.4 / len(plot.series) ** 0.5)
        points = running_mean(points)
    axes.plot(*_coordinates(thin(points)), **bold)


def _coordinates(points: Series) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]
