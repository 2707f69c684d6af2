"""The small before/after picture of a run: bits per byte of each held-out text, for a README."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamapro.errors import UserError
from llamapro.export.history import BeforeAfter, read_history
from llamapro.files.atomic import write_atomic
from llamapro.report.plots import to_svg

BEFORE, AFTER, INK, SOFT = "#9aa3b2", "#2563c9", "#1f2430", "#5b6472"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "result",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10.0,
}
_BAR = 0.36


def write_result_picture(run: Path, svg_path: Path) -> None:
    """Draw each validation set's bits per byte before and after training, on white, readable in any theme.

    Raises:
        UserError: the run has not been validated before and after.
    """
    scores = read_history(run).before_after()
    if not scores:
        raise UserError(f"{run} has no validation before and after training, so there is nothing to draw")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.7 + 0.75 * len(scores)), layout="constrained")
        _draw(figure.add_subplot(), scores)
        svg = to_svg(figure, transparent=False)
    svg_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(svg_path, svg)


def _draw(axes: Axes, scores: Sequence[BeforeAfter]) -> None:
    for row, score in enumerate(scores):
        _draw_bar(axes, row - _BAR / 2, score.before.bits_per_byte, BEFORE, "")
        _draw_bar(axes, row + _BAR / 2, score.after.bits_per_byte, AFTER, f" ({score.change:+.1%})")
    axes.set_yticks(range(len(scores)), [score.name for score in scores], color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(max(score.before.bits_per_byte, score.after.bits_per_byte) for score in scores))
    axes.set_title("Bits per byte of held-out text: before (grey), after (blue)", color=INK, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_bar(axes: Axes, position: float, value: float, color: str, note: str) -> None:
    axes.barh(position, value, height=_BAR, color=color)
    axes.text(value, position, f" {value:.3f}{note}", va="center", color=INK if note else SOFT)
