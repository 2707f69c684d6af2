"""The strength curve as a picture: what is learned against what is lost, one point for each strength."""

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamapro.evaluation.strength import StrengthCurve
from llamapro.report.plots import INK, LINES, ON_WHITE, to_svg

_STYLE: dict[Any, Any] = {**ON_WHITE, "svg.hashsalt": "strengths"}


def draw_strengths(curve: StrengthCurve) -> str:
    """An `<svg>` on white: across, the change of loss on the general text; upwards, that on each other text.

    Points carry their strengths, bars are 95 % intervals; down and to the left is better.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        others = [name for name in curve.points[0].changes if name != curve.general]
        for number, name in enumerate(others):
            _draw_text(axes, curve, name, LINES[number % len(LINES)])
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(f"change of loss on {curve.general} (general), %")
        axes.set_ylabel("change of loss, %")
        axes.set_title("New blocks from strength 0 (the base) to 1 (as trained)", fontsize=10, loc="left", color=INK)
        axes.legend()
        return to_svg(figure, transparent=False)


def _draw_text(axes: Axes, curve: StrengthCurve, name: str, color: str) -> None:
    general = [point.changes[curve.general] for point in curve.points]
    learned = [point.changes[name] for point in curve.points]
    across, up = ([100 * change.fraction for change in changes] for changes in (general, learned))
    widths = [[100 * (change.half_width or 0.0) for change in changes] for changes in (general, learned)]
    axes.errorbar(
        across, up, xerr=widths[0], yerr=widths[1], label=name, color=color, marker="o", markersize=4, elinewidth=0.7
    )
    for point, x, y in zip(curve.points, across, up, strict=True):
        axes.annotate(f"{point.strength:g}", (x, y), xytext=(5, 5), textcoords="offset points", color=color)
