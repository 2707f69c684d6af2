"""`python -m launch.quickstart`: expand a real small model, train the new blocks, and show what happened."""

import argparse
import sys
import time
from pathlib import Path

from llamapro import console
from llamapro.engine.environment import cuda_possible, usable_cores
from llamapro.experiments.steps import make_all

from .plan import LAUNCH, Machine, Places, quickstart_steps
from .publish import publish, show
from .result import describe, gather

ROOT = Path("work/quickstart")
CPU_RANKS = MOST_GPU_RANKS = 2


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.quickstart", description=__doc__)
    parser.add_argument("--steps", type=int, metavar="N", help="train only N steps and evaluate on less text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: give a positive number of steps")
    return console.guarded(lambda: quickstart(arguments.steps), debug=arguments.debug)


def quickstart(steps: int | None) -> int:
    """Do what is not done yet and show the result; returns the exit code."""
    start = time.monotonic()
    places = Places(ROOT, ROOT if steps is None else ROOT / f"short-{steps}")
    machine = this_machine()
    console.info(f"quickstart on {describe(machine)}, {usable_cores()} cores; everything goes to {places.outcome}/")
    make_all(quickstart_steps(places, machine, steps))
    outcome = gather(places, machine)
    show(outcome)
    publish(outcome, places, checkout() if steps is None else None)
    minutes = (time.monotonic() - start) / 60
    console.result(f"\nfinished after {minutes:.1f} minutes\n\n{where(places)}\n\n{next_commands(places)}")
    return 0


def this_machine() -> Machine:
    """The GPUs, at most two, where there are any; two CPU processes elsewhere."""
    if not cuda_possible():
        return Machine(CPU_RANKS, has_gpu=False, environment={"DS_ACCELERATOR": "cpu"})
    import torch  # seconds to import, and not needed without a GPU

    return Machine(min(torch.cuda.device_count(), MOST_GPU_RANKS), has_gpu=True, environment={})


def checkout() -> Path | None:
    """The working copy whose README shows the result; None in an installed copy."""
    return LAUNCH.parent if (LAUNCH.parent / "README.md").is_file() else None


def where(places: Places) -> str:
    """What lies where, one thing a line."""
    lines = ["where everything lies:"]
    for what, place in (
        ("the base model", places.base),
        ("the expanded model, untrained", places.expanded),
        ("the datasets", places.dataset("*")),
        ("the run: log, checkpoints, report", places.run),
        ("the measurements", places.evaluation),
        ("the result, a plain model", places.export),
    ):
        lines.append(f"  {what:<34} {place}")
    return "\n".join(lines)


def next_commands(places: Places) -> str:
    """The four commands that a reader may want next."""
    pretrain = "deepspeed --num_gpus 2 launch/pretrain.py --config launch/recipes/quickstart.yaml"
    lines = ["what next, after `. .venv/bin/activate`:"]
    for what, command in (
        ("talk to the result", f"python -m launch.quickstart.chat {places.export}"),
        ("your own text", f"llamapro data build --input your.jsonl --tokenizer {places.base} --output data/yours"),
        ("a longer run", f"{pretrain} --run.folder {places.root / 'longer'} --schedule.steps 1000"),
        ("the report", f"xdg-open {places.run / 'report.html'}"),
    ):
        lines.append(f"  {what:<20} {command}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
