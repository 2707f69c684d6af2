"""Training speed and memory at a real model's shape: tokens/s, MFU, HFU and peak memory, beside plan and ceilings.

    python -m benchmarks.train_gpu [--variants eager,compiled,fp8] [--work FOLDER]
    python -m benchmarks.train_gpu --device cpu --shape tiny --steps 3 --warmup 1      the same code without a GPU

LLaMA2-7B with 8 new blocks, random weights made on the device, sequences of 4,096 random tokens, the micro-batch that
the planner chooses. Every variant runs in a process of its own; results are written after each, so that a call may do
some of them and another one the rest.
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from llamapro.engine.environment import prepare_environment

RESULTS: Final = Path(__file__).parent / "results"
CEILINGS, REFERENCE = "ceilings", "trainer"
VARIANTS: Final[Mapping[str, dict[str, Any]]] = {
    "eager": {"zero_stage": 1, "compile": "off"},
    "compiled": {"zero_stage": 1, "compile": "on"},
    "fp8": {"zero_stage": 1, "compile": "on", "precision": "fp8-frozen"},
    "eager-zero2": {"zero_stage": 2, "compile": "off"},
    "eager-zero3": {"zero_stage": 3, "compile": "off"},
    "compiled-zero2": {"zero_stage": 2, "compile": "on"},
    "compiled-zero3": {"zero_stage": 3, "compile": "on"},
    "fp8-eager": {"zero_stage": 1, "compile": "off", "precision": "fp8-frozen"},
}
DEFAULT: Final = (CEILINGS, REFERENCE, "eager", "compiled", "compiled-zero2", "compiled-zero3", "fp8")
SMALLEST_MICRO: Final = 1
COLUMNS: Final = ("variant", "micro-batch", "tokens/s", "× trainer", "MFU", "HFU", "of the matrix ceiling",
                  "peak GiB", "planned GiB", "planned tokens/s")  # fmt: skip


def run_child(arguments: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process."""
    from benchmarks import gpu_ceilings, gpu_variants

    if arguments.child == CEILINGS:
        return gpu_ceilings.measure(arguments.device, arguments.shape)
    if arguments.child == REFERENCE:
        return gpu_variants.train_reference(arguments)
    return gpu_variants.train_ours(arguments, VARIANTS[arguments.child])


def in_process(arguments: argparse.Namespace, variant: str, micro_sequences: int | None) -> dict[str, Any]:
    """What a variant found in a process of its own; what it said last where it failed."""
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--child", variant, "--shape", arguments.shape]
    command += ["--device", arguments.device, "--work", str(arguments.work), "--steps", str(arguments.steps)]
    command += ["--warmup", str(arguments.warmup), "--accumulation", str(arguments.accumulation)]
    command += ["--micro-sequences", str(micro_sequences)] if micro_sequences else []
    environment = {**os.environ, "DS_ACCELERATOR": arguments.device, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-5:]}
    found: dict[str, Any] = orjson.loads(done.stdout.splitlines()[-1])
    return found


def out_of_memory(found: Mapping[str, Any]) -> bool:
    """Whether a variant failed because memory ran out."""
    return any("out of memory" in line.lower() for line in found.get("failed", ()))


def with_memory(arguments: argparse.Namespace, variant: str) -> dict[str, Any]:
    """A variant with the micro-batch asked for, or halved until it fits; what was tried is noted."""
    found = in_process(arguments, variant, arguments.micro_sequences)
    tried, micro = [], arguments.micro_sequences or arguments.first_micro
    while out_of_memory(found) and micro and micro > SMALLEST_MICRO:
        tried.append(micro)
        micro //= 2
        found = in_process(arguments, variant, micro)
    return {**found, "too_large": tried} if tried else found


def described(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all variants share."""
    from benchmarks.measure import machine
    from benchmarks.training_run import WORKLOADS
    from llamapro.ranks import Ranks
    from llamapro.training.environment import PACKAGES, describe_environment

    facts, workload = describe_environment(Ranks.solo(arguments.device)), WORKLOADS[arguments.shape]
    return {
        "date": datetime.date.today().isoformat(),
        "device": facts["device"],
        "machine": machine(arguments.work),
        "versions": {"llamapro": facts["llamapro"], "cuda": facts["cuda"], "python": facts["python"],
                     **{name: facts["packages"][name] for name in PACKAGES}},
        "shape": {"name": arguments.shape, **workload.sizes, "new_blocks": list(workload.learning),
                  "sequence_length": workload.sequence_length},
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "accumulation": arguments.accumulation,
    }  # fmt: skip


def report(facts: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    shape, variants = facts["shape"], facts["variants"]
    lines = [_row(name, found, variants) for name, found in variants.items() if name != CEILINGS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *lines))
    return (
        f"# Training at the shape {shape['name']}\n\n{facts['date']} · {facts['device']} · {versions}\n\n"
        f"`python -m benchmarks.train_gpu`\n\n{shape['num_hidden_layers']} blocks of width {shape['hidden_size']}, "
        f"{len(shape['new_blocks'])} new; sequences of {shape['sequence_length']} random tokens; "
        f"{facts['steps']} steps timed after {facts['warmup']}; the trainer is a loop like transformers' own, with "
        f"frozen parameters.\n\n{table}\n{_ceilings(variants.get(CEILINGS, {}))}"
    )


def _row(name: str, found: Mapping[str, Any], variants: Mapping[str, Any]) -> list[str]:
    if "failed" in found:
        return [name, "failed", *[""] * (len(COLUMNS) - 2)]
    reference = variants.get(REFERENCE, {}).get("tokens_per_second")
    matrix = variants.get(CEILINGS, {}).get("matrix_flops")
    needed = found["tokens_per_second"] * found["model_flops_per_token"]
    planned = found.get("planned_bytes")
    return [
        name,
        str(found["micro_sequences"]),
        f"{found['tokens_per_second']:,.0f}",
        f"{found['tokens_per_second'] / reference:.2f}" if reference else "",
        f"{found['mfu']:.1%}" if found.get("mfu") else "",
        f"{found['hfu']:.1%}" if found.get("hfu") else "",
        f"{needed / matrix:.1%}" if matrix else "",
        f"{found['peak_bytes'] / (1 << 30):.2f}",
        f"{planned / (1 << 30):.2f}" if planned else "",
        f"{found['planned_tokens_per_second']:,.0f}" if found.get("planned_tokens_per_second") else "",
    ]


def _ceilings(found: Mapping[str, Any]) -> str:
    rows = [*found.get("matrices", ()), *found.get("attention", ())]
    if not rows:
        return ""
    lines = [
        f"| {row['name']} | {row['tflops']:,.1f} |" if "tflops" in row else f"| {row['name']} | {row['failed']} |"
        for row in rows
    ]
    return "\n| ceiling | TFLOP/s |\n| --- | --- |\n" + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the results after each variant."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("DS_ACCELERATOR", arguments.device)
    prepare_environment()  # before torch is imported
    if arguments.child is not None:
        sys.stdout.write("\n" + orjson.dumps(run_child(arguments)).decode() + "\n")
        return
    _measure_all(arguments)


def _measure_all(arguments: argparse.Namespace) -> None:
    from benchmarks.gpu_variants import planned_micro_batch, prepare_model
    from llamapro import console
    from llamapro.files.atomic import write_atomic

    made = arguments.work is None
    arguments.work = arguments.work or Path(tempfile.mkdtemp())
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"train-{arguments.device}-{arguments.shape}.json"
    prepare_model(arguments.work, arguments.shape, arguments.device)
    arguments.first_micro = planned_micro_batch(arguments, VARIANTS["eager"])
    earlier = orjson.loads(path.read_bytes())["variants"] if path.exists() and arguments.add else {}
    facts = {**described(arguments), "variants": earlier}
    for variant in arguments.variants:
        facts["variants"][variant] = with_memory(arguments, variant)
        write_atomic(path, orjson.dumps(facts, option=orjson.OPT_INDENT_2) + b"\n")
        console.info(f"{variant}: {_said(facts['variants'][variant])}")
    write_atomic(path.with_suffix(".md"), report(facts))
    console.result(report(facts))
    if made:
        shutil.rmtree(arguments.work)


def _said(found: Mapping[str, Any]) -> str:
    if "failed" in found:
        return "failed: " + " / ".join(found["failed"])
    return f"{found['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in found else "measured"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", default="llama2-7b", help="a model of benchmarks/training_run.py")
    parser.add_argument(
        "--variants",
        type=_names,
        default=DEFAULT,
        metavar="NAME,NAME",
        help=f"of {', '.join((CEILINGS, REFERENCE, *VARIANTS))}; default: {', '.join(DEFAULT)}",
    )
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--micro-sequences", type=int, help="sequences per micro-batch; default: the planner's choice")
    parser.add_argument("--work", type=Path, help="where the model is or will be (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write the results")
    parser.add_argument("--add", action="store_true", help="keep the variants that the results have already")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in (CEILINGS, REFERENCE, *VARIANTS)]:
        raise argparse.ArgumentTypeError(f"no variant {', '.join(unknown)}")
    return names


if __name__ == "__main__":
    main()
