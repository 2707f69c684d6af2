"""List, verify and prune a run's checkpoints."""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.checkpoint.discover import list_checkpoints, prune
from llamapro.checkpoint.layout import read_pointer
from llamapro.cli.run_argument import existing_run
from llamapro.errors import EXIT_CHECK_FAILED, CheckFailed, UserError
from llamapro.run_folder import RunFolder

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|verify|prune")
    listing = actions.add_parser("ls", help="show the checkpoints, newest first (compares sizes, not digests)")
    verify = actions.add_parser("verify", help="read every byte and compare it with its digest; 1 if any differs")
    pruning = actions.add_parser("prune", help="delete old checkpoints")
    for action in (listing, verify, pruning):
        action.add_argument("run", metavar="RUN", type=Path, help="the run folder")
    pruning.add_argument("--keep", type=int, default=2, help="newest complete checkpoints that stay (default 2)")
    pruning.add_argument("--keep-every-steps", type=int, help="also keep every multiple of this step")


def run(arguments: argparse.Namespace) -> int:
    """Run one of the three actions."""
    folder = existing_run(arguments.run)
    if arguments.action == "prune":
        return _prune(folder, arguments.keep, arguments.keep_every_steps)
    return _show(folder, digests=arguments.action == "verify")


def _show(folder: RunFolder, *, digests: bool) -> int:
    listed = list_checkpoints(folder.checkpoints, digests=digests)
    if not listed and digests:
        raise CheckFailed(f"{folder.checkpoints} holds no checkpoint")
    latest = read_pointer(folder.checkpoints)
    good = "verified" if digests else "complete"
    rows = [
        (
            entry.folder.name,
            entry.step,
            f"{entry.nbytes / MIB:.1f}",
            entry.problem or good,
            "latest" if entry.folder == latest else "",
        )
        for entry in listed
    ]
    console.table(str(folder.checkpoints), ("checkpoint", "step", "MiB", "state", ""), rows)
    return EXIT_CHECK_FAILED if digests and any(entry.problem for entry in listed) else 0


def _prune(folder: RunFolder, keep: int, keep_every_steps: int | None) -> int:
    for name, value in (("--keep", keep), ("--keep-every-steps", keep_every_steps)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: give at least 1")
    deleted = prune(folder.checkpoints, keep, keep_every_steps)
    console.result("\n".join(f"deleted {path}" for path in deleted) or "nothing to delete")
    return 0
