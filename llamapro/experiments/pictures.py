"""Pictures of experiments, on white: what was learned against what was forgotten; scores over a sequence of tasks."""

from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamapro.experiments.results import AblationResults, Row, TraceResults
from llamapro.report.plots import INK, LINES, ON_WHITE, to_svg

# After as many variants as there are colours, the colours come again with the next of these.
MARKERS = ("o", "s", "^")
_STYLE: dict[Any, Any] = {**ON_WHITE, "svg.hashsalt": "experiment"}


def draw_ablation(results: AblationResults) -> str:
    """An `<svg>`: across, the change of loss on general text; upwards, on domain text; down and to the left is better.

    Small points are seeds, large ones their means with bars of one standard deviation.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, row) in enumerate(results.rows.items()):
            color, marker = LINES[number % len(LINES)], MARKERS[number // len(LINES) % len(MARKERS)]
            for trial in results.trials:
                if trial.variant == name:
                    axes.plot(100 * trial.general, 100 * trial.domain, ".", color=color, markersize=4, alpha=0.6)
            _draw_mean(axes, name, row, color, marker)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("change of loss on general text, %")
        axes.set_ylabel("change of loss on domain text, %")
        axes.set_title("Down: more was learned. Right: more was forgotten.", fontsize=10, loc="left", color=INK)
        axes.legend()
        return to_svg(figure, transparent=False)


def _draw_mean(axes: Axes, name: str, row: Row, color: str, marker: str) -> None:
    axes.errorbar(
        100 * row.general.mean,
        100 * row.domain.mean,
        xerr=100 * (row.general.deviation or 0.0),
        yerr=100 * (row.domain.deviation or 0.0),
        label=name,
        color=color,
        marker=marker,
        markersize=7,
        elinewidth=0.8,
        linestyle="none",
    )


def draw_trace(results: TraceResults) -> str:
    """An `<svg>` of two plots: OP and BWT after each task, the mean over seeds, one line for each method."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.0, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        after = range(1, len(results.tasks) + 1)
        for number, name in enumerate(results.rows):
            mine = [one for one in results.learned if one.method == name]
            color = LINES[number % len(LINES)]
            for axes, lists in ((left, [one.overall for one in mine]), (right, [one.transfer for one in mine])):
                means = [sum(values) / len(values) for values in zip(*lists, strict=True)]
                axes.plot(after, means, label=name, color=color, marker="o", markersize=4)
        for axes, title in ((left, "Overall performance"), (right, "Backward transfer")):
            axes.set_title(title, fontsize=10, loc="left", color=INK)
            axes.set_xticks(list(after), [f"{number}. {task}" for number, task in enumerate(results.tasks, 1)])
            axes.set_xlabel("after task")
        left.legend()
        return to_svg(figure, transparent=False)
