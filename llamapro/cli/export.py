"""Turn a run, a checkpoint or a delta into a plain Hugging Face model, or into a delta against its base."""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.export.export import export
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


def run(arguments: argparse.Namespace) -> int:
    """Export, and say what was written and proved."""
    summary = export(
        arguments.source,
        arguments.out,
        model=arguments.model,
        base=arguments.base,
        dtype=arguments.dtype,
        delta=arguments.delta,
        overwrite=arguments.overwrite,
    )
    at = f" at step {summary.step}" if summary.step is not None else ""
    kind = "delta" if arguments.delta else "model"
    console.result(
        f"{summary.folder}: {kind}{at}, {summary.bytes / GIB:.2f} GiB; {summary.unchanged} of {summary.tensors} "
        f"tensors are the base's, bit for bit; {summary.own} are its own"
    )
    console.info(f"to publish it: hf upload YOUR_NAME/MODEL {summary.folder}")
    return 0
