"""Show a model's blocks: original or new, copied from where, which tensors were zeroed, trained or not."""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.errors import UserError
from llamapro.expansion.blocks import BlockRow, ModelBlocks, describe_blocks

COLUMNS = ("block", "kind", "source", "zeroed", "trained", "parameters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="a model folder")


def run(arguments: argparse.Namespace) -> int:
    """Show the table; returns the exit code."""
    if not arguments.model.is_dir():
        raise UserError(f"{arguments.model} is no folder")
    described = describe_blocks(arguments.model)
    console.table(str(arguments.model), COLUMNS, [_cells(row, described) for row in described.blocks])
    console.result(_summary(described))
    return 0


def _cells(row: BlockRow, described: ModelBlocks) -> tuple[str, ...]:
    if row.new:
        kind, source = "new", f"copy of base {row.base_index}"
    else:
        kind = "base" if row.added_by is None else f"base (added by expansion {row.added_by})"
        source = "" if described.record is None else f"base {row.base_index}"
    trained = "yes" if row.trained else "no"
    zeroed = ", ".join(name.removesuffix(".weight") for name in row.zeroed)
    return str(row.index), kind, source, zeroed, trained, f"{row.parameters:,}"


def _summary(described: ModelBlocks) -> str:
    total = described.other_parameters + sum(row.parameters for row in described.blocks)
    new = [row for row in described.blocks if row.new]
    share = sum(row.parameters for row in new)
    text = f"{total:,} parameters in {len(described.blocks)} blocks and the embedding, norm and head around them"
    if described.record is None:
        return f"{text}; never expanded"
    return f"{text}; {share:,} ({share / total:.1%}) in {len(new)} new blocks; base {described.record.base_id}"
