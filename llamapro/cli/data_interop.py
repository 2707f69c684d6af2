"""Datasets from and to Megatron-LM's .bin and .idx files: the sub-commands of `llamapro data` for it."""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.data.dataset import Dataset


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `llamapro data import-megatron`."""
    from data_tools.pool import usable_cores

    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    parser.add_argument("output", type=Path, metavar="OUT", help="the dataset's folder")
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder or hub id; it made these ids")
    parser.add_argument(
        "--heldout", type=float, default=0.01, metavar="SHARE", help="documents held out (default: %(default)s)"
    )
    parser.add_argument("--license", default="", help="of the text; recorded in the dataset and in exported models")
    parser.add_argument(
        "--workers", type=int, default=usable_cores(), metavar="N", help="processes (default: %(default)s, the cores)"
    )


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `llamapro data export-megatron`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="dataset folder")
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="of the PREFIX.bin and PREFIX.idx to write")
    parser.add_argument(
        "--split", choices=("train", "heldout"), default="train", help="which documents (default: %(default)s)"
    )


def import_megatron(arguments: argparse.Namespace) -> int:
    """Import a pair of files as a dataset."""
    from data_tools.command import show_splits
    from data_tools.interop.megatron_import import ImportRequest, import_megatron

    manifest = import_megatron(
        ImportRequest(
            prefix=arguments.prefix,
            tokenizer=arguments.tokenizer,
            output=arguments.output,
            heldout=arguments.heldout,
            license=arguments.license,
            workers=arguments.workers,
        )
    )
    show_splits(arguments.output, manifest)
    for reason, count in manifest.rejects.items():
        console.warning(f"{count:,} documents were left out: {reason}")
    if manifest.splits["heldout"].documents == 0:
        console.warning(f"{arguments.output} has no held-out documents, so it can't be validated on; raise --heldout")
    return 0


def export_megatron(arguments: argparse.Namespace) -> int:
    """Export a split of a dataset as a pair of files."""
    from data_tools.interop.megatron_export import export_megatron

    dataset = Dataset.open(arguments.folder)
    paths = export_megatron(dataset, arguments.prefix, arguments.split)
    split = dataset.split(arguments.split)
    console.result(f"{split.documents:,} documents, {split.tokens:,} tokens: {paths[0]} and {paths[1]}")
    return 0
