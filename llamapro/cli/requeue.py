"""Whether a job whose run ended with 75 may queue again: batch scripts ask, 0 is yes, 1 is no.

No when the run was asked to stop (`llamapro stop`), and when the job has ended so often in a row without a newer
checkpoint that something else must be wrong. The count is kept in the run folder; a job submitted anew begins at 0.
"""

import argparse
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from llamapro import console
from llamapro.config.load import load_config
from llamapro.errors import CheckFailed, UserError
from llamapro.files.atomic import write_atomic
from llamapro.run_folder import RunFolder

MOST_WITHOUT_PROGRESS = 10
JOB_VARIABLE = "SLURM_JOB_ID"
FLAGS_OF_THE_RUN = frozenset({"--debug"})


class Restarts(BaseModel):
    """How often a job has queued again without getting anywhere.

    Attributes:
        latest: newest checkpoint at the last time; empty: there was none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: str
    latest: str
    count: int

    @classmethod
    def now(cls, folder: RunFolder, job: str) -> "Restarts":
        """One more than the run folder says, or the first after a newer checkpoint or of another job."""
        latest = _text(folder.latest_pointer).strip()
        before = cls.read(folder)
        alike = before is not None and (before.job, before.latest) == (job, latest)
        return cls(job=job, latest=latest, count=before.count + 1 if before and alike else 1)

    @classmethod
    def read(cls, folder: RunFolder) -> "Restarts | None":
        """What the run folder says; None: nothing yet."""
        text = _text(folder.restarts_file)
        try:
            return cls.model_validate_json(text) if text else None
        except ValidationError as error:
            raise UserError(f"{folder.restarts_file} is damaged; delete it to count from 0: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", type=Path, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument(
        "overrides", nargs=argparse.REMAINDER, metavar="--section.field value", help="as given to the run"
    )


def run(arguments: argparse.Namespace) -> int:
    """Count, and answer."""
    overrides = [given for given in arguments.overrides if given not in FLAGS_OF_THE_RUN]
    folder = RunFolder(load_config(arguments.config, overrides).run.folder)
    if folder.stop_file.exists():
        console.info(f"not queued again: {folder.stop_file} asked the run to stop; submit it again to go on")
        return 1
    folder.create()
    restarts = Restarts.now(folder, os.environ.get(JOB_VARIABLE, ""))
    write_atomic(folder.restarts_file, f"{restarts.model_dump_json()}\n")
    where = restarts.latest or "none"
    if restarts.count > MOST_WITHOUT_PROGRESS:
        raise CheckFailed(
            f"not queued again: the run has ended {restarts.count} times in a row without a newer checkpoint than "
            f"{where}; see the job's log and {folder.logs}, then submit it again"
        )
    console.info(
        f"back to the queue, restart {restarts.count} of at most {MOST_WITHOUT_PROGRESS} from checkpoint {where}"
    )
    return 0


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
