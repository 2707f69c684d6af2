"""What of this machine, or of all hosts of a job, stands in the way of training: exit code 0 when nothing does.

With `--distributed` it is run by a launcher, as training is: every host must have the same versions and GPUs, see the
run's folder, and be as fast as the others; what is amiss names the host.
"""

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamapro import console
from llamapro.engine.environment import prepare_environment
from llamapro.errors import EXIT_CHECK_FAILED, UserError

if TYPE_CHECKING:
    from llamapro.doctor.finding import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="look at all hosts together; run by a launcher: srun, torchrun, mpiexec, or deepspeed launch/doctor.py",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where runs write, seen by all hosts (default: working directory)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; returns 0, or 1 when something must be put right."""
    prepare_environment()  # before torch is imported: it reads it on import
    if not arguments.folder.is_dir():
        raise UserError(f"--folder {arguments.folder}: there is no such folder on {socket.gethostname()}")
    if arguments.distributed:
        return _show("the hosts of this job", _examine_job(arguments.folder, arguments.local_rank))
    return _show(f"this machine, {socket.gethostname()}", _examine_machine(arguments.folder))


def _examine_machine(folder: Path) -> "list[Finding]":
    from llamapro.doctor.finding import FAILED
    from llamapro.doctor.packages import check_packages

    packages = check_packages()
    if any(finding.what == "torch" and finding.state == FAILED for finding in packages):
        return packages  # nothing else can be asked
    from llamapro.doctor.machine import check_machine

    return [*packages, *check_machine(folder)]


def _examine_job(folder: Path, local_rank: int | None) -> "list[Finding]":
    from llamapro.config.engine import EngineConfig
    from llamapro.doctor.job import check_job
    from llamapro.engine.start import start_ranks, stop_ranks

    ranks = start_ranks(EngineConfig(startup_timeout_minutes=5), local_rank)
    try:
        return check_job(ranks, folder, socket.gethostname())
    finally:
        stop_ranks()


def _show(title: str, findings: "Sequence[Finding]") -> int:
    from llamapro.doctor.finding import COLUMNS, failures, table_rows

    console.table(title, COLUMNS, table_rows(findings))
    wrong = failures(findings)
    if not wrong:
        console.info("nothing stands in the way of training")
        return 0
    console.warning(f"to be put right: {', '.join(dict.fromkeys(finding.what for finding in wrong))}")
    return EXIT_CHECK_FAILED
