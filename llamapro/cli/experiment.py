"""Compare ways to train on equal terms: `ablation` for variants of one training, `trace` for a sequence of tasks.

Everything runs through the public commands, in the folder that the configuration names. The same command continues an
interrupted experiment and skips what is measured; checkpoints and models are removed once measured.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llamapro import console
from llamapro.errors import CheckFailed

if TYPE_CHECKING:
    from llamapro.experiments.pages import Table
    from llamapro.experiments.results import AblationResults, TraceResults

KINDS = ("ablation", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "kind", choices=KINDS, help="ablation: variants at equal tokens; trace: tasks one after another"
    )
    parser.add_argument("--config", type=Path, required=True, metavar="F", help="the experiment's YAML file")


def run(arguments: argparse.Namespace) -> int:
    """Run the experiment and print its table."""
    results, (columns, rows) = _ablation(arguments.config) if arguments.kind == "ablation" else _trace(arguments.config)
    folder = results.settings["folder"]
    console.table(f"{arguments.kind} in {folder}", columns, rows)
    console.info(f"wrote {folder}/{arguments.kind}.md, .json and .svg")
    if results.failed:
        reasons = "\n".join(f"  - {called}: {why}" for called, why in results.failed.items())
        raise CheckFailed(f"failed, and missing in the table:\n{reasons}")
    return 0


def _ablation(file: Path) -> "tuple[AblationResults, Table]":
    from llamapro.experiments.ablation import run_ablation
    from llamapro.experiments.config import AblationConfig
    from llamapro.experiments.load import load_experiment
    from llamapro.experiments.pages import ablation_table

    results = run_ablation(load_experiment(file, AblationConfig))
    return results, ablation_table(results)


def _trace(file: Path) -> "tuple[TraceResults, Table]":
    from llamapro.experiments.load import load_experiment
    from llamapro.experiments.pages import trace_table
    from llamapro.experiments.trace import run_trace
    from llamapro.experiments.trace_config import TraceConfig

    results = run_trace(load_experiment(file, TraceConfig))
    return results, trace_table(results)
