"""`evaluate --strengths`: what the new blocks gain and cost at strengths between 0 (the base) and 1 (as trained)."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from llamapro import console
from llamapro.errors import UserError
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.results import Change
from llamapro.evaluation.stored import write_stored
from llamapro.evaluation.strength import STRENGTHS_NAME, DialledModel, StrengthCurve, measure_strengths
from llamapro.evaluation.variants import Variants
from llamapro.expansion.record import read_record
from llamapro.export.strength import parse_strengths
from llamapro.files.atomic import write_atomic
from llamapro.report.strengths import draw_strengths

PICTURE_NAME = "strengths.svg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `evaluate` takes for it."""
    parser.add_argument(
        "--strengths",
        metavar="A,B,…",
        help=f"also measure with the new blocks at these strengths, e.g. 0,0.25,0.5,0.75,1; writes {STRENGTHS_NAME} "
        f"and {PICTURE_NAME}",
    )
    parser.add_argument("--general", metavar="NAME", help="for --strengths: the text that stands for what must be kept")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises:
    UserError: one of the two is given without the other, or a strength is none.
    """
    if (arguments.strengths is None) != (arguments.general is None):
        raise UserError("--strengths sets gain against loss: give both --strengths and --general, the text to keep")
    if arguments.strengths is not None:
        parse_strengths(arguments.strengths)


def dialled_model(
    arguments: argparse.Namespace, folder: Path, sets: Sequence[TextSet], settings: Settings
) -> DialledModel | None:
    """The model to turn, nothing measured yet; None when no strengths are asked for.

    Raises:
        UserError: the model was never expanded, no strength leads to its base, or there is nothing to set against the
            general text.
    """
    if arguments.strengths is None:
        return None
    names = [text.name for text in sets]
    if arguments.general not in names or len(names) < 2:
        raise UserError(
            f"--general {arguments.general!r}: give the name of one of at least two texts ({', '.join(names)}); it "
            "stands for what must be kept, the others for what was learned"
        )
    record = read_record(folder)
    if record is None:
        raise UserError(f"--strengths: {arguments.model} was never expanded, so it has no new blocks")
    return DialledModel(Variants(folder, settings, arguments.output), record)


def evaluate_strengths(arguments: argparse.Namespace, model: DialledModel, sets: Sequence[TextSet]) -> None:
    """Measure, print the table, write the curve and its picture into the output folder."""
    curve = measure_strengths(model, arguments.model, sets, parse_strengths(arguments.strengths), arguments.general)
    write_stored(arguments.output / STRENGTHS_NAME, curve)
    write_atomic(arguments.output / PICTURE_NAME, draw_strengths(curve))
    _show(curve)


def _show(curve: StrengthCurve) -> None:
    names = [curve.general, *(name for name in curve.points[0].sets if name != curve.general)]
    rows = [
        (f"{point.strength:g}", *(_cell(point.sets[name].loss, point.changes[name]) for name in names))
        for point in curve.points
    ]
    columns = ("strength", *(f"{name}{' (general)' if name == curve.general else ''}" for name in names))
    blocks = ", ".join(map(str, curve.blocks))
    title = f"{curve.model}, blocks {blocks}: loss in nats/token, change against strength 0 (the base), intervals 95 %"
    console.table(title, columns, rows)


def _cell(loss: float, change: Change) -> str:
    width = "" if change.half_width is None else f" ± {100 * change.half_width:.2f}"
    return f"{loss:.4f} ({100 * change.fraction:+.2f}{width} %)"
