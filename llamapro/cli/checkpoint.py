"""List, verify and prune a run's checkpoints."""

import argparse
from pathlib import Path

import orjson

from llamapro import console
from llamapro.checkpoint.discover import Listed, list_checkpoints, prune, scheduled_steps, set_aside
from llamapro.checkpoint.layout import read_pointer
from llamapro.cli.run_argument import existing_run
from llamapro.config.load import load_config
from llamapro.errors import EXIT_CHECK_FAILED, CheckFailed, UserError
from llamapro.run_folder import RunFolder

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|verify|prune")
    listing = actions.add_parser("ls", help="show the checkpoints, newest first (compares sizes, not digests)")
    verify = actions.add_parser("verify", help="read every byte and compare it with its digest; 1 if any differs")
    pruning = actions.add_parser(
        "prune", help="delete old checkpoints; reads every byte: a damaged one counts for none"
    )
    for action in (listing, verify, pruning):
        action.add_argument("run", metavar="RUN", type=Path, help="the run folder")
    for action in (listing, verify):
        action.add_argument("--json", action="store_true", help="one JSON object a line, for programs")
    pruning.add_argument("--keep", type=int, help="newest complete ones that stay (default: the run's checkpoint.keep)")
    pruning.add_argument(
        "--keep-every-steps",
        type=int,
        help="also keep every multiple of this step (default: the run's checkpoint.keep_every_steps)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run one of the three actions."""
    folder = existing_run(arguments.run)
    if arguments.action == "prune":
        return _prune(folder, arguments.keep, arguments.keep_every_steps)
    return _show(folder, digests=arguments.action == "verify", as_json=arguments.json)


def _show(folder: RunFolder, *, digests: bool, as_json: bool) -> int:
    listed = list_checkpoints(folder.checkpoints, digests=digests)
    if not listed and digests:
        raise CheckFailed(f"{folder.checkpoints} holds no checkpoint")
    (_print_lines if as_json else _print_table)(folder, listed, "verified" if digests else "complete")
    return EXIT_CHECK_FAILED if digests and any(entry.problem for entry in listed) else 0


def _print_table(folder: RunFolder, listed: list[Listed], good: str) -> None:
    latest = read_pointer(folder.checkpoints)
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
    for path in set_aside(folder.checkpoints):
        console.info(f"{path} was set aside as damaged; delete it when nobody needs to look at it any more")


def _print_lines(folder: RunFolder, listed: list[Listed], good: str) -> None:
    latest = read_pointer(folder.checkpoints)
    for entry in listed:
        facts = {
            "checkpoint": str(entry.folder),
            "step": entry.step,
            "bytes": entry.nbytes,
            "state": "damaged" if entry.problem else good,
            "problem": entry.problem,
            "latest": entry.folder == latest,
        }
        console.result(orjson.dumps(facts).decode())


def _prune(folder: RunFolder, keep: int | None, keep_every_steps: int | None) -> int:
    """What isn't said on the command line is as in the run's configuration."""
    for name, value in (("--keep", keep), ("--keep-every-steps", keep_every_steps)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: give at least 1")
    config = load_config(folder.config_file)
    deleted = prune(
        folder.checkpoints,
        config.checkpoint.keep if keep is None else keep,
        config.checkpoint.keep_every_steps if keep_every_steps is None else keep_every_steps,
        scheduled_steps(config),
        digests=True,
    )
    console.result("\n".join(f"deleted {path}" for path in deleted) or "nothing to delete")
    return 0
