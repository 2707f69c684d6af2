"""The `llamapro` command: finds the sub-command's module, runs it, and turns typed errors into messages and exit codes.

A sub-command is a module `llamapro/cli/<name>.py` with `add_arguments(parser)` and `run(arguments) -> int`; it is
imported only when it is called, so `llamapro expand` starts without torch. Its docstring's first line is its help.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

import llamapro
from llamapro import console

COMMANDS = {
    "expand": "grow a model by zero-initialized copies of some of its blocks",
    "verify": "prove what in a model is unchanged, and that fresh blocks are the identity",
    "inspect": "show a model's blocks: which are new, copied from where, trained or not",
    "data": "build, pack, verify and inspect datasets",
    "plan": "parameters, FLOPs, memory and time before anything runs",
    "export": "turn a run, a checkpoint or a delta into a plain Hugging Face model",
    "evaluate": "held-out loss and bits per byte of a model, against its base",
    "experiment": "compare ways to train at equal tokens, or over a sequence of tasks",
    "report": "write a run's report as one HTML page",
    "checkpoint": "list, verify and prune a run's checkpoints",
    "doctor": "what of this machine, or of a job's hosts, stands in the way of training",
    "stop": "ask a run to save and stop",
    "slurm": "write a batch script for Slurm",
    "requeue": "for batch scripts: whether a job that ended with 75 may queue again",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's); returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    outer = _outer_parser()
    chosen = outer.parse_args(arguments[:1])
    command = _load(chosen.command)
    parser = argparse.ArgumentParser(prog=f"llamapro {chosen.command}", description=command.__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.add_arguments(parser)
    parsed = parser.parse_args(arguments[1:])
    return console.guarded(lambda: int(command.run(parsed)), debug=parsed.debug)


def _outer_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="llamapro",
        usage="llamapro COMMAND …",
        description=f"{llamapro.__doc__}\n\ncommands:\n{lines}\n\n`llamapro COMMAND --help` explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llamapro {llamapro.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"llamapro.cli.{name}")


if __name__ == "__main__":
    sys.exit(main())
