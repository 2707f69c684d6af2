"""Turn a run, a checkpoint or a delta into a plain Hugging Face model, or into a delta against its base.

At a strength below 1 the new blocks do less than training made them do, down to nothing at 0, which is the base:
--strength names it, --max-general-increase measures which is the largest that keeps general text as good as asked for.
"""

import argparse
from pathlib import Path

import torch

from llamapro import console
from llamapro.cli.texts import (
    DEFAULT_SEQUENCE_LENGTH,
    DEFAULT_SEQUENCES,
    parse_text,
    require_names_once,
    require_tokenizer,
    row_length,
    run_configuration,
)
from llamapro.errors import UserError
from llamapro.evaluation.measure import Settings
from llamapro.evaluation.strength_bound import LEAST_ROWS, BoundedStrength
from llamapro.expansion.strength import described
from llamapro.export.bounded import bound_text, export_within_bound
from llamapro.export.export import AS_TRAINED, ExportSummary, export
from llamapro.export.source import find_trained, is_delta
from llamapro.export.strength import parse_strength
from llamapro.export.tensors import OUTPUT_DTYPES

GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("source", type=Path, metavar="RUN|CHECKPOINT|DELTA", help="a run's newest checkpoint is taken")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--model", type=Path, help="the model folder that was trained (default: the run's model.path)")
    parser.add_argument("--base", help="for a delta: the original base (folder or hub id), or the expanded model")
    parser.add_argument(
        "--dtype", choices=tuple(OUTPUT_DTYPES), default="keep", help="dtype written (default: the model folder's)"
    )
    parser.add_argument("--delta", action="store_true", help="write only what differs from the base")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is not empty")
    parser.add_argument(
        "--strength",
        metavar="S",
        help="strength of the new blocks from 0 (the base) to 1 (as trained), e.g. 0.75; of single blocks: 4=0.5,9=0",
    )
    parser.add_argument(
        "--max-general-increase",
        type=float,
        metavar="X",
        help="find the largest strength at which the loss on the --probe texts is at most this fraction above the "
        "base's, e.g. 0.003",
    )
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        metavar="NAME=DATASET[:SPLIT]",
        help="general text for --max-general-increase: half of its rows decide, half check; may be given several times",
    )
    parser.add_argument(
        "--probe-sequences",
        type=int,
        default=DEFAULT_SEQUENCES,
        help=f"rows of each probe at most, of the run's sequence length, else {DEFAULT_SEQUENCE_LENGTH} tokens "
        f"({DEFAULT_SEQUENCES})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export, and say what was written and proved."""
    _check_strength(arguments)
    if arguments.max_general_increase is not None:
        summary, found = _within_bound(arguments)
        _show_bound(found)
    else:
        summary = export(
            arguments.source,
            arguments.out,
            model=arguments.model,
            base=arguments.base,
            dtype=arguments.dtype,
            delta=arguments.delta,
            overwrite=arguments.overwrite,
            strength=AS_TRAINED if arguments.strength is None else parse_strength(arguments.strength),
        )
    _show(summary, "delta" if arguments.delta else "model")
    return 0


def _check_strength(arguments: argparse.Namespace) -> None:
    bound = arguments.max_general_increase
    if bound is not None and arguments.strength is not None:
        raise UserError("--strength names a strength and --max-general-increase finds one; give one of them")
    if (bound is None) == bool(arguments.probe):
        raise UserError("--max-general-increase is measured on text: give it together with --probe NAME=DATASET")
    if bound is not None and bound <= 0:
        raise UserError(f"--max-general-increase {bound:g}: give a fraction above 0, e.g. 0.003 for 0.3 %")
    if arguments.probe_sequences < LEAST_ROWS:
        raise UserError(f"--probe-sequences {arguments.probe_sequences}: at least {LEAST_ROWS} rows are needed")
    if bound is not None and is_delta(arguments.source):
        raise UserError(f"{arguments.source} is a delta, which has the strength that it was exported with")


def _within_bound(arguments: argparse.Namespace) -> tuple[ExportSummary, BoundedStrength]:
    probes = [parse_text(text, "--probe") for text in arguments.probe]
    require_names_once(probes, "--probe")
    folder = find_trained(arguments.source, arguments.model).model
    require_tokenizer(probes, folder)
    settings = Settings(
        sequence_length=row_length(None, run_configuration(arguments.source), folder),
        sequences=arguments.probe_sequences,
        precision="keep",
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    return export_within_bound(
        arguments.source,
        arguments.out,
        probes,
        settings,
        arguments.max_general_increase,
        model=arguments.model,
        dtype=arguments.dtype,
        delta=arguments.delta,
        overwrite=arguments.overwrite,
    )


def _show_bound(found: BoundedStrength) -> None:
    console.result(f"strength {found.strength:.10g} ({found.tried} tried): {bound_text(found)}")
    beyond = [name for name, increase in found.unseen.items() if increase.value > found.bound]
    if beyond:
        console.warning(
            f"on rows of {', '.join(beyond)} that had no part in the choice, the bound of {found.bound:.2%} is not "
            "kept; a longer probe (--probe-sequences) or a smaller bound gives a safer strength"
        )


def _show(summary: ExportSummary, kind: str) -> None:
    at = f" at step {summary.step}" if summary.step is not None else ""
    console.result(
        f"{summary.folder}: {kind}{at}, {summary.bytes / GIB:.2f} GiB; {summary.unchanged} of {summary.tensors} "
        f"tensors are the base's, bit for bit; {summary.own} are its own"
    )
    if summary.strengths:
        console.result(f"strength of the new blocks: {described(summary.strengths)}; of all others 1")
    console.info(f"to publish it: hf upload YOUR_NAME/MODEL {summary.folder}")
