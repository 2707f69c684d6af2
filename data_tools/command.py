"""The command line of a build, for `llamapro data build` and `python -m data_tools.build` alike."""

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

from data_tools.build import build_dataset
from data_tools.chat.library import template_names
from data_tools.chat.options import INPUT_FORMATS, LOSS_ON, MODEL_TEMPLATE, ChatRequest
from data_tools.decontaminate import CONTAMINATED
from data_tools.fim import FimRequest
from data_tools.inspect import learned_of, samples_of
from data_tools.mpi import launched_ranks, run_under_mpi
from data_tools.pool import StartPool, usable_cores, worker_pool
from data_tools.request import BuildRequest
from data_tools.sealing import REJECTS_NAME
from data_tools.work import CONTAMINATION_NAME
from llamapro import console
from llamapro.data.dataset import Dataset
from llamapro.data.manifest import DatasetManifest

SECONDS_TO_SPEAK = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Build a dataset as one process with workers, or as the ranks of an MPI job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_tools.build", description=main.__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_arguments(parser)
    arguments = _parse_once(parser, argv)
    return console.guarded(lambda: run(arguments), debug=arguments.debug)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="jsonl, txt (also .gz, .zst), parquet; folders, globs",
    )
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="model folder or hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the dataset's folder")
    _add_chat_arguments(parser)
    parser.add_argument("--text-field", default="text", help="JSON field or parquet column (default: %(default)s)")
    parser.add_argument(
        "--split",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what one document of a plain text file is (default: %(default)s)",
    )
    parser.add_argument(
        "--heldout", type=float, default=0.01, metavar="SHARE", help="documents held out (default: %(default)s)"
    )
    parser.add_argument(
        "--dedup",
        choices=("none", "exact"),
        default="none",
        help="exact: of documents with equal texts (but for white space and Unicode form) only the first is kept "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="evaluation files (jsonl, txt, parquet): documents that share 13 words in a row with an item are found",
    )
    parser.add_argument(
        "--contaminated",
        choices=("drop", "report"),
        default="drop",
        help="leave such documents out, or only list them in contamination.jsonl (default: %(default)s)",
    )
    _add_fim_arguments(parser)
    parser.add_argument("--license", default="", help="of the text; recorded in the dataset and in exported models")
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="rows that may be unusable before the build fails (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores() if launched_ranks() == 1 else 1,
        metavar="N",
        help="processes; under mpiexec, of each rank (default: the cores; under mpiexec 1; here %(default)s)",
    )


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=INPUT_FORMATS,
        default="auto",
        help="what a row is: text, or a conversation in one of these forms (default: found by looking)",
    )
    parser.add_argument(
        "--chat-template",
        default=MODEL_TEMPLATE,
        metavar="TEMPLATE",
        help=f"how conversations become text: model (its own), {', '.join(template_names())}, or a Jinja file "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--loss-on",
        choices=LOSS_ON,
        default="assistant",
        help="what is learned of conversations: the assistant's messages, the last of them, or all tokens "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=None, metavar="N", help="cut longer conversations (default: none is cut)"
    )


def _add_fim_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fim-rate",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="documents to rearrange so that the model learns to fill in the middle, for code (default: %(default)s)",
    )
    parser.add_argument(
        "--fim-spm-rate",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="of these, those whose suffix comes before the prefix (default: %(default)s)",
    )
    parser.add_argument(
        "--fim-tokens",
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="PRE,SUF,MID[,EOT]",
        help="the tokenizer's tokens for it (default: found by their usual names)",
    )
    parser.add_argument(
        "--fim-variant", type=int, default=0, metavar="N", help="another number cuts elsewhere (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Build what the parsed options say."""
    if launched_ranks() == 1:
        return _build(arguments, worker_pool)
    return run_under_mpi(partial(_build, arguments))


def _build(arguments: argparse.Namespace, start_pool: StartPool) -> int:
    request = BuildRequest(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        text_field=arguments.text_field,
        split=arguments.split,
        heldout=arguments.heldout,
        license=arguments.license,
        max_reject_fraction=arguments.max_reject_fraction,
        workers=arguments.workers,
        dedup=arguments.dedup,
        decontaminate=tuple(arguments.decontaminate),
        contaminated=arguments.contaminated,
        chat=ChatRequest(arguments.format, arguments.chat_template, arguments.loss_on, arguments.max_tokens),
        fim=FimRequest(arguments.fim_rate, arguments.fim_spm_rate, tuple(arguments.fim_tokens), arguments.fim_variant),
    )
    start = time.monotonic()
    manifest = build_dataset(request, start_pool)
    _show_built(arguments.output, manifest, time.monotonic() - start)
    return 0


def _parse_once(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """All ranks read the same options; the first one alone shows help or what is wrong with them."""
    if console.process_rank() == 0:
        return parser.parse_args(argv)
    try:
        with Path(os.devnull).open("w") as silence, redirect_stdout(silence), redirect_stderr(silence):
            return parser.parse_args(argv)
    except SystemExit as ending:
        # A launcher ends all ranks with the first that fails: that must be the one that says why.
        time.sleep(SECONDS_TO_SPEAK if ending.code else 0)
        raise


def _show_built(output: Path, manifest: DatasetManifest, seconds: float) -> None:
    show_splits(output, manifest)
    for reason, count in manifest.rejects.items():
        listed = output / (CONTAMINATION_NAME if reason == CONTAMINATED else REJECTS_NAME)
        console.warning(f"{count:,} rows were left out: {reason} (listed in {listed})")
    if "chat_template" in manifest.options:
        _show_conversations(output)
    if manifest.splits["heldout"].documents == 0:
        console.warning(f"{output} has no held-out documents, so it can't be validated on; raise --heldout")
    tokens = sum(split.tokens for split in manifest.splits.values())
    console.info(f"{tokens:,} tokens in {seconds:.1f} s; fingerprint {manifest.fingerprint[:16]}")


def _show_conversations(output: Path) -> None:
    """Show what is learned of conversations, with one of them as an example."""
    dataset = Dataset.open(output)
    for label, value in learned_of(dataset):
        console.result(f"{label}: {value}")
    for sample in samples_of(dataset, 1)[:1]:
        console.result(f"\nfor example {sample.file}, row {sample.row + 1}:\n{sample.shown()}\n")


def show_splits(output: Path, manifest: DatasetManifest) -> None:
    """Show how much is in each split of a dataset."""
    sizes = {name: (split.documents, split.tokens, split.text_bytes) for name, split in manifest.splits.items()}
    rows = [[name, *(f"{size:,}" for size in found)] for name, found in sizes.items()]
    console.table(f"dataset {output}", ["split", "documents", "tokens", "bytes of text"], rows)
