"""`python -m launch.quickstart`: expand a real small model, train the new blocks, and show what happened."""

import argparse
import sys
import time
from pathlib import Path

from llamapro import console
from llamapro.engine.environment import cuda_possible, usable_cores

from .plan import LAUNCH, Machine, Places, quickstart_steps
from .publish import publish, show
from .result import describe, gather
from .steps import run_steps

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
    run_steps(quickstart_steps(places, machine, steps))
    outcome = gather(places, machine)
    show(outcome)
    publish(outcome, places, checkout() if steps is None else None)
    console.result(f"\nfinished after {(time.monotonic() - start) / 60:.1f} minutes\n\n{next_commands(places)}")
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


def next_commands(places: Places) -> str:
    """The four commands that a reader may want next."""
    activate, longer = ". .venv/bin/activate", places.root / "longer"
    return "\n".join(
        [
            "what next:",
            f"  {activate}",
            f"  talk to the result   python -m launch.quickstart.chat {places.export}",
            "  your own text        llamapro data build --input your.jsonl --tokenizer "
            f"{places.base} --output data/yours",
            "  a longer run         deepspeed --num_gpus 2 launch/pretrain.py --config launch/recipes/quickstart.yaml "
            f"--run.folder {longer} --schedule.steps 1000",
            f"  the report           xdg-open {places.run / 'report.html'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
