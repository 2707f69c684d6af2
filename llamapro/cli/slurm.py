"""Write a batch script for Slurm that runs, saves, queues again and continues a run until it is done.

Where this machine has Slurm's commands, the cluster is asked first whether it would take the script
(`sbatch --test-only`), so a wrong partition, account, time or number of GPUs is noticed now.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from llamapro import console
from llamapro.cli.slurm_script import (
    SIGNAL_SECONDS,
    SLURM_EARLY_SECONDS,
    Allocation,
    Container,
    seconds_of,
    training_script,
)
from llamapro.config.load import load_config
from llamapro.errors import UserError
from llamapro.files.atomic import write_atomic

DEFAULTS = Allocation()
MOST_SIGNAL_SECONDS = 65535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", type=Path, metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="GPUs, and tasks, on each node")
    parser.add_argument(
        "--stage", choices=("pretrain", "sft"), default="pretrain", help="what to launch (default: %(default)s)"
    )
    parser.add_argument("--partition", metavar="P", help="partition (default: the cluster's)")
    parser.add_argument("--account", metavar="A", help="account that is charged (default: the user's)")
    parser.add_argument(
        "--time",
        default=DEFAULTS.time,
        metavar="T",
        help="time limit, e.g. 90 (minutes), 12:00:00, 2-00 (default: %(default)s); a longer run queues again",
    )
    parser.add_argument(
        "--cpus-per-task",
        type=int,
        default=DEFAULTS.cpus_per_task,
        metavar="C",
        help="cores per GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--signal-seconds",
        type=int,
        default=SIGNAL_SECONDS,
        metavar="S",
        help="how long before the time limit the run is told to save (default: %(default)s)",
    )
    parser.add_argument(
        "--container",
        metavar="IMAGE",
        help="run in it: a .sif file under Apptainer, any other image under pyxis and enroot",
    )
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="DIR",
        help="with --container: show it this folder too, besides the working directory; may be given again",
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, e.g. --sbatch=--qos=high; may be given again",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the script (default: RUN.sbatch)")
    parser.add_argument("--overwrite", action="store_true", help="replace the script")


def run(arguments: argparse.Namespace) -> int:
    """Write the script; returns 0."""
    _require_sense(arguments)
    config = load_config(arguments.config)
    script = arguments.output or Path(f"{arguments.config.stem}.sbatch")
    if script.exists() and not arguments.overwrite:
        raise UserError(f"{script} exists: give another --output, or --overwrite to replace it")
    text = training_script(
        arguments.stage,
        _allocation(arguments, config.run.folder.name),
        config=arguments.config,
        script=script,
        python=sys.executable,
        container=Container(arguments.container, arguments.mount) if arguments.container else None,
        step_timeout_minutes=config.engine.step_timeout_minutes,
    )
    console.info(_verdict(text))
    try:
        write_atomic(script, text)
    except OSError as error:
        raise UserError(f"--output {script} can't be written: {error}") from error
    console.result(f"{script}: {arguments.nodes * arguments.gpus_per_node} tasks; submit it: sbatch {script}")
    return 0


def _allocation(arguments: argparse.Namespace, name: str) -> Allocation:
    return Allocation(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time,
        signal_seconds=arguments.signal_seconds,
        name=re.sub(r"[^\w.-]+", "-", name) or DEFAULTS.name,
        partition=arguments.partition,
        account=arguments.account,
        folder=Path.cwd(),
        more=arguments.sbatch,
    )


def _require_sense(arguments: argparse.Namespace) -> None:
    """Refuse numbers and options that no script can be made of, all of them at once."""
    problems = [
        f"--{name.replace('_', '-')} {value}: give at least 1"
        for name in ("nodes", "gpus_per_node", "cpus_per_task")
        if (value := getattr(arguments, name)) < 1
    ]
    if not 1 <= arguments.signal_seconds <= MOST_SIGNAL_SECONDS:
        problems.append(f"--signal-seconds {arguments.signal_seconds}: give a number from 1 to {MOST_SIGNAL_SECONDS}")
    problems += _problems_of_time(arguments.time, arguments.signal_seconds)
    problems += [
        f"--sbatch {option!r}: give one whole option, e.g. --sbatch=--qos=high"
        for option in arguments.sbatch
        if not re.fullmatch(r"-\S.*", option)
    ]
    problems += [
        f"--{name} {value!r}: give its name"
        for name in ("partition", "account")
        if (value := getattr(arguments, name)) is not None and not re.fullmatch(r"\S+", value)
    ]
    if arguments.mount and not arguments.container:
        problems.append("--mount goes with --container; without one the tasks see every folder")
    if problems:
        raise UserError("\n".join(problems))


def _problems_of_time(time: str, signal_seconds: int) -> list[str]:
    seconds = seconds_of(time)
    if seconds is None:
        return [f"--time {time}: give minutes, MM:SS, HH:MM:SS, or D-HH, e.g. 90, 12:00:00, 2-00"]
    early = signal_seconds + SLURM_EARLY_SECONDS
    if seconds <= early:
        return [
            f"--time {time} is {seconds} s, and the signal to save comes up to {early} s before its end: the run would "
            "never begin; give more time, or less --signal-seconds"
        ]
    return []


def _verdict(text: str) -> str:
    """What the cluster says to the script, if there is one to ask.

    Raises:
        UserError: it refuses it.
    """
    if reason := _nobody_to_ask():
        return f"{reason}: whether the cluster takes the script shows when you submit it"
    done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, check=False)
    said = "; ".join(line.removeprefix("sbatch: ") for line in done.stderr.splitlines() if line.strip())
    if done.returncode != 0:
        raise UserError(f"the cluster refuses the script, so it was not written: {said}")
    return f"the cluster would take it: {said}"


def _nobody_to_ask() -> str:
    """Why no cluster can be asked from here; empty when one answers."""
    if shutil.which("sbatch") is None:
        return "no sbatch on this machine"
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False)
    said = (ping.stderr or ping.stdout).strip().rpartition("\n")[2]
    return f"no controller answers ({said})" if ping.returncode else ""
