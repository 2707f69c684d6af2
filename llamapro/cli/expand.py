"""Grow a model: copies of some of its blocks, made inactive so that the model still computes exactly the same.

The two projections of each copy that write to the residual stream are zero; training only the copies then teaches the
model new things while every original weight stays what it was. The output is a plain Hugging Face folder plus
expansion.json, which says what is new.
"""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.expansion.expand import expand
from llamapro.expansion.layout import parse_placement
from llamapro.expansion.plan import WRITTEN_DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("base", metavar="BASE", help="the base model: a folder or a hub id such as org/name")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--new-blocks", type=int, metavar="N", help="how many blocks to add in all")
    parser.add_argument(
        "--copies-per-group", type=int, default=1, metavar="P", help="copies after each group of blocks (default 1)"
    )
    parser.add_argument(
        "--placement",
        default="interleaved",
        metavar="interleaved|suffix|prefix|I,J,K",
        help="after each group (default), after the last block, before the first, or a copy after each listed block",
    )
    parser.add_argument("--dtype", choices=tuple(WRITTEN_DTYPES), default="keep", help="of all tensors (default keep)")
    parser.add_argument("--base-id", help="what the record calls the base (default: the hub id or the folder's name)")
    parser.add_argument("--allow-pickle", action="store_true", help="convert a base that has only .bin weights")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")


def run(arguments: argparse.Namespace) -> int:
    """Expand; returns the exit code."""
    record = expand(
        arguments.base,
        arguments.out,
        new_blocks=arguments.new_blocks,
        copies_per_group=arguments.copies_per_group,
        placement=parse_placement(arguments.placement),
        dtype=arguments.dtype,
        base_id=arguments.base_id,
        overwrite=arguments.overwrite,
        allow_pickle=arguments.allow_pickle,
    )
    new, sources = (", ".join(map(str, indices)) for indices in (record.new_blocks, record.source_blocks))
    console.result(
        f"{arguments.out}: {record.base_blocks} → {record.blocks} blocks, new {new} (copies of base blocks {sources}); "
        f"{len(record.zeroed)} tensors zeroed, {len(record.base_tensors)} base tensors unchanged"
    )
    return 0
