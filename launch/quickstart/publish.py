"""Shows the result: a table on the terminal, and a table and a picture for the README."""

import io
import re
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llamapro import console
from llamapro.errors import UserError
from llamapro.files.atomic import write_atomic

from .plan import Places
from .result import Outcome, Score

BEGIN, END = "<!-- quickstart result: begin -->", "<!-- quickstart result: end -->"
PICTURE = "quickstart.svg"
BEFORE_COLOR, AFTER_COLOR, INK = "#9aa5b1", "#2f6fde", "#6b7280"  # readable on light and dark pages
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quickstart",
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
_REGION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)


def show(outcome: Outcome) -> None:
    """Print the summary table and what was proved."""
    columns = ("held-out text", "before", "after", "change", "tokens")
    console.table("bits per byte, lower is better", columns, [_row(score) for score in outcome.scores])
    console.result(facts(outcome))
    for sample in outcome.samples:
        text = " ".join(sample["continuation"].split())
        console.result(f"  {Path(sample['model']).name}: {sample['prompt']} {text}")


def facts(outcome: Outcome) -> str:
    """One paragraph: what ran, and what was proved."""
    return (
        f"{outcome.base_blocks} → {outcome.blocks} blocks, {len(outcome.losses)} steps, {outcome.tokens:,} tokens in "
        f"{outcome.training_minutes:.1f} minutes on {outcome.machine}. "
        f"All {outcome.base_tensors} tensors of the base are bit-identical in the result."
    )


def publish(outcome: Outcome, places: Places, checkout: Path | None) -> None:
    """Write result.md and its picture into the outcome's folder and, with a checkout, into README.md and docs/."""
    picture = draw(outcome)
    write_atomic(places.outcome / PICTURE, picture)
    write_atomic(places.outcome / "result.md", markdown(outcome, PICTURE) + "\n")
    if checkout is not None:
        (checkout / "docs").mkdir(exist_ok=True)
        write_atomic(checkout / "docs" / PICTURE, picture)
        readme = checkout / "README.md"
        write_atomic(readme, replace_region(readme.read_text(), markdown(outcome, f"docs/{PICTURE}"), readme))


def markdown(outcome: Outcome, picture: str) -> str:
    """The result as a Markdown table, a paragraph and a picture."""
    lines = ["| held-out text | bits per byte before | after | change |", "| --- | --- | --- | --- |"]
    for score in outcome.scores:
        title, before, after, change = _row(score)[:4]
        lines.append(f"| {title} | {before} | {after} | {change} |")
    return "\n".join(
        [*lines, "", facts(outcome), "", f"![bits per byte before and after, and training loss]({picture})"]
    )


def replace_region(text: str, content: str, source: Path) -> str:
    """`text` with the marked region's content replaced.

    Raises:
        UserError: the markers are not there exactly once.
    """
    replaced, count = _REGION.subn(lambda _: f"{BEGIN}\n{content}\n{END}", text)
    if count != 1:
        raise UserError(f"{source}: expected one region from {BEGIN!r} to {END!r}, found {count}; restore the file")
    return replaced


def draw(outcome: Outcome) -> str:
    """The picture as SVG: bars of bits per byte before and after; the training loss by step."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        bars, curve = figure.subplots(1, 2)
        _draw_bars(bars, outcome)
        _draw_curve(curve, outcome)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _draw_bars(axes: Axes, outcome: Outcome) -> None:
    for number, score in enumerate(outcome.scores):
        pairs = ((-0.2, score.before, BEFORE_COLOR, "before"), (0.2, score.after, AFTER_COLOR, "after"))
        for offset, measured, color, label in pairs:
            value = measured.bits_per_byte
            bar = axes.bar(number + offset, value, 0.36, color=color, label=label if number == 0 else None)
            axes.bar_label(bar, fmt="%.3f", padding=2)
    axes.set_xticks(range(len(outcome.scores)), [score.title.replace(" (", "\n(") for score in outcome.scores])
    axes.set_ylabel("bits per byte")
    axes.margins(y=0.15)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _draw_curve(axes: Axes, outcome: Outcome) -> None:
    axes.plot([step for step, _ in outcome.losses], [loss for _, loss in outcome.losses], color=AFTER_COLOR)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")


def _row(score: Score) -> tuple[str, ...]:
    before, after, half_width = score.before, score.after, score.change.half_width
    change = f"{score.change.fraction:+.1%}" + ("" if half_width is None else f" ± {half_width:.1%}")
    bits = (f"{before.bits_per_byte:.3f}", f"{after.bits_per_byte:.3f}", change)
    return (score.title, *bits, f"{after.tokens:,}")
