"""What a save costs training: ours against writing the same bytes, and against DeepSpeed's own save of the same state.

    python -m benchmarks.checkpoint [--ranks 2] [--device cuda]

A LLaMA-shaped model with two new blocks trains on random tokens under the trainer's engine. In every round each
contestant saves the same state once, in an order that turns from round to round, with nothing waiting to be written:

- raw: each rank writes the bytes of its state, which lie in host memory already, to one file and syncs it;
- ours: the frozen weights are proved, the state is copied, training goes on while it is written, all ranks commit; what
  is counted is the time for which training stands still, and beside it what the whole save cost, slower steps included;
- ours, at once: the same without the background;
- DeepSpeed: `save_checkpoint` of the very engine; it syncs nothing: the time until its files are safe stands apart;
- DeepSpeed without frozen: the same with `exclude_frozen_parameters`.

Ratios are taken within a round, then their median.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

import orjson

from llamapro.engine.environment import prepare_environment
from llamapro.engine.ports import free_port

RESULTS: Final = Path(__file__).parent / "results"
RAW, OURS, AT_ONCE = "write + fsync of the same bytes", "ours", "ours, at once"
DEEPSPEED, WITHOUT_FROZEN = "DeepSpeed", "DeepSpeed without frozen"
CONTESTANTS: Final = (RAW, OURS, AT_ONCE, DEEPSPEED, WITHOUT_FROZEN)
PACKAGES: Final = ("llamapro", "torch", "deepspeed")
COLUMNS: Final = ("", "training stands still, s", "range", "× raw", "lost in all, s", "safe on disk after, s", "MB")
Outcome = dict[str, float]


def base_sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """Of the base's configuration."""
    return {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 11 // 4,
        "num_attention_heads": arguments.hidden // 64,
        "num_hidden_layers": arguments.blocks,
        "vocab_size": 32000,
        "max_position_embeddings": arguments.length,
    }


def write_models(arguments: argparse.Namespace, folder: Path) -> None:
    """A base of random weights and its expansion, in `folder`."""
    import torch

    from benchmarks.training_run import Workload, write_model
    from llamapro.expansion.expand import expand

    workload = Workload(base_sizes(arguments), (), arguments.length, 1)
    write_model(folder / "base", workload, torch.bfloat16, torch.device(arguments.device))
    expand(str(folder / "base"), folder / "expanded", new_blocks=arguments.new_blocks)


def run_ranks(arguments: argparse.Namespace, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Measure in a process per rank; what rank 0 found.

    Args:
        environment: as it was before this process chose its own threads.
    """
    port = free_port()
    words = ["--child", str(folder), *(word for word in sys.argv[1:])]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.checkpoint", *words],
            env={
                **environment,
                **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
                **{name: str(arguments.ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": arguments.device,
            },
            stdout=subprocess.PIPE,
        )
        for rank in range(arguments.ranks)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    found: dict[str, Any] = orjson.loads(said[0].splitlines()[-1])
    return found


def summary(rounds: Sequence[Mapping[str, Outcome]]) -> list[list[str]]:
    """The rows of the table: medians over rounds, and the median of the ratios to the raw writing of the same round."""
    rows = []
    for name in CONTESTANTS:
        runs = [found[name] for found in rounds]
        still = [run["stalled"] for run in runs]
        ratio = median(run["stalled"] / found[RAW]["stalled"] for run, found in zip(runs, rounds, strict=True))
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        rows.append(
            [
                name,
                f"{middle['stalled']:.3f}",
                f"{min(still):.3f} to {max(still):.3f}",
                f"{ratio:.2f}",
                f"{middle['lost']:.3f}",
                f"{middle['safe']:.3f}",
                f"{middle['bytes'] / 1e6:,.0f}",
            ]
        )
    return rows


def verdict(rounds: Sequence[Mapping[str, Outcome]]) -> dict[str, str]:
    """Ours beside DeepSpeed's own save."""

    def ratio(name: str, key: str, ours: str) -> float:
        return median(found[name][key] / found[OURS][ours] for found in rounds)

    still, safe = ratio(DEEPSPEED, "stalled", "stalled"), ratio(DEEPSPEED, "safe", "stalled")
    return {
        "DeepSpeed's save stops training": f"{still:.1f} times as long as ours; {safe:.1f} times, if its files are to "
        "be as safe as ours when training goes on",
        "DeepSpeed writes": f"{ratio(DEEPSPEED, 'bytes', 'bytes'):.2f} times the bytes",
    }


def report(facts: Mapping[str, object], rows: Sequence[Sequence[str]]) -> str:
    """The results as a Markdown page."""
    lines = ["# What a save costs training", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)), ""])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What to measure and where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size; a multiple of 64")
    parser.add_argument("--blocks", type=int, default=12, help="of the base")
    parser.add_argument("--new-blocks", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens of a step and rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write the results")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    """Make the model, measure, report."""
    arguments, environment = parse_arguments(), dict(os.environ)
    os.environ.setdefault("DS_ACCELERATOR", arguments.device)
    prepare_environment()  # before torch is imported
    if arguments.child is not None:
        from benchmarks.checkpoint_rounds import measure

        sys.stdout.write("\n" + orjson.dumps(measure(arguments, arguments.child)).decode() + "\n")
        return
    from benchmarks.measure import machine
    from llamapro import console
    from llamapro.files.atomic import write_atomic

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        write_models(arguments, folder)
        found = run_ranks(arguments, folder, environment)
        facts = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "state": f"{found['trainable'] / 1e6:,.1f} million parameters that learn of {found['all'] / 1e6:,.1f} "
            f"million; {arguments.ranks} rank{'s' * (arguments.ranks > 1)}, ZeRO stage {arguments.stage}, bf16 with "
            "float32 masters",
            "step": f"{found['step_seconds']:.2f} s without a save",
            "proof": f"{found['proof_seconds']:.3f} s of our standing still compare the frozen weights with the record",
            "rounds": arguments.rounds,
            "load": f"{load:.1f} processes on average when it began; above 1 others disturb the numbers",
            "device": found["device"],
            **machine(folder),
            "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
            **verdict(found["rounds"]),
        }
    rows = summary(found["rounds"])
    console.table("what a save costs training", COLUMNS, rows)
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = "checkpoint" if arguments.device == "cpu" else f"checkpoint-{arguments.device}"
    raw = {"facts": facts, "found": found, "settings": {k: str(v) for k, v in vars(arguments).items()}}
    write_atomic(arguments.results / f"{name}.json", orjson.dumps(raw, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(arguments.results / f"{name}.md", report(facts, rows))


if __name__ == "__main__":
    main()
