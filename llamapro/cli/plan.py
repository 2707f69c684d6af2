"""Memory by item, FLOPs by kind, speed and hours of a run or of an expansion, before anything runs.

The numbers count only what learns: frozen weights have no gradients and no optimizer state, and nothing flows below the
lowest new block. What speed assumes is said below the tables.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llamapro import console
from llamapro.config.batch import BatchConfig
from llamapro.config.load import load_config
from llamapro.config.model import ModelConfig
from llamapro.errors import UserError
from llamapro.expansion.families import family_of
from llamapro.expansion.layout import plan_layout
from llamapro.expansion.record import read_record
from llamapro.expansion.source import read_config
from llamapro.planning import time
from llamapro.planning.advice import ways_out
from llamapro.planning.gpus import Gpu, gpu_named
from llamapro.planning.memory import GIB
from llamapro.planning.plan import RESERVED_FRACTION, ZERO_STAGES, Choice, Job, choose, usable_bytes
from llamapro.planning.run_job import beyond_plan, compiles, job_of_run
from llamapro.planning.shape import DecoderShape, Learning
from llamapro.planning.tables import FLOPS_COLUMNS, MEMORY_COLUMNS, flops_rows, gib, memory_rows, recomputation
from llamapro.training.model_facts import ModelFacts, learning_of, resolve_trainable

DEFAULT_SEQUENCE_LENGTH = 4096
BILLION = 1e9
TERA = 1e12
QUANTITIES = (
    "parameters",
    "parameters that learn",
    "GFLOP per token",
    "ZeRO stage",
    "micro-batch, sequences",
    "recomputed",
    "memory per GPU, GiB",
    "tokens/s per GPU",
    "GPU-hours",
)
TIME_COLUMNS = ("µs per token", *(f"ZeRO-{stage}" for stage in ZERO_STAGES))


@dataclass(frozen=True)
class Hardware:
    """The GPUs that a plan is for.

    Attributes:
        gpu: their kind, its peak rate and memory as stated; None: not stated.
        memory_bytes: of one; None: not stated.
        efficiency: share of the peak that linears reach.
    """

    count: int
    gpu: Gpu | None
    memory_bytes: float | None
    efficiency: float

    @property
    def budget(self) -> float | None:
        """Bytes of one that may be used."""
        return None if self.memory_bytes is None else usable_bytes(self.memory_bytes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="RUN.yaml", help="plan this run")
    what.add_argument("--model", type=Path, metavar="BASE", help="plan expansions of this model folder")
    parser.add_argument("--new-blocks", type=_counts, metavar="N,N,…", help="with --model: blocks to add, e.g. 4,8,16")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU, e.g. h100: its peak rate, memory and bandwidths")
    parser.add_argument("--gpu-memory-gib", type=float, metavar="G", help="memory of one GPU, instead of the table's")
    parser.add_argument(
        "--gpu-bf16-tflops", type=float, metavar="T", help="peak bf16 rate of one GPU, instead of the table's"
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        default=time.MATRIX_EFFICIENCY,
        metavar="X",
        help=f"share of that peak that linears reach (default: {time.MATRIX_EFFICIENCY})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; returns 0."""
    hardware = _hardware(arguments)
    if arguments.config is not None:
        if arguments.new_blocks:
            raise UserError("--new-blocks goes with --model; a run's blocks are those of its model.path")
        _plan_run(arguments.config, hardware)
    else:
        if not arguments.new_blocks:
            raise UserError("--model needs --new-blocks, e.g. --new-blocks 4,8,16")
        _plan_expansions(arguments.model, arguments.new_blocks, hardware)
    _say_assumptions(hardware)
    return 0


def _plan_run(path: Path, hardware: Hardware) -> None:
    config = load_config(path)
    shape, learning = _model_of_run(config.model)
    job = job_of_run(config, shape, learning, hardware.count)
    stage, micro = config.engine.zero_stage, config.batch.micro_sequences
    given_micro = None if micro == "auto" else micro
    choice = choose(
        job,
        budget_bytes=hardware.budget,
        zero_stage=None if stage == "auto" else stage,
        micro_sequences=given_micro,
    )
    steps = config.schedule.steps
    tokens = BILLION if steps == "auto" else float(steps * config.batch.global_sequences * job.sequence_length)
    blocks = f"{learning.trainable_blocks(shape)} of {shape.blocks}"
    title = f"{path}: {tokens / BILLION:.3g} billion tokens on {_gpus(hardware.count)}"
    _print(title, "trainable blocks", {blocks: _column(job, choice, hardware, tokens)})
    title = f"memory per GPU, GiB, with a micro-batch of {choice.micro_sequences}"
    rows = memory_rows(job, choice.micro_sequences, choice.recomputed, hardware.budget)
    console.table(title, MEMORY_COLUMNS, rows)
    console.table("FLOPs per token", FLOPS_COLUMNS, flops_rows(job.flops(choice.recomputed)))
    if hardware.gpu is not None:
        console.table("expected time, micro-batch by stage", TIME_COLUMNS, _time_rows(job, given_micro, hardware))
    if beyond := beyond_plan(config, job, choice.micro_sequences):
        console.info(beyond)
    _say_ways_out(job, choice, hardware)


def _plan_expansions(folder: Path, counts: Sequence[int], hardware: Hardware) -> None:
    config = read_config(folder)
    base = DecoderShape.from_config(config)
    length = min(DEFAULT_SEQUENCE_LENGTH, int(config.get("max_position_embeddings") or DEFAULT_SEQUENCE_LENGTH))
    share = math.ceil(BatchConfig().global_sequences / hardware.count)
    columns, plans = {}, []
    for count in counts:
        layout = plan_layout(base.blocks, count, 1, "interleaved")
        shape, learning = base.with_blocks_of(layout.sources), Learning(frozenset(layout.new_blocks))
        compiled = compiles("auto", shape, "cuda")
        job = Job(shape, learning, "bf16", length, hardware.count, share, compiled=compiled)
        choice = choose(job, budget_bytes=hardware.budget)
        columns[str(count)] = _column(job, choice, hardware, BILLION)
        plans.append((job, choice))
    title = f"{folder}: a billion tokens in sequences of {length} on {_gpus(hardware.count)}"
    _print(title, "new blocks", columns)
    for count, (job, choice) in zip(counts, plans, strict=True):
        title = f"{count} new blocks: memory per GPU, GiB, with a micro-batch of {choice.micro_sequences}"
        rows = memory_rows(job, choice.micro_sequences, choice.recomputed, hardware.budget)
        console.table(title, MEMORY_COLUMNS, rows)
        _say_ways_out(job, choice, hardware)


def _model_of_run(model: ModelConfig) -> tuple[DecoderShape, Learning]:
    """Sizes and what learns; a model without a record is planned as instruction tuning does, with all that learns."""
    config = read_config(model.path)
    record = read_record(model.path)
    shape = DecoderShape.from_config(config)
    facts = ModelFacts(model.path, config, family_of(config), shape, record)
    chosen = resolve_trainable(model, "pretrain" if record else "sft", facts)
    return shape, learning_of(chosen)


def _print(title: str, first: str, columns: Mapping[str, Sequence[str]]) -> None:
    rows = zip(QUANTITIES, *columns.values(), strict=True)
    console.table(title, (first, *columns), list(rows))


def _column(job: Job, choice: Choice, hardware: Hardware, tokens: float) -> tuple[str, ...]:
    """The quantities of one plan, in the order of `QUANTITIES`."""
    speed = hours = "n/a"
    if hardware.gpu is not None:
        rate = time.token_time(job, choice, hardware.gpu, hardware.efficiency).tokens_per_second
        speed, hours = f"{rate:,.0f}", f"{time.gpu_hours(tokens, rate):,.1f}"
    return (
        f"{job.shape.parameters:,}",
        f"{job.learning.parameters(job.shape):,}",
        f"{job.flops().model / 1e9:.2f}",
        str(choice.zero_stage),
        str(choice.micro_sequences),
        recomputation(job, choice.recomputed),
        gib(choice.memory.total) + ("" if choice.fits else " (too much)"),
        speed,
        hours,
    )


def _time_rows(job: Job, micro_sequences: int | None, hardware: Hardware) -> list[tuple[str, ...]]:
    """Time by kind of work at each stage, with the stage's own micro-batch unless one is given."""
    assert hardware.gpu is not None
    choices = [
        choose(job, budget_bytes=hardware.budget, zero_stage=stage, micro_sequences=micro_sequences)
        for stage in ZERO_STAGES
    ]
    times = [time.token_time(job, choice, hardware.gpu, hardware.efficiency) for choice in choices]
    kinds = ("linears", "attention", "glue", "update", "communication", "total")
    micro = ("micro-batch", *(f"{choice.micro_sequences}" if choice.fits else "too much" for choice in choices))
    rows = [(kind, *(f"{1e6 * getattr(each, kind):.2f}" for each in times)) for kind in kinds]
    return [micro, *rows, ("tokens/s per GPU", *(f"{each.tokens_per_second:,.0f}" for each in times))]


def _hardware(arguments: argparse.Namespace) -> Hardware:
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus}: give at least 1")
    if not 0 < arguments.efficiency <= 1:
        raise UserError(f"--efficiency {arguments.efficiency:g}: give a share of the peak between 0 and 1")
    for name in ("gpu_memory_gib", "gpu_bf16_tflops"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give more than 0")
    gpu = gpu_named(arguments.gpu) if arguments.gpu else None
    if arguments.gpu_bf16_tflops:
        if gpu is None:
            raise UserError("--gpu-bf16-tflops changes a GPU of the table: name it or the nearest, e.g. --gpu h100")
        gpu = replace(gpu, bf16_flops=arguments.gpu_bf16_tflops * TERA)
    gib_each = arguments.gpu_memory_gib or (gpu.memory_gib if gpu else None)
    return Hardware(arguments.gpus, gpu, None if gib_each is None else gib_each * GIB, arguments.efficiency)


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count != 1 else ''}"


def _say_ways_out(job: Job, choice: Choice, hardware: Hardware) -> None:
    if choice.fits or hardware.budget is None:
        return
    ways = ways_out(job, hardware.budget)
    advice = f"what would: {'; or '.join(ways)}" if ways else "no number of GPUs, and no shorter sequence, would do"
    console.warning(f"it doesn't fit in {gib(hardware.budget)} GiB at any stage; {advice}")


def _say_assumptions(hardware: Hardware) -> None:
    if hardware.gpu is not None:
        _say_speed(hardware.gpu, hardware.efficiency)
        _say_links(hardware.gpu, hardware.count)
    else:
        console.info("no speed: name the GPU, e.g. --gpu h100")
    if hardware.budget is not None:
        console.info(f"{gib(hardware.budget)} GiB of a GPU are planned with; {RESERVED_FRACTION:.0%} is kept free")
    else:
        console.info("memory unknown, so stage 1 and a micro-batch of 1: name the GPU, or give --gpu-memory-gib")


def _say_speed(gpu: Gpu, efficiency: float) -> None:
    console.info(
        f"speed assumes, of the {gpu.name}'s {gpu.bf16_flops / TERA:g} TFLOP/s in bf16, {efficiency:.0%} in linears "
        f"and {time.ATTENTION_FORWARD_EFFICIENCY:.0%} forward and {time.ATTENTION_BACKWARD_EFFICIENCY:.0%} backward in "
        f"attention; the rest at {time.MEMORY_EFFICIENCY:.0%} of {gpu.memory_bandwidth / TERA:.3g} TB/s"
    )


def _say_links(gpu: Gpu, count: int) -> None:
    if count > 1:
        console.info(
            f"gradients and weights cross at {time.link_bandwidth(gpu, count) / 1e9:g} GB/s, overlapped with the "
            f"computation at stage 3 only; up to {time.GPUS_PER_MACHINE} GPUs are taken to be in one machine"
        )


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise argparse.ArgumentTypeError("each number of blocks must be at least 1")
    return counts
