"""The variants of `train_gpu`, each in a process of its own: ours through the trainer's engine, and the reference."""

import argparse
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.training_run import WORKLOADS, run_config, run_facts, write_model
from llamapro.engine.start import start_ranks, stop_ranks
from llamapro.planning.gpus import find_gpu
from llamapro.planning.plan import Choice
from llamapro.planning.time import token_time
from llamapro.training.device import present_device
from llamapro.training.mock_step import random_batch
from llamapro.training.opening import start_engine
from llamapro.training.preflight import Facts
from llamapro.training.step import to_device

LEARNING_RATE = 1e-5


def prepare_model(work: Path, shape: str, device: str) -> None:
    """Write the model's random weights unless they are there."""
    write_model(work / shape, WORKLOADS[shape], torch.bfloat16, torch.device(device))
    if device == "cuda":
        torch.cuda.empty_cache()  # the variants' processes need what this one took


def planned_micro_batch(arguments: argparse.Namespace, engine: Mapping[str, Any]) -> int:
    """The planner's micro-batch."""
    return _facts(arguments, engine).micro_sequences


def train_ours(arguments: argparse.Namespace, engine: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's engine: warm up, then timed steps."""
    facts = _facts(arguments, engine)
    config = run_config(arguments.work / arguments.shape, WORKLOADS[arguments.shape], **engine)
    with ExitStack() as stack:
        ranks = start_ranks(config.engine)
        stack.callback(stop_ranks)
        started = start_engine(config, facts, ranks, arguments.accumulation).engine
        inputs, _ = to_device(random_batch(facts), ranks.device)
        tokens = arguments.accumulation * inputs[0].numel()

        def step() -> None:
            for _ in range(arguments.accumulation):
                loss = started.forward_loss(*inputs)
                started.backward(loss.loss_sum, tokens)
            started.step(LEARNING_RATE)

        found = _timed(step, arguments, facts, tokens)
        found["attention"] = started.model.attention.name
        started.close()
    return {**found, **_planned(facts, engine), "engine": dict(engine), "recomputed": sorted(facts.recomputed)}


def train_reference(arguments: argparse.Namespace) -> dict[str, Any]:
    """What transformers' Trainer does in a step: its own model in bf16, frozen parameters, fused AdamW, clipping."""
    facts = _facts(arguments, {"compile": "off"})
    device = torch.device(arguments.device)
    folder = arguments.work / arguments.shape
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to(device)
    model.requires_grad_(False)
    for block in facts.trainable.blocks:
        model.model.layers[block].requires_grad_(True)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LEARNING_RATE, fused=device.type == "cuda")
    (ids, *_), _ = to_device(random_batch(facts), device)

    def step() -> None:
        for _ in range(arguments.accumulation):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / arguments.accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    return _timed(step, arguments, facts, arguments.accumulation * ids.numel())


def _facts(arguments: argparse.Namespace, engine: Mapping[str, Any]) -> Facts:
    workload = WORKLOADS[arguments.shape]
    config = run_config(arguments.work / arguments.shape, workload, **engine)
    facts = run_facts(config, workload, present_device(1), 1, arguments.micro_sequences)
    return replace(facts, accumulation_steps=arguments.accumulation)


def _timed(step: Callable[[], None], arguments: argparse.Namespace, facts: Facts, tokens: int) -> dict[str, Any]:
    """Rates over the timed steps; peak memory with everything before them."""
    device = torch.device(arguments.device)
    started = time.perf_counter()
    for _ in range(arguments.warmup):
        step()
    _wait_for(device)
    warmup_seconds = time.perf_counter() - started
    times = []
    for _ in range(arguments.steps):
        started = time.perf_counter()
        step()
        _wait_for(device)
        times.append(time.perf_counter() - started)
    rate = tokens / statistics.median(times)
    peak_flops = facts.device.peak_flops
    return {
        "micro_sequences": facts.micro_sequences,
        "tokens_per_second": rate,
        "seconds": {"warmup": warmup_seconds, "median": statistics.median(times), "all": times},
        "model_flops_per_token": facts.flops.model,
        "hardware_flops_per_token": facts.flops.hardware,
        "mfu": rate * facts.flops.model / peak_flops if peak_flops else None,
        "hfu": rate * facts.flops.hardware / peak_flops if peak_flops else None,
        "peak_bytes": _peak_bytes(device),
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "clocks_and_power": _clocks_and_power() if device.type == "cuda" else None,
    }


def _planned(facts: Facts, engine: Mapping[str, Any]) -> dict[str, Any]:
    """The planner's prediction of the same."""
    gpu = find_gpu(facts.device.name)
    shape = (facts.zero_stage, facts.micro_sequences, facts.accumulation_steps, facts.recomputed)
    choice = Choice(*shape, facts.memory, fits=True)
    rate = token_time(facts.job, choice, gpu).tokens_per_second if gpu else None
    return {"planned_bytes": facts.memory.total, "planned_tokens_per_second": rate}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(device: torch.device) -> int:
    """Allocated on a GPU; on the CPU the process's own largest resident memory, libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _clocks_and_power() -> str:
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
