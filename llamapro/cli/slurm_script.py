"""Batch scripts for Slurm, from one template: those in launch/slurm are what it gives for the defaults.

This module asks Slurm nothing; `llamapro slurm` does.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from llamapro.config.engine import EngineConfig

Stage = Literal["pretrain", "sft"]
TITLES = {"pretrain": "Pretraining", "sft": "Instruction tuning"}
SIGNAL_SECONDS = 180
DATA_SIGNAL_SECONDS = 60
SLURM_EARLY_SECONDS = 60
"""Slurm may send a signal so much earlier than asked for."""
PROCESS_GROUP_SECONDS = 180
"""The longest that a rank outlives its watchdog."""
DATA_RESTARTS = 50
DATA_WAIT_SECONDS = 300
"""How long after the first MPI rank the last one may end."""
PYTHON = ".venv/bin/python"
PYTHON_IN_CONTAINER = "python"
APPTAINER_SUFFIX = ".sif"
COMMON_OPTIONS = ("--requeue", "--open-mode=append", "--output=slurm-%j.log")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class Allocation:
    """What is asked of Slurm.

    Attributes:
        time: limit as sbatch takes it, e.g. "24:00:00" or "3-12".
        signal_seconds: how long before the limit the tasks are told.
        folder: working directory of the job; None: the one it is submitted from.
        more: further options of sbatch, whole: "--qos=high".
    """

    nodes: int = 2
    gpus_per_node: int = 8
    cpus_per_task: int = 8
    time: str = "24:00:00"
    signal_seconds: int = SIGNAL_SECONDS
    name: str = "llamapro"
    partition: str | None = None
    account: str | None = None
    folder: Path | None = None
    more: Sequence[str] = ()

    def options(self) -> list[str]:
        """The script's #SBATCH options."""
        named = {"partition": self.partition, "account": self.account, "chdir": self.folder}
        return [
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.gpus_per_node}",
            f"--gpus-per-node={self.gpus_per_node}",
            f"--cpus-per-task={self.cpus_per_task}",
            f"--time={self.time}",
            *(f"--{option}={shlex.quote(str(value))}" for option, value in named.items() if value is not None),
            f"--signal=USR1@{self.signal_seconds}",
            *COMMON_OPTIONS,
            *self.more,
        ]


@dataclass(frozen=True)
class Container:
    """Where the tasks run: a .sif file under Apptainer, any other image under pyxis and enroot.

    Attributes:
        mounts: folders that it shows, besides the working directory, under their own names.
    """

    image: str
    mounts: Sequence[str] = ()

    @property
    def is_apptainer(self) -> bool:
        """Whether tasks start the container themselves, and not srun for them."""
        return self.image.endswith(APPTAINER_SUFFIX)

    def python(self) -> str:
        """Words of bash that start its Python."""
        if not self.is_apptainer:
            return PYTHON_IN_CONTAINER
        binds = " ".join(f"--bind {word(mount)}" for mount in self.mounts)
        start = f'apptainer exec --nv --bind "$PWD" --pwd "$PWD" {binds}'.rstrip()
        return f"{start} {word(self.image)} {PYTHON_IN_CONTAINER}"

    def options(self) -> str:
        """Options of srun, as words of bash, that start the tasks in it."""
        if self.is_apptainer:
            return ""
        mounts = "".join(f",{word(f'{mount}:{mount}')}" for mount in self.mounts)
        return f'--container-image={word(self.image)} --container-mounts="$PWD:$PWD"{mounts} --container-workdir="$PWD"'


def training_script(
    stage: Stage,
    allocation: Allocation,
    *,
    config: Path | None = None,
    script: Path | None = None,
    python: str = PYTHON,
    container: Container | None = None,
    step_timeout_minutes: float | None = None,
) -> str:
    """The batch script of a run.

    Args:
        config: the run's YAML file; None: the script's first argument.
        script: where it will lie, for the comment at its head.
        python: the interpreter, where there is no container.
        step_timeout_minutes: the run's; None: the default.
    """
    minutes = EngineConfig().step_timeout_minutes if step_timeout_minutes is None else step_timeout_minutes
    container_options = container.options() if container else ""
    return _render(
        "training.sbatch",
        options=allocation.options(),
        stage=stage,
        title=TITLES[stage],
        config=None if config is None else str(config),
        script=str(script),
        python=container.python() if container else word(python),
        container_options=container_options,
        in_container=' "${container[@]}"' if container_options else "",
        wait_seconds=round(60 * minutes) + PROCESS_GROUP_SECONDS,
        signal_seconds=allocation.signal_seconds,
    )


def data_script() -> str:
    """The batch script that tokenizes with MPI."""
    options = [
        "--job-name=llamapro-data",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--time=24:00:00",
        f"--signal=TERM@{DATA_SIGNAL_SECONDS}",
        *COMMON_OPTIONS,
    ]
    return _render(
        "data.sbatch",
        options=options,
        python=PYTHON,
        wait_seconds=DATA_WAIT_SECONDS,
        most_restarts=DATA_RESTARTS,
        signal_seconds=DATA_SIGNAL_SECONDS,
    )


def committed_scripts() -> dict[str, str]:
    """What launch/slurm holds, by file name."""
    stages: tuple[Stage, ...] = ("pretrain", "sft")
    scripts = {f"{stage}.sbatch": training_script(stage, Allocation()) for stage in stages}
    return scripts | {"data.sbatch": data_script()}


def seconds_of(time: str) -> int | None:
    """Seconds of a time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None: none of them."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def word(text: str) -> str:
    """One word of bash."""
    return shlex.quote(text)


def _render(template: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("llamapro.cli"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["word"] = word
    return environment.get_template(template).render(values, early_seconds=SLURM_EARLY_SECONDS).rstrip() + "\n"
