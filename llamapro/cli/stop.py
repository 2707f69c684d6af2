"""Ask a run to save and stop.

Writes the file STOP into the run folder. The run sees it at its next micro-step, saves and exits with code 75; starting
the same command again continues it. This works under every launcher and from every machine that sees the folder.
"""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.cli.run_argument import existing_run
from llamapro.errors import UserError
from llamapro.files.atomic import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the stop file."""
    folder = existing_run(arguments.run)
    try:
        write_atomic(folder.stop_file, "stop\n")
    except OSError as error:
        raise UserError(f"{folder.stop_file} can't be written: {error}") from error
    console.result(
        f"asked {arguments.run} to save and stop (the file {folder.stop_file}); delete it to change your mind"
    )
    return 0
