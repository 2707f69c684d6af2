"""Training SmolLM2-135M + 6 blocks on the CPU: this system against three usual ways, on the same documents.

    make quickstart STEPS=1        # once: the model, expanded, and two corpora in work/quickstart
    python -m benchmarks.train_cpu

Every system runs in a process of its own, in turns, several rounds; each step has the same tokens. Ratios are taken
within a round, then their median. Padding counts as nothing. Memory is the largest resident size after the model was
loaded, less the size then.

- ours: packed rows under the DeepSpeed engine with float32 master weights, as `launch/pretrain.py` trains;
- trainer: transformers' Trainer on the same packed rows, everything but the new blocks frozen;
- padded: one document a row, padded to the longest of its batch, gradients of the embeddings' outputs forced on, as the
  method's first code trained: in a plain loop;
- loop: a plain torch loop on the packed rows: forward, loss over all logits, backward, AdamW.

The last three train bf16 weights without a float32 copy, which is less work than ours, and let documents of a row see
each other.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from benchmarks.measure import machine
from llamapro import console
from llamapro.errors import UserError
from llamapro.files.atomic import write_atomic

RESULTS = Path(__file__).parent / "results"
OURS, EAGER = "ours", "ours, not compiled"
SYSTEMS = (OURS, EAGER, "trainer", "padded", "loop")
PACKAGES = ("llamapro", "torch", "transformers", "accelerate", "deepspeed")
COLUMNS = ("", "useful tokens/s", "ours ×", "MiB above the loaded model", "ours ×")
MIB = 1 << 20


def run_once(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with one system in a new process; returns what it measured."""
    command = [sys.executable, "-m", "benchmarks.train_systems", name, str(arguments.work), str(folder)]
    options = {name: getattr(arguments, name) for name in ("rows", "length", "steps", "warmup")}
    done = subprocess.run([*command, json.dumps(options)], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios(rounds: Sequence[dict[str, dict[str, Any]]], name: str, key: str) -> float:
    """Ours over another system, the median of the rounds."""
    return statistics.median(found[OURS][key] / found[name][key] for found in rounds)


def summary(rounds: Sequence[dict[str, dict[str, Any]]]) -> list[tuple[str, ...]]:
    """The table: medians, and ratios within rounds."""
    rows = []
    for name in rounds[0]:
        speed = statistics.median(found[name]["tokens_per_second"] for found in rounds)
        memory = statistics.median(found[name]["bytes_above_model"] for found in rounds)
        faster, smaller = ratios(rounds, name, "tokens_per_second"), ratios(rounds, name, "bytes_above_model")
        rows.append((name, f"{speed:,.0f}", f"{faster:.2f}", f"{memory / MIB:,.0f}", f"{smaller:.2f}"))
    return rows


def report(facts: dict[str, Any], rows: Sequence[tuple[str, ...]]) -> bytes:
    """The results as Markdown."""
    table = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    cells = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join(["# Training on the CPU", "", *lines, "", *cells, ""]).encode()


def parse_arguments() -> argparse.Namespace:
    """What to measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work/quickstart"), help="what `make quickstart` made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="packed rows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps before, in which compiling takes place")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write the results")
    return parser.parse_args()


def main() -> int:
    """Run all systems in turns, report."""
    arguments = parse_arguments()
    if not (arguments.work / "expanded").is_dir():
        raise UserError(f"--work {arguments.work}: there is no expanded model; run `make quickstart STEPS=1` first")
    rounds = []
    for number in range(arguments.rounds):
        order = arguments.systems if number % 2 == 0 else arguments.systems[::-1]
        found = {}
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = run_once(name, arguments, Path(folder))
            console.info(f"round {number + 1}: {name}: {found[name]['tokens_per_second']:,.0f} tokens/s")
        rounds.append({name: found[name] for name in arguments.systems})
    first = rounds[0][arguments.systems[0]]
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tokens": f"{first['corpus']}; {first['tokens_per_step']:,.0f} useful tokens a step, {first['documents']}",
        "runs": f"{arguments.rounds} rounds of {arguments.steps} timed steps after {arguments.warmup}",
        **machine(arguments.work),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }
    rows = summary(rounds)
    console.table("training on the CPU", COLUMNS, rows)
    arguments.results.mkdir(parents=True, exist_ok=True)
    raw = {"facts": facts, "rounds": rounds}
    write_atomic(arguments.results / "train-cpu.json", orjson.dumps(raw, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(arguments.results / "train-cpu.md", report(facts, rows))
    return 0


if __name__ == "__main__":
    sys.exit(console.guarded(main, debug=False))
