"""Whether frozen weights in FP8 teach the new blocks what bf16 does: the same run twice, judged in bf16.

    python -m benchmarks.fp8_gate --config RUN.yaml [--ranks N] [--section.field value …]

Trains the run of a configuration through `launch/pretrain.py` in bf16 and with `engine.precision: fp8-frozen`, exports
both, and measures both exports, and the model before training, in bf16 on the configuration's held-out text. Ends with
1 when the loss on any text isn't shown to be within the bound. Started again it continues what was interrupted. On the
CPU FP8 is emulated: the same scales and roundings, with sums in float32.
"""

import argparse
import datetime
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson
import torch

from benchmarks.measure import machine
from llamapro import console
from llamapro.config.load import load_config
from llamapro.config.root import RunConfig
from llamapro.data.dataset import Dataset
from llamapro.errors import CheckFailed
from llamapro.evaluation.measure import Settings, TextSet
from llamapro.evaluation.precision_gate import DEFAULT_BOUND, Contestants, Verdict, judge
from llamapro.export.export import export
from llamapro.files.atomic import write_atomic
from llamapro.training.metrics import read_metrics

PRETRAIN = Path(__file__).parents[1] / "launch" / "pretrain.py"
RESULTS = Path(__file__).parent / "results"
BF16, FP8 = "bf16", "fp8-frozen"
PACKAGES = ("llamapro", "torch", "deepspeed", "transformers")
DEFAULT_SEQUENCES = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    own, overrides = _parser().parse_known_args(argv)
    return console.guarded(lambda: gate(own, overrides), debug=own.debug)


def gate(own: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Train twice, export, measure, judge.

    Raises:
        CheckFailed: a run failed, or a text's loss isn't shown to be within the bound.
    """
    config = load_config(own.config, overrides)
    work = own.work.absolute()
    exports = {precision: _trained(own, overrides, work, precision) for precision in (BF16, FP8)}
    contestants = Contestants(untrained=config.model.path, bf16=exports[BF16], judged=exports[FP8])
    settings = Settings(
        sequence_length=config.data.sequence_length,
        sequences=own.sequences,
        precision=BF16,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    verdicts = judge(contestants, text_sets(config), settings, work / "evaluation", own.bound)
    for verdict in verdicts:
        console.result(str(verdict))
    _write_results(own.results, config, work, verdicts, settings)
    if failed := [verdict.text for verdict in verdicts if not verdict.passed]:
        raise CheckFailed(
            f"the loss of the run in FP8 is not shown to be within {own.bound:.2%} of the bf16 run's on "
            f"{', '.join(failed)}; an interval wider than the bound needs more rows (--sequences)"
        )
    return 0


def text_sets(config: RunConfig) -> list[TextSet]:
    """The held-out texts that a run's configuration validates on."""
    sets = config.validation.sets
    paths = {name: source.path for name, source in config.data.sources.items()} if isinstance(sets, str) else sets
    return [TextSet(name, str(path), Dataset.open(Path(path)), "heldout") for name, path in paths.items()]


def train_command(own: argparse.Namespace, overrides: Sequence[str], run: Path, precision: str) -> list[str]:
    """The run's own command, with its folder and precision laid over; stages 1 and 2 hold what is in FP8."""
    launcher = [sys.executable]
    if own.ranks > 1:
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(own.ranks)]
    changes = {"run.folder": run, "engine.precision": precision, "engine.zero_stage": own.zero_stage}
    laid_over = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    return [*launcher, str(PRETRAIN), "--config", str(own.config), *overrides, *laid_over]


def _trained(own: argparse.Namespace, overrides: Sequence[str], work: Path, precision: str) -> Path:
    """The exported model of the run in one precision."""
    run, out = work / precision, work / f"{precision}-export"
    command = train_command(own, overrides, run, precision)
    if code := subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        raise CheckFailed(f"the run in {precision} ended with exit code {code}; its message stands above")
    export(run, out, overwrite=True)
    return out


def _write_results(
    folder: Path, config: RunConfig, work: Path, verdicts: Sequence[Verdict], settings: Settings
) -> None:
    """fp8-gate.json: what was trained, where, and what came out."""
    steps = {
        run: [line for line in read_metrics(work / run / "metrics.jsonl") if "loss" in line] for run in (BF16, FP8)
    }
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "model": str(config.model.path),
        "steps": len(steps[BF16]),
        "sequence_length": settings.sequence_length,
        "global_sequences": config.batch.global_sequences,
        "learning_rate": config.schedule.learning_rate,
        "device": torch.cuda.get_device_name() if settings.device.type == "cuda" else "cpu (FP8 emulated)",
        **machine(work),
        "versions": {name: version(name) for name in PACKAGES},
    }
    losses = {run: [line["loss"] for line in lines] for run, lines in steps.items()}
    judged = [asdict(verdict) | {"passed": verdict.passed, "kept_gain": verdict.kept_gain} for verdict in verdicts]
    content = orjson.dumps({"facts": facts, "verdicts": judged, "losses": losses}, option=orjson.OPT_INDENT_2)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "fp8-gate.json", content + b"\n")
    console.info(f"wrote {folder / 'fp8-gate.json'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_gate", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="the run's YAML file")
    parser.add_argument("--work", type=Path, default=Path("work/fp8-gate"), help="where runs and exports go")
    parser.add_argument("--ranks", type=int, default=1, help="processes, started by deepspeed when more than one")
    parser.add_argument("--zero-stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--sequences", type=int, default=DEFAULT_SEQUENCES, help="rows per text at most")
    parser.add_argument("--bound", type=float, default=DEFAULT_BOUND, help="of the loss, as a fraction")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of fp8-gate.json")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
