"""Write a run's report as one self-contained HTML page, RUN/report.html."""

import argparse
from pathlib import Path

from llamapro import console
from llamapro.report.page import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; one page each")


def run(arguments: argparse.Namespace) -> int:
    """Write the pages and say where they are."""
    for folder in arguments.runs:
        console.result(str(write_report(folder)))
    return 0
