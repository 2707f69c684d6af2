"""The planner's memory against what a step of the trainer's engine really takes at most.

    python -m benchmarks.memory [--shape small] [--device cpu|cuda]

Every case runs in processes of its own. On a GPU the allocator says what was allocated at most; on the CPU every tensor
is counted while it is alive, which is the same thing.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import orjson

from llamapro.engine.environment import prepare_environment
from llamapro.engine.ports import free_port

RESULTS: Final = Path(__file__).parent / "results"
MICRO_BATCHES: Final = 2
STEPS: Final = 2
CPU_CASES: Final = (
    {"ranks": 1, "stage": 1},
    {"ranks": 1, "stage": 2},
    {"ranks": 1, "stage": 3},
    {"ranks": 1, "stage": 1, "micro": 1},
    {"ranks": 1, "stage": 1, "budget": 0.5},
    {"ranks": 2, "stage": 1},
    {"ranks": 2, "stage": 2},
    {"ranks": 2, "stage": 3},
    {"ranks": 2, "stage": 3, "budget": 0.5},
    {"ranks": 1, "stage": 1, "precision": "float32"},
    {"ranks": 2, "stage": 2, "precision": "float32"},
)
GPU_CASES: Final = (
    {"ranks": 1, "stage": 1, "compile": "off"},
    {"ranks": 1, "stage": 2, "compile": "off"},
    {"ranks": 1, "stage": 3, "compile": "off"},
    {"ranks": 1, "stage": 1, "compile": "on"},
    {"ranks": 1, "stage": 1, "compile": "off", "budget": 0.5},
)
COLUMNS: Final = ("ranks", "stage", "precision", "compile", "micro", "recomputed")


def measure_case(folder: Path, shape: str, device_name: str, case: dict[str, Any]) -> dict[str, Any]:
    """One rank's part of a case, in its own process: planned and measured bytes.

    Args:
        case: what differs from one sequence pair in bf16, eager: ranks, stage, micro, precision, compile, budget (the
            share of its activations that a micro-batch may keep).
    """
    import torch

    from benchmarks.live_bytes import LiveBytes
    from benchmarks.training_run import WORKLOADS, run_config, run_facts
    from llamapro.engine.start import start_ranks, stop_ranks
    from llamapro.training.device import present_device
    from llamapro.training.opening import start_engine

    workload, micro = WORKLOADS[shape], case.get("micro", 2)
    overlay = folder / "buffers.json"
    engine = {
        "zero_stage": case["stage"],
        "precision": case.get("precision", "bf16"),
        "compile": case.get("compile", "off"),
        "deepspeed": str(overlay),
        "activation_memory_gib": "unlimited",
    }
    config = run_config(folder / engine["precision"], workload, case["ranks"], **engine)
    facts = run_facts(config, workload, present_device(case["ranks"]), case["ranks"], micro)
    if "budget" in case:
        engine["activation_memory_gib"] = case["budget"] * facts.memory.activations / (1 << 30)
        config = run_config(config.model.path, workload, case["ranks"], **engine)
        facts = run_facts(config, workload, present_device(case["ranks"]), case["ranks"], micro)
    with ExitStack() as stack:
        counter = None if device_name == "cuda" else stack.enter_context(LiveBytes())
        ranks = start_ranks(config.engine)
        stack.callback(stop_ranks)
        started = start_engine(config, facts, ranks, MICRO_BATCHES).engine
        _take_steps(started, facts, ranks.device)
        peak = counter.peak if counter else torch.cuda.max_memory_allocated()
        started.close()
    items = ("weights", "gathered", "gradients", "optimizer", "communication", "activations", "at_work", "update")
    return {
        **{name: case.get(name, default) for name, default in (("ranks", 1), ("stage", 1))},
        "precision": engine["precision"],
        "compile": engine["compile"],
        "micro": micro,
        "recomputed": len(facts.recomputed),
        "planned_bytes": facts.memory.total,
        "measured_bytes": peak,
        "ratio": facts.memory.total / peak,
        "items": {item: getattr(facts.memory, item) for item in items},
    }


def _take_steps(engine: Any, facts: Any, device: Any) -> None:
    from llamapro.training.mock_step import random_batch
    from llamapro.training.step import to_device

    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            inputs, _ = to_device(random_batch(facts), device)
            loss = engine.forward_loss(*inputs)
            engine.backward(loss.loss_sum, inputs[0].numel())
            del loss, inputs
        engine.step(1e-4)


def run_case(folder: Path, shape: str, device: str, case: dict[str, Any]) -> dict[str, Any]:
    """A case in processes of its own; what rank 0 found.

    Raises:
        CalledProcessError: a rank failed.
    """
    arguments = ["--child", orjson.dumps(case).decode(), "--shape", shape, "--device", device, "--work", str(folder)]
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    count = case["ranks"]
    shared = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(free_port())}
    if device == "cpu":
        shared["DS_ACCELERATOR"] = "cpu"
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(count)
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process in processes:
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    found: dict[str, Any] = orjson.loads(outputs[0].splitlines()[-1])
    return found


def run(folder: Path, shape: str, device: str, cases: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """All cases, as JSON values."""
    import torch

    from benchmarks.measure import machine
    from benchmarks.training_run import WORKLOADS, write_model
    from llamapro import console
    from llamapro.ranks import Ranks
    from llamapro.training.environment import PACKAGES, describe_environment

    for precision, dtype in {"bf16": torch.bfloat16, "float32": torch.float32}.items():
        if any(case.get("precision", "bf16") == precision for case in cases):
            write_model(folder / precision, WORKLOADS[shape], dtype, torch.device(device))
    (folder / "buffers.json").write_bytes(orjson.dumps(_buffers(shape) if device == "cpu" else {}))
    found = []
    for case in cases:
        found.append(run_case(folder, shape, device, case))
        console.info(f"{case}: planned / measured {found[-1]['ratio']:.3f}")
    described = describe_environment(Ranks.solo(device))
    return {
        "machine": machine(folder),
        "device": described["device"],
        "versions": {name: described["packages"][name] for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
        "shape": {"name": shape, **WORKLOADS[shape].sizes, "sequence_length": WORKLOADS[shape].sequence_length},
        "cases": found,
    }


def _buffers(shape: str) -> dict[str, Any]:
    """For the CPU, DeepSpeed's buffers in proportion to a small model.

    Its own are made for one a hundred times as large, and would hide what is compared. As with 8 billion parameters,
    stage 3 holds an eighth of the model whole and fetches a thirtieth ahead.
    """
    from benchmarks.training_run import WORKLOADS
    from llamapro.planning.shape import DecoderShape, Learning

    workload = WORKLOADS[shape]
    sizes = DecoderShape.from_config(workload.config.to_dict())
    trainable = Learning(frozenset(workload.learning)).parameters(sizes)
    held = sizes.parameters // 8
    return {
        "zero_optimization": {
            "reduce_bucket_size": trainable // 8,
            "stage3_max_live_parameters": held,
            "stage3_max_reuse_distance": held,
            "stage3_prefetch_bucket_size": sizes.parameters // 30,
            "stage3_param_persistence_threshold": workload.sizes["hidden_size"],
        }
    }


def report(facts: dict[str, Any]) -> str:
    """The results as a Markdown page."""
    shape, versions = facts["shape"], ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = [*COLUMNS, "planned MiB", "measured MiB", "planned / measured"]
    rows = [
        [*(str(case[name]) for name in COLUMNS), *(f"{case[f'{which}_bytes'] / (1 << 20):,.1f}" for which in KINDS),
         f"{case['ratio']:.3f}"]
        for case in facts["cases"]
    ]  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    ratios = [case["ratio"] for case in facts["cases"]]
    return (
        f"# Planned and measured memory\n\n{facts['date']} · {facts['device']} · {versions}\n\n"
        f"`python -m benchmarks.memory --shape {shape['name']}`\n\n"
        f"{shape['num_hidden_layers']} blocks of width {shape['hidden_size']}, every fifth learns, sequences of "
        f"{shape['sequence_length']}; the peak of {STEPS} steps of {MICRO_BATCHES} micro-batches.\n\n{table}\n\n"
        f"Between {min(ratios):.3f} and {max(ratios):.3f}.\n"
    )


KINDS: Final = ("planned", "measured")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="small", help="a model of benchmarks/training_run.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--work", type=Path, help="where to put the models (default: a temporary folder)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write the results")
    parser.add_argument("--child", type=orjson.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare_environment()  # before torch is imported
    if arguments.child is not None:
        found = measure_case(arguments.work, arguments.shape, arguments.device, arguments.child)
        sys.stdout.write(orjson.dumps(found).decode() + "\n")
        return
    _measure_all(arguments)


def _measure_all(arguments: argparse.Namespace) -> None:
    import torch

    from llamapro import console
    from llamapro.files.atomic import write_atomic

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = CPU_CASES if device == "cpu" else GPU_CASES
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        facts = run(Path(folder), arguments.shape, device, cases)
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = f"memory-{device}-{arguments.shape}"
    write_atomic(arguments.results / f"{name}.json", orjson.dumps(facts, option=orjson.OPT_INDENT_2) + b"\n")
    write_atomic(arguments.results / f"{name}.md", report(facts))
    console.result(report(facts))


if __name__ == "__main__":
    main()
